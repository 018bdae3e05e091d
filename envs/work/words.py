"""The words that rows are made of. Short, and none of them means two things: an id is no name, a name is no title."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count

from envs.words import CITIES, ITEMS, NAMES, ORDERS, THINGS


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


POOLS: Mapping[str, tuple[str, ...]] = {
    "names": (*NAMES, *_words("amy bob cal dot fay hal ida jay lou max ned una")),
    "cities": (*CITIES, *_words("baku doha oran pisa nice kyiv quito rabat sofia tunis")),
    "goods": (*ITEMS, *_words("tent rope lens coat boot drum kite vase clock stove chair spade")),
    "things": THINGS,
    "titles": _words("dawn echo frost haven quest storm tide vault wonder comet ghost river mirror canal"),
    "codes": _words("alpha bravo delta gamma kappa omega sigma theta zeta lambda tango victor hotel zulu"),
}
"""Words that tell a row to people, by the name that domain files call them."""

IDS = (
    *ORDERS,
    *_words("amber basil cedar clove coral crane daisy ember fern flint hazel heron ivory ivy kelp larch lilac lily"),
    *_words("lotus lynx maple mint moss nova olive orca otter palm pearl peony pine plum poppy quail quartz raven"),
    *_words("reed robin rose sage shell slate swan teal thorn topaz trout tulip umber violet wasp wheat willow wren"),
    *_words("yarrow yew zebra finch gecko heath jasper koala lemon mango nickel oak onion birch bison cobra cocoa"),
    *_words(
        "dingo eagle elm emu goose grape guava hyena iris lava lime lion llama melon mole moth newt panda peach pecan"
    ),
    *_words("pike prune puma rhino"),
)


def ids(n: int) -> list[str]:
    """The first ``n`` ids: single words as long as there are any, then words with a number."""

    def endless() -> Iterator[str]:
        yield from IDS
        for number in count(2):
            yield from (f"{word}{number}" for word in IDS)

    words = endless()
    return [next(words) for _ in range(n)]
