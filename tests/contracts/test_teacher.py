"""What every teacher must hold."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from fusion.teachers import ModelTeacher
from posttrain.protocols import Teacher
from posttrain.weights import fingerprint
from tests.model.longcat2_tiny import tiny
from tests.posttrain.small import plain_logprobs

KINDS = {"model": ModelTeacher, "model, one sequence a forward": lambda folder: ModelTeacher(folder, 1)}
LENGTHS = (7, 12, 2, 12, 5, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    tiny(seed=3).save_pretrained(path)
    return path


@pytest.fixture(params=KINDS)
def teacher(request: pytest.FixtureRequest, folder: Path) -> Teacher:
    return KINDS[request.param](folder)


@pytest.fixture
def ids() -> list[list[int]]:
    rng = Random(0)
    return [[rng.randrange(3, 61) for _ in range(n)] for n in LENGTHS]


def test_is_a_teacher_that_says_who_it_is(teacher: Teacher) -> None:
    assert isinstance(teacher, Teacher)
    (scores,) = teacher.score([[3, 4]], [[False, True]])
    assert scores.teacher == fingerprint(tiny(seed=3)) != fingerprint(tiny(seed=4))


def test_log_probs_equal_a_plain_forward(teacher: Teacher, ids: list[list[int]]) -> None:
    scores = teacher.score(ids, [[True] * n for n in LENGTHS])
    for one, given in zip(scores, ids, strict=True):
        assert one.logprobs == pytest.approx(plain_logprobs(tiny(seed=3), given), abs=1e-5)
        assert one.logprobs[0] == 0.0, "nothing comes before the first token"


def test_outside_the_mask_there_is_zero_and_inside_nothing_changes(teacher: Teacher, ids: list[list[int]]) -> None:
    rng = Random(1)
    mask = [[rng.random() < 0.5 for _ in given] for given in ids]
    whole = teacher.score(ids, [[True] * n for n in LENGTHS])
    for some, every, kept in zip(teacher.score(ids, mask), whole, mask, strict=True):
        assert some.logprobs == tuple(p if m else 0.0 for p, m in zip(every.logprobs, kept, strict=True))


def test_company_and_order_do_not_matter(teacher: Teacher, ids: list[list[int]]) -> None:
    """A sequence is padded to the longest of its company; its own log-probs stay."""
    mask = [[True] * n for n in LENGTHS]
    together = teacher.score(ids, mask)
    backwards = teacher.score(ids[::-1], mask[::-1])[::-1]
    for one, other, given, kept in zip(together, backwards, ids, mask, strict=True):
        (alone,) = teacher.score([given], [kept])
        assert one.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_nothing_gives_nothing(teacher: Teacher) -> None:
    assert teacher.score([], []) == []
