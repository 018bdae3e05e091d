"""Plans a chain in a database: goals that can be reached one after the other, each with the look-ups that tell its ids,
and how a user who knows no id would ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from envs.work.chain import Found, Step, Told
from envs.work.database import Database
from envs.work.graph import followers
from envs.work.history import draw_arguments
from envs.work.language import Entity, Is, Operation
from envs.work.sql import quoted
from posttrain.errors import ToolError

SLACK = 2
"""Calls that a chain may have more than asked for, because the last goal needs them."""
DEPTH = 3
"""How many rows may stand between a row and the word that a user knows it by."""
SAME_AS = 0.2
"""How often a value is said as that of another row."""
FOLLOW = 0.5
"""How often a goal is looked for among those that an earlier goal makes possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A step that changes something, and how to ask for it."""

    step: int
    says: str
    slots: Mapping[str, str]
    """What stands in the braces of ``says``."""
    told: Sequence[str]
    """The slots that hold a word or a number which only the user knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A description that must fit one row, as long as anybody may look it up."""

    sql: str
    values: tuple[str, ...]
    row: str

    def fits(self, database: Database) -> list[str]:
        return [i for (i,) in database.query(self.sql, self.values)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    steps: tuple[Step, ...] = ()
    goals: tuple[Goal, ...] = ()
    claims: tuple[Claim, ...] = ()
    found: Mapping[str, Found] = field(default_factory=dict[str, Found])
    """Where each id is told."""
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the user calls the rows."""
    made: Sequence[str] = ()
    """Tables that have a new row; it is called the new one, so there is only one."""


class _Hopeless(Exception):
    """A row that nobody can name, or a chain that grows too long."""


def make_plan(database: Database, wish: str, rng: Random, rows: int, length: int) -> Plan | None:
    """A chain of ``length`` calls or a few more with the goal ``wish`` first; None if this draw found none. Changes
    nothing."""
    operations = [o for o in database.domain.operations.values() if o.does]
    plan = Plan()
    with database.scratch():
        while len(plan.steps) < length:
            done = [plan.steps[g.step].tool for g in plan.goals]
            order = rng.sample(operations, len(operations))
            next_to = {t for d in done for t in followers(database.domain.name)[d]} if rng.random() < FOLLOW else set()
            order.sort(key=lambda o: (o.name in done, o.name != wish, o.name not in next_to))
            longer = _next_goal(database, plan, order, rng, rows, length + SLACK)
            if longer is None:
                return None
            plan = longer
            if plan.steps[plan.goals[0].step].tool != wish:
                return None
    return plan


def _next_goal(
    database: Database, plan: Plan, order: Sequence[Operation], rng: Random, rows: int, most: int
) -> Plan | None:
    """The plan with the first goal of ``order`` that can be had, carried out; None after some tries."""
    for operation in order[:10]:
        if operation.makes in plan.made:
            continue
        arguments = draw_arguments(database, operation, rng, rows, near=plan.found.keys())
        if arguments is None:
            continue
        try:
            longer = _Planner(database, plan, rng, most).reach(operation, arguments)
            answer = database.call(operation, arguments)
        except (_Hopeless, ToolError):  # a price that is to change may be drawn as it was
            continue
        if operation.makes:
            at, name = len(longer.steps) - 1, f"the new {operation.makes}"
            longer = replace(
                longer,
                found={**longer.found, answer: Found(step=at)},
                names={**longer.names, answer: name},
                made=(*longer.made, operation.makes),
            )
        return longer
    return None


class _Planner:
    """Adds one goal to a plan, look-ups first."""

    def __init__(self, database: Database, plan: Plan, rng: Random, most: int) -> None:
        self._database, self._rng, self._most = database, rng, most
        self._steps, self._claims = list(plan.steps), list(plan.claims)
        self._found, self._names = dict(plan.found), dict(plan.names)
        self._fresh = {row for row, name in plan.names.items() if name.startswith("the new ")}
        self._plan = plan
        self._asked: list[str] = []
        """Rows that are being looked up: none of them may be told by itself."""

    def reach(self, operation: Operation, arguments: Mapping[str, str]) -> Plan:
        """The plan with ``operation`` as its last step. Raises _Hopeless."""
        values: dict[str, Told | Found] = {}
        slots: dict[str, str] = {}
        told: list[str] = []
        for name, column in operation.parameters.items():
            text = arguments[name]
            if column.kind == "ref":
                slots[name] = self._look_up(column.entity, text, DEPTH)
                values[name] = self._found[text]
            elif f"{{{name}}}" not in operation.says:
                values[name] = self._look_at(operation, name, arguments)
            else:
                same = self._same_as(operation, name, arguments) if column.kind == "choice" else None
                values[name], slots[name] = same or (Told(text=text), text)
                told += [] if same else [name]
        self._add(Step(tool=operation.name, arguments=values))
        goal = Goal(step=len(self._steps) - 1, says=operation.says, slots=slots, told=told)
        return replace(
            self._plan,
            steps=tuple(self._steps),
            goals=(*self._plan.goals, goal),
            claims=tuple(self._claims),
            found=self._found,
            names=self._names,
        )

    def _add(self, step: Step) -> int:
        if len(self._steps) == self._most:
            raise _Hopeless
        self._steps.append(step)
        return len(self._steps) - 1

    def _query(self, sql: str, *values: str) -> list[tuple[Any, ...]]:
        return self._database.query(sql, values)

    def _look_up(self, entity: str, row: str, depth: int) -> str:
        """What a user calls the row; its id is found in some step then. Raises _Hopeless."""
        if row in self._found:
            return self._names[row]
        made = self._database.domain.entities[entity]
        routes = [self._from_child, self._from_parent]
        self._rng.shuffle(routes)
        if made.key and self._rng.random() < 0.7:
            return self._by_key(made, row)
        self._asked.append(row)
        names = (route(made, row, depth) for route in routes if depth)
        name = next((n for n in names if n), None)
        self._asked.pop()
        if name:
            return name
        if made.key:
            return self._by_key(made, row)
        raise _Hopeless

    def _by_key(self, entity: Entity, row: str) -> str:
        assert entity.key is not None
        [(word,)] = self._query(f"select {quoted(entity.key.name)} from {quoted(entity.name)} where id = ?", row)
        at = self._add(Step(tool=f"find_{entity.name}", arguments={entity.key.name: Told(text=word)}))
        return self._tell(row, Found(step=at), f"{entity.name} {word}")

    def _tell(self, row: str, where: Found, name: str) -> str:
        self._found[row], self._names[row] = where, name
        return name

    def _from_parent(self, entity: Entity, row: str, depth: int) -> str | None:
        """``the loan of member ada``, ``the red car of owner ben``: the one of its kind under what it refers to."""
        refs = [c for c in entity.columns.values() if c.kind == "ref"]
        for ref in self._rng.sample(refs, len(refs)):
            table, column = quoted(entity.name), quoted(ref.name)
            [(parent,)] = self._query(f"select {column} from {table} where id = ?", row)
            if parent is None or parent in self._fresh or parent in self._asked:
                continue
            for told in ("", *entity.fixed):
                [(word,)] = self._query(f"select {quoted(told) if told else 'null'} from {table} where id = ?", row)
                sql = f"select id from {table} where {column} = ?" + (f" and {quoted(told)} = ?" if told else "")
                claim = Claim(sql=sql, values=(parent, word) if told else (parent,), row=row)
                if claim.fits(self._database) == [row]:
                    break
            else:
                continue
            owner = self._look_up(ref.entity, parent, depth - 1)
            tool = f"list_{entity.name}_by_{ref.name}"
            at = self._add(Step(tool=tool, arguments={ref.name: self._found[parent]}))
            self._claims.append(claim)
            several = sum(c.entity == ref.entity for c in refs) > 1
            name = f"the {word + ' ' if told else ''}{entity.name} {f'with {ref.name}' if several else 'of'} {owner}"
            return self._tell(row, Found(step=at, where={told: word} if told else {}), name)
        return None

    def _from_child(self, entity: Entity, row: str, depth: int) -> str | None:
        """``the owner of car fox``: what a row with a name refers to."""
        for child in self._database.domain.entities.values():
            refs = [c.name for c in child.columns.values() if c.kind == "ref" and c.entity == entity.name]
            for ref in refs if child.key else ():
                sql = f"select id from {quoted(child.name)} where {quoted(ref)} = ? order by rowid"
                children = self._query(sql, row)
                one = self._rng.choice([i for (i,) in children]) if children else None
                if one is None or one in (*self._fresh, *self._asked) or self._rng.random() < 0.5:
                    continue
                name = self._look_up(child.name, one, depth - 1)
                at = self._add(Step(tool=f"get_{child.name}", arguments={child.name: self._found[one]}))
                self._claims.append(
                    Claim(sql=f"select {quoted(ref)} from {quoted(child.name)} where id = ?", values=(one,), row=row)
                )
                return self._tell(row, Found(step=at, column=ref), f"the {ref} of {name}")
        return None

    def _look_at(self, operation: Operation, name: str, arguments: Mapping[str, str]) -> Found:
        """An amount that nobody says, because it is what stands in the database."""
        paths = (c.path for c in operation.needs if isinstance(c, Is) and c.terms == ((name,),))
        first, *rest = next(paths)
        row, column = arguments[first], operation.parameters[first]
        for step in rest[:-1]:
            entity = self._database.domain.entities[column.entity]
            [(below,)] = self._query(f"select {quoted(step)} from {quoted(entity.name)} where id = ?", row)
            self._found[below] = self._get(entity.name, row, step)
            row, column = below, entity.columns[step]
        return self._get(column.entity, row, rest[-1])

    def _get(self, entity: str, row: str, column: str) -> Found:
        at = self._add(Step(tool=f"get_{entity}", arguments={entity: self._found[row]}))
        return Found(step=at, column=column)

    def _same_as(self, operation: Operation, name: str, arguments: Mapping[str, str]) -> tuple[Found, str] | None:
        """``the city of member ben`` for a word that another row with a name has."""
        column, text = operation.parameters[name], arguments[name]
        ends = any(f"{word} {{{name}}}" in operation.says for word in ("to", name))
        if not ends or self._rng.random() >= SAME_AS or len(self._steps) + 3 > self._most:
            return None
        for entity in self._database.domain.entities.values():
            if not entity.key or entity.columns.get(column.name) != column:
                continue
            sql = f"select id from {quoted(entity.name)} where {quoted(column.name)} = ? order by rowid"
            others = [i for (i,) in self._query(sql, text) if i not in {*arguments.values(), *self._fresh}]
            if not others:
                return None
            row = self._rng.choice(others)
            owner = self._names[row] if row in self._found else self._by_key(entity, row)
            sql = f"select {quoted(column.name)} from {quoted(entity.name)} where id = ?"
            self._claims.append(Claim(sql=sql, values=(row,), row=text))
            return self._get(entity.name, row, column.name), f"the {column.name} of {owner}"
        return None
