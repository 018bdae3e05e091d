"""Keeps what the model chose at every column of every slot, for the trainer to choose the same (R3-style replay).

Buffers lie beside the cache's and are written at the same places, so that continued rows, copied rows and overwritten
drafts need no care of their own. On the CPU, since that is where completions are made.

Shapes: R slots, S columns, L layers, K chosen, O indexers a layer, B rows in a forward, T tokens a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.engine.cache import SlotCache
from posttrain.types import Choices


class Recorder:
    """Raises ValueError for a model that does not say what it chose."""

    def __init__(self, config: Any, cache: SlotCache) -> None:
        if config.model_type != "longcat2":
            raise ValueError(
                f"engine.record_choices: a model of type {config.model_type} does not say what it chose: set "
                "engine.record_choices to false"
            )
        self.cache = cache
        shape = (cache.num_slots, cache.max_columns, config.num_layers)
        self.slots_RSLK = np.zeros((*shape, config.moe_topk), np.uint16)
        self.columns_RSLOK: np.ndarray | None = None
        if config.use_lsa:
            self.columns_RSLOK = np.zeros((*shape, 2 // config.cli_factor, config.index_topk), np.int32)

    def write(self, out: Any) -> None:
        """Choices of the forward that the cache was last placed for."""
        place = self.cache.rows_B1.numpy(), self.cache.columns_BT.numpy()
        self.slots_RSLK[place] = torch.stack(out.slots, dim=2).cpu().numpy()
        if self.columns_RSLOK is not None:
            *_, indexers, count = self.columns_RSLOK.shape
            every = _all_seen(self.cache.columns_BT, indexers, count)
            layers = [every if s is None else s.cpu() for s in out.index_sets]
            self.columns_RSLOK[place] = torch.stack(layers, dim=2).numpy()

    def copy_row(self, source: int, targets: Tensor, length: int) -> None:
        """As the cache's."""
        for buffer in (self.slots_RSLK, self.columns_RSLOK):
            if buffer is not None:
                buffer[targets.numpy(), :length] = buffer[source, :length]

    def read(self, row: int, length: int) -> Choices:
        """Of the first ``length`` columns."""
        slots = self.slots_RSLK[row, :length]
        layers, topk = slots.shape[1:]
        if self.columns_RSLOK is None:
            return Choices(slots=slots.astype("<u2").tobytes(), slot_shape=(layers, topk))
        columns = self.columns_RSLOK[row, :length]
        return Choices(
            slots=slots.astype("<u2").tobytes(),
            slot_shape=(layers, topk),
            columns=columns.astype("<i4").tobytes(),
            column_shape=(layers, columns.shape[2], columns.shape[3]),
        )


def _all_seen(columns_BT: Tensor, indexers: int, count: int) -> Tensor:
    """Everything that each token sees, as an index set [B, T, O, K]: where a forward is dense, that fits."""
    last_BT11 = columns_BT[:, :, None, None]
    return (last_BT11 + torch.arange(1 - count, 1)).clamp(min=-1).expand(-1, -1, indexers, -1)
