"""What every credit must hold."""

from __future__ import annotations

import pytest

from experts.credit import GroupCredit, GroupCreditConfig
from fusion.credit import TeacherCredit
from posttrain.protocols import Credit
from posttrain.types import Rollout
from tests.fusion.test_credit import Fake
from tests.posttrain.small import rollout

CREDITS = {
    "group": lambda: GroupCredit(GroupCreditConfig()),
    "group, std": lambda: GroupCredit(GroupCreditConfig(scale="std")),
    "teacher": lambda: TeacherCredit({"agent": Fake(10)}),
}


@pytest.fixture(params=CREDITS)
def credit(request: pytest.FixtureRequest) -> Credit:
    return CREDITS[request.param]()


@pytest.fixture
def group() -> list[Rollout]:
    return [rollout(f"s/0/{i}", values=(5, 6, 7 + i), versions=(4, 2 + i, 5), score=i / 3) for i in range(4)]


def test_is_a_credit(credit: Credit) -> None:
    assert isinstance(credit, Credit)


def test_samples_are_the_rollouts_tokens(credit: Credit, group: list[Rollout]) -> None:
    samples = credit(group)
    assert [s.rollout for s in samples] == [r.id for r in group]
    for sample, source in zip(samples, group, strict=True):
        (branch,) = source.branches
        assert sample.ids == tuple(i for s in branch for i in s.ids)
        assert sample.sampled == tuple(m for s in branch for m in s.sampled)
        assert sample.logprobs == tuple(p for s in branch for p in s.logprobs)
        assert sample.versions == tuple(v for s in branch for v in s.versions)
        assert (sample.domain, sample.oldest_version) == (source.task.domain, source.oldest_version)


def test_there_is_signal_on_sampled_tokens_and_only_there(credit: Credit, group: list[Rollout]) -> None:
    for sample in credit(group):
        signal = sample.advantages if sample.teacher_logprobs is None else sample.teacher_logprobs
        assert tuple(v != 0 for v in signal) == sample.sampled


def test_it_is_a_pure_function_of_the_group(credit: Credit, group: list[Rollout]) -> None:
    first = credit(group)
    backwards = credit(group[::-1])
    assert credit(group) == first
    assert sorted(backwards, key=lambda s: s.rollout) == first
