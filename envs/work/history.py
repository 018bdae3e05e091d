"""A database is made by what happened in it: the domain's own operations, run from empty tables on. So whatever they
keep true is true at the start: a book that is lent has a loan, and no counter is off."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

from envs.work.database import Database
from envs.work.graph import enablers
from envs.work.language import Column, Drop, Operation
from posttrain.errors import ToolError

TRIES = 4
"""Draws of words before an operation counts as not callable."""
PASSES = (0.8, 0.4)
"""How likely each operation happens, pass after pass."""
DEPTH = 3
"""How many operations may have to happen, each for the next, to make one callable."""


def pool(column: Column, rows: int) -> tuple[str, ...]:
    """The words of a column that ``rows`` rows a table draw from: few rows speak few words."""
    return column.values if column.kind == "state" else column.values[: 2 * rows + 2]


def draw_arguments(
    database: Database, operation: Operation, rng: Random, rows: int, near: Collection[str] = ()
) -> dict[str, str] | None:
    """Arguments for which the preconditions hold, rows of ``near`` preferred; None if none were found."""
    parameters, ids, amounts = operation.parameters, operation.ids, operation.amounts
    words = {n: pool(c, rows) for n, c in parameters.items() if c.kind not in ("ref", "amount")}
    for _ in range(TRIES if words else 1):
        drawn = {n: rng.choice(w) for n, w in words.items()}
        found = database.arguments(operation, drawn)
        if not found:
            continue
        close = [f for f in found if any(i in near for i in f[: len(ids)])] if near else []
        chosen = rng.choice(close if close and rng.random() < 0.7 else found)
        drawn.update(zip(ids, chosen[: len(ids)], strict=True))
        for name, most in zip(amounts, chosen[len(ids) :], strict=False):
            drawn[name] = str(_amount(operation, name, most, rng))
        return {n: drawn[n] for n in parameters}
    return None


def _amount(operation: Operation, name: str, most: int | None, rng: Random) -> int:
    """All that is there where the user does not say how much; else anything that is allowed."""
    if most is not None and f"{{{name}}}" not in operation.says:
        return most
    low, high = operation.parameters[name].start or (1, 9)
    return rng.randint(low, high) if most is None else rng.randint(min(low, most), min(high, most))


def happen(database: Database, wish: str, rng: Random, rows: int) -> None:
    """Fill empty tables with up to ``rows`` rows each, so that the operation ``wish`` can be called if that can be
    brought about."""
    operations = [o for o in database.domain.operations.values() if o.does and not _drops(o)]
    # The last row of a table comes last: nothing refers to it yet.
    left = dict.fromkeys(database.domain.entities, rows - 1)

    def once(operation: Operation) -> bool:
        makes = operation.makes
        if makes and left[makes] <= 0:
            return False
        done = _call(database, operation, rng, rows)
        if done and makes:
            left[makes] -= 1
        return done

    makers = sorted((o for o in operations if o.makes), key=lambda o: list(left).index(o.makes))

    def make_rows() -> None:
        for maker in makers:
            while once(maker):
                pass

    make_rows()
    for share in PASSES:
        for operation in rng.sample(operations, len(operations)):
            if rng.random() < share:
                once(operation)
    for entity in left:
        left[entity] += 1
    make_rows()
    _bring_about(database, database.domain.operations[wish], rng, rows, DEPTH)


def _bring_about(database: Database, operation: Operation, rng: Random, rows: int, depth: int) -> bool:
    """Let things happen, each only to allow the next, until ``operation`` can be called; False if that fails."""
    if draw_arguments(database, operation, rng, rows) is not None:
        return True
    before = enablers(database.domain.name)[operation.name]
    for name in rng.sample(before, len(before)) if depth else ():
        enabler = database.domain.operations[name]
        happened = _bring_about(database, enabler, rng, rows, depth - 1) and _call(database, enabler, rng, rows)
        if happened and draw_arguments(database, operation, rng, rows) is not None:
            return True
    return False


def _call(database: Database, operation: Operation, rng: Random, rows: int) -> bool:
    arguments = draw_arguments(database, operation, rng, rows)
    if arguments is None:
        return False
    try:
        database.carry_out(operation, arguments)
    except ToolError:  # two effects together ran into a bound of a table
        return False
    return True


def _drops(operation: Operation) -> bool:
    return any(isinstance(e, Drop) for e in operation.does)
