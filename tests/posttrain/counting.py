"""A trainer and an engine that only keep count, for tests of the loop."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from experts.credit import samples_of
from posttrain.groups import Group
from posttrain.loop import Loop
from posttrain.protocols import Engine
from posttrain.settings import LoopConfig
from posttrain.trainer import Trainer
from posttrain.types import Completion, Rollout, Sample, Sampling, Task, Weights
from tests.posttrain.small import TASK, rollout


class Boom(Exception):
    """What a test raises."""


@dataclass
class Source:
    """Tasks by number; remembers what it was told of and for which worlds it was asked."""

    give: Callable[[int], Task] = lambda number: TASK
    asked: list[tuple[int, str]] = field(default_factory=list)
    told: list[list[str]] = field(default_factory=list)

    def task(self, number: int, world: str) -> Task:
        self.asked.append((number, world))
        task = self.give(number)
        return replace(task, world=world) if world else task

    def seen(self, task: Task, rollouts: Sequence[Rollout]) -> None:
        self.told.append([r.id for r in rollouts])

    def state(self) -> dict[str, Any]:
        return {"told": len(self.told)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.told = [[]] * state["told"]


@dataclass
class Counting:
    """A trainer, an engine, a journal and rollouts that take random times. ``settle`` makes the loop."""

    config: LoopConfig
    latency: Callable[[], float] = lambda: 0.0
    step_s: Callable[[], float] = lambda: 0.0
    fails: Callable[[str], bool] = lambda rollout_id: False
    boom: str = ""
    version: int = 0
    shares: dict[str, float] | None = None
    served: int = 0
    stepped: list[tuple[int, list[Sample], int]] = field(default_factory=list)
    trained: list[list[int]] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)
    journal: list[Rollout] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    open: int = 0
    started: set[int] = field(default_factory=set)
    states: list[dict[str, Any]] = field(default_factory=list)
    credited: list[list[str]] = field(default_factory=list)
    stop_at: int = 0
    kept: list[set[int]] = field(default_factory=list)
    """Versions that each load kept."""

    def explode(self, where: str) -> None:
        if self.boom == where:
            raise Boom(where)

    # Trainer

    def step(self, samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        self.explode("step")
        time.sleep(self.step_s())
        self.stepped.append((self.version, list(samples), num_rollouts))
        return {"loss": 0.0}

    def publish(self) -> Weights:
        self.explode("publish")
        return Weights(version=self.version, where="nowhere")

    def state(self) -> dict[str, Any]:
        return {"version": self.version}

    # Engine

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        await asyncio.sleep(self.latency())
        version = self.served if sampling.version is None else sampling.version
        return Completion(ids=(5,), logprobs=(-1.0,), versions=(version,), finish="stop")

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None:
        self.explode("load")
        self.kept.append(set(keep))
        self.served = weights.version
        await asyncio.sleep(self.latency())

    async def close(self) -> None: ...

    # The rest

    async def play(self, engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        self.explode("play")
        self.asked.append(rollout_id)
        self.open += 1
        try:
            turns = [await engine.generate((3, 4), Sampling(seed=seed + t)) for t in range(2)]
        finally:
            self.open -= 1
        versions = [v for t in turns for v in t.versions]
        return rollout(rollout_id, versions=versions, score=None if self.fails(rollout_id) else 1.0)

    def task(self, number: int) -> Task:
        self.explode("task")
        self.started.add(number)
        return TASK

    def credit(self, group: Sequence[Rollout]) -> list[Sample]:
        self.explode("credit")
        self.credited.append([r.id for r in group])
        return [s for r in group for s in samples_of(r, 1.0)]

    def write(self, record: Rollout) -> None:
        self.explode("journal")
        self.journal.append(record)

    def on_step(self, version: int, stats: dict[str, float], batch: Sequence[Group]) -> None:
        self.explode("on_step")
        assert version == self.version
        self.trained.append([g.number for g in batch])
        self.logged.append(stats)
        if version == self.stop_at:
            raise Boom("killed")

    def checkpoint(self, state: dict[str, Any]) -> None:
        self.explode("checkpoint")
        self.states.append(state)

    def settle(self) -> Loop:
        return Loop(
            self.config, name="s", seed=1, engine=self, trainer=cast(Trainer, self), credit=self.credit,
            source=Source(self.task), run_rollout=self.play, journal=self, on_step=self.on_step,
            checkpoint=self.checkpoint, shares=self.shares,
        )  # fmt: skip

    def run(self, loop: Loop | None = None) -> Loop:
        """Bounded, and nothing may be left behind."""
        loop = loop or self.settle()

        async def main() -> None:
            try:
                async with asyncio.timeout(30):
                    await loop.run()
            finally:
                assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())
        trained = self.version * self.config.groups_per_step
        assert loop.books.accepted == trained + len(loop.books.shelf), "what admission counts is what is there"
        return loop


def config(**changes: Any) -> LoopConfig:
    return LoopConfig(
        **{
            "steps": 4,
            "groups_per_step": 2,
            "group_size": 2,
            "max_running": 6,
            "wait_s": 20.0,
            "retry_s": 0.0,
            **changes,
        }
    )


def shakes(seed: int, longest: float) -> Callable[[], float]:
    """Random latencies, now and then a long one."""
    rng = random.Random(seed)
    return lambda: rng.random() * longest * (10 if rng.random() < 0.1 else 1)
