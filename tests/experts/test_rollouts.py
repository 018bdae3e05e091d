"""The player finds the world of a task and scores with the configured weights."""

from __future__ import annotations

import asyncio
from typing import Any

from experts.rollouts import Player
from posttrain.types import StopReason
from rewards import RewardConfig
from tests.envs.test_episode import CALL_ADD, EOS, Script, Toy, chat, task


def test_it_opens_the_task_s_own_world_and_weighs_the_parts() -> None:
    """Outcome 0.75 at a weight of 0.8, nothing to complain of otherwise: 0.6."""
    right, wrong = Toy(name="right"), Toy(name="wrong")
    worlds: Any = {"wrong": wrong, "right": right}
    player = Player(worlds, chat(), RewardConfig(outcome=0.8), temperature=0.25)
    engine = Script([CALL_ADD, f"done{EOS}"])
    played = asyncio.run(player(engine, task(world="right"), "s/0/1", "s/0", 11))
    assert (played.id, played.group, played.stop) == ("s/0/1", "s/0", StopReason.SCORED)
    assert (right.opened, wrong.opened) == (1, 0)
    assert played.score is not None
    assert (round(played.score.value, 6), played.score.outcome) == (0.6, 0.75)
    assert [(s.seed, s.temperature) for s in engine.sampling] == [(11, 0.25), (12, 0.25)]
