"""What the made-up encyclopaedia knows: kinds of things, the facts each has, and the sentences that say them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from envs.search.lexicon import ANIMALS, BIRDS, COLOURS, FISH, GOODS, INSTRUMENTS, SUBJECTS, TRADES, TREES, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A fact whose value is another thing: every thing of the kind has exactly one."""

    name: str
    to: Kind
    noun: str
    """What the value is to who has it: ``author``."""
    asked: str
    """Names the value, given who has it: ``the author of {}``."""
    clause: str
    """What can be said of who has it: ``was written by {}``."""
    others: tuple[str, str]
    """Other sentences with ``{name}`` and ``{value}``; the first is the name and the clause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A fact whose value is a word of a list, or a number."""

    name: str
    values: tuple[str, ...] | range
    asked: str
    clause: str
    others: tuple[str, str]
    year: bool = False
    """A number that periods stand for, and not ranges."""


Fact = Relation | Quality


def sentences(fact: Fact) -> tuple[str, ...]:
    """All that say ``fact``, with ``{name}`` and ``{value}``."""
    return ("{name} " + fact.clause.format("{value}"), *fact.others)


_PERSON: tuple[Fact, ...] = (
    Relation(
        name="home",
        to="town",
        noun="home town",
        asked="the home town of {}",
        clause="grew up in {}",
        others=("{value} is where {name} spent a childhood", "the home town of {name} is {value}"),
    ),
    Relation(
        name="firm",
        to="firm",
        noun="employer",
        asked="the employer of {}",
        clause="works for {}",
        others=("{name} has been employed by {value} for a long time", "the employer of {name} is {value}"),
    ),
    Relation(
        name="tutor",
        to="person",
        noun="tutor",
        asked="the tutor of {}",
        clause="was taught by {}",
        others=("{value} was the tutor of {name}", "{name} owes much to the lessons of {value}"),
    ),
    Quality(
        name="trade",
        values=TRADES,
        asked="the trade of {}",
        clause="works as a {}",
        others=("by trade {name} is a {value}", "{name} earns a living as a {value}"),
    ),
    Quality(
        name="instrument",
        values=INSTRUMENTS,
        asked="the instrument of {}",
        clause="plays the {}",
        others=("in the evening {name} practises the {value}", "friends know {name} for playing the {value}"),
    ),
    Quality(
        name="height",
        values=range(148, 205),
        asked="the height in cm of {}",
        clause="is {} cm tall",
        others=("{name} measures {value} cm", "the height of {name} is {value} cm"),
    ),
    Quality(
        name="year",
        values=range(1780, 1980),
        year=True,
        asked="the year of birth of {}",
        clause="was born in {}",
        others=("{name} came into the world in {value}", "the year of birth of {name} is {value}"),
    ),
)

_TOWN: tuple[Fact, ...] = (
    Relation(
        name="river",
        to="river",
        noun="river",
        asked="the river of {}",
        clause="lies on {}",
        others=("the river that runs through {name} is {value}", "{name} was built on the banks of {value}"),
    ),
    Relation(
        name="mayor",
        to="person",
        noun="mayor",
        asked="the mayor of {}",
        clause="is governed by {}",
        others=("{value} is the mayor of {name}", "the people of {name} chose {value} as their mayor"),
    ),
    Quality(
        name="craft",
        values=GOODS,
        asked="the craft of {}",
        clause="is known for {}",
        others=("traders come to {name} for {value}", "the craft of {name} is {value}"),
    ),
    Quality(
        name="tree",
        values=TREES,
        asked="the kind of tree along the main street of {}",
        clause="has {} trees along its main street",
        others=("the main street of {name} is lined with {value} trees", "{value} trees give shade in {name}"),
    ),
    Quality(
        name="people",
        values=range(3, 400),
        asked="the number of people, in thousands, of {}",
        clause="has {} thousand people",
        others=(
            "about {value} thousand people live in {name}",
            "the last count in {name} found {value} thousand people",
        ),
    ),
    Quality(
        name="year",
        values=range(1100, 1900),
        year=True,
        asked="the year of foundation of {}",
        clause="was founded in {}",
        others=("the foundation of {name} dates from {value}", "{name} celebrates {value} as its first year"),
    ),
)

_RIVER: tuple[Fact, ...] = (
    Relation(
        name="lake",
        to="lake",
        noun="lake",
        asked="the lake at the end of {}",
        clause="flows into {}",
        others=("{name} ends in {value}", "the water of {name} is gathered by {value}"),
    ),
    Relation(
        name="source",
        to="town",
        noun="town of origin",
        asked="the town at the source of {}",
        clause="rises near {}",
        others=("the source of {name} is close to {value}", "a spring not far from {value} feeds {name}"),
    ),
    Quality(
        name="fish",
        values=FISH,
        asked="the fish of {}",
        clause="is fished for {}",
        others=("anglers come to {name} for {value}", "the fish of {name} is the {value}"),
    ),
    Quality(
        name="bird",
        values=BIRDS,
        asked="the bird of {}",
        clause="is home to the {}",
        others=("along {name} one sees the {value}", "the bird of {name} is the {value}"),
    ),
    Quality(
        name="length",
        values=range(30, 900),
        asked="the length in km of {}",
        clause="is {} km long",
        others=("{name} runs for {value} km", "the length of {name} is {value} km"),
    ),
    Quality(
        name="year",
        values=range(1400, 1950),
        year=True,
        asked="the year of the first bridge over {}",
        clause="was first bridged in {}",
        others=("the first bridge over {name} was opened in {value}", "until {value} no bridge crossed {name}"),
    ),
)

_LAKE: tuple[Fact, ...] = (
    Relation(
        name="port",
        to="town",
        noun="port",
        asked="the port on {}",
        clause="has its port at {}",
        others=("boats on {name} land at {value}", "the port on {name} is {value}"),
    ),
    Quality(
        name="fish",
        values=FISH,
        asked="the fish of {}",
        clause="is fished for {}",
        others=("anglers come to {name} for {value}", "the fish of {name} is the {value}"),
    ),
    Quality(
        name="tree",
        values=TREES,
        asked="the kind of tree on the shore of {}",
        clause="has {} trees on its shore",
        others=("the shore of {name} is covered with {value} trees", "{value} trees surround {name}"),
    ),
    Quality(
        name="depth",
        values=range(4, 400),
        asked="the depth in m of {}",
        clause="is {} m deep",
        others=("at its deepest {name} measures {value} m", "the depth of {name} is {value} m"),
    ),
    Quality(
        name="year",
        values=range(1600, 1980),
        year=True,
        asked="the year of the first map of {}",
        clause="was first mapped in {}",
        others=("the first map of {name} was drawn in {value}", "nobody had mapped {name} before {value}"),
    ),
)

_BOOK: tuple[Fact, ...] = (
    Relation(
        name="author",
        to="person",
        noun="author",
        asked="the author of {}",
        clause="was written by {}",
        others=("{value} wrote {name}", "the author of {name} is {value}"),
    ),
    Relation(
        name="scene",
        to="town",
        noun="scene",
        asked="the scene of {}",
        clause="is set in {}",
        others=("the story of {name} happens in {value}", "the scene of {name} is {value}"),
    ),
    Quality(
        name="subject",
        values=SUBJECTS,
        asked="the subject of {}",
        clause="is about {}",
        others=("the subject of {name} is {value}", "readers of {name} learn much of {value}"),
    ),
    Quality(
        name="colour",
        values=COLOURS,
        asked="the colour of the cloth of {}",
        clause="comes in {} cloth",
        others=("the cover of {name} is of {value} cloth", "{name} is bound in {value} cloth"),
    ),
    Quality(
        name="pages",
        values=range(60, 900),
        asked="the number of pages of {}",
        clause="has {} pages",
        others=("{name} is a work of {value} pages", "{name} takes {value} pages"),
    ),
    Quality(
        name="year",
        values=range(1500, 1990),
        year=True,
        asked="the year of print of {}",
        clause="was printed in {}",
        others=("the first copies of {name} appeared in {value}", "the year of print of {name} is {value}"),
    ),
)

_FIRM: tuple[Fact, ...] = (
    Relation(
        name="seat",
        to="town",
        noun="seat",
        asked="the seat of {}",
        clause="has its seat in {}",
        others=("{name} is run from {value}", "the office of {name} stands in {value}"),
    ),
    Relation(
        name="head",
        to="person",
        noun="head",
        asked="the head of {}",
        clause="is headed by {}",
        others=("{value} is the head of {name}", "decisions at {name} are made by {value}"),
    ),
    Quality(
        name="product",
        values=GOODS,
        asked="the product of {}",
        clause="makes {}",
        others=("{name} sells {value}", "the product of {name} is {value}"),
    ),
    Quality(
        name="badge",
        values=ANIMALS,
        asked="the animal on the badge of {}",
        clause="has the {} on its badge",
        others=("the badge of {name} shows the {value}", "everything from {name} carries the sign of the {value}"),
    ),
    Quality(
        name="staff",
        values=range(5, 3000),
        asked="the number of workers of {}",
        clause="employs {} workers",
        others=("{value} workers are paid by {name}", "the staff of {name} counts {value} workers"),
    ),
    Quality(
        name="year",
        values=range(1650, 1990),
        year=True,
        asked="the year of foundation of {}",
        clause="was set up in {}",
        others=("{name} opened its doors in {value}", "{name} has been in business since {value}"),
    ),
)

FACTS: Mapping[Kind, tuple[Fact, ...]] = {
    "person": _PERSON,
    "town": _TOWN,
    "river": _RIVER,
    "lake": _LAKE,
    "book": _BOOK,
    "firm": _FIRM,
}

SHARES: Mapping[Kind, float] = {"person": 0.3, "town": 0.2, "book": 0.2, "firm": 0.1, "river": 0.13, "lake": 0.07}
"""Of all pages."""
