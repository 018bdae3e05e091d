"""What every teacher must hold."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from experts.train import ADAPTER
from fusion.served_teachers import start_teachers
from fusion.teachers import ModelTeacher
from posttrain.protocols import Teacher
from posttrain.types import Support, TeacherScores
from tests.contracts.engines import model_of, needs_vllm, vllm_config
from tests.model.longcat2_tiny import tiny
from tests.posttrain.small import plain_logprobs
from tests.posttrain.tiny import all_logprobs

LENGTHS = (7, 12, 2, 12, 5, 1)
TOP, ALWAYS = 5, (2, 60, 7)
KINDS = {"model": (), "one sequence a forward": (), "served": needs_vllm, "served adapters": needs_vllm}


@dataclass(frozen=True)
class Two:
    """Two teachers that differ, and the models that they are."""

    teachers: tuple[Teacher, Teacher]
    models: tuple[PreTrainedModel, PreTrainedModel]
    tolerance: float = 1e-5

    @property
    def plain(self) -> Teacher:
        """The first of them without a support."""
        found: Any = copy.copy(self.teachers[0])
        found._top_k, found._always = 0, ()
        return found


def rows(support: Support | None) -> list[dict[int, float]]:
    """Id to log-prob of every row."""
    assert support is not None and TOP <= support.width <= TOP + len(ALWAYS)
    ids, logprobs = (np.frombuffer(b, t) for b, t in ((support.ids, "<i4"), (support.logprobs, "<f4")))
    pairs = [[(int(i), float(p)) for i, p in zip(*row, strict=True) if i >= 0] for row in
             zip(ids.reshape(-1, support.width), logprobs.reshape(-1, support.width), strict=True)]  # fmt: skip
    assert all(len(dict(row)) == len(row) for row in pairs), "no token twice"
    return [dict(row) for row in pairs]


@contextmanager
def served(folder: Path, weights: str) -> Iterator[Two]:
    """Servers on a loop that runs in another thread, as the stage's does."""
    kind = "llama-32-lora" if weights == "lora" else "llama-32"
    models: list[Any] = [model_of(kind, seed) for seed in (3, 4)]
    model_of(kind).save_pretrained(folder / "base")
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(folder / name)
        if weights == "lora":
            model.adapter.save_pretrained(folder / name / ADAPTER)
    loop, stack = asyncio.new_event_loop(), AsyncExitStack()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(600)

    folders = {name: folder / name for name in "ab"}
    try:
        config = vllm_config(weights=weights, max_logprobs=TOP)
        found = run(start_teachers(config, folder / "base", folders, folder / "work", stack, TOP, ALWAYS))
        yield Two((found["a"], found["b"]), (models[0], models[1]), 1e-4)
    finally:
        run(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=marks) for kind, marks in KINDS.items()])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder = tmp_path_factory.mktemp("teachers")
    if request.param.startswith("served"):
        with served(folder, "lora" if "adapters" in request.param else "folder") as found:
            yield found
        return
    models = tiny(seed=3), tiny(seed=4)
    budget = 1 if request.param.startswith("one") else 8192
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(folder / name)
    yield Two(
        (ModelTeacher(folder / "a", budget, TOP, ALWAYS), ModelTeacher(folder / "b", budget, TOP, ALWAYS)), models
    )


@pytest.fixture
def ids() -> list[list[int]]:
    rng = Random(0)
    return [[rng.randrange(3, 61) for _ in range(n)] for n in LENGTHS]


def test_are_teachers_that_say_who_they_are(two: Two) -> None:
    names = [t.score([[3, 4]], [[False, True]])[0].teacher for t in two.teachers]
    assert all(isinstance(t, Teacher) for t in two.teachers)
    assert names[0] != names[1]
    assert names == [t.score([[5, 6, 7]], [[False, True, True]])[0].teacher for t in two.teachers]


def test_log_probs_equal_a_plain_forward(two: Two, ids: list[list[int]]) -> None:
    for teacher, model in zip(two.teachers, two.models, strict=True):
        for one, given in zip(teacher.score(ids, [[True] * n for n in LENGTHS]), ids, strict=True):
            assert one.logprobs == pytest.approx(plain_logprobs(model, given), abs=two.tolerance)
            assert one.logprobs[0] == 0.0, "nothing comes before the first token"


def test_the_support_is_what_transformers_finds_most_likely_and_what_is_always_asked(
    two: Two, ids: list[list[int]]
) -> None:
    """The token that came is of it only if it would be whatever came."""
    outside = 0
    for teacher, model in zip(two.teachers, two.models, strict=True):
        for one, given in zip(teacher.score(ids, [[True] * n for n in LENGTHS]), ids, strict=True):
            found = rows(one.support)
            assert len(found) == len(given) - 1, "nothing comes before the first token"
            for row, logp_V, token in zip(found, all_logprobs(model, given), given[1:], strict=False):
                assert set(row) == {*logp_V.topk(TOP).indices.tolist(), *ALWAYS}
                assert row == pytest.approx({i: float(logp_V[i]) for i in row}, abs=two.tolerance)
                outside += token not in row
    assert outside > 20


def test_only_what_is_masked_has_a_support(two: Two, ids: list[list[int]]) -> None:
    rng, teacher = Random(2), two.teachers[0]
    mask = [[rng.random() < 0.5 for _ in given] for given in ids]
    whole = teacher.score(ids, [[True] * n for n in LENGTHS])
    for some, every, kept in zip(teacher.score(ids, mask), whole, mask, strict=True):
        wanted = [row for row, m in zip(rows(every.support), kept[1:], strict=True) if m]
        assert rows(some.support) == [pytest.approx(row, abs=two.tolerance) for row in wanted]


def test_without_a_support_the_log_probs_are_the_same(two: Two, ids: list[list[int]]) -> None:
    mask = [[True] * n for n in LENGTHS]
    for plain, one in zip(two.plain.score(ids, mask), two.teachers[0].score(ids, mask), strict=True):
        assert plain.support is None and plain.teacher == one.teacher
        assert plain.logprobs == pytest.approx(one.logprobs, abs=two.tolerance)


def test_outside_the_mask_there_is_zero_and_inside_nothing_changes(two: Two, ids: list[list[int]]) -> None:
    rng, teacher = Random(1), two.teachers[0]
    mask = [[rng.random() < 0.5 for _ in given] for given in ids]
    whole = teacher.score(ids, [[True] * n for n in LENGTHS])
    for some, every, kept in zip(teacher.score(ids, mask), whole, mask, strict=True):
        wanted = [p if m else 0.0 for p, m in zip(every.logprobs, kept, strict=True)]
        assert some.logprobs == pytest.approx(wanted, abs=two.tolerance)
        assert all(p == 0.0 for p, m in zip(some.logprobs, kept, strict=True) if not m)


def test_company_and_order_do_not_matter(two: Two, ids: list[list[int]]) -> None:
    """A sequence is padded to the longest of its company; its own log-probs stay."""
    mask, teacher = [[True] * n for n in LENGTHS], two.teachers[0]
    together = teacher.score(ids, mask)
    backwards = teacher.score(ids[::-1], mask[::-1])[::-1]
    for one, other, given, kept in zip(together, backwards, ids, mask, strict=True):
        (alone,) = teacher.score([given], [kept])
        assert one.logprobs == pytest.approx(alone.logprobs, abs=two.tolerance)
        assert one.logprobs == pytest.approx(other.logprobs, abs=two.tolerance)


def test_both_are_asked_at_the_same_time(two: Two, ids: list[list[int]]) -> None:
    """As adapters of one server are, of which a forward then has both."""
    mask, many = [[True] * n for n in LENGTHS], 4
    start = threading.Barrier(2)

    def ask(teacher: Teacher) -> list[TeacherScores]:
        start.wait(60)
        return [scores for _ in range(many) for scores in teacher.score(ids, mask)]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(ask, two.teachers))
    for teacher, model, together in zip(two.teachers, two.models, found, strict=True):
        for one, given, alone in zip(together, ids * many, teacher.score(ids, mask) * many, strict=True):
            assert one.teacher == alone.teacher
            assert one.logprobs == pytest.approx(plain_logprobs(model, given), abs=two.tolerance)
            assert rows(one.support) == [pytest.approx(row, abs=two.tolerance) for row in rows(alone.support)]


def test_nothing_gives_nothing(two: Two) -> None:
    assert two.teachers[0].score([], []) == []
