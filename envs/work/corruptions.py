"""Chains with one mistake: a step left out, an argument or a tool mistaken, a change that nobody asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from envs.work.chain import Found, Step, Steps, Told, arguments_of, insert, run
from envs.work.database import Database
from envs.work.history import draw_arguments
from envs.work.language import Column, Domain

Kind = Literal["dropped", "value", "tool", "extra"]

EXTRA = 3
"""Superfluous changes a chain, at the most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    kind: Kind
    steps: Steps


def other_value(
    domain: Domain, rows: Mapping[str, Sequence[Sequence[Any]]], column: Column, right: str, rng: Random
) -> str:
    """A value that could stand in the place of ``right``: of another row where rows have such values."""
    match column.kind:
        case "ref":
            words = [row[0] for row in rows[column.entity]]
        case "key":
            owner = next(e for e in domain.entities.values() if column in e.columns.values())
            at = list(owner.columns).index(column.name) + 1
            words = [row[at] for row in rows[owner.name]]
        case "amount":
            words = [str(n) for n in range(1, 10)]
        case _:
            words = list(column.values)
    others = [w for w in words if w != right]
    return rng.choice(others) if others else "nobody"


def corruptions(
    database: Database, steps: Sequence[Step], tools: Sequence[str], rows: int, rng: Random
) -> Iterator[Corruption]:
    """Every single mistake of each kind, each with one draw of what stands in the right one's place. ``rows`` is the
    size of the tables, for the words of superfluous changes."""
    domain, before = database.domain, database.rows()
    with database.scratch():
        answers = run(database, steps)
    for i in range(len(steps)):
        yield Corruption(kind="dropped", steps=[None if n == i else s for n, s in enumerate(steps)])
    for i, step in enumerate(steps):
        right = arguments_of(step, answers) or {}
        for name, column in domain.operations[step.tool].parameters.items():
            wrong = Told(text=other_value(domain, before, column, right[name], rng))
            changed = replace(step, arguments={**step.arguments, name: wrong})
            yield Corruption(kind="value", steps=[*steps[:i], changed, *steps[i + 1 :]])
    for i, step in enumerate(steps):
        other = domain.operations[rng.choice([t for t in tools if t != step.tool])]
        kept: dict[str, Told | Found] = {}
        for name, column in other.parameters.items():
            same = domain.operations[step.tool].parameters.get(name) == column
            wrong = Told(text=other_value(domain, before, column, "", rng))
            kept[name] = step.arguments[name] if same else wrong
        changed = Step(tool=other.name, arguments=kept)
        yield Corruption(kind="tool", steps=[*steps[:i], changed, *steps[i + 1 :]])
    writes = [t for t in tools if domain.operations[t].does]
    for name in rng.sample(writes, min(EXTRA, len(writes))):
        extra = _superfluous(database, steps, name, rows, rng)
        if extra:
            yield extra


def _superfluous(database: Database, steps: Sequence[Step], name: str, rows: int, rng: Random) -> Corruption | None:
    at = rng.randint(0, len(steps))
    with database.scratch():
        run(database, steps[:at])
        arguments = draw_arguments(database, database.domain.operations[name], rng, rows)
    if arguments is None:
        return None
    extra = Step(tool=name, arguments={k: Told(text=v) for k, v in arguments.items()})
    return Corruption(kind="extra", steps=insert(steps, at, extra))
