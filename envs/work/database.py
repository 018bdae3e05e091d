"""The state of an environment: a SQLite database in memory that only the operations of its domain read and change."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from envs.work.domain import load_domain
from envs.work.language import NONE, AtLeast, Column, Condition, Is, Linked, NoRow, Operation, Unused
from envs.work.sql import quoted, schema, statements
from posttrain.errors import ToolError, WorldError

Arguments = Mapping[str, str]
Rows = Mapping[str, Sequence[Sequence[Any]]]
"""All rows by table, an id first; a link's are pairs of ids."""
State = frozenset[tuple[tuple[Any, ...], int]]
"""Rows, and how often each is there."""

DONE = "ok"
NOTHING = "no rows"
ROW, CELL = "; ", " "
"""What stands between the rows of an answer, and between the words of a row."""


def cells(answer: str) -> list[dict[str, str]]:
    """The rows that an answer shows: column by column, the id as ``id``. Empty where it shows none."""
    if answer in ("", DONE, NOTHING) or answer.startswith("error"):
        return []
    rows: list[dict[str, str]] = []
    for row in answer.split(ROW):
        key, *rest = row.split(CELL)
        rows.append({"id": key, **dict(zip(rest[::2], rest[1::2], strict=False))})
    return rows


@cache
def _empty(domain: str) -> bytes:
    """The tables of a domain without rows: copying them is faster than making them."""
    database = sqlite3.connect(":memory:")
    database.executescript(schema(domain))
    image = database.serialize()
    database.close()
    return image


class Database:
    """Holds ``rows``; a new row takes the next id of ``spare``, then numbered ones."""

    def __init__(self, domain: str, rows: Rows, spare: Iterable[str]) -> None:
        self.domain = load_domain(domain)
        self._statements = statements(domain)
        self._made: list[str] = []
        self._spare = list(spare)
        self._db: sqlite3.Connection | None = sqlite3.connect(":memory:", isolation_level=None, cached_statements=1024)
        self._db.deserialize(_empty(domain))
        self._db.execute("pragma foreign_keys = on")
        for table in (*self.domain.entities, *self.domain.links):
            for row in rows.get(table, ()):
                self.query(f"insert into {quoted(table)} values ({','.join('?' * len(row))})", row)

    def close(self) -> None:
        """Drop everything; idempotent."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def query(self, sql: str, values: Mapping[str, Any] | Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of any statement. Raises WorldError once it is closed."""
        if self._db is None:
            raise WorldError("the database is closed")
        return self._db.execute(sql, values).fetchall()

    @contextmanager
    def scratch(self, spare: Iterable[str] | None = None) -> Iterator[None]:
        """Whatever happens inside is undone. ``spare``: the ids that new rows take meanwhile."""
        made, kept = len(self._made), self._spare
        self._spare = kept if spare is None else list(spare)
        self.query("savepoint scratch")
        try:
            yield
        finally:
            self.query("rollback to scratch")
            self.query("release scratch")
            self._spare = kept
            del self._made[made:]

    def settle(self) -> None:
        """Rows made so far count as rows that were there."""
        self._spare = self._spare[len(self._made) :]
        self._made = []

    @property
    def spare(self) -> list[str]:
        return list(self._spare)

    def rows(self) -> dict[str, list[list[Any]]]:
        """All rows by table, in the order in which they were made."""
        tables = (*self.domain.entities, *self.domain.links)
        return {t: [list(r) for r in self.query(f"select * from {quoted(t)} order by rowid")] for t in tables}

    def snapshot(self) -> State:
        """What the database holds. The id of a row made since it was opened does not count, only what the row says:
        who makes two rows in another order makes the same state."""
        made = dict.fromkeys(self._made, "")
        found: Counter[tuple[Any, ...]] = Counter()
        for table, rows in self.rows().items():
            for row in rows:
                # What a row refers to stands in a table before it, or before it in its own, so its meaning is known.
                told = [made.get(v, v) for v in row]
                if table in self.domain.entities and row[0] in made:
                    told[0] = made[row[0]] = repr((table, told[1:]))
                found[(table, *told)] += 1
        return frozenset(found.items())

    def call(self, operation: Operation, arguments: Arguments) -> str:
        """Run a tool: all of it, or nothing and a ToolError that names the cause."""
        values = {n: self._value(n, c, arguments[n]) for n, c in operation.parameters.items()}
        if operation.needs:
            self._check(operation, values)
        return self._read(operation, values) if operation.reads else self.carry_out(operation, arguments)

    def carry_out(self, operation: Operation, arguments: Arguments) -> str:
        """The effects alone, for arguments that are known to be legal: all of them, or none and a ToolError."""
        values: dict[str, Any] = {**arguments, **{n: int(arguments[n]) for n in operation.amounts}}
        if operation.makes:
            at = len(self._made)
            values["id"] = self._spare[at] if at < len(self._spare) else f"row{at}"
        try:
            with self._whole(len(operation.does)):
                for effect in self._statements[operation.name].effects:
                    self.query(effect, values)
        except sqlite3.IntegrityError as error:  # effects that are fine one by one may break a bound together
            raise ToolError("error: not allowed") from error
        if not operation.makes:
            return DONE
        self._made.append(values["id"])
        return values["id"]

    @contextmanager
    def _whole(self, effects: int) -> Iterator[None]:
        """All statements or none; one alone is whole by itself."""
        if effects == 1:
            yield
            return
        self.query("savepoint whole")
        try:
            yield
        except BaseException:
            self.query("rollback to whole")
            raise
        finally:
            self.query("release whole")

    def arguments(self, operation: Operation, words: Arguments) -> list[tuple[Any, ...]]:
        """All ids for which the preconditions hold with ``words``, and the most that each amount may be."""
        return self.query(self._statements[operation.name].arguments, words)

    def _value(self, name: str, column: Column, value: str) -> Any:
        """What to bind. Raises ToolError for a row that is not there or a word that is not allowed."""
        match column.kind:
            case "ref":
                # Text that is no UTF-8 cannot be bound.
                if not value.isascii() or not self.query(
                    f"select 1 from {quoted(column.entity)} where id = ?", (value,)
                ):
                    raise ToolError(f"error: no {column.entity} {value[:20]}")
            case "amount":
                if not (value.isascii() and value.isdigit() and 0 < len(value) < 7):
                    raise ToolError(f"error: {name} is a number")
                if int(value) == 0:
                    raise ToolError(f"error: {name} is 0")
                return int(value)
            case "key":
                if not (value.isascii() and value.isalpha() and len(value) < 21):
                    raise ToolError(f"error: {name} is a word")
            case _:
                if value not in column.values:
                    raise ToolError(f"error: no {column.name} {value[:20]}")
        return value

    def _check(self, operation: Operation, values: Mapping[str, Any]) -> None:
        done = self._statements[operation.name]
        [held] = self.query(done.check, values)
        for condition, shown, holds in zip(operation.needs, done.shown, held, strict=True):
            if not holds:
                value = self.query(shown, values)[0][0] if shown else None
                raise ToolError(f"error: {_cause(condition, NONE if value is None else value, values)}")

    def _read(self, operation: Operation, values: Mapping[str, Any]) -> str:
        done = self._statements[operation.name]
        found = self.query(done.read, values)
        key = self.domain.entities[operation.reads].key
        if not found and key and operation.by == key.name:
            raise ToolError(f"error: no {operation.reads} {values[key.name]}")
        return ROW.join(_row(done.columns, row) for row in found) or NOTHING


def _row(columns: Sequence[str], row: Sequence[Any]) -> str:
    return CELL.join((row[0], *(f"{c}{CELL}{NONE if v is None else v}" for c, v in zip(columns, row[1:], strict=True))))


def _cause(condition: Condition, value: Any, values: Mapping[str, Any]) -> str:
    """Why ``condition`` does not hold."""
    match condition:
        case Is(path=path) | AtLeast(path=path):
            return f"{' '.join(path[-2:])} is {value}"
        case Linked(link=link, holds=holds):
            return f"no {link}" if holds else f"{link} is there"
        case NoRow(entity=entity, path=path, state=state):
            return f"{path[-1]} has {state + ' ' if state else ''}{entity}"
        case Unused(column=column):
            return f"{column} {values[column]} is taken"
