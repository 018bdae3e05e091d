"""Which task a group works on: a fixed function of the seed, the group's number and the groups that have ended, so that
a resumed run agrees.

Without a curriculum it is the seed and the number alone. With one, a task of pass rate p and difficulty d is drawn by

    weight = 0.01 + 4 p (1 - p) exp(-((d - P) / width)^2 / 2)

The two axes, pass rate and the capability that a task demands, easy tasks first and hard ones later, are
LongCat-Flash-Thinking-2601's (arXiv 2601.16725), which prints no formula. p (1 - p) is the variance of the
outcome, so what a group can teach (learnability, arXiv 2502.12272), here at most 1; P is the pass rate of the whole
world, so that the window over difficulty, easiest 0 and hardest 1, moves to harder tasks as the expert gets better. The
constant lets every task come some time. A task that was all right or all wrong a few times in a row rests for a while
and comes back (with-replacement filtering, arXiv 2509.18883). A drawn task is given to ``1 + round(a (1 - p))``
groups in a row, each with advantages of its own: the oversampling coefficient of 2601.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean
from typing import Any

from experts.budget import allocate
from experts.config import CurriculumConfig
from posttrain.protocols import World
from posttrain.types import Rollout, Task

_ANY = 0.01
"""Weight that every task has."""
_START = 0.25
"""Pass rate of a world of which nothing was seen: low, so that the easier tasks are first."""
_MEMORY = 0.95
"""What is left of a world's pass rate when another group of it has ended."""


@dataclass(slots=True)
class _Record:
    """What is known of a task that was seen."""

    rate: float
    """Pass rate, of late."""
    silent: int = 0
    """Latest groups that were all right or all wrong."""
    back: int = 0
    """It rests until so many groups of its world were seen."""


class Curriculum:
    """The order of one world's tasks, and the sizes of its groups."""

    def __init__(self, tasks: Sequence[Task], config: CurriculumConfig, group_size: int) -> None:
        self._tasks, self._config, self._group_size = tasks, config, group_size
        self._index = {task.id: i for i, task in enumerate(tasks)}
        # The middle of a task's rank, so that worlds count difficulty as they like and equal ones are all at a half.
        order = sorted(task.difficulty for task in tasks)
        self._levels = [
            (bisect_left(order, t.difficulty) + bisect_right(order, t.difficulty)) / (2 * len(order)) for t in tasks
        ]
        self.rate = _START
        """Pass rate of the world, of late."""
        self._groups = 0
        self._records: dict[int, _Record] = {}
        self._queue: list[tuple[int, int | None]] = []

    def next(self, rng: Random) -> Task:
        """The next group's. ``rng`` is asked when nothing is planned."""
        if not self._queue:
            self._plan(rng)
        index, rollouts = self._queue.pop(0)
        return self._tasks[index] if rollouts is None else replace(self._tasks[index], rollouts=rollouts)

    def _plan(self, rng: Random) -> None:
        budget, planned = self._config.budget, list[int]()
        weights = self.weights()
        while len(planned) < (1 if budget is None else budget.pool):
            [index] = rng.choices(range(len(self._tasks)), weights)
            planned += [index] * self._repeats(index)
        sizes: Sequence[int | None] = [None] * len(planned)
        if budget is not None:
            rates = [self._rate(index) for index in planned]
            sizes = allocate(rates, self._group_size * len(planned), budget.min, budget.max)
        self._queue = list(zip(planned, sizes, strict=True))

    def weights(self) -> list[float]:
        """Of every task; 0 for those that rest, unless all do."""
        found = [
            _ANY + 4 * p * (1 - p) * self._window(i) for i, p in enumerate(map(self._rate, range(len(self._tasks))))
        ]
        awake = [0.0 if self._rests(i) else weight for i, weight in enumerate(found)]
        return awake if any(awake) else found

    def _window(self, index: int) -> float:
        return math.exp(-(((self._levels[index] - self.rate) / self._config.width) ** 2) / 2)

    def _rests(self, index: int) -> bool:
        return index in self._records and self._records[index].back > self._groups

    def _rate(self, index: int) -> float:
        """Of a task that was not seen, what its world's tasks have."""
        return self._records[index].rate if index in self._records else self.rate

    def _repeats(self, index: int) -> int:
        """What was not seen has no past rate, and is measured first."""
        return 1 + round(self._config.repeat * (1 - self._records[index].rate)) if index in self._records else 1

    def seen(self, task: Task, rollouts: Sequence[Rollout]) -> None:
        """Learn from a group that has ended. Groups without any outcome say nothing."""
        outcomes = [r.score.outcome for r in rollouts if r.score is not None]
        if not outcomes:
            return
        index, mean = self._index[task.id], fmean(outcomes)
        self._groups += 1
        record = self._records.setdefault(index, _Record(self.rate))
        record.rate += (1 - self._config.memory) * (mean - record.rate)
        self.rate += (1 - _MEMORY) * (mean - self.rate)
        record.silent = record.silent + 1 if max(outcomes) <= 0 or min(outcomes) >= 1 else 0
        if record.silent >= self._config.rest_after:
            record.silent, record.back = 0, self._groups + self._config.rest

    def state(self) -> dict[str, Any]:
        """At most one record a task, and one pool of groups."""
        records = [[i, r.rate, r.silent, r.back] for i, r in sorted(self._records.items())]
        return {"rate": self.rate, "groups": self._groups, "records": records, "queue": [list(q) for q in self._queue]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo ``state``."""
        self.rate, self._groups = state["rate"], state["groups"]
        self._records = {i: _Record(rate, silent, back) for i, rate, silent, back in state["records"]}
        self._queue = [(index, rollouts) for index, rollouts in state["queue"]]


class TaskStream:
    """Tasks of several worlds, mixed by share. Implements ``groups.TaskSource``."""

    def __init__(
        self,
        worlds: Mapping[str, World],
        shares: Mapping[str, float],
        per_world: int,
        seed: int,
        *,
        curriculum: CurriculumConfig | None = None,
        group_size: int = 1,
    ) -> None:
        self.shares = {n: shares[n] for n in sorted(shares)}
        self._tasks = {n: worlds[n].tasks("train", per_world, seed) for n in self.shares}
        self._seed = seed
        self._curricula = {
            n: Curriculum(tasks, curriculum, group_size) for n, tasks in self._tasks.items() if curriculum is not None
        }

    def task(self, number: int, world: str) -> Task:
        """The task of group ``number``. With replacement: a task may come again under other weights."""
        rng = Random(f"{self._seed}/{number}")
        name = rng.choices(list(self.shares), list(self.shares.values()))[0]
        if self._curricula:
            return self._curricula[world or name].next(rng)
        return rng.choice(self._tasks[world or name])

    def seen(self, task: Task, rollouts: Sequence[Rollout]) -> None:
        """See ``TaskSource``. Without a curriculum nothing is learned from it."""
        if self._curricula:
            self._curricula[task.world].seen(task, rollouts)

    def state(self) -> dict[str, Any]:
        """Of every world's curriculum; without one the number says it all."""
        return {name: curriculum.state() for name, curriculum in self._curricula.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        for name, curriculum in self._curricula.items():
            curriculum.restore(state[name])
