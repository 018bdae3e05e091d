"""Questions that the encyclopaedia answers in several steps, each with one answer and no other.

A question is a *plan*: a thing to start from, named or described, and the facts to follow from there, one a hop. The
plan's meaning is a set of answers over all things; a question is asked only if every step of it means one thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from envs.search.corpus import Corpus, Style, Thing, Value, shown
from envs.search.lexicon import Kind
from envs.search.schema import FACTS, Fact, Quality, Relation


@dataclass(frozen=True, slots=True, kw_only=True)
class Clue:
    """What is said of the start instead of its name."""

    fact: str
    via: str = ""
    """Relation to the thing that has the fact; the start itself if empty."""
    word: str = ""
    """The value, if it is a word; else it lies in ``low`` to ``high``."""
    low: int = 0
    high: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One step."""

    fact: str
    kind: Kind
    """Of the things that have the fact: those reached, if ``back``."""
    back: bool = False
    """From a relation's value to who has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The structure of a question. Holds no answer."""

    kind: Kind
    """Of the start."""
    name: str = ""
    """The start, or empty if clues stand for it."""
    clues: tuple[Clue, ...] = ()
    hops: tuple[Hop, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of ``to_json``."""
        clues, hops = (Clue(**c) for c in data["clues"]), (Hop(**h) for h in data["hops"])
        return cls(kind=data["kind"], name=data["name"], clues=tuple(clues), hops=tuple(hops))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A plan and what it means."""

    plan: Plan
    start: str
    answer: str


def fact_of(kind: Kind, name: str) -> Fact:
    """The fact ``name`` of things of ``kind``."""
    return next(f for f in FACTS[kind] if f.name == name)


def normal(answer: str) -> str:
    """What is compared: no case, no punctuation, no articles, single spaces."""
    return " ".join(w for w in re.findall(r"\w+", answer.casefold()) if w not in ("a", "an", "the"))


# Meaning --------------------------------------------------------------------------------------------------------------


def fits(corpus: Corpus, thing: Thing, clue: Clue) -> bool:
    """Whether ``clue`` holds of ``thing``."""
    who = corpus.things[str(thing.facts[clue.via])] if clue.via else thing
    value = who.facts[clue.fact]
    return clue.low <= value <= clue.high if isinstance(value, int) else value == clue.word


def starts(corpus: Corpus, kind: Kind, clues: tuple[Clue, ...]) -> frozenset[str]:
    """All things that are described."""
    words = [corpus.having.get((kind, c.fact, c.word), frozenset()) for c in clues if c.word and not c.via]
    found = frozenset.intersection(*words) if words else frozenset(corpus.of_kind[kind])
    return frozenset(name for name in found if all(fits(corpus, corpus.things[name], c) for c in clues))


def step(corpus: Corpus, name: str, hop: Hop) -> frozenset[Value]:
    """All that one hop from ``name`` leads to."""
    if hop.back:
        return corpus.having.get((hop.kind, hop.fact, name), frozenset())
    return frozenset({corpus.things[name].facts[hop.fact]})


# Drawing --------------------------------------------------------------------------------------------------------------


def draw(corpus: Corpus, hops: int, obfuscate: int, backward: float, rng: Random) -> Question | None:
    """A question, or None if this draw has several answers, comes by a thing twice or tells the answer.

    ``obfuscate``: 0 names the start; from 1 a description stands for it; from 2 ranges for its numbers, from 3 periods
    for its years.
    """
    start = corpus.things[rng.choice(tuple(corpus.things))]
    taken: list[Hop] = []
    seen: list[Value] = [start.name]
    for i in range(hops):
        hop = _draw_hop(corpus, str(seen[-1]), i == hops - 1, backward, rng)
        if hop is None:
            return None
        taken.append(hop)
        (value,) = step(corpus, str(seen[-1]), hop)
        if value in seen:
            return None
        seen.append(value)
    if obfuscate:
        clues = _describe(corpus, start, obfuscate, rng)
        plan = None if clues is None else Plan(kind=start.kind, clues=clues, hops=tuple(taken))
    else:
        plan = Plan(kind=start.kind, name=start.name, hops=tuple(taken))
    answer = str(seen[-1])
    if plan is None or f" {normal(answer)} " in f" {normal(phrase(plan, corpus.style))} ":
        return None
    return Question(plan=plan, start=start.name, answer=answer)


def _draw_hop(corpus: Corpus, name: str, last: bool, backward: float, rng: Random) -> Hop | None:
    """A hop from ``name`` that leads to one value only; to another thing unless it is the last."""
    kind = corpus.things[name].kind
    if rng.random() < backward:
        hops = [
            Hop(fact=f.name, kind=other, back=True)
            for other in FACTS
            for f in shown(other, corpus.style)
            if isinstance(f, Relation) and f.to == kind
        ]
    else:
        hops = [Hop(fact=f.name, kind=kind) for f in shown(kind, corpus.style) if last or isinstance(f, Relation)]
    hops = [h for h in hops if len(step(corpus, name, h)) == 1]
    return rng.choice(hops) if hops else None


def _describe(corpus: Corpus, thing: Thing, obfuscate: int, rng: Random) -> tuple[Clue, ...] | None:
    """Clues that hold of ``thing`` and of nothing else: its words, its numbers, at need a neighbour's words."""
    words = [f for f in FACTS[thing.kind] if isinstance(f, Quality) and not isinstance(f.values, range)]
    numbers = [f for f in FACTS[thing.kind] if isinstance(f, Quality) and isinstance(f.values, range)]
    relations = [f for f in FACTS[thing.kind] if isinstance(f, Relation)]
    for some in (words, numbers, relations):
        rng.shuffle(some)
    clues = [Clue(fact=f.name, word=str(thing.facts[f.name])) for f in words]
    more = [_span(f, int(thing.facts[f.name]), obfuscate, rng) for f in numbers]
    for relation in relations:
        other = corpus.things[str(thing.facts[relation.name])]
        fact = rng.choice([f for f in FACTS[other.kind] if isinstance(f, Quality) and not isinstance(f.values, range)])
        more.append(Clue(fact=fact.name, via=relation.name, word=str(other.facts[fact.name])))
    for clue in more:
        clues.append(clue)
        if len(starts(corpus, thing.kind, tuple(clues))) == 1:
            rng.shuffle(clues)
            return tuple(clues)
    return None


def _span(fact: Quality, value: int, obfuscate: int, rng: Random) -> Clue:
    """Exact, or a range around the number, or the decade of the year."""
    if obfuscate < (3 if fact.year else 2):
        return Clue(fact=fact.name, low=value, high=value)
    if fact.year:
        return Clue(fact=fact.name, low=value // 10 * 10, high=value // 10 * 10 + 9)
    width = max(4, value // 4)
    low = max(1, value - rng.randint(1, width - 1))
    return Clue(fact=fact.name, low=low, high=low + width)


# Words ----------------------------------------------------------------------------------------------------------------


def phrase(plan: Plan, style: Style) -> str:
    """The question in words."""
    told = plan.name or _description(plan)
    kind = plan.kind
    for hop in plan.hops:
        fact = fact_of(hop.kind, hop.fact)
        if style == "brief":
            told = f"{hop.kind} with {hop.fact} {told}" if hop.back else f"{hop.fact} of {told}"
        elif hop.back:
            told = f"the {hop.kind} {_who(hop.kind)} {fact.clause.format(told)}"
        else:
            told = fact.asked.format(told)
        kind = hop.kind if hop.back else fact.to if isinstance(fact, Relation) else None
    if style == "brief":
        return f"{told}?"
    return f"{'who' if kind == 'person' else 'what'} is {told}?"


def _who(kind: Kind) -> str:
    return "who" if kind == "person" else "that"


def _description(plan: Plan) -> str:
    """At least two clues are of the start itself."""
    *first, last = [_said(fact_of(plan.kind, c.fact), c) for c in plan.clues if not c.via]
    text = f"the {plan.kind} {_who(plan.kind)} {', '.join(first)} and {last}"
    for clue in plan.clues:
        if clue.via:
            relation = fact_of(plan.kind, clue.via)
            assert isinstance(relation, Relation)
            text += f", and whose {relation.noun} {_said(fact_of(relation.to, clue.fact), clue)}"
    return text


def _said(fact: Fact, clue: Clue) -> str:
    if clue.word:
        return fact.clause.format(clue.word)
    if clue.low == clue.high:
        return fact.clause.format(clue.low)
    if isinstance(fact, Quality) and fact.year:
        return fact.clause.format(f"the {clue.low}s")
    return fact.clause.format(f"{clue.low} to {clue.high}")
