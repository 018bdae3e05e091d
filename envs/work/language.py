"""The language that domains are written in: tables, and operations with explicit pre- and postconditions.

A *path* begins with a parameter and goes on by columns: ``loan`` is the id itself, ``loan.book.state`` a column of the
row that ``loan.book`` refers to. A *term* is a path, a word or a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

NONE = "none"
"""How an empty reference reads."""

Path = tuple[str, ...]
Term = Path | str | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    name: str
    kind: Literal["key", "choice", "state", "amount", "ref"]
    """``key``: a word that tells the row from the others of its table; ``state``: changed by actions only."""
    values: tuple[str, ...] = ()
    """Words that it may hold; a new row begins in the first state."""
    entity: str = ""
    """The table that a ``ref`` points to."""
    free: bool = False
    """A tool of its own may set it. A choice that is not free tells rows apart in lists."""
    empty: bool = False
    """A ``ref`` that a new row begins without."""
    start: tuple[int, int] | None = None
    """Bounds of an amount that a new row is given; without them it begins at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    name: str
    columns: Mapping[str, Column]

    @property
    def key(self) -> Column | None:
        """The column that people know a row by, if there is one."""
        return next((c for c in self.columns.values() if c.kind == "key"), None)

    @property
    def fixed(self) -> tuple[str, ...]:
        """The columns that lists show: they tell rows apart and never change."""
        return tuple(c.name for c in self.columns.values() if c.kind == "choice" and not c.free)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A relation of many to many: which ``left`` rows go with which ``right`` rows."""

    name: str
    left: str
    right: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Is:
    """The value at ``path`` is one of ``terms``; or, if not ``holds``, none of them."""

    path: Path
    terms: tuple[Term, ...]
    holds: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AtLeast:
    path: Path
    term: Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Linked:
    link: str
    left: Path
    right: Path
    holds: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRow:
    """No row of ``entity`` (in ``state``, if that is said) refers by ``column`` to the row at ``path``."""

    entity: str
    column: str
    path: Path
    state: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unused:
    """No row of ``entity`` has the key that the parameter of the same name says."""

    entity: str
    column: str


Condition = Is | AtLeast | Linked | NoRow | Unused


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    path: Path
    term: Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    path: Path
    term: Term
    sign: Literal[1, -1]


@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """A row whose columns are the parameters of the same names; the others begin as their columns say."""

    entity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Make a link, or undo it if not ``holds``."""

    link: str
    left: Path
    right: Path
    holds: bool = True


Effect = Put | Add | New | Drop | Join


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A tool. It reads (``reads``) or it changes (``does``), never both."""

    name: str
    description: str
    parameters: Mapping[str, Column]
    """A ``ref`` takes the id of a row of its entity."""
    reads: str = ""
    """The entity whose rows it answers."""
    by: str = ""
    """The column, or the link, that the parameter is compared with; empty: the id."""
    needs: tuple[Condition, ...] = ()
    does: tuple[Effect, ...] = ()
    says: str = ""
    """How a user asks for it, with the parameters in braces. What is not in it must be looked up."""

    @cached_property
    def makes(self) -> str:
        """The entity of the row that it adds, if any: its answer is that row's id."""
        return next((e.entity for e in self.does if isinstance(e, New)), "")

    @cached_property
    def gives(self) -> str:
        """The entity whose ids its answer tells, if any."""
        return self.reads or self.makes

    @cached_property
    def takes(self) -> tuple[str, ...]:
        """The entities whose ids it must be told."""
        return tuple(self.parameters[n].entity for n in self.ids)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The parameters that are ids."""
        return tuple(n for n, c in self.parameters.items() if c.kind == "ref")

    @cached_property
    def amounts(self) -> tuple[str, ...]:
        """The parameters that are amounts."""
        return tuple(n for n, c in self.parameters.items() if c.kind == "amount")


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    name: str
    entities: Mapping[str, Entity]
    """What is referred to stands before what refers to it."""
    links: Mapping[str, Link]
    operations: Mapping[str, Operation]

    def kind(self, operation: Operation, path: Path) -> Column:
        """The column that ``path`` ends in. Raises KeyError where it leads nowhere."""
        column = operation.parameters[path[0]]
        for name in path[1:]:
            column = self.entities[column.entity].columns[name]
        return column
