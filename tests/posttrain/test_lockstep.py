"""Nothing is sampled until every live episode waits."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from random import Random

from posttrain.engine.lockstep import Lockstep
from posttrain.protocols import Engine
from posttrain.types import Completion, Sampling, Weights


class Recorder:
    """An engine that notes, turn of the event loop by turn, the seeds it was asked with."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open: list[int] | None = None
        self.calls: list[str] = []

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        """One token, after a while that has nothing to do with the order of asking."""
        if self.open is None:
            self.open = []
            self.batches.append(self.open)
            asyncio.get_running_loop().call_soon(self._shut)
        self.open.append(sampling.seed)
        await asyncio.sleep(Random(sampling.seed).random() / 100)
        return Completion(ids=(len(ids),), logprobs=(0.0,), versions=(sampling.version or 0,), finish="length")

    def _shut(self) -> None:
        self.open = None

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None:
        """Noted."""
        self.calls.append(f"load {weights.version}, keep {list(keep)}")

    async def close(self) -> None:
        """Noted."""
        self.calls.append("close")


async def settle() -> None:
    """Let everything happen that waits for nothing."""
    for _ in range(10):
        await asyncio.sleep(0)


async def ask(engine: Engine, seed: int) -> Completion:
    return await engine.generate((1, 2, 3), Sampling(seed=seed))


def test_nothing_is_forwarded_until_all_seats_wait_and_then_in_the_order_of_seeds() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        engine = Lockstep(recorder)
        engine.enter(2)
        engine.enter(1)
        asked = [asyncio.create_task(ask(engine, 9)), asyncio.create_task(ask(engine, 4))]
        await settle()
        assert recorder.batches == []
        asked.append(asyncio.create_task(ask(engine, 7)))
        assert [c.ids for c in await asyncio.gather(*asked)] == [(3,)] * 3
        assert recorder.batches == [[4, 7, 9]]

    asyncio.run(scenario())


def test_who_leaves_releases_who_waits() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        engine = Lockstep(recorder)
        engine.enter(3)
        asked = [asyncio.create_task(ask(engine, seed)) for seed in (2, 1)]
        await settle()
        assert recorder.batches == []
        engine.leave()
        await asyncio.gather(*asked)
        assert recorder.batches == [[1, 2]]
        engine.leave()
        await ask(engine, 3)
        assert recorder.batches == [[1, 2], [3]]

    asyncio.run(scenario())


def test_who_is_cancelled_while_waiting_is_not_counted_as_waiting() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        engine = Lockstep(recorder)
        engine.enter(2)
        doomed = asyncio.create_task(ask(engine, 1))
        await settle()
        doomed.cancel()
        await settle()
        kept = asyncio.create_task(ask(engine, 2))
        await settle()
        assert recorder.batches == []
        engine.leave()
        await kept
        assert recorder.batches == [[2]]

    asyncio.run(scenario())


def test_batches_repeat_whatever_the_timing() -> None:
    """Episodes of different lengths whose tools take a random time, twice with other times."""

    async def run(times: Random) -> list[list[int]]:
        recorder = Recorder()
        engine = Lockstep(recorder)
        engine.enter(6)

        async def episode(index: int) -> None:
            for turn in range(1 + index % 4):
                await asyncio.sleep(times.random() / 200)
                await ask(engine, 100 * index + turn)
            await asyncio.sleep(times.random() / 200)
            engine.leave()

        await asyncio.gather(*(episode(i) for i in range(6)))
        return recorder.batches

    first, second = asyncio.run(run(Random(1))), asyncio.run(run(Random(2)))
    assert first == second
    assert first == [[100 * i + turn for i in range(6) if turn <= i % 4] for turn in range(4)]


def test_without_seats_it_is_transparent_and_the_rest_is_passed_on() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        engine = Lockstep(recorder)
        assert isinstance(engine, Engine)
        assert (await ask(engine, 5)).ids == (3,)
        assert (await engine.generate((1, 2), Sampling(version=3))).versions == (3,)
        await engine.load(Weights(version=4, where="somewhere"))
        await engine.load(Weights(version=5, where="somewhere"), keep=(3, 4))
        await engine.close()
        assert recorder.calls == ["load 4, keep []", "load 5, keep [3, 4]", "close"]

    asyncio.run(scenario())
