"""Requests, the slots that serve them, and what a forward over some of the slots looks like.

Shapes: B rows in a forward, T tokens a row, S visible columns, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from posttrain.engine.cache import SlotCache
from posttrain.types import Sampling

_COLUMN_STEP = 32
_PREFILL_TOKENS = 8192
"""Padded tokens one prefill forward may hold: bounds its memory."""


@dataclass(slots=True, kw_only=True)
class Request:
    id: int
    ids: tuple[int, ...]
    sampling: Sampling


@dataclass(slots=True, kw_only=True)
class Slot:
    index: int
    context: list[int] = field(default_factory=list)
    """Every token whose keys are in the cache, plus the one sampled last."""
    request: Request | None = None
    version: int = -1
    """The resident version that computed the row; -1: it was dropped, or the row goes on under a newer one."""
    freed_at: int = 0
    uniforms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    states: Tensor = field(default_factory=lambda: torch.zeros(0))
    """With drafts: hidden states [n, H] of the last n cached columns, those whose draft keys are still to be made."""

    @property
    def temperature(self) -> float:
        """Of the running request."""
        return self.request.sampling.temperature if self.request is not None else 0.0

    @property
    def sampled(self) -> int:
        """Tokens sampled for the running request."""
        return len(self.logprobs)

    @property
    def room(self) -> int:
        """Tokens that may still be sampled for it."""
        return len(self.uniforms) - self.sampled


class Rows(NamedTuple):
    """Inputs of one forward. Padding is written to the trash column."""

    ids_BT: Tensor
    positions_BT: Tensor
    mask_B1TS: Tensor
    last_B: Tensor
    """Place of each row's last new token."""


def lay_out(
    cache: SlotCache, slots: Sequence[Slot], tokens: Sequence[Sequence[int]], starts: Sequence[int], end: int = 1
) -> Rows:
    """Places ``tokens`` at the columns from ``starts`` on, for the forward that comes next; a row without tokens is
    idle. At least ``end`` columns will be visible."""
    lengths_B = np.array([len(t) for t in tokens])
    new_BT = np.arange(lengths_B.max()) < lengths_B[:, None]
    ids = np.zeros(new_BT.shape, dtype=np.int64)
    ids[new_BT] = [token for row in tokens for token in row]
    columns = np.where(new_BT, np.array(starts)[:, None] + np.arange(new_BT.shape[1]), cache.trash_column)
    ids_BT, columns_BT = torch.from_numpy(ids), torch.from_numpy(columns)
    positions_BT = columns_BT.masked_fill(columns_BT == cache.trash_column, 0)
    end = max(end, int(positions_BT.max()) + 1)
    visible = min(-(-end // _COLUMN_STEP) * _COLUMN_STEP, cache.max_columns)
    hidden_B1TS = torch.arange(visible) > positions_BT[:, None, :, None]
    # Additive, because transformers' eager attention adds whatever mask it is given.
    mask_B1TS = torch.zeros(hidden_B1TS.shape).masked_fill_(hidden_B1TS, torch.finfo(torch.float32).min)
    rows_B = torch.tensor([s.index for s in slots])
    cache.place(rows_B, columns_BT, visible, all(s.index == row for row, s in enumerate(slots)))
    return Rows(ids_BT, positions_BT, mask_B1TS, torch.from_numpy(lengths_B) - 1)


def chunks(work: Sequence[tuple[Slot, int]]) -> Iterator[list[Slot]]:
    """Slots with as many tokens to read, in forwards of bounded size; similar lengths together, so that little is
    padded."""
    order = sorted(work, key=lambda w: (w[1], w[0].index))
    while order:
        count = 1
        while count < len(order) and (count + 1) * order[count][1] <= _PREFILL_TOKENS:
            count += 1
        yield [slot for slot, _ in order[:count]]
        order = order[count:]
