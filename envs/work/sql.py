"""Operations as SQL: preconditions become one query, effects one statement each, and callable arguments a join.

Names come from domain files alone and are quoted, since a table may be called "order"; values are always bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from envs.work.domain import load_domain
from envs.work.language import (
    NONE,
    Add,
    AtLeast,
    Column,
    Condition,
    Domain,
    Drop,
    Effect,
    Is,
    Join,
    Linked,
    New,
    NoRow,
    Operation,
    Path,
    Put,
    Term,
    Unused,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statements:
    """What an operation does in SQL. Parameters are bound by name."""

    check: str
    """One column for each precondition: 1 if it holds. Empty if there are none."""
    shown: Sequence[str]
    """For each precondition a query for the value that it is about, or nothing."""
    effects: Sequence[str]
    read: str
    """Answers the rows of an operation that reads."""
    columns: Sequence[str]
    """What it shows of them after the id."""
    arguments: str
    """All ids for which the preconditions hold, given the words; then the most that each amount may be (null: any)."""


@cache
def statements(name: str) -> Mapping[str, Statements]:
    """The statements of every operation of the domain ``name``."""
    domain = load_domain(name)
    return {o.name: _statements(domain, o) for o in domain.operations.values()}


@cache
def schema(name: str) -> str:
    """Tables with their foreign keys, their legal words, and no amount below zero."""
    domain = load_domain(name)
    tables = [
        f"create table {quoted(e.name)} (id text primary key, {', '.join(map(_definition, e.columns.values()))})"
        for e in domain.entities.values()
    ]
    for link in domain.links.values():
        sides = ", ".join(f"{quoted(s)} text not null references {quoted(s)}(id)" for s in (link.left, link.right))
        key = f"primary key ({quoted(link.left)}, {quoted(link.right)})"
        tables.append(f"create table {quoted(link.name)} ({sides}, {key})")
    return ";".join(tables)


def quoted(name: str) -> str:
    return f'"{name}"'


def _definition(column: Column) -> str:
    name = quoted(column.name)
    match column.kind:
        case "ref":
            return f"{name} text {'' if column.empty else 'not null '}references {quoted(column.entity)}(id)"
        case "amount":
            return f"{name} integer not null check ({name} >= 0)"
        case "key":
            return f"{name} text not null unique"
        case _:
            return f"{name} text not null check ({name} in ({_words(column.values)}))"


def _words(words: Sequence[str]) -> str:
    return ", ".join(f"'{w}'" for w in words)


def _statements(domain: Domain, operation: Operation) -> Statements:
    bound = _Writer(domain, operation, {n: f":{n}" for n in operation.parameters})
    conditions = [bound.condition(c) for c in operation.needs]
    entity = domain.entities.get(operation.reads)
    columns = () if entity is None else entity.fixed if operation.by else tuple(entity.columns)
    return Statements(
        check=f"select {', '.join(conditions)}" if conditions else "",
        shown=[f"select {bound.path(c.path)}" if isinstance(c, Is | AtLeast) else "" for c in operation.needs],
        effects=[bound.effect(e) for e in operation.does],
        read=_read(domain, operation, columns) if operation.reads else "",
        columns=columns,
        arguments=_arguments(domain, operation),
    )


def _read(domain: Domain, operation: Operation, columns: Sequence[str]) -> str:
    table = quoted(operation.reads)
    [name] = operation.parameters
    if operation.by in domain.links:
        link = quoted(operation.by)
        where = f"id in (select {table} from {link} where {quoted(name)} = :{name})"
    else:
        where = f"{quoted(operation.by or 'id')} = :{name}"
    return f"select {', '.join(map(quoted, ('id', *columns)))} from {table} where {where} order by rowid"


def _arguments(domain: Domain, operation: Operation) -> str:
    ids = {n: c.entity for n, c in operation.parameters.items() if c.kind == "ref"}
    amounts = [n for n, c in operation.parameters.items() if c.kind == "amount"]
    roots = {n: f'"of {n}".id' if n in ids else f":{n}" for n in operation.parameters}
    writer = _Writer(domain, operation, roots)
    where: list[str] = []
    most: dict[str, list[str]] = {n: [] for n in amounts}
    for condition in operation.needs:
        match condition:
            # An amount that is still open must be what stands there, or no more than that.
            case Is(path=path, terms=((name,),), holds=True) | AtLeast(path=path, term=(name,)) if name in most:
                most[name].append(writer.path(path))
                where.append(f"coalesce({writer.path(path)} >= 1, 0)")
            case Is(terms=((name,),)) if name in most:
                pass
            case _:
                where.append(writer.condition(condition))
    bounds = [f"min({', '.join(m)})" if len(m) > 1 else m[0] if m else "null" for m in most.values()]
    tables = ", ".join(f'{quoted(e)} as "of {n}"' for n, e in ids.items())
    shown = ", ".join([*(roots[n] for n in ids), *bounds]) or "1"
    order = ", ".join(f'"of {n}".rowid' for n in ids)
    return (
        f"select {shown}{' from ' + tables if tables else ''} where {' and '.join(where) or '1'}"
        f"{' order by ' + order if order else ''}"
    )


class _Writer:
    """Writes expressions; ``roots`` says how each parameter is written."""

    def __init__(self, domain: Domain, operation: Operation, roots: Mapping[str, str]) -> None:
        self._domain, self._operation, self._roots = domain, operation, roots

    def path(self, path: Path) -> str:
        """Null where a reference on the way is empty."""
        if len(path) == 1:
            return self._roots[path[0]]
        owner = self._domain.kind(self._operation, path[:-1]).entity
        return f"(select {quoted(path[-1])} from {quoted(owner)} where id = {self.path(path[:-1])})"

    def term(self, term: Term) -> str:
        if isinstance(term, tuple):
            return self.path(term)
        return str(term) if isinstance(term, int) else "null" if term == NONE else f"'{term}'"

    def condition(self, condition: Condition) -> str:
        match condition:
            case Is(path=path, terms=terms, holds=holds):
                # "is" tells null from null and from everything else, where "=" would not.
                same = " or ".join(f"{self.path(path)} is {self.term(t)}" for t in terms)
                return f"({same})" if holds else f"not ({same})"
            case AtLeast(path=path, term=term):
                return f"coalesce({self.path(path)} >= {self.term(term)}, 0)"
            case Linked(link=link, left=left, right=right, holds=holds):
                return f"{'' if holds else 'not '}exists (select 1 {self._pair(link, left, right)})"
            case NoRow(entity=entity, column=column, path=path, state=state):
                where = f"{quoted(column)} = {self.path(path)}" + (f" and state = '{state}'" if state else "")
                return f"not exists (select 1 from {quoted(entity)} where {where})"
            case Unused(entity=entity, column=column):
                return f"not exists (select 1 from {quoted(entity)} where {quoted(column)} = {self._roots[column]})"

    def effect(self, effect: Effect) -> str:
        match effect:
            case Put(path=path, term=term):
                return self._update(path, self.term(term))
            case Add(path=path, term=term, sign=sign):
                return self._update(path, f"{quoted(path[-1])} {'+' if sign > 0 else '-'} {self.term(term)}")
            case New(entity=entity):
                return self._insert(entity)
            case Drop(path=path):
                table = self._domain.kind(self._operation, path).entity
                return f"delete from {quoted(table)} where id = {self.path(path)}"
            case Join(link=link, left=left, right=right, holds=True):
                return f"insert into {quoted(link)} values ({self.path(left)}, {self.path(right)})"
            case Join(link=link, left=left, right=right):
                return f"delete {self._pair(link, left, right)}"

    def _update(self, path: Path, value: str) -> str:
        owner = self._domain.kind(self._operation, path[:-1]).entity
        return f"update {quoted(owner)} set {quoted(path[-1])} = {value} where id = {self.path(path[:-1])}"

    def _pair(self, name: str, left: Path, right: Path) -> str:
        link = self._domain.links[name]
        sides = f"{quoted(link.left)} = {self.path(left)} and {quoted(link.right)} = {self.path(right)}"
        return f"from {quoted(name)} where {sides}"

    def _insert(self, name: str) -> str:
        values = [":id"]
        for column in self._domain.entities[name].columns.values():
            match column.kind:
                case "state":
                    values.append(f"'{column.values[0]}'")
                case _ if column.name in self._operation.parameters:
                    values.append(self._roots[column.name])
                case kind:
                    values.append("0" if kind == "amount" else "null")
        return f"insert into {quoted(name)} values ({', '.join(values)})"
