"""Which teacher judges what, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from fusion.credit import TeacherCredit
from posttrain.types import Support, TeacherScores
from tests.posttrain.small import rollout


@dataclass
class Fake:
    """Log-prob of a token is minus its id over ``scale``."""

    scale: float
    asked: list[tuple[list[list[int]], list[list[bool]]]] = field(default_factory=list)

    def score(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[bool]]) -> list[TeacherScores]:
        self.asked.append(([list(i) for i in ids], [list(m) for m in mask]))
        return [
            TeacherScores(logprobs=tuple(-i / self.scale if m else 0.0 for i, m in zip(a, b, strict=True)), teacher="f")
            for a, b in zip(ids, mask, strict=True)
        ]


def test_the_domain_s_teacher_judges_and_no_other() -> None:
    teachers = {"agent": Fake(10), "reasoning": Fake(100)}
    credit = TeacherCredit(teachers)
    (agent,) = credit([rollout("s/0/0", values=(5, 6))])
    (reasoning,) = credit([rollout("s/1/0", values=(5, 6), domain="reasoning")])
    assert agent.teacher_logprobs == (0.0, 0.0, -0.5, -0.6)
    assert reasoning.teacher_logprobs == (0.0, 0.0, -0.05, -0.06)
    assert [len(t.asked) for t in teachers.values()] == [1, 1]


def test_the_student_s_own_tokens_are_judged_as_they_were_sampled() -> None:
    teacher = Fake(10)
    TeacherCredit({"agent": teacher})(
        [rollout("s/0/0", values=(5, 6)), rollout("s/0/1", values=(8, 9, 7), versions=(0,) * 3)]
    )
    mask = [False, False, True, True]
    assert teacher.asked == [([[3, 4, 5, 6], [3, 4, 8, 9, 7]], [mask, [*mask, True]])]


def test_rewards_play_no_part_and_behaviour_is_kept() -> None:
    """No reward-based advantage, equal rewards or not, and a group of one teaches too."""
    samples = TeacherCredit({"agent": Fake(10)})([rollout("s/0/0", score=1.0), rollout("s/0/1", score=0.0)])
    assert [s.rollout for s in samples] == ["s/0/0", "s/0/1"]
    assert {s.advantages for s in samples} == {(0.0,) * 4}
    assert {s.logprobs for s in samples} == {(0.0, 0.0, -1.0, -1.0)}
    assert len(TeacherCredit({"agent": Fake(10)})([rollout("s/0/0", score=0.0)])) == 1


def test_what_the_teacher_says_of_other_tokens_is_kept_with_the_sample() -> None:
    support = Support(ids=bytes(8), logprobs=bytes(8), width=1)

    class Wordy(Fake):
        def score(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[bool]]) -> list[TeacherScores]:
            return [replace(s, support=support) for s in super().score(ids, mask)]

    (plain,) = TeacherCredit({"agent": Fake(10)})([rollout("s/0/0", values=(5, 6))])
    (wordy,) = TeacherCredit({"agent": Wordy(10)})([rollout("s/0/0", values=(5, 6))])
    assert plain.teacher_support is None and wordy == replace(plain, teacher_support=support)


def test_nothing_in_nothing_out_and_an_unknown_domain_is_an_error() -> None:
    credit = TeacherCredit({"agent": Fake(10)})
    assert credit([]) == []
    with pytest.raises(KeyError, match="reasoning"):
        credit([rollout("s/0/0", domain="reasoning")])
