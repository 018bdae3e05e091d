"""Environments by domain and seed: a database that came about, a chain planned in it, tools grown around it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from envs.work.chain import Found, Step, Steps, run
from envs.work.database import Database, State
from envs.work.graph import grow, seed_chain
from envs.work.history import draw_arguments, happen
from envs.work.language import Operation
from envs.work.plan import Goal, Plan, make_plan
from envs.work.words import ids
from posttrain.errors import ConfigError

ATTEMPTS = 100
PLANS = 3
"""Plans that are tried in one database."""
SPARE = 12
"""Ids that an environment keeps for new rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    tools: int = 20
    """The least number of tools."""
    chain: int = 5
    """The least number of calls."""
    rows: int = 6
    """Rows a table, where its operations allow so many."""
    further: float = 0.3
    """How likely another chain of unused tools joins the grown ones, and after it another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    domain: str
    tools: tuple[str, ...]
    """In the order in which they are shown."""
    rows: Mapping[str, Sequence[Sequence[Any]]]
    spare: tuple[str, ...]
    """Ids of rows that will be made."""
    steps: tuple[Step, ...]
    goals: tuple[Goal, ...]


@lru_cache(maxsize=64)
def _workshop(domain: str, thread: int) -> Database:
    """An empty database to try things in; one a thread, as SQLite wants it."""
    return Database(domain, {}, ())


def environment(domain: str, seed: int, size: Size) -> Environment:
    """The environment of that domain and seed: always the same. Raises ConfigError if ``size`` leaves room for none."""
    database = _workshop(domain, threading.get_ident())
    for attempt in range(ATTEMPTS):
        rng = Random(f"{domain}/{seed}/{attempt}")
        words = ids(size.rows * (len(database.domain.entities) + 1) + SPARE)
        rng.shuffle(words)
        with database.scratch(words):
            found = _attempt(database, rng, size)
        if found:
            return found
    raise ConfigError(
        f"{domain} has no environment with tools={size.tools}, chain={size.chain}, rows={size.rows}:"
        " ask for fewer tools, a shorter chain or more rows"
    )


def _attempt(database: Database, rng: Random, size: Size) -> Environment | None:
    domain = database.domain
    wish = rng.choice([o.name for o in domain.operations.values() if o.does])
    happen(database, wish, rng, size.rows)
    database.settle()
    rows, spare = database.rows(), database.spare
    plans = (make_plan(database, wish, rng, size.rows, size.chain) for _ in range(PLANS))
    plan = next((p for p in plans if p and _sound(database, p)), None)
    if plan is None:
        return None

    def instantiated(operation: Operation) -> bool:
        return draw_arguments(database, operation, rng, size.rows) is not None

    tools = grow(domain, [s.tool for s in plan.steps], size.tools, instantiated, rng)
    while rng.random() < size.further:
        tools += seed_chain(domain, tools, instantiated, rng)
    if len(tools) < size.tools:
        return None
    rng.shuffle(tools)
    return Environment(
        domain=domain.name,
        tools=tuple(tools),
        rows=rows,
        spare=tuple(spare[:SPARE]),
        steps=plan.steps,
        goals=plan.goals,
    )


def final_state(database: Database, steps: Steps) -> State:
    """What the database would hold after ``steps``."""
    with database.scratch():
        run(database, steps)
        return database.snapshot()


def _sound(database: Database, plan: Plan) -> bool:
    """Whether the descriptions fit one row all the way and every step is needed."""
    if any(c.fits(database) != [c.row] for c in plan.claims):
        return False
    with database.scratch():
        answers: list[str] = []
        for goal in plan.goals:
            answers = run(database, plan.steps[: goal.step + 1], answers)
            if answers[-1].startswith("error") or not answers[-1]:
                return False
            if any(set(c.fits(database)) - {c.row} for c in plan.claims):
                return False
        wanted = database.snapshot()
    goals = [g.step for g in plan.goals]
    kept = {tuple(g for g in goals if g not in _lost(plan.steps, [i])) for i in range(len(plan.steps))}
    kept.add(tuple(g for g in goals if not any(isinstance(v, Found) for v in plan.steps[g].arguments.values())))
    kept = {k for k in kept if len(k) < len(goals)} | {()}
    return all(
        final_state(database, [s if i in k or i not in goals else None for i, s in enumerate(plan.steps)]) != wanted
        for k in kept
    )


def _lost(steps: Sequence[Step], dropped: Sequence[int]) -> set[int]:
    """The steps that cannot be made without those that are dropped."""
    lost = set(dropped)
    for i, step in enumerate(steps):
        if any(isinstance(v, Found) and v.step in lost for v in step.arguments.values()):
            lost.add(i)
    return lost
