"""The local engine beyond the contract: its process when things go wrong, and its scheduler step by step."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from multiprocessing import Pipe
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from posttrain.engine import slots, worker
from posttrain.engine.batching import Scheduler
from posttrain.engine.local import LocalEngine
from posttrain.engine.slots import Request
from posttrain.errors import EngineError, UserError
from posttrain.types import Completion, Sampling, Weights
from tests.model.longcat2_tiny import LSA
from tests.posttrain.tiny import all_logprobs, make_ids, make_model

TOLERANCE = 1e-4


# The process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[asyncio.Runner, LocalEngine]]:
    """An engine for the tests that leave it alive."""
    with asyncio.Runner() as runner:
        engine = runner.run(LocalEngine.start(folder, slots=4, max_context=16, timeout_s=60))
        yield runner, engine
        runner.run(engine.close())


def test_a_wait_beyond_its_bound_says_what_it_waited_for(served: tuple[asyncio.Runner, LocalEngine]) -> None:
    runner, engine = served
    os.kill(engine._process.pid, signal.SIGSTOP)
    engine._timeout_s = 0.2
    with pytest.raises(EngineError, match=r"^waited 0\.2 s for a completion of at most 5 tokens$"):
        runner.run(engine.generate((3, 4), Sampling(max_tokens=5)))
    engine._timeout_s = 60
    os.kill(engine._process.pid, signal.SIGCONT)
    assert len(runner.run(engine.generate((3, 4), Sampling(max_tokens=6))).ids) == 6  # the late answer was not taken
    assert engine._waiting == {}


def test_a_killed_process_fails_whoever_waits_and_whoever_comes_later(folder: Path) -> None:
    async def scenario() -> list[str]:
        engine = await LocalEngine.start(folder, slots=4, max_context=200, timeout_s=60)
        os.kill(engine._process.pid, signal.SIGSTOP)  # else some may be through before it is killed
        waiting = [asyncio.create_task(engine.generate((5, i), Sampling(max_tokens=190))) for i in range(8)]
        await asyncio.sleep(0.01)
        os.kill(engine._process.pid, signal.SIGKILL)
        async with asyncio.timeout(50):
            outcomes: list[Any] = await asyncio.gather(*waiting, return_exceptions=True)
            for call in (engine.generate((5, 6), Sampling()), engine.load(Weights(version=1, where="nowhere"))):
                outcomes += await asyncio.gather(call, return_exceptions=True)
            await engine.close()
            await engine.close()
        assert engine._pipe.closed
        return [f"{type(o).__name__}: {o}" for o in outcomes]

    text = "EngineError: the engine process died with exit code -9; its last words are on stderr"
    assert asyncio.run(scenario()) == [text] * 10


@pytest.mark.slow
def test_a_stopped_process_does_not_stop_whoever_sends_it_more_than_a_pipe_holds(folder: Path) -> None:
    """The event loop stands still while it writes, so no bound of its own would end that."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=worker.main, args=(there, str(folder), 4, 16, 1), daemon=True)
    process.start()
    there.close()
    assert here.poll(120) and process.pid is not None  # it is ready; a start has the engine's bound, here too short
    os.kill(process.pid, signal.SIGSTOP)
    rescue = threading.Timer(60, process.kill)
    rescue.start()

    async def scenario() -> list[Any]:
        engine = LocalEngine(process, here, 2)
        await engine._ready
        asked = (engine.generate((i,) * 50_000, Sampling(max_tokens=5)) for i in range(64))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        await engine.close()
        return outcomes

    began = time.monotonic()
    outcomes = asyncio.run(scenario())
    took_s = time.monotonic() - began
    rescue.cancel()
    assert [type(o) for o in outcomes] == [EngineError] * 64
    assert took_s < 60, "it was killed by the test"
    assert not process.is_alive()


def test_an_engine_that_cannot_start_says_so_and_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="died with exit code 1"):
        asyncio.run(LocalEngine.start(tmp_path / "absent", timeout_s=60))


def test_a_model_that_chooses_as_it_goes_is_not_compiled(tmp_path: Path) -> None:
    make_model("longcat2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"engine\.compile: models of type longcat2"):
        asyncio.run(LocalEngine.start(tmp_path, timeout_s=60, compiling=True))


def test_a_start_beyond_its_bound_leaves_no_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LocalEngine] = []
    init = LocalEngine.__init__
    monkeypatch.setattr(LocalEngine, "__init__", lambda self, *a: (made.append(self), init(self, *a))[1])
    with pytest.raises(EngineError, match=r"waited 0\.01 s for the engine to start"):
        asyncio.run(LocalEngine.start(folder, timeout_s=0.01))
    assert made[0]._process.exitcode is not None
    assert made[0]._pipe.closed


def test_the_process_reads_while_it_writes(folder: Path) -> None:
    """More bytes than a pipe holds go both ways at once, and neither side waits for the other."""
    here, there = Pipe()
    thread = threading.Thread(target=worker.main, args=(there, str(folder), 4, 16, 1))
    thread.start()
    assert here.recv() == ("ready",)
    batch = [request(i, range(20)) for i in range(40_000)]
    here.send(("generate", batch))
    assert here.poll(30)  # it has begun to answer, and cannot end before we read
    sender = threading.Thread(target=here.send, args=(("generate", batch),), daemon=True)
    sender.start()
    sender.join(20)
    stuck = sender.is_alive()
    answers = [number for _ in range(2) for number, _ in here.recv()[1]]
    assert not stuck
    assert answers == [*range(40_000), *range(40_000)]
    here.send(("close",))
    thread.join(20)
    assert not thread.is_alive()


def test_the_process_ends_when_its_owner_is_gone(folder: Path) -> None:
    here, there = Pipe()
    thread = threading.Thread(target=worker.main, args=(there, str(folder), 4, 64, 1))
    thread.start()
    assert here.recv() == ("ready",)
    here.send(("generate", [Request(id=0, ids=(3,), sampling=Sampling(max_tokens=60))]))
    here.close()
    thread.join(10)
    assert not thread.is_alive()


# The scheduler


class Counting(nn.Module):
    """Passes on to a model and notes the shape ``(rows, tokens)`` of every forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.shapes: list[tuple[int, int]] = []

    def forward(self, input_ids: Tensor, **rest: Any) -> Any:
        """The model's own."""
        self.shapes.append((input_ids.shape[0], input_ids.shape[1]))
        return self.model(input_ids=input_ids, **rest)


MODEL = make_model("longcat2")


def request(number: int, ids: Sequence[int], max_tokens: int = 5, seed: int = 0) -> Request:
    return Request(id=number, ids=tuple(ids), sampling=Sampling(max_tokens=max_tokens, seed=seed))


def serve(scheduler: Scheduler, requests: Sequence[Request]) -> list[Completion]:
    """Completions in the order of ``requests``, all of which wait from the beginning."""
    scheduler.submit(requests)
    while scheduler.busy:
        scheduler.step()
    done, scheduler.done = dict(scheduler.done), []
    return [done[r.id] for r in requests]


def gap(model: Any, requests: Sequence[Request], completions: Sequence[Completion]) -> float:
    """Largest difference to the log-probs of one full forward each."""
    worst = 0.0
    for r, c in zip(requests, completions, strict=True):
        all_TV = all_logprobs(model, (*r.ids, *c.ids))[len(r.ids) - 1 : -1]
        want_T = all_TV.gather(1, torch.tensor(c.ids)[:, None])[:, 0]
        worst = max(worst, (want_T - torch.tensor(c.logprobs)).abs().max().item())
    return worst


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "qwen3", "qwen3_moe", "gemma2", "phi3", "gpt_neox", "deepseek_v3"])
def test_any_causal_model_is_served_as_its_own_forward_has_it(kind: str) -> None:
    """Fused heads, learned positions, routed experts, soft-capped scores (eager attention), latent keys."""
    model = make_model(kind)
    requests = [request(i, make_ids(Random(i), n), 12, i) for i, n in enumerate((3, 50, 30, 60, 7, 100, 3, 41))]
    assert gap(model, requests, serve(Scheduler(model, 6, 128), requests)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe", "deepseek_v3"])
def test_compiled_a_causal_model_is_served_as_its_own_forward_has_it(kind: str) -> None:
    """Later versions too, of which each has a model of its own."""
    model, later = make_model(kind), make_model(kind, seed=1)
    requests = [request(i, make_ids(Random(i), n), 12, i) for i, n in enumerate((3, 50, 30, 60, 7))]
    counters.clear()
    scheduler = Scheduler(deepcopy(model), 6, 128, compiling=True)
    scheduler.warm_up()
    compiled = counters["stats"]["unique_graphs"]
    assert gap(model, requests, serve(scheduler, requests)) < TOLERANCE
    scheduler.set_version(1, keep=[0]).load_state_dict(later.state_dict())
    assert gap(later, requests, serve(scheduler, requests)) < TOLERANCE
    assert all(m.base_model._compiled_call_impl is not None for m in map(scheduler.resident.__getitem__, (0, 1)))
    assert counters["stats"]["unique_graphs"] == compiled >= 2  # nobody waits for more when the engine is at work
    torch.compiler.reset()


def test_compiled_a_model_with_windows_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.compile: a model of type gemma2 has more than full attention"):
        Scheduler(make_model("gemma2"), 6, 128, compiling=True)


def test_a_context_in_which_prefills_choose_by_pages_is_refused() -> None:
    pages: dict[str, Any] = {"use_hi": True, "hi_page_size": 8, "hi_block_size": 4, "hi_pages": 4, "hi_min_tokens": 64}
    model = make_model("longcat2", **LSA, **pages)
    with pytest.raises(ValueError, match=r"max_context: 64, but from 64 tokens on \(hi_min_tokens\)"):
        Scheduler(model, 2, 64)
    Scheduler(model, 2, 63)


def test_a_sliding_window_shorter_than_the_context_is_refused() -> None:
    model = make_model("mistral", sliding_window=64)
    assert Scheduler(model, 2, 64).max_context == 64
    with pytest.raises(ValueError, match="set max_context to at most 64"):
        Scheduler(model, 2, 65)


def test_prefill_in_another_order_than_the_slots_keeps_rows_apart() -> None:
    """Sorted by length the rows are 0, 2, 1, 3: as many as the cache's first four, but not in their order."""
    requests = [request(i, make_ids(Random(i), n), 3, i) for i, n in enumerate((3, 9, 6, 12))]
    assert gap(MODEL, requests, serve(Scheduler(MODEL, 4, 64), requests)) < TOLERANCE


def test_the_next_turn_forwards_only_what_is_new() -> None:
    counting = Counting(MODEL)
    scheduler = Scheduler(counting, 3, 128)
    firsts = [request(i, make_ids(Random(i), 40 + i), 5, i) for i in range(3)]
    answers = serve(scheduler, firsts)
    order = (2, 0, 1)
    nexts = [request(10 + i, (*firsts[i].ids, *answers[i].ids, *make_ids(Random(50 + i), 6)), 4, i) for i in order]
    counting.shapes.clear()
    again = serve(scheduler, nexts)
    assert counting.shapes == [(3, 7), (3, 1), (3, 1), (3, 1)]  # the token sampled last, and six new ones
    assert gap(MODEL, nexts, again) < TOLERANCE


def test_a_context_that_differs_or_is_of_other_weights_is_computed_again() -> None:
    counting = Counting(MODEL)
    scheduler = Scheduler(counting, 1, 128)
    first = request(0, make_ids(Random(0), 30))
    (answer,) = serve(scheduler, [first])
    changed = request(1, (*first.ids[:10], 5, *first.ids[11:], *answer.ids, 9), 1)
    counting.shapes.clear()
    serve(scheduler, [changed])
    assert counting.shapes == [(1, 36)]
    for version in (1, 1):  # the same number twice: another stage begins to count anew
        (answer,) = serve(scheduler, [first])
        scheduler.set_version(version)
        counting.shapes.clear()
        (later,) = serve(scheduler, [request(2, (*first.ids, *answer.ids, 9), 2)])
        assert counting.shapes == [(1, 36), (1, 1)]
        assert later.versions == (version, version)


def test_a_row_begun_under_older_weights_is_not_continued_by_the_next_turn() -> None:
    counting = Counting(MODEL)
    scheduler = Scheduler(counting, 1, 128)
    first = request(0, make_ids(Random(0), 30), 6)
    scheduler.submit([first])
    scheduler.step()
    scheduler.set_version(7)
    while scheduler.busy:
        scheduler.step()
    answer = scheduler.done[0][1]
    assert answer.versions == (0, 0, 7, 7, 7, 7)
    counting.shapes.clear()
    serve(scheduler, [request(1, (*first.ids, *answer.ids, 9), 1)])
    assert counting.shapes == [(1, 37)]


def test_a_group_shares_one_prefill() -> None:
    counting = Counting(MODEL)
    ids = make_ids(Random(1), 30)
    group = [request(i, ids, 8, i) for i in range(6)]
    together = serve(Scheduler(counting, 8, 128), group)
    assert counting.shapes[0] == (1, 30)
    assert counting.shapes[1:] == [(6, 1)] * 7
    assert [c.ids for c in together] == [serve(Scheduler(MODEL, 1, 128), [r])[0].ids for r in group]
    assert gap(MODEL, group, together) < TOLERANCE
    assert len({c.ids for c in together}) == 6


def test_what_is_forgotten_leaves_its_slot_at_once_and_what_follows_is_as_ever() -> None:
    """One that runs, one that waits, one that has ended: the first one's row is continued like any other's."""
    scheduler = Scheduler(MODEL, 2, 128)
    witness, forgotten, waiting = (request(i, make_ids(Random(i), 20 + i), 12, i) for i in range(3))
    scheduler.submit([witness, forgotten, waiting])
    for _ in range(4):
        scheduler.step()
    context = scheduler.slots[1].context
    begun = tuple(context)
    for number in (1, 2, 99):
        scheduler.forget(number)
    assert not scheduler.pending and scheduler.free == [scheduler.slots[1]]
    after = request(3, (*begun, 7), 5, 3)
    counting = Counting(MODEL)
    scheduler.resident._models[0] = counting
    scheduler.submit([after])
    scheduler.step()
    assert counting.shapes[0] == (1, 2), "the token sampled last, and the new one"
    while scheduler.busy:
        scheduler.step()
    done = dict(scheduler.done)
    assert sorted(done) == [0, 3]
    assert gap(MODEL, [witness, after], [done[0], done[3]]) < TOLERANCE
    scheduler.forget(3)
    assert sorted(slot.index for slot in scheduler.free) == [0, 1], "twice is once"


def test_whoever_gives_up_waiting_frees_a_slot(folder: Path) -> None:
    """Of two slots one is taken by what is asked for until the end, the other by what nobody waits for any more. It is
    free before the first one ends, which it would not be if the second, as long, went on."""

    async def run() -> None:
        engine = await LocalEngine.start(folder, slots=2, max_context=4000, timeout_s=120)
        try:
            long = Sampling(max_tokens=3900, seed=1)
            stays, goes = (asyncio.create_task(engine.generate((3, 4, i), long)) for i in (5, 6))
            await asyncio.sleep(0.05)  # so that both have begun, most likely
            goes.cancel()
            unsent = asyncio.create_task(engine.generate((3, 4, 8), long))
            await asyncio.sleep(0)
            unsent.cancel()
            found = await engine.generate((3, 4, 9), Sampling(max_tokens=4, seed=1))
            assert len(found.ids) == 4 and not stays.done()
            stays.cancel()
        finally:
            await engine.close()

    asyncio.run(run())


def test_idle_rows_change_nothing() -> None:
    """Rows end at different times: some forwards carry idle rows along, later ones pick the few that run."""
    counting = Counting(MODEL)
    requests = [request(i, make_ids(Random(i), 5 + 3 * i), n, i) for i, n in enumerate((30, 2, 9, 3, 4, 12, 2, 20))]
    together = serve(Scheduler(counting, 8, 128), requests)
    live = [sum(r.sampling.max_tokens > step for r in requests) for step in range(1, 30)]
    rows = [shape[0] for shape in counting.shapes[1:]]
    assert any(r > n for r, n in zip(rows, live, strict=True))
    assert rows[11:19] == [2] * 8  # the first and the last slot run: they are picked
    alone = [serve(Scheduler(MODEL, 1, 128), [r])[0] for r in requests]
    assert [c.ids for c in together] == [c.ids for c in alone]
    assert gap(MODEL, requests, together) < TOLERANCE


def test_the_same_calls_give_the_same_tokens_bit_for_bit() -> None:
    requests = [request(i, make_ids(Random(i % 9), 4 + i % 13), 3 + i % 11, i) for i in range(30)]
    assert serve(Scheduler(MODEL, 5, 64), requests) == serve(Scheduler(MODEL, 5, 64), requests)


def test_a_long_prefill_is_cut_into_forwards_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_PREFILL_TOKENS", 64)
    counting = Counting(MODEL)
    requests = [request(i, make_ids(Random(i), n), 2, i) for i, n in enumerate((5, 90, 20, 30, 8, 31))]
    completions = serve(Scheduler(counting, 6, 128), requests)
    assert counting.shapes[:4] == [(3, 20), (2, 31), (1, 90), (6, 1)]
    assert gap(MODEL, requests, completions) < TOLERANCE


def test_what_finds_no_room_ends_without_a_forward() -> None:
    counting = Counting(MODEL)
    requests = [request(0, make_ids(Random(0), 16)), request(1, make_ids(Random(0), 4), max_tokens=0)]
    empty = Completion(ids=(), logprobs=(), versions=(), finish="length")
    assert serve(Scheduler(counting, 2, 16), requests) == [empty, empty]
    assert counting.shapes == []
