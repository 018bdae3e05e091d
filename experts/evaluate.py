"""One policy on held-out tasks: outcomes, not shaped rewards. What cannot be judged is tried again, then reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envs.episode import transcript
from experts.config import EvaluationConfig
from experts.rollouts import Player
from posttrain.errors import EngineError
from posttrain.groups import derive_seed
from posttrain.protocols import Engine, World
from posttrain.types import Culprit, Rollout, Task

_ATTEMPTS = 3
"""Tries for an episode that infrastructure broke."""


def held_out(worlds: Mapping[str, World], config: EvaluationConfig, seed: int) -> list[Task]:
    """The evaluation tasks of all worlds, the same for every policy; each domain's are shared equally by its worlds."""
    out: list[Task] = []
    for domain in sorted({w.domain for w in worlds.values()}):
        names = sorted(n for n, w in worlds.items() if w.domain == domain)
        for name in names:
            out += worlds[name].tasks("eval", -(-config.tasks // len(names)), seed)
    return out


async def evaluate(
    engine: Engine,
    player: Player,
    tasks: Sequence[Task],
    config: EvaluationConfig,
    *,
    label: str,
    seed: int,
    on_done: Callable[[], None],
) -> list[Rollout]:
    """One rollout a task, in the order of ``tasks``. Invalid ones keep ``score`` None. Raises EngineError
    if the engine fails."""
    gate = asyncio.Semaphore(config.concurrency)

    async def one(task: Task) -> Rollout:
        async with gate:
            rollout: Rollout | None = None
            for attempt in range(_ATTEMPTS):
                # The label is not part of the seed: every policy draws the same random numbers on a task.
                rollout = await player(engine, task, f"{label}/{task.id}/0", label, derive_seed(seed, task.id, attempt))
                if rollout.valid:
                    break
            assert rollout is not None  # _ATTEMPTS > 0
            if rollout.error is not None and rollout.error.culprit is Culprit.ENGINE:  # it serves all, or nobody
                raise EngineError(f"{rollout.id}: {rollout.error.message}")
            on_done()
            return rollout

    try:
        async with asyncio.TaskGroup() as episodes:  # not gather, which would leave the others behind on an error
            playing = [episodes.create_task(one(t)) for t in tasks]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [p.result() for p in playing]


def record(rollout: Rollout) -> dict[str, Any]:
    """What the report keeps of an evaluated episode."""
    return {
        "task": rollout.task.id,
        "domain": rollout.task.domain,
        "world": rollout.task.world,
        "difficulty": rollout.task.difficulty,
        "outcome": None if rollout.score is None or not rollout.score.valid else rollout.score.outcome,
        "tokens": rollout.sampled_tokens,
        "stop": str(rollout.stop),
        "sandbox": rollout.sandbox,
        "parse_errors": len(rollout.parse_errors),
        "text": transcript(rollout.messages),
    }
