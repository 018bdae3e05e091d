"""Which task a group works on: a fixed function of the seed and the group's number, so that a resumed run agrees."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from posttrain.protocols import World
from posttrain.types import Task


class TaskStream:
    """Tasks of several worlds, mixed by share."""

    def __init__(self, worlds: Mapping[str, World], shares: Mapping[str, float], per_world: int, seed: int) -> None:
        self._names = sorted(shares)
        self._weights = [shares[n] for n in self._names]
        self._tasks = {n: worlds[n].tasks("train", per_world, seed) for n in self._names}
        self._seed = seed

    def __call__(self, number: int) -> Task:
        """The task of group ``number``. With replacement: a task may come again under other weights."""
        rng = Random(f"{self._seed}/{number}")
        name = rng.choices(self._names, self._weights)[0]
        return rng.choice(self._tasks[name])
