"""An engine as one group of a run with pinned versions sees it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from posttrain.protocols import Engine
from posttrain.types import Completion, Sampling, Weights


@dataclass(frozen=True, slots=True)
class Pinned:
    """An Engine around an Engine: every request is sampled by ``version`` alone."""

    engine: Engine
    version: int

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        """See the protocol. EngineError if the version is no longer resident."""
        return await self.engine.generate(ids, replace(sampling, version=self.version))

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None:
        """See the protocol."""
        await self.engine.load(weights, keep)

    async def close(self) -> None:
        """See the protocol."""
        await self.engine.close()
