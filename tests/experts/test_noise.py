"""Noise on a part of each group: who gets it, what moves its level, and that a stage keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from envs.noise import NoiseConfig
from experts.noise import GroupNoise
from posttrain.types import Rollout, Score
from tests.envs.test_episode import EOS, Script, Toy, call, play, task
from tests.posttrain.small import rollout

CONFIG = NoiseConfig(share=0.5, gap=0.1, patience=2, window=4, tool=("wording",), instruction=("redundancy",))


def test_half_of_a_group_is_noisy_and_a_second_attempt_keeps_its_noise() -> None:
    noise = GroupNoise(CONFIG, 4, seed=3)
    groups = [f"expert-x/{n}" for n in range(30)]
    drawn = {g: [noise(f"{g}/{i}", g) for i in range(4)] for g in groups}
    assert all(sum(n is not None for n in of) == 2 for of in drawn.values())
    assert len({tuple(n is None for n in of) for of in drawn.values()}) > 3
    assert [noise(f"{groups[0]}/{i}.2", groups[0]) for i in range(4)] == drawn[groups[0]]
    assert [GroupNoise(CONFIG, 4, seed=3)(f"{g}/0", g) for g in groups] == [of[0] for of in drawn.values()]
    other = [[GroupNoise(CONFIG, 4, seed=4)(f"{g}/{i}", g) is None for i in range(4)] for g in groups]
    assert other != [[n is None for n in of] for of in drawn.values()]


def scored(level: int, outcome: float) -> Rollout:
    return replace(rollout("s/0/0"), noise=level, score=Score(value=0.0, outcome=outcome))


def test_the_level_rises_as_the_gap_closes() -> None:
    noise = GroupNoise(CONFIG, 4, seed=3)
    apart = [*[scored(0, 1.0)] * 4, *[scored(1, 0.0)] * 4]
    level = {"noise/level": 1.0, "noise/clean": 1.0}
    assert noise.update(apart) == level | {"noise/noisy": 0.0}
    close = [*[scored(0, 1.0)] * 4, *[scored(1, 1.0)] * 4]
    assert noise.update(close) == level | {"noise/noisy": 1.0} and noise.level == 1
    unjudged = replace(scored(1, 0.0), score=None)
    # Rollouts of another level say nothing of this one.
    assert noise.update([*close, unjudged, *[scored(3, 0.0)] * 4]) == level | {"noise/noisy": 1.0}
    assert noise.level == 2
    resumed = GroupNoise(CONFIG, 4, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(noise.state_dict())))
    assert resumed.level == 2
    assert resumed.update(close) == noise.update(close)
    assert resumed.state_dict() == noise.state_dict()


def test_an_episode_is_played_with_its_noise() -> None:
    noise = GroupNoise(NoiseConfig(share=1.0, start=3), 1, seed=0)
    heard: set[str] = set()
    for n in range(20):
        drawn = noise(f"s/{n}/0", f"s/{n}")
        assert drawn is not None
        engine = Script([call("what"), f"done{EOS}", f"done{EOS}"])
        played = play(engine, Toy(), noise=drawn)
        assert (played.noise, played.task) == (3, task()), "the task as the world has it"
        assert played.score is not None and played.score.outcome == 0.75
        assert played.messages[0].content.endswith("go")
        heard |= {played.messages[0].content, played.messages[2].content}
    assert len(heard) > 6 and any("again" in text for text in heard) and "added what" in heard


def test_the_state_survives_a_checkpoint_file(tmp_path: Path) -> None:
    """``torch.load`` with ``weights_only`` takes plain values only."""
    noise = GroupNoise(CONFIG, 4, seed=3)
    noise.update([scored(0, 1.0), scored(1, 0.5)])
    torch.save({"noise": noise.state_dict()}, tmp_path / "state.pt")
    other = GroupNoise(CONFIG, 4, seed=3)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)["noise"])
    assert other.state_dict() == noise.state_dict()
