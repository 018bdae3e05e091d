"""Makes batches of an engine repeatable: nothing is sampled until every live episode waits for a token."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from posttrain.protocols import Engine
from posttrain.types import Completion, Sampling, Weights


class Lockstep:
    """An Engine around an Engine, for synchronous training. Whoever starts an episode calls ``enter`` before any
    other one can finish, and ``leave`` when it ends; requests go on together, in the order of their seeds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seats = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def enter(self, count: int) -> None:
        """``count`` more episodes are under way."""
        self._seats += count

    def leave(self) -> None:
        """One episode has ended."""
        self._seats -= 1
        self._release()

    def _release(self) -> None:
        self._waiting = [(s, f) for s, f in self._waiting if not f.done()]
        if self._waiting and len(self._waiting) >= self._seats:
            ready, self._waiting = sorted(self._waiting, key=lambda w: w[0]), []
            for _, future in ready:
                future.set_result(None)

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        """See the protocol."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((sampling.seed, future))
        # Not at once: this one would go on before those that it releases, whatever their seeds.
        asyncio.get_running_loop().call_soon(self._release)
        await future  # bounded by the loop's own waits: every seat either asks or leaves
        return await self._engine.generate(ids, sampling)

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None:
        """See the protocol."""
        await self._engine.load(weights, keep)

    async def close(self) -> None:
        """See the protocol."""
        await self._engine.close()
