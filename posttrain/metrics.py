"""Numbers of a run, one JSONL record a step and stage. The type of a value says how it reduces over the step."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.files import write_text
from posttrain.journal import Journal, read_journal


@dataclass(frozen=True, slots=True)
class Last:
    """The newest value stands for the step; what a plain number means."""

    value: float


@dataclass(frozen=True, slots=True)
class Max:
    """The largest value of the step."""

    value: float


@dataclass(frozen=True, slots=True)
class Sum:
    """The total of the step."""

    value: float


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of the step, each value counting ``weight`` times."""

    value: float
    weight: float = 1.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """Mean of many; weight 0 if there are none."""
        numbers = list(values)
        return cls(math.fsum(numbers) / len(numbers), len(numbers)) if numbers else cls(0.0, 0.0)


Value = Last | Max | Sum | Mean


class Metrics:
    """Writes ``metrics.jsonl``: ``{"stage", "step", "time", NAME: number, ...}``. Safe to call from any thread."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._journal = Journal(self.path)
        self._open: dict[str, dict[str, Value]] = {}
        self._lock = threading.Lock()

    def add(self, stage: str, values: Mapping[str, float | Value]) -> None:
        """Contribute to the step that ``stage`` logs next."""
        with self._lock:
            self._add(stage, values)

    def log(self, step: int, stage: str, values: Mapping[str, float | Value]) -> dict[str, float | None]:
        """Write the record of one step: ``values`` and all added since the last one.

        Returns the reduced numbers. What has no number (not finite, a mean of nothing) is written as null.
        """
        with self._lock:
            self._add(stage, values)
            numbers = {name: _number(value) for name, value in self._open.pop(stage, {}).items()}
            self._journal.write({"stage": stage, "step": step, "time": round(time.time(), 3), **numbers})
        return numbers

    def rewind(self, stage: str, step: int) -> None:
        """Forget what ``stage`` logged after ``step``: those steps will be done again. -1 forgets the whole stage."""
        with self._lock:
            kept = [r for r in read_journal(self.path) if r["stage"] != stage or r["step"] <= step]
            self._open.pop(stage, None)
            self._journal.close()
            write_text(self.path, "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in kept))
            self._journal = Journal(self.path)

    def records(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Everything logged so far, oldest first, of one stage or of all."""
        return [r for r in read_journal(self.path) if stage is None or r["stage"] == stage]

    def close(self) -> None:
        """Idempotent."""
        self._journal.close()

    def _add(self, stage: str, values: Mapping[str, float | Value]) -> None:
        step = self._open.setdefault(stage, {})
        for name, value in values.items():
            if name in ("stage", "step", "time"):
                raise ValueError(f"a metric cannot be called {name!r}: the record has that key")
            new = value if isinstance(value, Value) else Last(float(value))
            step[name] = _reduce(name, step[name], new) if name in step else new


def _reduce(name: str, old: Value, new: Value) -> Value:
    match old, new:
        case Last(), Last():
            return new
        case Max(), Max():
            return Max(max(old.value, new.value))
        case Sum(), Sum():
            return Sum(old.value + new.value)
        case Mean(), Mean():
            weight = old.weight + new.weight
            return Mean((old.value * old.weight + new.value * new.weight) / weight if weight else 0.0, weight)
        case _:
            raise TypeError(f"metric {name!r} is a {type(old).__name__} and now a {type(new).__name__}")


def _number(value: Value) -> float | None:
    if isinstance(value, Mean) and value.weight == 0:
        return None
    return value.value if math.isfinite(value.value) else None
