"""Random turns, tokens and latencies of simulated rollouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from posttrain.errors import UserError
from posttrain.journal import read_journal, rollout_from_dict
from posttrain.run import RunDir
from posttrain.simulate_settings import Constant, Distribution, FromRun, Lognormal, Measured

_Z99 = 2.3263478740408408
"""99 % of a standard normal are below."""


class Sampler:
    """A distribution made ready. Raises UserError for a run that has no such rollouts."""

    def __init__(self, spec: Distribution) -> None:
        self.spec = spec
        self._values = np.zeros(0)
        if isinstance(spec, Measured):
            self._values = np.asarray(spec.values)
        elif isinstance(spec, FromRun):
            self._values = np.asarray(list(_found(spec)))
            if not len(self._values):
                where = f" of world {spec.world}" if spec.world is not None else ""
                raise UserError(f"{_journal(spec)}: holds no valid rollout{where}; name another stage or world")

    def draw(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        """Independent values of ``shape``."""
        match self.spec:
            case Constant(value=value):
                return np.full(shape, value)
            case Lognormal(median=median, p99=p99, most=most):
                found = median * np.exp(math.log(p99 / median) / _Z99 * rng.standard_normal(shape))
                return found if most is None else np.minimum(found, most)
            case _:
                return self._values[rng.integers(len(self._values), size=shape)]


def _found(spec: FromRun) -> Iterator[float]:
    for record in read_journal(_journal(spec)):
        rollout = rollout_from_dict(record)
        turns = sum(m.role == "assistant" for m in rollout.messages)
        if not turns or not rollout.valid or (spec.world is not None and rollout.task.world != spec.world):
            continue
        match spec.what:
            case "turns":
                yield turns
            case "seconds":
                yield rollout.wall_s / turns
            case "tokens":
                yield rollout.sampled_tokens / turns


def _journal(spec: FromRun) -> Path:
    path = RunDir.require(spec.run).rollouts(spec.stage)
    if not path.is_file():
        there = ", ".join(p.stem for p in sorted(path.parent.glob("expert-*.jsonl"))) or "no expert's"
        raise UserError(f"{path}: there is no such journal; the run has {there}")
    return path
