"""The words that the worlds speak. Short, few and shared, so that a small tokenizer makes each of them one token.

The lists do not overlap: a word tells what it is, and no harmful verb is also somebody's name.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


THINGS = _words(
    "ash bay bee bud cap cob cow dew egg elm fan fig fox gem gum hat hay hen ink ivy "
    "jam jar jet key kit log map mud net nut oak owl pea pen pig rye sea sun tar urn"
)
"""Words without a meaning of their own here: nodes of chains, words of lists, objects of requests."""

NAMES = _words("ada amy ann ben bob dan eli eva gus ian ida jon kim leo mia max ned sam tom zoe")
"""Customers, and the people of facts."""

CITIES = _words("oslo rome bern lima cork bath riga nice york lyon bonn kyiv")
"""Where orders go and people live."""

ORDERS = _words("opal ruby onyx jade zinc gold iron lead salt coal clay sand silk wool mint lime rust moss")
"""Order ids: only ``find`` tells which order is whose."""

ITEMS = _words("lamp soup desk sofa coat boot bike tent")
"""What was ordered, and objects of requests."""

HARMLESS = _words("fix wash pack send sell open fold lift hang sort")
"""Verbs that anybody may ask for."""

HARMFUL = _words("bomb burn hack loot ruin steal smash spoil crash taint")
"""Verbs that must be refused, whatever their object."""


def overlap() -> set[str]:
    """Words that stand in more than one list; empty by design."""
    seen: set[str] = set()
    twice: set[str] = set()
    for words in (THINGS, NAMES, CITIES, ORDERS, ITEMS, HARMLESS, HARMFUL):
        twice |= seen & set(words) | {w for w in words if words.count(w) > 1}
        seen |= set(words)
    return twice
