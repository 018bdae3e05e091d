"""Group-relative advantages by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from pydantic import ValidationError

from experts.credit import GroupCredit, GroupCreditConfig, LengthPenalty, samples_of
from posttrain.types import Rollout, Sample, Segment
from tests.posttrain.small import rollout

NONE, STD = GroupCredit(GroupCreditConfig()), GroupCredit(GroupCreditConfig(scale="std"))


def group(*scores: float | None) -> list[Sample]:
    return NONE([rollout(f"s/0/{i}", score=v) for i, v in enumerate(scores)])


def advantages(samples: Sequence[Sample]) -> list[float]:
    """Of the last token of each, which is sampled."""
    return [s.advantages[-1] for s in samples]


def test_each_minus_the_mean() -> None:
    """Mean 0.5: 0.5, -0.5, 0.25, -0.25."""
    assert advantages(group(1.0, 0.0, 0.75, 0.25)) == [0.5, -0.5, 0.25, -0.25]


def test_divided_by_the_standard_deviation_of_the_group() -> None:
    """Population standard deviation of 1, 0, 0, 0 is sqrt(3/16) = 0.433; the mean is 1/4."""
    samples = STD([rollout(f"s/0/{i}", score=v) for i, v in enumerate((1.0, 0.0, 0.0, 0.0))])
    assert advantages(samples) == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])


def test_compared_with_the_others_alone() -> None:
    """1 - (0 + .75 + .25)/3, 0 - 2/3, .75 - 1.25/3, .25 - 1.75/3: 4/3 of what the mean of all gives."""
    credit = GroupCredit(GroupCreditConfig(baseline="leave_one_out"))
    samples = credit([rollout(f"s/0/{i}", score=v) for i, v in enumerate((1.0, 0.0, 0.75, 0.25))])
    assert advantages(samples) == pytest.approx([2 / 3, -2 / 3, 1 / 3, -1 / 3])


def test_the_others_alone_are_those_with_a_score() -> None:
    """Two are left: each is compared with the other."""
    credit = GroupCredit(GroupCreditConfig(baseline="leave_one_out"))
    samples = credit([rollout(f"s/0/{i}", score=v) for i, v in enumerate((1.0, None, 0.25))])
    assert advantages(samples) == pytest.approx([0.75, -0.75])


def test_the_others_alone_and_the_standard_deviation_of_all() -> None:
    """Values 1, 0, 0, 0: (1 - 0) and (0 - 1/3), over sqrt(3)/4."""
    credit = GroupCredit(GroupCreditConfig(baseline="leave_one_out", scale="std"))
    samples = credit([rollout(f"s/0/{i}", score=v) for i, v in enumerate((1.0, 0.0, 0.0, 0.0))])
    assert advantages(samples) == pytest.approx([4 / 3**0.5, *[-4 / 3 / 3**0.5] * 3])


@pytest.mark.parametrize(
    ("tokens", "lost"), [(0, 0.0), (10, 0.0), (11, 0.05), (15, 0.25), (20, 0.5), (99, 0.5)], ids=str
)
def test_what_length_costs(tokens: int, lost: float) -> None:
    """Nothing up to 10 tokens, 0.05 for each of the next 10, 0.5 from there on."""
    assert LengthPenalty(free=10, full=20, weight=0.5)(tokens) == pytest.approx(lost)


def spoken(index: int, score: float, *branches: int) -> Rollout:
    """A rollout with so many sampled tokens a branch."""
    segments = [Segment(ids=(5,) * n, sampled=(True,) * n, logprobs=(-1.0,) * n, versions=(0,) * n) for n in branches]
    return replace(rollout(f"s/0/{index}", score=score), branches=tuple((s,) for s in segments))


def test_long_rollouts_lose_before_they_are_compared() -> None:
    """2, 3 and 4 tokens (1 + 3 over two branches), all solved: worth 1, 0.8, 0.6; the mean is 0.8."""
    credit = GroupCredit(GroupCreditConfig(length=LengthPenalty(free=2, full=7)))
    samples = credit([spoken(0, 1.0, 2), spoken(1, 1.0, 3), spoken(2, 1.0, 1, 3)])
    assert advantages(samples) == pytest.approx([0.2, 0.0, -0.2, -0.2])


def test_brevity_alone_earns_nothing() -> None:
    """All failed: none is worth less than 0, so there is nothing to learn."""
    credit = GroupCredit(GroupCreditConfig(length=LengthPenalty(free=2, full=7)))
    assert credit([spoken(0, 0.0, 2), spoken(1, 0.0, 9)]) == []


def test_a_length_penalty_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValidationError, match="full: 5 tokens must be more than free, 5"):
        LengthPenalty(free=5, full=5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_a_group_of_equal_values_teaches_nothing(value: float) -> None:
    for credit in (NONE, STD):
        assert credit([rollout(f"s/0/{i}", score=value) for i in range(7)]) == []
    assert group(value) == [], "nor does a group of one"


def test_what_has_no_score_is_neither_in_the_mean_nor_trained() -> None:
    samples = group(1.0, None, 0.0)
    assert [s.rollout for s in samples] == ["s/0/0", "s/0/2"]
    assert advantages(samples) == [0.5, -0.5]


def test_a_sample_is_its_branch_token_by_token() -> None:
    """Two tokens given, two sampled, one given, one sampled."""
    one = rollout("s/0/0", values=(5, 6), versions=(3, 4))
    more = Segment(ids=(9,), sampled=(True,), logprobs=(-0.5,), versions=(4,))
    two = replace(one, branches=((*one.branches[0], Segment.given((7,)), more), (more,)))
    first, second = samples_of(two, -0.25)
    assert first == Sample(
        rollout="s/0/0",
        domain="agent",
        ids=(3, 4, 5, 6, 7, 9),
        sampled=(False, False, True, True, False, True),
        logprobs=(0.0, 0.0, -1.0, -1.0, 0.0, -0.5),
        advantages=(0.0, 0.0, -0.25, -0.25, 0.0, -0.25),
        oldest_version=3,
        versions=(-1, -1, 3, 4, -1, 4),
    )
    assert (second.ids, second.advantages, second.oldest_version) == ((9,), (-0.25,), 3)
