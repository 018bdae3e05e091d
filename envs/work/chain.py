"""Chains: calls whose arguments are told by the user or found in the answers of earlier calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from envs.work.database import Database, cells
from posttrain.errors import ToolError


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the user says."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A column of the one row of an earlier answer that shows what ``where`` says."""

    step: int
    column: str = "id"
    where: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    tool: str
    arguments: Mapping[str, Told | Found]


Steps = Sequence[Step | None]
"""None stands for a step that is left out, so that the others keep their numbers."""


def to_json(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """JSON values that ``from_json`` reads."""
    return [asdict(s) for s in steps]


def from_json(steps: Sequence[Mapping[str, Any]]) -> list[Step]:
    """What ``to_json`` wrote."""

    def value(data: Mapping[str, Any]) -> Told | Found:
        return Told(**data) if "text" in data else Found(**data)

    return [Step(tool=s["tool"], arguments={k: value(v) for k, v in s["arguments"].items()}) for s in steps]


def known(value: Told | Found, answers: Sequence[str]) -> str | None:
    """The argument, or None if no answer tells it."""
    if isinstance(value, Told):
        return value.text
    rows = [r for r in cells(answers[value.step]) if value.where.items() <= r.items()]
    return rows[0].get(value.column) if len(rows) == 1 else None


def arguments_of(step: Step, answers: Sequence[str]) -> dict[str, str] | None:
    """The arguments of a call, or None if one of them is not known."""
    found = {k: known(v, answers) for k, v in step.arguments.items()}
    told = {k: v for k, v in found.items() if v is not None}
    return told if len(told) == len(found) else None


def run(database: Database, steps: Steps, answers: Sequence[str] = ()) -> list[str]:
    """The answers to all steps, after those given. A step that is left out, or that lacks an argument, has none."""
    told = list(answers)
    for step in steps[len(told) :]:
        filled = arguments_of(step, told) if step else None
        if step is None or filled is None:
            told.append("")
            continue
        try:
            told.append(database.call(database.domain.operations[step.tool], filled))
        except ToolError as error:
            told.append(str(error))
    return told


def insert(steps: Sequence[Step], at: int, extra: Step) -> list[Step]:
    """The chain with one more step before ``at``."""

    def moved(value: Told | Found) -> Told | Found:
        return replace(value, step=value.step + 1) if isinstance(value, Found) and value.step >= at else value

    later = [replace(s, arguments={k: moved(v) for k, v in s.arguments.items()}) for s in steps[at:]]
    return [*steps[:at], extra, *later]
