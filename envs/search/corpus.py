"""The made-up encyclopaedia: things with facts, one page a thing, and how a page is read back.

Facts are drawn independently of each other, so none can be inferred and all must be looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from random import Random
from typing import Literal, get_args

from envs.search.lexicon import FILLERS, Kind, made_up, names
from envs.search.schema import FACTS, SHARES, Fact, Quality, Relation, sentences

Style = Literal["prose", "brief"]
"""``prose``: every fact is a sentence, among others that tell nothing. ``brief``: relations and the year, as fields."""

Value = str | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """What one page is about."""

    name: str
    kind: Kind
    facts: Mapping[str, Value]
    """Fact's name to its value; a relation's is the name of the other thing."""


def shown(kind: Kind, style: Style) -> tuple[Fact, ...]:
    """The facts that a page of ``kind`` states."""
    if style == "prose":
        return FACTS[kind]
    return tuple(f for f in FACTS[kind] if isinstance(f, Relation) or f.year)


class Corpus:
    """All things and their pages. The same arguments make the same corpus on every machine."""

    def __init__(self, pages: int, seed: int, style: Style, fillers: int) -> None:
        self.style: Style = style
        self._fillers = fillers
        self._seed = seed
        rng = Random(f"search/{seed}/{pages}")
        made = made_up(rng)
        called: dict[Kind, list[str]] = {kind: names(kind, n, made, rng) for kind, n in _counts(pages).items()}
        self.things: dict[str, Thing] = {
            name: Thing(name=name, kind=kind, facts={f.name: _draw(f, name, called, rng) for f in FACTS[kind]})
            for kind, own in called.items()
            for name in own
        }
        self.of_kind: dict[Kind, list[str]] = called

    @cached_property
    def having(self) -> dict[tuple[Kind, str, Value], frozenset[str]]:
        """Names of the things of a kind whose fact has a value."""
        found: dict[tuple[Kind, str, Value], set[str]] = {}
        for thing in self.things.values():
            for fact, value in thing.facts.items():
                found.setdefault((thing.kind, fact, value), set()).add(thing.name)
        return {key: frozenset(names) for key, names in found.items()}

    def page(self, name: str) -> str:
        """The text about ``name``. Raises KeyError."""
        thing = self.things[name]
        rng = Random(f"page/{self._seed}/{name}")
        facts = list(shown(thing.kind, self.style))
        rng.shuffle(facts)
        if self.style == "brief":
            return "; ".join([f"{name}: {thing.kind}", *(f"{f.name} {thing.facts[f.name]}" for f in facts)])
        told = [rng.choice(sentences(f)).format(name=name, value=thing.facts[f.name]) for f in facts]
        told += [f.format(name=name, other=self._other(rng, name)) for f in rng.sample(FILLERS, self._fillers)]
        rng.shuffle(told)
        return ". ".join([f"{name} is a {thing.kind}", *told]) + "."

    def _other(self, rng: Random, name: str) -> str:
        own = self.of_kind[rng.choice(get_args(Kind))]
        return rng.choice([n for n in rng.sample(own, 2) if n != name])


def _counts(pages: int) -> dict[Kind, int]:
    """Pages of each kind; two at the least, so that nothing need be related to itself."""
    counts: dict[Kind, int] = {kind: max(2, int(share * pages)) for kind, share in SHARES.items()}
    counts["person"] += pages - sum(counts.values())
    return counts


def _draw(fact: Fact, name: str, called: Mapping[Kind, list[str]], rng: Random) -> Value:
    match fact:
        case Relation():
            return rng.choice([n for n in rng.sample(called[fact.to], 2) if n != name])
        case Quality():
            return rng.choice(fact.values)


def parts(text: str, words: int) -> list[str]:
    """``text`` in pieces of whole sentences, about ``words`` words each."""
    pieces: list[list[str]] = [[]]
    held = 0
    for sentence in re.split(r"(?<=[.;]) ", text):
        n = sentence.count(" ") + 1
        if held and held + n > words:
            pieces.append([])
            held = 0
        pieces[-1].append(sentence)
        held += n
    return [" ".join(piece) for piece in pieces]


@lru_cache(maxsize=4096)  # the same pages come up in question after question
def read(text: str, name: str, style: Style) -> Mapping[str, str]:
    """What ``text`` says of ``name``: fact's name to value, and ``kind``. Knows the sentences, and no facts."""
    return {
        key: m["value"]
        for sentence in re.split(r"[.;](?: |$)", text)
        for key, pattern in _patterns(style)
        if (m := pattern.fullmatch(sentence)) and m.groupdict().get("name", name) == name
    }


@lru_cache(maxsize=2)
def _patterns(style: Style) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((key, re.compile(pattern)) for key, pattern in _spelled(style))


def _spelled(style: Style) -> Iterator[tuple[str, str]]:
    name = "(?P<name>[a-z]+ [a-z]+)"
    yield "kind", name + (": " if style == "brief" else " is a ") + f"(?P<value>{'|'.join(get_args(Kind))})"
    for facts in FACTS.values():
        for fact in facts:
            match fact:
                case Relation():
                    value = "[a-z]+ [a-z]+"
                case Quality(values=range()):
                    value = "[0-9]+"
                case _:
                    value = "[a-z]+"
            for sentence in (f"{fact.name} {{value}}",) if style == "brief" else sentences(fact):
                yield fact.name, sentence.format(name=name, value=f"(?P<value>{value})")
