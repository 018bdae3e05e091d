"""Self-verification: when an expert's pass rate stalls, it judges its own answers for a while.

After LongCat-Flash-Thinking-2601 (arXiv 2601.16725, 5.1), which says when (generation stalls), on what (the model's own
trajectories, the hard ones above all) and that its influence is coupled to their quality; the rules here are ours. A
verdict is worth the pass rate of the group that the judged answer came from: answers that are easy to judge because
they are all wrong are worth nothing, so writing such answers never pays. Hard means a pass rate near a half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from envs.episode import transcript
from envs.worlds.verify import Verify, question
from experts.config import VerificationConfig
from posttrain.groups import TaskSource
from posttrain.journal import task_from_dict, task_to_dict
from posttrain.types import Rollout, Task

_POOL = 64
"""Judged answers that wait to be asked about; the oldest go first."""


class SelfVerification:
    """A ``groups.TaskSource`` around another one. Its state is part of the stage's checkpoint."""

    def __init__(self, inner: TaskSource, world: Verify, config: VerificationConfig, seed: int) -> None:
        self._inner, self._world, self._config, self._seed = inner, world, config, seed
        self._outcomes: list[float] = []
        self._pool: list[Task] = []

    @property
    def active(self) -> bool:
        """Whether the pass rate has stalled."""
        n = self._config.window
        if len(self._outcomes) < 2 * n:
            return False
        before, after = sum(self._outcomes[:n]) / n, sum(self._outcomes[n:]) / n
        return after - before <= self._config.gain

    def task(self, number: int, world: str) -> Task:
        """A task of the other source or, in the phase, now and then a judged answer."""
        rng = Random(f"{self._seed}/verify/{number}")
        if self.active and self._pool and rng.random() < self._config.share:
            weights = [p * (1 - p) + 0.01 for p in (t.data["weight"] for t in self._pool)]
            index = rng.choices(range(len(self._pool)), weights)[0]
            return self._pool.pop(index)
        return self._inner.task(number, world)

    def seen(self, task: Task, rollouts: Sequence[Rollout]) -> None:
        """Keep one right and one wrong answer of the group, so that neither verdict is the likelier one."""
        if task.world == self._config.world:
            return
        self._inner.seen(task, rollouts)
        judged = [(r, r.score.outcome) for r in rollouts if r.score is not None]
        if not judged:
            return
        rate = sum(outcome for _, outcome in judged) / len(judged)
        self._outcomes = [*self._outcomes, rate][-2 * self._config.window :]
        right = next((r for r, outcome in judged if outcome == 1.0), None)
        wrong = next((r for r, outcome in judged if outcome == 0.0), None)
        if right is not None and wrong is not None:
            self._pool += [self._question(right, True, rate), self._question(wrong, False, rate)]
            self._pool = self._pool[-_POOL:]

    def _question(self, rollout: Rollout, right: bool, rate: float) -> Task:
        task = rollout.task
        rest = rollout.messages[len(task.prompt) :]
        last = rest[-1] if rest else None
        alone = len(rest) == 1 and last is not None and not last.tool_calls
        answer = last.content if alone and last is not None else transcript(rest)
        return Task(
            id=f"{rollout.id}/verify",
            domain=task.domain,
            world=self._config.world,
            prompt=question(task.prompt, answer),
            thinking=self._world.thinking,
            limits=self._world.limits,
            difficulty=task.difficulty,
            data={"right": right, "weight": rate},
        )

    def state(self) -> dict[str, Any]:
        """See ``TaskSource``."""
        pool = [task_to_dict(t) for t in self._pool]
        return {"inner": self._inner.state(), "outcomes": list(self._outcomes), "pool": pool}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See ``TaskSource``."""
        self._inner.restore(state["inner"])
        self._outcomes = list(state["outcomes"])
        self._pool = [task_from_dict(t) for t in state["pool"]]
