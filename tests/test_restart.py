"""A new engine before the first checkpoint: what the groups so far have taught is forgotten with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from envs.noise import NoiseConfig
from experts.config import CurriculumConfig
from experts.noise import GroupNoise
from experts.tasks import TaskStream
from posttrain.chat import Chat
from posttrain.protocols import World
from posttrain.run import RunDir
from rewards import RewardConfig
from tests.posttrain.tiny import make_tokenizer
from tests.test_fault_outcomes import kill_engine
from tests.toy_stage import (
    SIZE,
    STEPS,
    EvenPlayer,
    Hook,
    HookedWorld,
    check_books,
    fine,
    rollouts,
    toy_stage,
    train,
    weights,
)

pytestmark = pytest.mark.faults


def run(folder: Path, name: str, hook: Hook) -> RunDir:
    """Synchronous, with a source and a noise that learn, and one checkpoint: at the end."""
    worlds: dict[str, World] = {"requests": HookedWorld(hook, 60.0)}
    source = TaskStream(worlds, {"requests": 1.0}, 20, seed=3, curriculum=CurriculumConfig(), group_size=SIZE)
    noise = GroupNoise(NoiseConfig(window=2, patience=1, gap=2.0), SIZE, 3)
    player = EvenPlayer(worlds, Chat(make_tokenizer()), RewardConfig(), noise=noise)
    pace = {"max_staleness": 0, "checkpoint_every": STEPS, "retry_s": 0.05}
    return train(folder, name, replace(toy_stage(folder, worlds, loop=pace, source=source), player=player))


def test_an_engine_that_dies_before_the_first_checkpoint_changes_nothing(tmp_path: Path) -> None:
    async def deadly(where: str, count: int) -> None:
        if where == "grade" and count == 20:
            kill_engine()

    killed, calm = run(tmp_path, "killed", deadly), run(tmp_path, "calm", fine)
    check_books(killed)
    played = {r.id: r.task.id for r in rollouts(killed) if r.valid}
    assert played == {r.id: r.task.id for r in rollouts(calm)}
    assert {r.noise for r in rollouts(calm)} >= {0, 1, 2}, "the level has risen"
    expected = weights(calm)
    assert all(torch.equal(expected[name], w) for name, w in weights(killed).items())
