"""Which rollouts are noisy, and when there is more noise."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import get_args

import pytest
from pydantic import ValidationError

from envs.noise import CHANCE, MAX_LEVEL, InstructionKind, NoiseConfig, NoiseScheduler, ToolKind, noise_of

# groups ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "size", "many"), [(0.5, 8, 4), (0.25, 8, 2), (0.0, 8, 0), (1.0, 5, 5), (0.5, 1, 0)])
def test_a_part_of_every_group_is_noisy(share: float, size: int, many: int) -> None:
    config = NoiseConfig(share=share)
    for seed in range(20):
        made = [noise_of(config, 2, i, size, seed) for i in range(size)]
        assert sum(m is not None for m in made) == many
        assert made == [noise_of(config, 2, i, size, seed) for i in range(size)]
        assert len({m.seed for m in made if m is not None}) == many, "each its own"
    assert [noise_of(config, 0, i, size, 0) for i in range(size)] == [None] * size


def test_the_noisy_ones_are_not_always_the_same() -> None:
    noisy = [[noise_of(NoiseConfig(), 1, i, 4, seed) is not None for i in range(4)] for seed in range(50)]
    assert all(any(n[i] for n in noisy) and not all(n[i] for n in noisy) for i in range(4))


def test_a_higher_level_has_more_kinds_and_shows_them_more_often() -> None:
    config = NoiseConfig(share=1.0)
    for level in range(1, MAX_LEVEL + 1):
        made = [noise_of(config, level, 0, 1, seed) for seed in range(100)]
        assert all(m is not None and len(m.instruction) == len(m.tool) == level for m in made)
        assert {k for m in made if m for k in m.tool} == set(get_args(ToolKind))
        assert {k for m in made if m for k in m.instruction} == set(get_args(InstructionKind))
    assert all(a < b for a, b in pairwise(CHANCE))
    one = NoiseConfig(instruction=("typos",), tool=(), share=1.0)
    made = noise_of(one, 3, 0, 1, 0)
    assert made is not None and (made.instruction, made.tool) == (("typos",), ())


def test_options_are_checked() -> None:
    with pytest.raises(ValidationError, match="name a kind of noise"):
        NoiseConfig(instruction=(), tool=())
    with pytest.raises(ValidationError, match="Extra inputs"):
        NoiseConfig.model_validate({"kinds": ["typos"]})
    with pytest.raises(ValidationError, match="'failure', 'incomplete', 'wording' or 'redundancy'"):
        NoiseConfig.model_validate({"tool": ["lies"]})
    with pytest.raises(ValidationError, match="less than or equal to 3"):
        NoiseConfig(start=4)
    assert NoiseConfig.model_validate({"tool": ["failure"]}).tool == ("failure",), "as YAML gives it"


# schedule -------------------------------------------------------------------------------------------------------------

NARROW, WIDE = ([1.0, 1.0], [1.0, 0.9]), ([1.0, 1.0], [0.5, 0.5])


def test_the_level_rises_when_the_gap_stays_small() -> None:
    scheduler = NoiseScheduler(NoiseConfig(gap=0.1, patience=2, window=2))
    assert scheduler.level == 1 and scheduler.gap is None
    assert [scheduler.update(*some) for some in (NARROW, WIDE, NARROW, NARROW)] == [1, 1, 1, 2]
    assert scheduler.gap is None, "scores of another level do not count"
    assert [scheduler.update(*some) for some in (WIDE, WIDE, NARROW, NARROW, NARROW, NARROW, NARROW)] == [
        2, 2, 2, 3, 3, 3, 3,
    ]  # fmt: skip


def test_a_gap_that_is_not_below_the_bound_is_not_small() -> None:
    scheduler = NoiseScheduler(NoiseConfig(gap=0.25, patience=1, window=1))
    assert scheduler.update([1.0], [0.75]) == 1 and scheduler.gap == 0.25
    assert scheduler.update([0.5], [0.9]) == 2, "noisy ones may do better"


def test_nothing_is_concluded_from_few_scores() -> None:
    scheduler = NoiseScheduler(NoiseConfig(patience=1, window=3))
    assert [scheduler.update([1.0], [1.0]) for _ in range(2)] == [1, 1]
    assert scheduler.update([1.0], []) == 1 and scheduler.gap is None
    assert scheduler.update([], [1.0]) == 2


def test_the_windows_slide() -> None:
    scheduler = NoiseScheduler(NoiseConfig(gap=0.1, patience=99, window=4))
    scheduler.update([0.0] * 4, [1.0] * 4)
    assert scheduler.gap == -1.0
    scheduler.update([1.0, 1.0], [0.0])
    assert scheduler.gap == 0.5 - 0.75
    scheduler.update([1.0] * 9, [0.0] * 9)
    assert scheduler.gap == 1.0


def test_level_zero_is_a_clean_beginning() -> None:
    scheduler = NoiseScheduler(NoiseConfig(start=0, patience=2, window=2))
    assert [scheduler.update([0.0, 1.0], []) for _ in range(3)] == [0, 1, 1]


def test_the_level_never_falls() -> None:
    scheduler = NoiseScheduler(NoiseConfig(start=2, patience=1, window=1))
    assert [scheduler.update([1.0], [0.0]) for _ in range(20)] == [2] * 20
    assert [scheduler.update(*some) for some in (([1.0], [1.0]), ([1.0], [0.0]))] == [3, 3]


def test_a_scheduler_goes_on_from_its_state() -> None:
    config = NoiseConfig(gap=0.1, patience=2, window=2)
    sequence = (NARROW, WIDE, NARROW, NARROW, WIDE, NARROW, NARROW, NARROW)
    for stop in range(len(sequence)):
        one, other = NoiseScheduler(config), NoiseScheduler(config)
        for some in sequence[:stop]:
            one.update(*some)
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        for some in sequence[stop:]:
            assert one.update(*some) == other.update(*some)
        assert one.state_dict() == other.state_dict()


def test_a_start_that_was_raised_holds() -> None:
    old = NoiseScheduler(NoiseConfig(start=1, window=1, patience=5))
    old.update([1.0], [0.5])
    new = NoiseScheduler(NoiseConfig(start=2, window=1, patience=5))
    new.load_state_dict(old.state_dict())
    assert new.level == 2 and new.gap is None
