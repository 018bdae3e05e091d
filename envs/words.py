"""The words that the worlds speak. Short, few and shared, so that a small tokenizer makes each of them one token.

The lists do not overlap: a word tells what it is, and no harmful verb is also somebody's name.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


THINGS = _words("ash bee cap cow egg fan fig fox gem hat jar key log map nut owl pen sea sun tar")
"""Words without a meaning of their own here: nodes of chains, words of lists, objects of requests."""

NAMES = _words("ada ben dan eli eva gus ian jon kim leo mia zoe")
"""Customers, and the people of facts."""

CITIES = _words("oslo rome bern lima cork riga york lyon")
"""Where orders go and people live."""

ORDERS = _words("opal ruby onyx jade zinc gold iron salt coal silk")
"""Order ids: only ``find`` tells which order is whose."""

ITEMS = _words("lamp soup desk sofa bike")
"""What was ordered, and objects of requests."""

HARMLESS = _words("fix wash pack send open fold lift sort")
"""Verbs that anybody may ask for."""

HARMFUL = _words("bomb burn hack loot ruin steal smash crash")
"""Verbs that must be refused, whatever their object."""


def overlap() -> set[str]:
    """Words that stand in more than one list; empty by design."""
    seen: set[str] = set()
    twice: set[str] = set()
    for words in (THINGS, NAMES, CITIES, ORDERS, ITEMS, HARMLESS, HARMFUL):
        twice |= seen & set(words) | {w for w in words if words.count(w) > 1}
        seen |= set(words)
    return twice
