"""Domains: reads a domain's file and derives the tools that every table has.

The file says tables with columns, relations of many to many, and actions. Every table gets tools to find, get and list
its rows and to set what is free to be set; rows that no action makes can be added and removed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import yaml

from envs.work.clauses import Clauses, parameters
from envs.work.language import (
    NONE,
    Add,
    AtLeast,
    Column,
    Domain,
    Drop,
    Entity,
    Is,
    Join,
    Link,
    Linked,
    New,
    NoRow,
    Operation,
    Path,
    Put,
    Unused,
)
from envs.work.words import POOLS
from posttrain.errors import ConfigError

FOLDER = pathlib.Path(__file__).parent / "domains"

DOMAINS: tuple[str, ...] = tuple(sorted(f.stem for f in FOLDER.glob("*.yaml")))
"""Names of all domains, one file each."""


@cache
def load_domain(name: str) -> Domain:
    """The domain of that name. Raises ConfigError that names the file and what is wrong in it."""
    file = FOLDER / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"no domain {name!r}: choose of {', '.join(DOMAINS)}")
    return read_domain(name, yaml.safe_load(file.read_text()), str(file.name))


def read_domain(name: str, data: Mapping[str, Any], file: str) -> Domain:
    """A domain from what its file says. Raises ConfigError that names ``file`` and the key."""
    where = "tables"
    try:
        entities: dict[str, Entity] = {}
        for table, columns in data["tables"].items():
            where = f"tables.{table}"
            made = {c: _column(c, str(spec), entities) for c, spec in columns.items()}
            entities[table] = Entity(name=table, columns=made)
        links: dict[str, Link] = {}
        for link, text in data.get("links", {}).items():
            where = f"links.{link}"
            left, right = text.split()
            links[link] = Link(name=link, left=entities[left].name, right=entities[right].name)
        actions: list[Operation] = []
        for action, spec in data["actions"].items():
            where = f"actions.{action}"
            actions.append(_action(action, spec, entities, links))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{file}: {where}: {error}") from error
    made = {a.makes for a in actions}
    joined = {e.link for a in actions for e in a.does if isinstance(e, Join)}
    derived = [o for e in entities.values() for o in _tools(e, entities, links, e.name in made)]
    derived += [o for link in links.values() for o in _link_tools(link, link.name in joined)]
    operations = {o.name: o for o in (*derived, *actions)}
    if len(operations) < len(derived) + len(actions):
        raise ConfigError(f"{file}: actions: an action has the name of another tool")
    return Domain(name=name, entities=entities, links=links, operations=operations)


def _column(name: str, spec: str, entities: Mapping[str, Entity]) -> Column:
    words = spec.split()
    free, empty = words[0] == "free", words[0] == "maybe"
    match words[1:] if words[0] in ("free", "maybe") else words:
        case ["ref", str(entity)]:
            return Column(name=name, kind="ref", entity=entities[entity].name, free=free, empty=empty)
        case ["key", str(pool)]:
            return Column(name=name, kind="key", values=POOLS[pool])
        case ["state", *states] if len(states) > 1:
            return Column(name=name, kind="state", values=tuple(states))
        case ["amount"]:
            return Column(name=name, kind="amount")
        case ["amount", str(low), str(high)]:
            return Column(name=name, kind="amount", start=(int(low), int(high)), free=free)
        case ["fixed", *values] if values:
            return Column(name=name, kind="choice", values=_values(values))
        case [*values] if free and len(_values(values)) > 1:
            return Column(name=name, kind="choice", values=_values(values), free=True)
        case _:
            raise ValueError(f"{name}: no column: {spec!r}")


def _values(words: list[str]) -> tuple[str, ...]:
    return POOLS[words[0]] if words[0] in POOLS else tuple(words)


def _action(name: str, spec: Mapping[str, str], entities: Mapping[str, Entity], links: Mapping[str, Link]) -> Operation:
    unknown = sorted(set(spec) - {"takes", "needs", "does", "says"})
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}")
    made = next((c.split()[1] for c in spec["does"].split(";") if c.split()[0] == "new"), "")
    takes = parameters(spec["takes"], made, entities)
    clauses = Clauses(takes, entities, links)
    does = clauses.effects(spec["does"])
    there = dict.fromkeys(p for e in does if isinstance(e, Add | Put) for p in _empty_refs(e.path, takes, entities))
    if made:
        _check_made(entities[made], takes)
    return Operation(
        name=name,
        description=spec["says"].replace("{", "").replace("}", ""),
        parameters=takes,
        needs=(
            *_unused(made, entities),
            *clauses.conditions(spec.get("needs", "")),
            *(Is(path=p, terms=(NONE,), holds=False) for p in there),
            *(AtLeast(path=e.path, term=e.term) for e in does if isinstance(e, Add) and e.sign < 0),
        ),
        does=does,
        says=spec["says"],
    )


def _empty_refs(path: Path, takes: Mapping[str, Column], entities: Mapping[str, Entity]) -> Iterator[Path]:
    """The references on the way of an effect that may be empty: it needs them not to be."""
    column = takes[path[0]]
    for length, name in enumerate(path[1:-1], start=2):
        column = entities[column.entity].columns[name]
        if column.empty:
            yield path[:length]


def _unused(made: str, entities: Mapping[str, Entity]) -> tuple[Unused, ...]:
    key = entities[made].key if made else None
    return (Unused(entity=made, column=key.name),) if key else ()


def _check_made(entity: Entity, takes: Mapping[str, Column]) -> None:
    for column in _asked(entity):
        if column.name not in takes:
            raise ValueError(f"new {entity.name} must take {column.name}")


def _asked(entity: Entity) -> list[Column]:
    """The columns that a new row must be told."""
    return [
        c
        for c in entity.columns.values()
        if c.kind in ("key", "choice") or c.start is not None or (c.kind == "ref" and not c.empty)
    ]


def _tools(
    entity: Entity, entities: Mapping[str, Entity], links: Mapping[str, Link], made: bool
) -> Iterator[Operation]:
    """What every table has. ``made``: an action adds its rows."""
    e = entity.name
    row = Column(name=e, kind="ref", entity=e)
    if entity.key:
        key = entity.key
        yield Operation(
            name=f"find_{e}", description=f"{e} by {key.name}", parameters={key.name: key}, reads=e, by=key.name
        )
    yield Operation(name=f"get_{e}", description=f"all of a {e}", parameters={e: row}, reads=e)
    for c in entity.columns.values():
        if c.kind in ("ref", "choice", "state"):
            about = f"each {e} of a {c.name}"
            yield Operation(name=f"list_{e}_by_{c.name}", description=about, parameters={c.name: c}, reads=e, by=c.name)
        if c.free:
            yield Operation(
                name=f"set_{e}_{c.name}",
                description=f"{c.name} of a {e}",
                parameters={e: row, c.name: c},
                needs=(Is(path=(e, c.name), terms=((c.name,),), holds=False),),
                does=(Put(path=(e, c.name), term=(c.name,)),),
                says=f"set the {c.name} of {{{e}}} to {{{c.name}}}",
            )
    if made:
        return
    asked = _asked(entity)
    refs = " and ".join(f"{{{c.name}}}" for c in asked if c.kind == "ref")
    rest = "".join(f", {c.name} {{{c.name}}}" for c in asked if c.kind != "ref")
    yield Operation(
        name=f"new_{e}",
        description=f"add a {e}",
        parameters={c.name: c for c in asked},
        needs=_unused(e, entities),
        does=(New(entity=e),),
        says=f"add a new {e}{' for ' if refs else ''}{refs}{rest}",
    )
    users = ((o.name, c) for o in entities.values() for c in o.columns.values() if c.kind == "ref" and c.entity == e)
    rows = tuple(NoRow(entity=o, column=c.name, path=(e,)) for o, c in users)
    joined = tuple(NoRow(entity=k.name, column=e, path=(e,)) for k in links.values() if e in (k.left, k.right))
    yield Operation(
        name=f"drop_{e}",
        description=f"remove a {e}",
        parameters={e: row},
        needs=(*rows, *joined),
        does=(Drop(path=(e,)),),
        says=f"remove {{{e}}}",
    )


def _link_tools(link: Link, made: bool) -> Iterator[Operation]:
    """What every relation has. ``made``: an action links."""
    name, left, right = link.name, link.left, link.right
    rows = {e: Column(name=e, kind="ref", entity=e) for e in (left, right)}
    for one, other in ((left, right), (right, left)):
        yield Operation(
            name=f"list_{one}_by_{name}",
            description=f"each {one} with a {name} of a {other}",
            parameters={other: rows[other]},
            reads=one,
            by=name,
        )
    for verb, holds in (("drop", False), *(() if made else (("add", True),))):
        yield Operation(
            name=f"{verb}_{name}",
            description=f"{verb} the {name} of a {left} and a {right}",
            parameters=rows,
            needs=(Linked(link=name, left=(left,), right=(right,), holds=not holds),),
            does=(Join(link=name, left=(left,), right=(right,), holds=holds),),
            says=f"{verb} the {name} of {{{left}}} and {{{right}}}",
        )
