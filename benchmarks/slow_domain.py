"""A slow domain must not stall the trainer: ``python benchmarks/slow_domain.py [--seeds 0,1,2] [--steps 60]``.

The real loop and scheduler over an engine and a trainer that only take their time. Three domains with equal shares; an
episode asks the engine, which serves a few requests at once, and waits for its tools in between. In the slow runs the
tools of one domain take so long that its episodes, waiting for nobody, last ten times as long. That must stay below K
steps: what takes longer cannot be trained in time, and the trainer waits for it whatever else is done.

Printed, with quotas and without, balanced and slow: the trainer's idle share, each domain's share of what was trained,
the largest that any had of a batch (after the first K + 1, all of which start together), and the median seconds of an
episode. Exit status 1 if, with quotas, the slow run's idle share is above 1.2 times the balanced one's, or the share of
a domain is further from its part than the tolerance allows, in all or in a batch.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean, median
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from experts.credit import samples_of
from posttrain.groups import Group
from posttrain.loop import Loop
from posttrain.protocols import Engine
from posttrain.settings import LoopConfig
from posttrain.trainer import Trainer
from posttrain.types import Completion, Rollout, Sample, Sampling, Score, Segment, StopReason, Task, Weights

DOMAINS = ("code", "search", "work")
SLOW, FACTOR = "work", 10.0
TURNS, SLOTS, TURN_S = 3, 8, 0.01
"""Requests of an episode; requests that the engine serves at once; seconds of one."""
EPISODE_S, STEP_S = 0.04, 0.14
"""Seconds of an episode that waits for nobody; seconds of a step, which the engine cannot quite keep up with."""
SIGMA = 0.4
"""Of the logarithm of a call's seconds."""
BAR = 1.2


@dataclass
class Machine:
    """An engine, a trainer, a source and a journal that take their time and keep count."""

    seed: int
    factors: Mapping[str, float]
    version: int = 0
    served: int = 0
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SLOTS))
    batches: list[Counter[str]] = field(default_factory=list)
    spent: list[tuple[float, float]] = field(default_factory=list)
    """Idle and whole seconds of every step."""
    episodes: dict[str, list[float]] = field(default_factory=lambda: {d: [] for d in DOMAINS})

    # Engine

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        """One token, after a turn's time on a slot."""
        async with self.slots:
            await asyncio.sleep(TURN_S)
        version = self.served if sampling.version is None else sampling.version
        return Completion(ids=(5,), logprobs=(-1.0,), versions=(version,), finish="stop")

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None:
        """At once."""
        self.served = weights.version

    async def close(self) -> None:
        """Nothing to free."""

    # Trainer

    def step(self, samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        """A step's time."""
        time.sleep(STEP_S)
        return {}

    def publish(self) -> Weights:
        """Nothing but the version."""
        return Weights(version=self.version, where="nowhere")

    def state(self) -> dict[str, Any]:
        """Nothing is resumed."""
        return {}

    # Source and journal

    def task(self, number: int, world: str) -> Task:
        """Domains by equal shares where none is asked for."""
        name = world or Random(f"{self.seed}/{number}").choice(DOMAINS)
        return Task(id=f"{name}/{number}", domain=name, world=name, prompt=())

    def seen(self, task: Task, rollouts: Sequence[Rollout]) -> None:
        """Nothing is learned."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing is resumed."""

    def write(self, record: Rollout) -> None:
        """Keep an episode's seconds."""
        self.episodes[record.task.world].append(record.wall_s)

    # The rest

    async def play(self, engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        """Turns, with a call between any two."""
        rng, started = Random(seed), time.monotonic()
        mean = (EPISODE_S * self.factors.get(task.world, 1.0) - TURNS * TURN_S) / (TURNS - 1)
        segments = [Segment.given((3, 4))]
        for turn in range(TURNS):
            if turn:
                await asyncio.sleep(mean * math.exp(rng.gauss(-(SIGMA**2) / 2, SIGMA)))
            segments.append(Segment.from_completion(await engine.generate((3, 4), Sampling(seed=seed + turn))))
        return Rollout(
            id=rollout_id,
            group=group,
            task=task,
            branches=(tuple(segments),),
            messages=(),
            stop=StopReason.SCORED,
            score=Score(value=1.0),
            wall_s=time.monotonic() - started,
        )

    def credit(self, group: Sequence[Rollout]) -> list[Sample]:
        """Something to train on."""
        return [sample for rollout in group for sample in samples_of(rollout, 1.0)]

    def on_step(self, version: int, stats: dict[str, float], batch: Sequence[Group]) -> None:
        """Count."""
        self.batches.append(Counter(group.task.world for group in batch))
        idle = stats["time/wait_s"] + stats["time/publish_s"]
        self.spent.append((idle, idle + stats["time/step_s"]))

    # What came of it

    @property
    def idle(self) -> float:
        """Share of the time in which the trainer had nothing to do."""
        return sum(i for i, _ in self.spent) / sum(s for _, s in self.spent)

    def shares(self) -> dict[str, float]:
        """Of the groups that were trained, a domain."""
        counts = sum(self.batches, Counter[str]())
        return {d: counts[d] / counts.total() for d in DOMAINS}

    def largest(self, first: int) -> int:
        """Groups of any domain in a batch, at most; the first batches are left out."""
        return max(max(batch.values()) for batch in self.batches[first:])


def run(config: LoopConfig, seed: int, factors: Mapping[str, float]) -> Machine:
    """One run of the loop."""
    machine = Machine(seed=seed, factors=factors)
    loop = Loop(
        config,
        name="slow",
        seed=seed,
        engine=machine,
        trainer=cast(Trainer, machine),
        credit=machine.credit,
        source=machine,
        run_rollout=machine.play,
        journal=machine,
        on_step=machine.on_step,
        checkpoint=lambda state: None,
        shares=dict.fromkeys(DOMAINS, 1.0),
    )
    asyncio.run(loop.run())
    return machine


def show(found: Mapping[tuple[bool, bool], Sequence[Machine]], config: LoopConfig) -> bool:
    """Print the table; whether the bar holds."""
    first = config.max_staleness + 1
    console, table = Console(width=140), Table(title=f"{SLOW} {FACTOR:g} times as slow, or not")
    for column in (
        "quotas",
        "run",
        "idle share",
        *(f"{d}, of all" for d in DOMAINS),
        "largest of a batch",
        "episode s",
    ):
        table.add_column(column)
    for (quotas, slow), machines in found.items():
        shares = [fmean(m.shares()[d] for m in machines) for d in DOMAINS]
        seconds = [median(s for m in machines for s in m.episodes[d]) for d in DOMAINS]
        table.add_row(
            "on" if quotas else "off",
            "slow" if slow else "balanced",
            f"{fmean(m.idle for m in machines):.3f}",
            *(f"{share:.3f}" for share in shares),
            f"{max(m.largest(first) for m in machines)} of {config.groups_per_step}",
            ", ".join(f"{s:.2f}" for s in seconds),
        )
    console.print(table)
    good = True
    for quotas in (True, False):
        ratio = fmean(m.idle for m in found[quotas, True]) / fmean(m.idle for m in found[quotas, False])
        console.print(f"idle share, slow over balanced, quotas {'on' if quotas else 'off'}: {ratio:.2f}")
        good &= not quotas or ratio <= BAR
    machines, part = [*found[True, False], *found[True, True]], 1 / len(DOMAINS)
    off = max(abs(share / part - 1) for m in machines for share in m.shares().values())
    console.print(f"furthest from its part with quotas: {off:.2f} of it; the tolerance is {config.tolerance:g}")
    room = math.ceil(part * (1 + config.tolerance) * config.groups_per_step)
    return good and off <= config.tolerance and all(m.largest(first) <= room for m in machines)


def main() -> None:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="one run of each kind a seed")
    parser.add_argument("--steps", type=int, default=60, help="of every run")
    options = parser.parse_args()
    config = LoopConfig(steps=options.steps, groups_per_step=12, group_size=4, max_running=84, max_staleness=6)
    if options.steps <= config.max_staleness + 1:
        parser.error(f"--steps: the first {config.max_staleness + 1} batches are left out; ask for more")
    found: dict[tuple[bool, bool], list[Machine]] = {}
    for seed in map(int, options.seeds.split(",")):
        for quotas in (True, False):
            for slow in (False, True):
                chosen = config.model_copy(update={"quotas": quotas})
                machine = run(chosen, seed, {SLOW: FACTOR} if slow else {})
                found.setdefault((quotas, slow), []).append(machine)
    sys.exit(0 if show(found, config) else 1)


if __name__ == "__main__":
    main()
