"""Several versions of a policy in one engine: each request is sampled as if its version were alone."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.engine.batching import Scheduler
from posttrain.engine.local import LocalEngine
from posttrain.engine.slots import Request
from posttrain.engine.start import start_engine
from posttrain.errors import EngineError
from posttrain.settings import LocalEngineConfig
from posttrain.types import Completion, Sampling, Weights
from posttrain.weights import SHM, SharedWeights, state_of
from tests.contracts.engines import replayed
from tests.model.longcat2_tiny import LSA, MTP
from tests.posttrain.tiny import all_logprobs, make_ids, make_model, trainer_gap, trainer_of

TOLERANCE = 1e-4
STEPS = MTP["mtp_num_layers"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "longcat2": ("longcat2", {}, {"record_choices": True}),
    "drafting": ("longcat2", {**LSA, **MTP}, {"record_choices": True, "draft_steps": STEPS}),
}
"""A kind of model, its config, and what the scheduler does with it."""
EVERY = pytest.mark.parametrize("case", CASES)


@cache
def policy(case: str, version: int) -> Any:
    """The model that has this number here; not to be changed."""
    kind, changes, _ = CASES[case]
    return make_model(kind, seed=20 + version, **changes)


def scheduler_of(case: str, version: int = 0, slots: int = 6, **options: Any) -> Scheduler:
    """A scheduler with one version."""
    scheduler = Scheduler(deepcopy(policy(case, version)), slots, 96, **CASES[case][2], **options)
    scheduler.set_version(version)
    return scheduler


def swap(scheduler: Scheduler, case: str, version: int, keep: Sequence[int] = ()) -> None:
    """Load the model of that number."""
    scheduler.set_version(version, keep).load_state_dict(policy(case, version).state_dict())


def request(number: int, length: int, max_tokens: int, version: int | None = None) -> Request:
    sampling = Sampling(max_tokens=max_tokens, seed=number, version=version)
    return Request(id=number, ids=make_ids(Random(number), length), sampling=sampling)


def finish(scheduler: Scheduler) -> dict[int, Completion]:
    """Everything that ended or now ends."""
    while scheduler.busy:
        scheduler.step()
    return dict(scheduler.done)


def alone(case: str, version: int, requests: Sequence[Request]) -> list[Completion]:
    """Answers of an engine that never had another version."""
    scheduler = scheduler_of(case, version)
    scheduler.submit(requests)
    done = finish(scheduler)
    return [done[r.id] for r in requests]


def from_token(request: Request, completion: Completion, start: int) -> tuple[tuple[int, ...], Completion]:
    """A completion's tokens from ``start`` on, and all before it as their prompt."""
    rest = replace(completion, ids=completion.ids[start:], logprobs=completion.logprobs[start:], choices=None)
    return (*request.ids, *completion.ids[:start]), replace(rest, versions=completion.versions[start:])


# Pinned


@EVERY
def test_what_is_pinned_has_the_same_bits_whatever_else_is_served(case: str) -> None:
    """A group of one prompt and others beside it; without drafts all of them take the same number of rounds."""
    group = [request(i, 9 + 7 * i, 40) for i in range(4)] if case != "drafting" else [request(0, 23, 40)]
    group += [replace(r, id=10, sampling=replace(r.sampling, seed=10)) for r in group[:1] if case != "drafting"]
    want = alone(case, 3, group)
    scheduler = scheduler_of(case, 3, slots=12)
    scheduler.submit([replace(r, sampling=replace(r.sampling, version=3)) for r in group])
    for version in (4, 5, 6):
        for _ in range(3):
            scheduler.step()
        swap(scheduler, case, version, keep=range(3, version))
        scheduler.submit([request(10 * version + i, 5 + i, 15, version if i else None) for i in range(2)])
    done = finish(scheduler)
    assert [done[r.id] for r in group] == want
    for version in (4, 5, 6):
        assert done[10 * version + 1].versions == (version,) * 15
    assert done[40].versions != (4,) * 15 and set(done[40].versions) <= {4, 5, 6}
    assert scheduler.failed == []


@EVERY
def test_the_next_turn_continues_a_row_of_its_own_version_only(case: str) -> None:
    scheduler = scheduler_of(case, 1)
    first = request(0, 30, 6, version=1)
    scheduler.submit([first])
    ids = (*first.ids, *finish(scheduler)[0].ids, 7, 8)
    swap(scheduler, case, 2, keep=[1])
    turns = [
        Request(id=2 + n, ids=ids, sampling=Sampling(max_tokens=9, seed=5, version=v)) for n, v in enumerate((2, 1))
    ]
    rows = [scheduler._choose(r)[1] for r in turns]
    scheduler.free = list(scheduler.slots)
    assert rows == [0, len(first.ids) + 5]
    scheduler.submit(turns)
    done = finish(scheduler)
    for turn, version in zip(turns, (2, 1), strict=True):
        (want,) = alone(case, version, [replace(turn, sampling=replace(turn.sampling, version=None))])
        assert (done[turn.id].ids, done[turn.id].versions) == (want.ids, (version,) * 9)
        assert done[turn.id].logprobs == pytest.approx(want.logprobs, abs=TOLERANCE)
        assert done[turn.id].choices == want.choices


def test_one_prompt_is_shared_among_requests_of_one_version_only() -> None:
    scheduler = scheduler_of("longcat2")
    swap(scheduler, "longcat2", 1, keep=[0])
    ids = make_ids(Random(0), 20)
    asked = [Request(id=i, ids=ids, sampling=Sampling(max_tokens=8, seed=3, version=(0, 1, None)[i])) for i in range(3)]
    scheduler.submit(asked)
    done = finish(scheduler)
    assert done[1].ids == done[2].ids
    for i, model in ((0, policy("longcat2", 0)), (1, policy("longcat2", 1))):
        assert trainer_gap(trainer_of(deepcopy(model)), [(ids, done[i])]) < TOLERANCE
    assert done[0].ids != done[1].ids


def test_a_version_that_is_loaded_again_drops_the_earlier_one_of_its_number() -> None:
    """Another stage begins to count anew: the number is the same, the weights are not."""
    scheduler = scheduler_of("llama", 1)
    scheduler.submit([request(0, 10, 20, version=1), request(1, 10, 20)])
    scheduler.step()
    scheduler.set_version(1, keep=[1]).load_state_dict(policy("llama", 2).state_dict())
    assert scheduler.failed == [(0, "version 1 was dropped before its request ended: resident are 1 (newest: 1)")]
    scheduler.submit([request(2, 10, 20, version=1)])
    done = finish(scheduler)
    assert trainer_gap(trainer_of(deepcopy(policy("llama", 2))), [(request(2, 10, 0).ids, done[2])]) < TOLERANCE
    assert done[1].versions == (1,) * 20


# Not pinned


@EVERY
@pytest.mark.parametrize("on_swap", ["keep", "recompute"])
def test_after_a_swap_the_cache_is_kept_or_computed_anew(case: str, on_swap: str) -> None:
    """Computed anew, the log-probs after it are those of the trainer with the new weights; kept, they cannot be. Up to
    the swap there is no difference."""
    requests = [request(i, 3 + 11 * i, 30) for i in range(5)]
    scheduler = scheduler_of(case, on_swap=on_swap)
    scheduler.submit(requests)
    for _ in range(8):
        scheduler.step()
    swap(scheduler, case, 1)
    done = finish(scheduler)
    before = [done[r.id].versions.count(0) for r in requests]
    assert all(
        8 <= n < 30 and done[r.id].versions[n:] == (1,) * (30 - n) for r, n in zip(requests, before, strict=True)
    )
    for r, n, want in zip(requests, before, alone(case, 0, requests), strict=True):
        assert done[r.id].ids[:n] == want.ids[:n]
        assert done[r.id].logprobs[:n] == pytest.approx(want.logprobs[:n], abs=TOLERANCE)
    new = trainer_of(deepcopy(policy(case, 1)))
    gaps = [trainer_gap(new, [from_token(r, done[r.id], n)]) for r, n in zip(requests, before, strict=True)]
    if on_swap == "recompute":
        assert max(gaps) < TOLERANCE
    else:
        assert min(gaps) > 100 * TOLERANCE


@pytest.mark.parametrize("case", ["longcat2", "drafting"])
def test_a_cache_that_was_computed_anew_is_wholly_the_new_versions(case: str) -> None:
    """What it chose is recorded anew, and the next turn continues the row."""
    scheduler, first = scheduler_of(case, on_swap="recompute"), request(0, 30, 12)
    scheduler.submit([first])
    scheduler.step()
    swap(scheduler, case, 1)
    answer = finish(scheduler)[0]
    ids = (*first.ids, *answer.ids)
    with torch.no_grad():
        out = policy(case, 1)(torch.tensor([ids[:-1]]), use_cache=False, output_choices=True)
    assert answer.choices is not None
    slots = np.frombuffer(answer.choices.slots, "<u2").reshape(41, *answer.choices.slot_shape)
    assert (np.sort(slots, axis=-1) == torch.stack(out.slots, dim=2)[0].sort(dim=-1).values.numpy()).all()
    turn = Request(id=1, ids=(*ids, 9), sampling=Sampling(max_tokens=9, seed=1))
    assert scheduler._choose(turn)[1] == 41
    scheduler.free = list(scheduler.slots)
    scheduler.submit([turn])
    assert trainer_gap(trainer_of(deepcopy(policy(case, 1))), [(turn.ids, finish(scheduler)[1])]) < TOLERANCE


def test_a_long_computation_anew_is_cut_into_forwards_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.engine.slots._PREFILL_TOKENS", 64)
    scheduler, requests = scheduler_of("llama", on_swap="recompute"), [request(i, 5 + 12 * i, 20) for i in range(6)]
    scheduler.submit(requests)
    scheduler.step()
    swap(scheduler, "llama", 1)
    shapes: list[tuple[int, ...]] = []
    hook: Any = lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
    scheduler.model.register_forward_pre_hook(hook, with_kwargs=True)
    scheduler.step()
    assert shapes == [(2, 18), (1, 30), (1, 42), (1, 54), (1, 66), (6, 1)]
    done, new = finish(scheduler), trainer_of(deepcopy(policy("llama", 1)))
    assert trainer_gap(new, [from_token(r, done[r.id], 2) for r in requests]) < TOLERANCE


# Anything at all


@cache
def reference(case: str, version: int, ids: tuple[int, ...], sampling: Sampling) -> Completion:
    """Of an engine that only ever had that version."""
    return alone(case, version, [Request(id=0, ids=ids, sampling=sampling)])[0]


def full_logprobs(case: str, r: Request, completion: Completion) -> list[float]:
    """Log-prob of every token by the version that is stamped on it, given the whole context."""
    ids, n = (*r.ids, *completion.ids), len(r.ids)
    by_version = {v: all_logprobs(policy(case, v), ids) for v in set(completion.versions)}
    return [by_version[v][n - 1 + t, ids[n + t]].item() for t, v in enumerate(completion.versions)]


LOAD = st.tuples(st.just("load"), st.sets(st.integers(0, 2), max_size=2))
"""Which of the versions that there are to keep, by how long ago they came."""
ASK = st.tuples(
    st.just("ask"), st.integers(1, 20), st.integers(1, 20), st.one_of(st.none(), st.integers(0, 2)), st.integers(0, 3)
)
"""Lengths of prompt and answer, how long ago its version came if it is pinned, and which prompt it shares."""
STEP = st.tuples(st.just("step"), st.integers(1, 6))


@EVERY
@pytest.mark.parametrize("on_swap", ["keep", "recompute"])
@settings(max_examples=8, derandomize=True, database=None)
@given(st.lists(st.one_of(LOAD, ASK, ASK, STEP), min_size=10, max_size=30))
def test_every_answer_is_that_of_its_version_alone(case: str, on_swap: str, actions: list[tuple[Any, ...]]) -> None:
    scheduler, asked, dropped = scheduler_of(case, slots=3, on_swap=on_swap), dict[int, Request](), set[int]()
    for action in actions:
        versions = list(scheduler.resident)[::-1]  # the newest first
        match action:
            case ("load", kept):
                keep = [versions[i] for i in kept if i < len(versions)]
                swap(scheduler, case, versions[0] + 1, keep)
                assert list(scheduler.resident) == [*sorted(keep), versions[0] + 1]
                dropped |= {i for i, r in asked.items() if r.sampling.version in set(versions) - set(keep)}
            case ("ask", length, max_tokens, ago, prompt):
                version = None if ago is None else versions[min(ago, len(versions) - 1)]
                sampling = Sampling(max_tokens=max_tokens, seed=len(asked), version=version)
                r = Request(id=len(asked), ids=make_ids(Random(prompt), length), sampling=sampling)
                asked[r.id] = r
                scheduler.submit([r])
            case (_, count):
                for _ in range(count):
                    scheduler.step()
        dropped -= {i for i, _ in scheduler.done}
    done = finish(scheduler)
    assert {i for i, _ in scheduler.failed} == dropped and done.keys() == asked.keys() - dropped
    for number, completion in done.items():
        check(case, on_swap, asked[number], completion)


def check(case: str, on_swap: str, r: Request, completion: Completion) -> None:
    first = completion.versions[0]
    count, pinned = completion.versions.count(first), r.sampling.version
    want = reference(case, first, r.ids, replace(r.sampling, version=None))
    assert completion.ids[:count] == want.ids[:count]
    assert completion.logprobs[:count] == pytest.approx(want.logprobs[:count], abs=TOLERANCE)
    if count == len(completion.ids):
        assert completion.finish == want.finish and len(want.ids) == count
    if pinned is not None:
        assert completion.versions == (pinned,) * len(want.ids)
    assert list(completion.versions) == sorted(completion.versions)
    if on_swap == "recompute":
        assert completion.logprobs == pytest.approx(full_logprobs(case, r, completion), abs=TOLERANCE)


# Memory


@EVERY
def test_there_are_as_many_models_as_versions(case: str) -> None:
    """However the number of kept versions goes up and down."""
    scheduler, rng, most = scheduler_of(case), Random(0), 3
    policy(case, 1)
    gc.collect()
    others = count_models(scheduler.model) - 1
    for version in range(1, 31):
        resident = list(scheduler.resident)
        keep = sorted(rng.sample(resident, rng.randint(0, min(most, len(resident)))))
        scheduler.set_version(version, keep)
        assert list(scheduler.resident) == [*keep, version]
        assert count_models(scheduler.model) - others == len(keep) + 1 <= most + 1


def count_models(like: Any) -> int:
    return sum(type(o) is type(like) for o in gc.get_objects())


def test_a_dropped_model_becomes_the_next_version() -> None:
    scheduler = scheduler_of("llama")
    first = scheduler.model
    second = scheduler.set_version(1, keep=[0])
    assert second is not first
    assert scheduler.set_version(2, keep=[1]) is first
    assert scheduler.set_version(3, keep=[2]) is second


# The process


@pytest.mark.parametrize("on_swap", ["keep", "recompute"])
def test_the_engine_does_what_its_config_says(on_swap: Any, tmp_path: Path) -> None:
    """Two models by turns, in every try of the scene the next."""
    for parity in (0, 1):
        policy("longcat2", parity).save_pretrained(tmp_path / str(parity))
    r = request(0, 20, 200)

    async def scenario() -> list[Completion]:
        config = LocalEngineConfig(slots=4, max_context=240, timeout_s=120, on_swap=on_swap)
        engine = await start_engine(config, tmp_path / "0", tmp_path)

        async def swapped(version: int) -> Completion:
            long = asyncio.create_task(engine.generate(r.ids, r.sampling))
            await engine.generate((3, 4), Sampling(max_tokens=5))
            await engine.load(Weights(version=version, where=str(tmp_path / str(version % 2))))
            return await long

        tries = await replayed(lambda c: 5 <= c.versions.count(c.versions[0]) <= 150, swapped)
        await engine.close()
        return tries

    tries = asyncio.run(scenario())
    for version, completion in enumerate(tries, 1):
        count = completion.versions.count(version - 1)
        assert completion.versions == (version - 1,) * count + (version,) * (200 - count)
        if count == 200 or (on_swap == "keep" and completion is not tries[-1]):
            continue  # nothing follows the swap, or it may be too little to tell, or all
        new = trainer_of(deepcopy(policy("longcat2", version % 2)))
        gap = trainer_gap(new, [from_token(r, completion, count)])
        assert gap < TOLERANCE if on_swap == "recompute" else gap > 100 * TOLERANCE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loads_do_not_let_the_process_grow(tmp_path: Path) -> None:
    """Fifty loads, two versions kept beside the newest: a model forgotten at each would be a gigabyte."""
    keep, size = 2, {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096}
    model = make_model("llama", **size)
    model.save_pretrained(tmp_path)
    megabytes = sum(t.numel() * t.element_size() for t in state_of(model).values()) / 2**20
    assert megabytes > 20

    async def scenario() -> tuple[list[float], list[int]]:
        engine = await LocalEngine.start(tmp_path, slots=4, max_context=64, timeout_s=120)
        shared, used, residents = SharedWeights(state_of(model)), list[float](), list[int]()
        shared.write(state_of(model))
        assert engine.resident() == (0,)
        for version in range(1, 51):
            kept = engine.resident()[-keep:]
            await engine.load(Weights(version=version, where=SHM + shared.name), kept)
            assert engine.resident() == (*kept, version)
            pinned = (engine.generate((5, 6, 7), Sampling(max_tokens=3, version=v)) for v in engine.resident())
            assert [c.versions for c in await asyncio.gather(*pinned)] == [(v,) * 3 for v in engine.resident()]
            residents.append(len(engine.resident()))
            used.append(resident_megabytes(engine._process.pid))
        shared.close()
        with pytest.raises(
            EngineError, match=r"version 47 is not resident in the engine: resident are 48, 49, 50 \(ne"
        ):
            await engine.generate((5, 6), Sampling(version=47))
        await engine.close()
        return used, residents

    used, residents = asyncio.run(scenario())
    assert residents == [2, *[3] * 49]
    print(f"{megabytes:.0f} MB a model; the process has {used[0]:.0f}, {used[4]:.0f}, ... {used[-1]:.0f} MB")
    assert max(used[5:]) - used[4] < megabytes


def resident_megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
