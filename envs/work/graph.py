"""The tool graph of a domain: which tool needs what another one answers or brings about; and growth along it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from random import Random
from typing import Literal, NamedTuple

from envs.work.domain import load_domain
from envs.work.language import NONE, Add, AtLeast, Domain, Is, Join, Linked, New, NoRow, Operation, Put, Term


class Edge(NamedTuple):
    source: str
    target: str
    kind: Literal["output", "effect"]
    """``output``: the target takes an id that the source answers; ``effect``: the source can make a precondition of
    the target true."""


def ready(domain: Domain, operation: Operation, tools: Sequence[str]) -> bool:
    """Whether some tool of ``tools`` tells each id that ``operation`` takes."""
    given = {domain.operations[t].gives for t in tools}
    return all(entity in given for entity in operation.takes)


@cache
def edges(name: str) -> tuple[Edge, ...]:
    """All dependencies between different tools of the domain ``name``."""
    domain = load_domain(name)
    found: list[Edge] = []
    brings = {o.name: set(_brings(domain, o)) for o in domain.operations.values()}
    wants = {o.name: set(_wants(domain, o)) for o in domain.operations.values()}
    for source in domain.operations.values():
        for target in domain.operations.values():
            if source is target:
                continue
            if source.gives and source.gives in target.takes:
                found.append(Edge(source.name, target.name, "output"))
            if brings[source.name] & wants[target.name]:
                found.append(Edge(source.name, target.name, "effect"))
    return tuple(found)


@cache
def neighbours(name: str) -> dict[str, tuple[str, ...]]:
    """The tools that depend on each tool, or that it depends on, in the order of the domain."""
    domain = load_domain(name)
    near: dict[str, dict[str, None]] = {t: {} for t in domain.operations}
    for edge in edges(name):
        near[edge.source][edge.target] = None
        near[edge.target][edge.source] = None
    return {t: tuple(others) for t, others in near.items()}


@cache
def followers(name: str) -> dict[str, frozenset[str]]:
    """The tools that each tool's effect can make callable."""
    return {
        t: frozenset(e.target for e in edges(name) if e.source == t and e.kind == "effect")
        for t in load_domain(name).operations
    }


@cache
def enablers(name: str) -> dict[str, tuple[str, ...]]:
    """The tools whose effect can make each tool callable, those that make the rows it takes among them."""
    domain = load_domain(name)
    before: dict[str, dict[str, None]] = {t: {} for t in domain.operations}
    for edge in edges(name):
        if edge.kind == "effect" or domain.operations[edge.source].makes:
            before[edge.target][edge.source] = None
    return {t: tuple(others) for t, others in before.items()}


Fact = tuple[str, str, str]


def _brings(domain: Domain, operation: Operation) -> Iterator[Fact]:
    for effect in operation.does:
        match effect:
            case Put(path=path, term=term):
                owner = domain.kind(operation, path[:-1]).entity
                yield (owner, path[-1], term if isinstance(term, str) else "any")
            case Add(path=path, sign=sign):
                yield (domain.kind(operation, path[:-1]).entity, path[-1], "more" if sign > 0 else "less")
            case New(entity=entity):
                yield from ((entity, "state", s) for s in _states(domain, entity)[:1])
            case Join(link=link, holds=holds):
                yield (link, "link", str(holds))
            case _:
                pass


def _wants(domain: Domain, operation: Operation) -> Iterator[Fact]:
    for condition in operation.needs:
        match condition:
            case Is(path=path, terms=terms, holds=True) if len(path) > 1:
                owner = domain.kind(operation, path[:-1]).entity
                yield from ((owner, path[-1], _word(t)) for t in terms)
            case Is(path=path, terms=(word,)) if word == NONE:
                yield (domain.kind(operation, path[:-1]).entity, path[-1], "any")
            case AtLeast(path=path):
                yield (domain.kind(operation, path[:-1]).entity, path[-1], "more")
            case Linked(link=link, holds=holds):
                yield (link, "link", str(holds))
            case NoRow(entity=entity, state=state) if state:
                yield from ((entity, "state", s) for s in _states(domain, entity) if s != state)
            case _:
                pass


def _word(term: Term) -> str:
    return term if isinstance(term, str) else "less" if term == 0 else "any"


def _states(domain: Domain, entity: str) -> tuple[str, ...]:
    return next((c.values for c in domain.entities[entity].columns.values() if c.kind == "state"), ())


def grow(
    domain: Domain, chain: Sequence[str], least: int, instantiated: Callable[[Operation], bool], rng: Random
) -> list[str]:
    """``chain`` and what grows from it, breadth first, until there are ``least`` tools or no tool is left.

    A tool is added only if its dependencies are there: tools that tell the ids it takes, and rows for which its
    preconditions hold (``instantiated``). Where nothing more can be reached, another chain begins.
    """
    tools = list(dict.fromkeys(chain))
    waiting = list(tools)
    while len(tools) < least:
        if not waiting:
            waiting = seed_chain(domain, tools, instantiated, rng)
            if not waiting:
                break
            tools += waiting
        level = list(dict.fromkeys(n for t in waiting for n in neighbours(domain.name)[t] if n not in tools))
        rng.shuffle(level)
        waiting = []
        for name in level:
            operation = domain.operations[name]
            if len(tools) < least and ready(domain, operation, tools) and instantiated(operation):
                tools.append(name)
                waiting.append(name)
    return tools


def seed_chain(
    domain: Domain, tools: Sequence[str], instantiated: Callable[[Operation], bool], rng: Random
) -> list[str]:
    """A chain of tools that are not in ``tools``: one that changes something, after those that tell the ids it takes.
    Empty if there is none."""
    unused = [o for o in domain.operations.values() if o.name not in tools]
    goals = [o for o in unused if o.does and instantiated(o)]
    todo = [rng.choice(goals)] if goals else []
    found: list[Operation] = []
    while todo:
        operation = todo.pop()
        found.append(operation)
        for entity in operation.takes:
            if entity not in {domain.operations[t].gives for t in tools} | {o.gives for o in (*found[1:], *todo)}:
                # By a column, not by the id or a link: columns lead up to tables that are found by a word.
                columns = domain.entities[entity].columns
                todo.append(rng.choice([o for o in unused if o.reads == entity and o.by in columns]))
    return [o.name for o in reversed(found)]
