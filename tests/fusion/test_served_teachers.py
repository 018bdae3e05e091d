"""Teachers whose servers die: the real classes, over real servers and over ones that only keep books."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from experts.train import ADAPTER
from fusion.served_teachers import ServedTeacher, start_teachers
from posttrain.engine.local import LocalEngine
from posttrain.engine.vllm_keeper import Keeper
from posttrain.engine.vllm_server import Late, Refused, ServerGone
from posttrain.errors import EngineError, TeacherError
from posttrain.protocols import World
from posttrain.settings import LocalEngineConfig, VllmEngineConfig
from posttrain.types import Rollout, Sample
from tests.contracts.engines import model_of, needs_vllm, vllm_config
from tests.toy_stage import HookedWorld, fine, toy_stage, train

IDS = [[5, 9, 12, 4, 7], [8, 3, 33]]
MASK = [[True] * len(one) for one in IDS]


@contextmanager
def loop_beside() -> Iterator[tuple[asyncio.AbstractEventLoop, Callable[..., Any]]]:
    """An event loop in another thread, as the stage's is to who scores, and how to run something on it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop, lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(600)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.parametrize(
    "weights", [pytest.param(w, marks=[*needs_vllm, pytest.mark.faults]) for w in ("folder", "lora")]
)
def test_a_killed_server_is_replaced_and_scores_as_before(weights: str, tmp_path: Path) -> None:
    """With all that it served: adapters by their names, and the tokens that it is always asked."""
    kind = "llama-32-lora" if weights == "lora" else "llama-32"
    model_of(kind).save_pretrained(tmp_path / "base")
    for name, seed in (("a", 3), ("b", 4)):
        model: Any = model_of(kind, seed)
        model.save_pretrained(tmp_path / name)
        if weights == "lora":
            model.adapter.save_pretrained(tmp_path / name / ADAPTER)
    folders, always = {name: tmp_path / name for name in "ab"}, (2, 60)
    with loop_beside() as (_, run):
        stack = AsyncExitStack()
        try:
            config = vllm_config(weights=weights, max_logprobs=4)
            found = run(start_teachers(config, tmp_path / "base", folders, tmp_path / "work", stack, 4, always))
            before = {name: teacher.score(IDS, MASK) for name, teacher in found.items()}
            assert before["a"][0].logprobs != pytest.approx(before["b"][0].logprobs, abs=1e-2)
            for keeper in {teacher._keeper for teacher in found.values()}:
                keeper.server._process.kill()
            for name, teacher in found.items():
                for after, was in zip(teacher.score(IDS, MASK), before[name], strict=True):
                    assert after.logprobs == pytest.approx(was.logprobs, abs=1e-5)
                    assert after.support and was.support and after.support.ids == was.support.ids
            assert {teacher._keeper.lives for teacher in found.values()} == {1}
        finally:
            run(stack.aclose())


class Books:
    """A server that scores, if it lives to the end of a question. ``deadly`` is called with the question's number."""

    def __init__(self, deadly: Callable[[int], None], restarts: int = 3) -> None:
        self.config = VllmEngineConfig(type="vllm", restarts=restarts, timeout_s=20, start_s=20)
        self.name = "the writer's server"
        self.deadly, self.alive, self.asked, self.starts = deadly, True, 0, 0

    async def begin(self) -> None:
        self.alive, self.starts = True, self.starts + 1

    async def kill(self) -> None:
        self.alive = False

    async def well(self) -> bool:
        return self.alive

    async def post(self, path: str, body: Any) -> Any:
        self.asked = number = self.asked + 1
        await asyncio.sleep(0)  # another question is on its way too
        self.deadly(number)
        ids = body["token_ids"]
        return {"prompt_logprobs": [None, *({str(i): {"logprob": -float(i), "rank": 1}} for i in ids[1:])]}


def asked(server: Books) -> list[tuple[float, ...]]:
    with loop_beside() as (loop, _):
        server_: Any = server
        teacher = ServedTeacher(Keeper(server_, server.begin), "writer", "digest", loop)
        return [s.logprobs for s in teacher.score(IDS, MASK)]


EXPECTED = [(0.0, -9.0, -12.0, -4.0, -7.0), (0.0, -3.0, -33.0)]


def test_what_was_on_its_way_is_asked_again() -> None:
    """Of one new server."""

    def deadly(number: int) -> None:
        if number == 1:
            server.alive = False
        if number <= 2:
            raise ServerGone("it died")

    server = Books(deadly)
    assert asked(server) == EXPECTED
    assert server.starts == 1 and server.asked == 4


def test_one_that_is_late_and_well_is_left_alone() -> None:
    def deadly(number: int) -> None:
        raise Late("did not answer in time")

    server = Books(deadly)
    with pytest.raises(TeacherError, match="did not answer in time"):
        asked(server)
    assert server.starts == 0 and server.asked == 2


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_restart_that_fails_is_tried_again(restarts: int) -> None:
    """If there are restarts left."""

    def deadly(number: int) -> None:
        if number == 1:
            server.alive = False
            raise ServerGone("it died")

    async def begin() -> None:
        await start()
        if server.starts == 1:
            raise EngineError("it ended before it served")

    server = Books(deadly, restarts)
    start, server.begin = server.begin, begin  # pyright: ignore[reportAttributeAccessIssue]
    if restarts == 1:
        with pytest.raises(TeacherError, match="it ended before it served"):
            asked(server)
    else:
        assert asked(server) == EXPECTED
    assert server.starts == restarts and server.alive == (restarts == 2)


def test_one_that_hangs_is_taken_for_dead() -> None:
    def deadly(number: int) -> None:
        if number == 1:
            server.alive = False
        if number <= 2:
            raise Late("did not answer in time")

    server = Books(deadly)
    assert asked(server) == EXPECTED
    assert server.starts == 1


def test_one_that_dies_too_often_is_named() -> None:
    def deadly(number: int) -> None:
        server.alive = False
        raise ServerGone(f"it died of question {number}")

    server = Books(deadly, restarts=2)
    with pytest.raises(TeacherError, match="it died of question"):
        asked(server)
    assert server.starts == 2


def test_one_that_refuses_is_not_started_anew() -> None:
    def deadly(number: int) -> None:
        raise Refused("too long")

    server = Books(deadly)
    with pytest.raises(TeacherError, match="too long"):
        asked(server)
    assert server.starts == 0


@pytest.mark.parametrize("error, starts", [(TeacherError, 1), (EngineError, 3)])
def test_a_teacher_s_failure_is_not_cured_by_new_engines(
    error: type[Exception], starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine's is, ``restarts`` times."""
    started, start = list[int](), LocalEngine.start

    async def counted(*args: Any, **kwargs: Any) -> LocalEngine:
        started.append(1)
        return await start(*args, **kwargs)

    def credit(group: Sequence[Rollout]) -> list[Sample]:
        raise error("the teacher writer: it died")

    monkeypatch.setattr(LocalEngine, "start", counted)
    worlds: dict[str, World] = {"requests": HookedWorld(fine, 60.0)}
    engine = LocalEngineConfig(slots=8, max_context=128, restarts=2)
    stage = toy_stage(tmp_path, worlds, credit=credit, engine=engine)
    with pytest.raises(error, match="the teacher writer"):
        train(tmp_path, "run", stage)
    assert len(started) == starts
