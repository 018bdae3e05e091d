"""What every engine must hold, whatever model it serves. The first test is the one that RL cannot live without."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np
import pytest
import scipy.stats

from posttrain.errors import EngineError
from posttrain.objective_settings import ClippedLoss
from posttrain.protocols import Engine
from posttrain.settings import LoraConfig, TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Completion, Sampling, Weights
from tests.contracts.engines import MAX_CONTEXT, SLOTS, WAYS, Bench, model_of
from tests.posttrain.tiny import VOCAB, all_logprobs, make_ids, next_logprobs, trainer_gap, trainer_of

TOLERANCE = 1e-4

T = TypeVar("T")
Turn = tuple[tuple[int, ...], Completion]


@pytest.fixture(
    scope="module",
    params=[pytest.param((w, k), marks=WAYS[w].marks, id=f"{w}-{k}") for w in WAYS for k in WAYS[w].kinds],
)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One engine for all tests of a model; a test that loads weights keeps ``model`` and ``version`` true."""
    name, kind = request.param
    way, folder = WAYS[name], tmp_path_factory.mktemp(kind)
    model = model_of(kind)
    model.save_pretrained(folder)
    with asyncio.Runner() as runner:
        engine = runner.run(way.start(folder))
        yield Bench(runner=runner, way=way, engine=engine, kind=kind, folder=folder, model=model)
        runner.run(engine.close())


def test_is_an_engine(bench: Bench) -> None:
    assert isinstance(bench.engine, Engine)


async def _conversation(engine: Engine, rng: Random, seed: int, version: int | None = None) -> list[Turn]:
    """Three turns: every prompt is the context so far and what somebody else added."""
    ids, turns = make_ids(rng, rng.randint(1, 60)), list[Turn]()
    for turn in range(3):
        sampling = Sampling(max_tokens=rng.randint(1, 30), seed=seed + turn, version=version)
        turns.append((ids, await engine.generate(ids, sampling)))
        ids = (*ids, *turns[-1][1].ids, *make_ids(rng, rng.randint(1, 12)))
    return turns


def test_logprobs_equal_the_trainers(bench: Bench) -> None:
    """Conversations of all lengths side by side, more than there are slots, and groups of one prompt."""
    prompts = [make_ids(Random(n), n) for n in (40, 7)]

    async def crowd() -> list[Turn]:
        talks = asyncio.gather(*(_conversation(bench.engine, Random(i), 10 * i) for i in range(3 * SLOTS)))
        asked = [(p, Sampling(max_tokens=20, seed=1000 + i)) for p in prompts for i in range(SLOTS)]
        groups = await asyncio.gather(*(bench.engine.generate(p, s) for p, s in asked))
        return [t for talk in await talks for t in talk] + [(p, c) for (p, _), c in zip(asked, groups, strict=True)]

    pairs = bench.runner.run(crowd())
    gap = trainer_gap(bench.trainer(), pairs)
    tokens = sum(len(c.ids) for _, c in pairs)
    print(f"{bench.kind}: max |engine - trainer| = {gap:.2e} over {tokens} tokens of {len(pairs)} completions")
    assert tokens > 1000
    assert gap < TOLERANCE


def test_a_request_gives_the_same_tokens_alone_and_in_a_crowd(bench: Bench) -> None:
    request = (make_ids(Random(5), 23), Sampling(max_tokens=25, seed=77))
    others = [(make_ids(Random(i), 3 + 5 * i), Sampling(max_tokens=5 + i, seed=i)) for i in range(20)]
    (alone,) = bench.run(request)
    crowd = bench.run(*others[:9], request, *others[9:])
    assert crowd[9].ids == alone.ids
    assert crowd[9].logprobs == pytest.approx(alone.logprobs, abs=TOLERANCE)


def test_more_requests_than_slots_all_end_with_their_own_answer(bench: Bench) -> None:
    requests = [(make_ids(Random(i), 1 + i % 17), Sampling(max_tokens=1 + i % 7, seed=i)) for i in range(5 * SLOTS)]
    completions = bench.run(*requests)
    assert [len(c.ids) for c in completions] == [s.max_tokens for _, s in requests]
    assert trainer_gap(bench.trainer(), [(r[0], c) for r, c in zip(requests, completions, strict=True)]) < TOLERANCE


def test_temperature_zero_takes_the_most_likely_token(bench: Bench) -> None:
    prompts = [make_ids(Random(i), 4 + 9 * i) for i in range(6)]
    completions = bench.run(*[(p, Sampling(temperature=0, max_tokens=20)) for p in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        best = all_logprobs(bench.model, (*prompt, *completion.ids))[len(prompt) - 1 : -1].max(dim=-1)
        assert completion.ids == tuple(best.indices.tolist())
        assert completion.logprobs == pytest.approx(best.values.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_frequencies_match_the_distribution(bench: Bench, temperature: float) -> None:
    prompt, n = make_ids(Random(3), 12), 2000
    completions = bench.run(
        *[(prompt, Sampling(temperature=temperature, max_tokens=1, seed=i)) for i in range(n)],
    )
    want_V = next_logprobs(bench.model, prompt, temperature)
    assert all(abs(c.logprobs[0] - want_V[c.ids[0]].item()) < TOLERANCE for c in completions)
    counts_V = np.bincount([c.ids[0] for c in completions], minlength=VOCAB)
    expected_V = want_V.double().exp().numpy() * n
    often_V = expected_V >= 5
    seen = np.append(counts_V[often_V], counts_V[~often_V].sum())
    expected = np.append(expected_V[often_V], expected_V[~often_V].sum())
    assert expected.max() > 3 * n / VOCAB, "the distribution is too flat to tell anything"
    assert scipy.stats.chisquare(seen, expected * n / expected.sum()).pvalue > 1e-3


def test_a_stop_token_ends_a_completion_and_is_part_of_it(bench: Bench) -> None:
    prompt, sampling = make_ids(Random(8), 15), Sampling(max_tokens=30, seed=4)
    (free,) = bench.run((prompt, sampling))
    end = free.ids.index(free.ids[9]) + 1
    (stopped,) = bench.run((prompt, replace(sampling, stop_ids=(free.ids[9], VOCAB + 5))))
    assert (stopped.ids, stopped.finish) == (free.ids[:end], "stop")
    assert (len(free.ids), free.finish) == (30, "length")


@pytest.mark.parametrize(
    ("length", "max_tokens", "sampled"),
    [(20, 7, 7), (MAX_CONTEXT - 10, 50, 10), (MAX_CONTEXT - 1, 50, 1), (MAX_CONTEXT, 5, 0), (999, 5, 0), (5, 0, 0)],
)
def test_the_bounds_end_a_completion_with_length(bench: Bench, length: int, max_tokens: int, sampled: int) -> None:
    (completion,) = bench.run((make_ids(Random(1), length), Sampling(max_tokens=max_tokens)))
    assert (len(completion.ids), completion.finish) == (sampled, "length")
    assert len(completion.logprobs) == len(completion.versions) == sampled


def test_nothing_to_continue_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="ids is empty"):
        bench.run(((), Sampling()))


def test_a_cancelled_request_leaves_the_others_alone(bench: Bench) -> None:
    requests = [(make_ids(Random(i), 10 + i), Sampling(max_tokens=12, seed=i)) for i in range(6)]
    want = bench.run(*requests)

    async def cancel_some() -> list[Completion | BaseException]:
        long = Sampling(max_tokens=200, seed=5)
        short = asyncio.create_task(bench.engine.generate((5, 6), Sampling(max_tokens=2)))
        doomed = [asyncio.create_task(bench.engine.generate(make_ids(Random(i), 30), long)) for i in range(4)]
        kept = [asyncio.create_task(bench.engine.generate(*r)) for r in requests]
        doomed[0].cancel()  # before it was sent
        await short  # now the others are under way, and on a busy machine they may even be through
        for task in doomed:
            task.cancel()
        ended = await asyncio.gather(*doomed, return_exceptions=True)
        assert [c.ids for c in await asyncio.gather(*kept)] == [c.ids for c in want]
        through = [e for e in ended if not isinstance(e, asyncio.CancelledError)]
        assert all(isinstance(e, Completion) and len(e.ids) == 200 for e in through), through
        return ended

    bench.until(lambda ended: all(isinstance(e, asyncio.CancelledError) for e in ended), cancel_some)


@pytest.mark.parametrize("by", ["its own way", "folder"])
def test_after_a_load_everything_comes_from_the_new_weights(bench: Bench, by: str, tmp_path: Path) -> None:
    if by == "folder" and bench.way is WAYS["vllm-lora"]:
        pytest.skip("takes adapters alone")
    prompt = make_ids(Random(2), 30)
    requests = [(prompt, Sampling(max_tokens=20, seed=i)) for i in range(4)]
    old = bench.run(*requests)
    model = bench.another()
    if by == "its own way":
        bench.runner.run(bench.take(model))
    else:
        model.save_pretrained(tmp_path)
        bench.load(model, str(tmp_path))
    # The old contexts are continued too: their keys are of the old weights and must not be.
    requests += [((*prompt, *c.ids, 7, 8), Sampling(max_tokens=10, seed=9)) for c in old]
    new = bench.run(*requests)
    assert {v for c in new for v in c.versions} == {bench.version}
    assert trainer_gap(bench.trainer(), [(r[0], c) for r, c in zip(requests, new, strict=True)]) < TOLERANCE
    assert [c.ids for c in new[:4]] != [c.ids for c in old]


def test_a_request_that_spans_a_load_has_both_versions_in_order(bench: Bench) -> None:
    prompt, short = make_ids(Random(6), 20), 5 if bench.way.exact else 10  # with others it may be a few tokens ahead

    async def span() -> tuple[Trainer, Completion]:
        old, (new,) = bench.trainer(), bench.others(1)
        long = asyncio.create_task(bench.engine.generate(prompt, Sampling(max_tokens=200, seed=1)))
        await bench.engine.generate(prompt, Sampling(max_tokens=short, seed=2))  # now the long one is under way
        await bench.take(new)
        count = (await long).versions.count(bench.version - 1)
        assert long.result().versions == (bench.version - 1,) * count + (bench.version,) * (200 - count)
        return old, long.result()

    old, completion = bench.until(lambda got: 5 <= got[1].versions.count(bench.version - 1) < 200, span)
    count = completion.versions.count(bench.version - 1)
    first = replace(completion, ids=completion.ids[:count], logprobs=completion.logprobs[:count])
    assert trainer_gap(old, [(prompt, first)]) < TOLERANCE


def test_a_pinned_request_is_bit_for_bit_that_of_an_engine_of_its_version(bench: Bench, tmp_path: Path) -> None:
    """Two newer versions come meanwhile, and others are sampled from them and from an older one."""
    prompt, sampling, other = make_ids(Random(7), 30), Sampling(max_tokens=200, seed=3), make_ids(Random(8), 20)
    answers = list[Completion]()

    async def pinned() -> tuple[list[bool], Completion]:
        newer = bench.others(2)
        older = await bench.take(bench.another())
        version = await bench.take(model, keep=[older])
        task = asyncio.create_task(bench.engine.generate(prompt, replace(sampling, version=version)))
        await asyncio.sleep(0)  # it is asked first, so it has the first row, as it has alone
        crowd, under_way = list[asyncio.Task[Completion]](), list[bool]()
        for count in range(2):
            await bench.engine.generate(other, Sampling(max_tokens=10, seed=count, version=older))  # it is under way
            await bench.take(newer[count], keep=[older, version])
            crowd += [asyncio.create_task(bench.engine.generate(other, Sampling(max_tokens=40, seed=count)))]
            under_way.append(not task.done())
        first, second = await asyncio.gather(*crowd)
        assert (await task).versions == (version,) * 200 and second.versions == (bench.version,) * 40
        assert list(first.versions) == sorted(first.versions) and {*first.versions} <= {version + 1, version + 2}
        answers.append(await task)
        return under_way, first

    def all_come_about(got: tuple[list[bool], Completion]) -> bool:
        under_way, first = got
        if bench.way.exact:
            return all(under_way) and {*first.versions} == {bench.version - 1, bench.version}
        return under_way[0] and first.versions[0] == bench.version - 1

    model = model_of(bench.kind, seed=bench.version + 1000)
    bench.until(all_come_about, pinned)
    want = bench.alone(model, tmp_path, lambda engine: engine.generate(prompt, sampling))
    for got in answers:  # of every try
        assert (got.ids, got.finish) == (want.ids, want.finish)
        assert got.logprobs == (want.logprobs if bench.way.exact else pytest.approx(want.logprobs, abs=TOLERANCE))
    assert trainer_gap(trainer_of(model), [(prompt, got) for got in answers]) < TOLERANCE


def test_pinned_conversations_go_on_while_newer_versions_come(bench: Bench, tmp_path: Path) -> None:
    """All lengths, more than there are slots; the newest serves requests that are not pinned at the same time."""

    async def talk(engine: Engine, version: int | None = None) -> list[Turn]:
        turns = await asyncio.gather(*(_conversation(engine, Random(i), 10 * i, version) for i in range(12)))
        return [t for turn in turns for t in turn]

    async def meanwhile() -> tuple[list[list[Turn]], list[Completion]]:
        version, others = bench.version, list[Completion]()
        talks = [asyncio.create_task(talk(bench.engine, version))]
        while not talks[-1].done() or len(others) < 2:
            if talks[-1].done():  # on a busy machine they may be through before the second of the versions comes
                talks.append(asyncio.create_task(talk(bench.engine, version)))
            others.append(await bench.engine.generate((5, 6, 7), Sampling(max_tokens=5, seed=len(others))))
            await bench.take(bench.another(), keep=[version])
        return await asyncio.gather(*talks), others

    bench.runner.run(bench.take(bench.another()))
    trainer, want = bench.trainer(), bench.alone(bench.model, tmp_path, talk)
    version = bench.version
    got, others = bench.runner.run(meanwhile())
    for talked in got:
        for (ids, a), (want_ids, b) in zip(talked, want, strict=True):
            assert a.versions == (version,) * len(a.ids)
            if not bench.way.moves:
                assert (ids, a.ids, a.finish) == (want_ids, b.ids, b.finish)
                assert a.logprobs == pytest.approx(b.logprobs, abs=TOLERANCE)
        assert trainer_gap(trainer, talked) < TOLERANCE
    assert [c.versions for c in others] == [(version + n,) * 5 for n in range(len(others))]


def test_a_version_that_is_dropped_fails_its_own_requests_and_no_others(bench: Bench) -> None:
    prompts, trainers = [make_ids(Random(i), 10 + i) for i in range(3)], list[Trainer]()

    def resident() -> str:
        return rf"resident are {bench.version - 1}, {bench.version} \(newest: {bench.version}\)"

    async def drop() -> tuple[bool, list[Any], list[Completion], list[Completion]]:
        (coming,) = bench.others(1)
        old = await bench.take(bench.another())
        kept = await bench.take(bench.another(), keep=[old])
        trainers.append(bench.trainer())

        def ask(count: int, tokens: int, version: int | None) -> list[asyncio.Task[Completion]]:
            sampling = [Sampling(max_tokens=tokens, seed=i, version=version) for i in range(count)]
            return [asyncio.create_task(bench.engine.generate(prompts[i % 3], s)) for i, s in enumerate(sampling)]

        pinned, free, first = ask(2, 200, kept), ask(2, 200, None), ask(1, 5, kept)
        doomed = ask(2 * SLOTS, 220, old)  # most of them wait for a slot
        await first[0]  # now the others are under way
        await bench.take(coming, keep=[kept])
        async with asyncio.timeout(60):
            ended = await asyncio.gather(*doomed, return_exceptions=True)
        under_way = not any(t.done() for t in pinned)
        dropped = rf"^version {old} was dropped before its request ended: {resident()}$"
        for end in ended:
            if isinstance(end, Completion):
                assert end.versions == (old,) * 220
            else:
                with pytest.raises(EngineError, match=dropped):
                    raise end
        stayed, went = await asyncio.gather(*pinned), await asyncio.gather(*free)
        assert all(c.versions == (kept,) * 200 for c in stayed)
        for c in went:
            first = c.versions.count(kept)
            assert c.versions == (kept,) * first + (bench.version,) * (200 - first)
        return under_way, [e for e in ended if not isinstance(e, Completion)], stayed, went

    def all_come_about(got: tuple[bool, list[Any], list[Completion], list[Completion]]) -> bool:
        under_way, failures, _, free = got
        begun = [c.versions[0] == bench.version - 1 for c in free]
        spans = [{bench.version - 1, bench.version} == {*c.versions} for c in free]
        if bench.way.exact:
            return under_way and len(failures) == 2 * SLOTS and all(spans)
        return bool(failures) and all(begun) and any(spans)

    _, _, pinned, free = bench.until(all_come_about, drop)
    old, kept, newest = (bench.version - n for n in (2, 1, 0))
    for version in (old, newest + 1, -1):
        with pytest.raises(EngineError, match=rf"^version {version} is not resident in the engine: {resident()}$"):
            bench.run((prompts[0], Sampling(version=version)))
    want = bench.run(*[(prompts[i], Sampling(max_tokens=200, seed=i, version=kept)) for i in range(2)])
    for got, again, both in zip(pinned, want, free, strict=True):
        if bench.way.moves:
            assert trainer_gap(trainers[-1], [(prompts[pinned.index(got)], got)]) < TOLERANCE
        else:
            assert got.ids == again.ids
            assert got.logprobs == pytest.approx(again.logprobs, abs=TOLERANCE)
        first = both.versions.count(kept)
        assert both.ids[:first] == again.ids[:first] and (first == 200 or both.ids != got.ids)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_what_the_trainer_publishes_is_what_the_engine_serves(bench: Bench, lora: LoraConfig | None) -> None:
    if lora not in bench.way.loras:
        pytest.skip("takes adapters alone")
    base = model_of(bench.kind) if bench.way.loras == (lora,) else model_of(bench.kind, seed=3)
    config = TrainerConfig(lora=lora, tokens_per_micro_batch=1024)
    trainer = Trainer(base, config, ClippedLoss(), 1, bench.way.outlet(bench.new_folder()))
    for i, parameter in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
        parameter.data += 0.05 * np.sin(i + 1)
    bench.version += 1
    trainer.version = bench.version
    bench.runner.run(bench.engine.load(trainer.publish()))
    requests = [(make_ids(Random(i), 10 + i), Sampling(max_tokens=15, seed=i)) for i in range(6)]
    completions = bench.run(*requests)
    assert {v for c in completions for v in c.versions} == {bench.version}
    assert trainer_gap(trainer, [(r[0], c) for r, c in zip(requests, completions, strict=True)]) < TOLERANCE
    trainer.close()
    bench.load(model_of(bench.kind), str(bench.folder))


@pytest.mark.parametrize("name", [pytest.param(name, marks=way.marks) for name, way in WAYS.items()])
def test_close_frees_everything_and_can_be_called_twice(name: str, tmp_path: Path) -> None:
    model_of(WAYS[name].kinds[-1]).save_pretrained(tmp_path)
    before = _children()

    async def scenario() -> list[BaseException | Completion]:
        engine = await WAYS[name].start(tmp_path)
        assert _children() > before
        short = asyncio.create_task(engine.generate((5, 6), Sampling(max_tokens=5)))
        long = [Sampling(max_tokens=200, seed=i) for i in range(12 * SLOTS)]  # some wait for seconds
        waiting = [asyncio.create_task(engine.generate((5, 6), sampling)) for sampling in long]
        await short
        await engine.close()
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await engine.generate((5, 6), Sampling())
        with pytest.raises(EngineError, match="closed"):
            await engine.load(Weights(version=1, where=str(tmp_path)))
        return await asyncio.gather(*waiting, return_exceptions=True)

    outcomes = asyncio.run(scenario())
    for outcome in outcomes:
        if isinstance(outcome, Completion):  # it ended before
            assert len(outcome.ids) == 200
        else:
            assert isinstance(outcome, EngineError) and "closed" in str(outcome), outcome
    assert any(isinstance(outcome, EngineError) for outcome in outcomes)
    assert _children() == before


def _children() -> set[int]:
    """Processes that this one started, and theirs; without the one in which multiprocessing counts shared memory."""
    parents = {int(p.name): _parent(p) for p in Path("/proc").iterdir() if p.name.isdigit()}
    found, new = set[int](), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new}
        found |= new
    return found - {getattr(resource_tracker._resource_tracker, "_pid", None)}  # pyright: ignore[reportAttributeAccessIssue]


def _parent(process: Path) -> int:
    try:
        state, parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(parent)
