"""Group-relative advantages by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from experts.credit import GroupCredit, GroupCreditConfig, samples_of
from posttrain.types import Sample, Segment
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
    )
    assert (second.ids, second.advantages, second.oldest_version) == ((9,), (-0.25,), 3)
