"""What every teacher must hold."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import PreTrainedModel

from experts.train import ADAPTER
from fusion.served_teachers import start_teachers
from fusion.teachers import ModelTeacher
from posttrain.protocols import Teacher
from tests.contracts.engines import model_of, needs_vllm, vllm_config
from tests.model.longcat2_tiny import tiny
from tests.posttrain.small import plain_logprobs

LENGTHS = (7, 12, 2, 12, 5, 1)
KINDS = {"model": (), "one sequence a forward": (), "served": needs_vllm, "served adapters": needs_vllm}


@dataclass(frozen=True)
class Two:
    """Two teachers that differ, and the models that they are."""

    teachers: tuple[Teacher, Teacher]
    models: tuple[PreTrainedModel, PreTrainedModel]
    tolerance: float = 1e-5


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
        found = run(start_teachers(vllm_config(weights=weights), folder / "base", folders, folder / "work", stack))
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
    yield Two((ModelTeacher(folder / "a", budget), ModelTeacher(folder / "b", budget)), models)


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


def test_nothing_gives_nothing(two: Two) -> None:
    assert two.teachers[0].score([], []) == []
