"""The words of the made-up encyclopaedia: what things are called, and what can be said of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from random import Random
from typing import Literal

from envs.words import CITIES, HARMLESS, NAMES, ORDERS, THINGS

Kind = Literal["person", "town", "river", "lake", "book", "firm"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRADES = _words(
    "smith baker tanner weaver potter mason tailor cooper miller brewer sailor printer glazier barber carter roofer "
    "dyer hatter joiner fuller turner farrier saddler chandler"
)
INSTRUMENTS = _words(
    "harp lute flute drum horn fiddle cello oboe organ lyre pipe zither bugle viola banjo cornet guitar harmonium "
    "mandolin clarinet bassoon trumpet accordion piano"
)
GOODS = _words(
    "lace honey cheese paper glass rope candles bells barrels carpets knives needles buttons ribbons mustard vinegar "
    "cider porcelain tiles bricks sails gloves combs clocks"
)
TREES = _words(
    "oak elm birch maple alder willow cedar spruce larch poplar linden hazel rowan beech walnut chestnut cypress "
    "juniper holly yew hornbeam aspen pine sycamore"
)
FISH = _words(
    "trout perch pike carp eel salmon roach bream tench barbel sturgeon grayling char burbot gudgeon zander chub dace "
    "minnow loach lamprey whitefish catfish ruffe"
)
BIRDS = _words(
    "heron stork crane goose swan duck teal grebe coot bittern kingfisher osprey tern gull curlew plover snipe dipper "
    "wagtail cormorant egret pelican ibis avocet"
)
SUBJECTS = _words(
    "gardens ghosts kings horses stars storms ships winter dreams money thieves wolves music saints islands mountains "
    "letters spies pirates poets orphans dragons twins comets"
)
COLOURS = _words(
    "red blue green black white grey brown yellow purple pink orange violet crimson scarlet azure ivory amber maroon "
    "olive beige indigo turquoise lilac khaki"
)
ANIMALS = _words(
    "lion bear eagle stag boar tiger falcon unicorn griffin panther leopard badger otter beaver ram bull elephant "
    "camel dolphin serpent raven cobra rhino bison"
)

NAMED_BY: Mapping[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "person": (NAMES, THINGS),
    "town": (CITIES, THINGS),
    "river": (ORDERS, THINGS),
    "lake": (ORDERS, CITIES),
    "book": (HARMLESS, THINGS),
    "firm": (HARMLESS, ORDERS),
}
"""A name is a word of each list. No two kinds share a pair, so words in another order are never another name."""

FILLERS = (
    "an old song puts {name} and {other} into one verse",
    "a visitor once mistook {name} for {other}",
    "in a quiz of the radio {name} came up next to {other}",
    "a letter of last year speaks of {name} and of {other} in one breath",
    "children skip to a rhyme on {name} and {other}",
    "a postcard with {other} on it was kept for the sake of {name}",
    "little else is told of {name}",
    "whoever looks for {name} in older works finds a line or two",
    "the newspapers of the county bring up {name} every spring",
    "a painting that is said to show {name} was lost",
)
"""Sentences that tell nothing which is asked for; some name another thing beside."""

_SPARE = 1.25
"""Possible names of a kind, at the least, for each that is given."""


def names(kind: Kind, n: int, made: Iterator[str], rng: Random) -> list[str]:
    """``n`` names of ``kind``, none twice, in the words of the other worlds; if too few, also from ``made``."""
    firsts, seconds = (list(words) for words in NAMED_BY[kind])
    short = sqrt(_SPARE * n / (len(firsts) * len(seconds)))
    if short > 1:
        for words in (firsts, seconds):
            words += [next(made) for _ in range(int(len(words) * (short - 1)) + 1)]
    pairs = rng.sample(range(len(firsts) * len(seconds)), n)
    return [f"{firsts[p // len(seconds)]} {seconds[p % len(seconds)]}" for p in pairs]


def made_up(rng: Random) -> Iterator[str]:
    """Words that hardly anybody has heard, none twice and none of the lists above."""
    told = (TRADES, INSTRUMENTS, GOODS, TREES, FISH, BIRDS, SUBJECTS, COLOURS, ANIMALS)
    seen = {w for words in (*told, *(w for pair in NAMED_BY.values() for w in pair)) for w in words}
    while True:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)) + rng.choice("lmnrst")
        if rng.random() < 0.5:
            word += rng.choice(("a", "en", "or", "ia", "ic"))
        if word not in seen:
            seen.add(word)
            yield word
