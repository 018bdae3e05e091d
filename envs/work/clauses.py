"""Reads the clauses of a domain file: what an action takes, needs and does. Raises ValueError that names the cure.

Conditions: ``loan.state is open late``, ``trip.state not done``, ``account.balance >= amount``,
``has skill nurse ward``, ``no skill nurse ward``, ``no loan of member``, ``no open loan of member``. Effects:
``loan.state = open``, ``book.stock += 1``, ``account.balance -= amount``, ``new loan``, ``drop loan``,
``link skill nurse ward``, ``unlink skill nurse ward``. Clauses stand apart by semicolons.
"""

from __future__ import annotations

from collections.abc import Mapping

from envs.work.language import (
    NONE,
    Add,
    AtLeast,
    Column,
    Condition,
    Drop,
    Effect,
    Entity,
    Is,
    Join,
    Link,
    Linked,
    New,
    NoRow,
    Path,
    Put,
    Term,
)

AMOUNT = Column(name="amount", kind="amount", start=(1, 9))
"""The parameter of that name, unless a table says otherwise."""


def parameters(text: str, made: str, entities: Mapping[str, Entity]) -> dict[str, Column]:
    """``member book term`` or ``from=account to=account amount``: names, and the table or column each is one of."""
    found: dict[str, Column] = {}
    for word in text.split():
        name, _, kind = word.partition("=")
        kind = kind or name
        owners = [made, *(c.entity for c in found.values() if c.kind == "ref")]
        if kind in entities:
            found[name] = Column(name=name, kind="ref", entity=kind)
            continue
        columns = (entities[e].columns[kind] for e in owners if e and kind in entities[e].columns)
        column = next(columns, AMOUNT if kind == "amount" else None)
        if column is None:
            raise ValueError(f"takes {word!r}: write a table, or a column of the tables taken before it")
        found[name] = column
    return found


class Clauses:
    """Reads for one action, whose parameters are known."""

    def __init__(self, takes: Mapping[str, Column], entities: Mapping[str, Entity], links: Mapping[str, Link]) -> None:
        self._takes, self._entities, self._links = takes, entities, links

    def conditions(self, text: str) -> tuple[Condition, ...]:
        return tuple(self._condition(c) for c in _clauses(text))

    def effects(self, text: str) -> tuple[Effect, ...]:
        return tuple(self._effect(c) for c in _clauses(text))

    def _condition(self, clause: str) -> Condition:
        match clause.split():
            case ["has" | "no" as word, str(link), str(left), str(right)] if link in self._links:
                return Linked(link=link, left=self._path(left), right=self._path(right), holds=word == "has")
            case ["no", *rest, str(entity), "of", str(path)] if len(rest) < 2 and entity in self._entities:
                return self._no_row(entity, self._path(path), rest[0] if rest else "")
            case [str(path), "is" | "not" as word, *terms] if terms:
                where = self._path(path)
                return Is(path=where, terms=tuple(self._term(t, where) for t in terms), holds=word == "is")
            case [str(path), ">=", str(term)]:
                where = self._path(path)
                return AtLeast(path=where, term=self._term(term, where))
            case _:
                raise ValueError(f"no condition: {clause!r}")

    def _effect(self, clause: str) -> Effect:
        match clause.split():
            case ["new", str(entity)] if entity in self._entities:
                return New(entity=entity)
            case ["drop", str(path)]:
                return Drop(path=self._path(path))
            case ["link" | "unlink" as word, str(link), str(left), str(right)] if link in self._links:
                return Join(link=link, left=self._path(left), right=self._path(right), holds=word == "link")
            case [str(path), "=", str(term)]:
                where = self._path(path)
                return Put(path=where, term=self._term(term, where))
            case [str(path), "+=" | "-=" as word, str(term)]:
                where = self._path(path)
                return Add(path=where, term=self._term(term, where), sign=1 if word == "+=" else -1)
            case _:
                raise ValueError(f"no effect: {clause!r}")

    def _no_row(self, entity: str, path: Path, state: str) -> NoRow:
        target = self._column(path).entity
        columns = self._entities[entity].columns.values()
        refs = [c.name for c in columns if c.kind == "ref" and c.entity == target]
        if len(refs) != 1:
            raise ValueError(f"no {entity} of {'.'.join(path)}: {len(refs)} columns of {entity} refer to {target}")
        if state and not any(state in c.values for c in columns if c.kind == "state"):
            raise ValueError(f"{entity} is never {state}")
        return NoRow(entity=entity, column=refs[0], path=path, state=state)

    def _column(self, path: Path) -> Column:
        column = self._takes.get(path[0])
        for name in path[1:]:
            column = self._entities[column.entity].columns.get(name) if column and column.entity else None
        if column is None:
            raise ValueError(f"{'.'.join(path)} leads nowhere: begin with one of {', '.join(self._takes)}")
        return column

    def _path(self, text: str) -> Path:
        path = tuple(text.split("."))
        self._column(path)
        return path

    def _term(self, text: str, path: Path) -> Term:
        """What is compared with, or put into, the column at ``path``."""
        if text.split(".")[0] in self._takes:
            return self._path(text)
        column = self._column(path)
        if column.kind == "amount" and text.isdigit():
            return int(text)
        if text in column.values or (text == NONE and column.empty):
            return text
        raise ValueError(f"{'.'.join(path)} is never {text}: {', '.join(column.values) or column.kind}")


def _clauses(text: str) -> list[str]:
    return [c.strip() for c in text.split(";") if c.strip()]
