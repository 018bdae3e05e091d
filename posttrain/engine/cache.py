"""A preallocated key-value cache in which every request owns a row ("slot") for its whole life.

It is a transformers ``Cache``, so any causal LM that uses one can be batched continuously: the engine says which rows
and columns the next forward writes (``place``), the model calls ``update`` as it always does, and a 4-D attention mask
hides what a row has not filled yet.

Shapes: R rows of the cache, B rows in this forward, T new tokens a row, S visible columns, h heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, allocated at the first update: rows, heads and columns end to end, since a compiled
    forward writes in place only what it was given, and no view of it."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes and dtypes of the first update."""
        c = self._cache
        self.heads = key_states.shape[1]
        places = c.num_slots * self.heads * c.max_columns
        # Values are a size of their own: an indexer has keys alone and values of size 0.
        self.keys = key_states.new_zeros(places, key_states.shape[3])
        self.values = value_states.new_zeros(places, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write ``[B, h, T, d]`` where ``place`` said and return the rows' first S columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        c = self._cache
        out: list[Tensor] = []
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer.index_copy_(0, c.places(self.heads), new.flatten(0, 2))
            by_row = self._by_row(buffer)
            rows = by_row[: c.num_rows] if c.rows_are_prefix else by_row[c.rows_B1[:, 0]]
            out.append(rows[:, :, : c.visible])
        return out[0], out[1]

    def _by_row(self, buffer: Tensor) -> Tensor:
        """``[R, h, S, d]``."""
        return buffer.view(self._cache.num_slots, self.heads, self._cache.max_columns, buffer.shape[1])

    def copy_row(self, source: int, targets: Tensor, length: int) -> None:
        """Give ``targets`` the first ``length`` columns of row ``source``."""
        assert self.keys is not None and self.values is not None
        for buffer in (self.keys, self.values):
            by_row = self._by_row(buffer)
            by_row[targets, :, :length] = by_row[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the visible columns."""
        return self._cache.visible, 0

    def get_seq_length(self) -> int:
        """Rows differ in length, so the model must be given position ids; this says 0."""
        return 0

    def get_max_length(self) -> int:
        """Columns a row can fill."""
        return self._cache.max_columns - 1


class SlotCache(Cache):
    """``num_slots`` rows of ``max_length`` columns, and one column more for padding to write into."""

    def __init__(self, num_slots: int, max_length: int) -> None:
        self._slots: list[SlotLayer] = []
        super().__init__(layers=self._slots)  # pyright: ignore[reportArgumentType]  # the same list, as it grows
        self.num_slots, self.max_columns = num_slots, max_length + 1
        self.trash_column = max_length
        self.place(torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), 1, True)

    def place(self, rows_B: Tensor, columns_BT: Tensor, visible: int, rows_are_prefix: bool) -> None:
        """Where the next forward writes. ``rows_are_prefix``: rows are 0..B-1, so that reads need no copy."""
        self.rows_B1, self.columns_BT = rows_B[:, None], columns_BT
        self.num_rows, self.visible, self.rows_are_prefix = len(rows_B), visible, rows_are_prefix
        self._places: dict[int, Tensor] = {}

    def places(self, heads: int) -> Tensor:
        """Where the next forward writes ``[B, h, T]``, in a layer's rows, heads and columns end to end."""
        if heads not in self._places:
            row_BH = self.rows_B1 * heads + torch.arange(heads)
            self._places[heads] = (row_BH[:, :, None] * self.max_columns + self.columns_BT[:, None]).flatten()
        return self._places[heads]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """See ``SlotLayer.update``; layers appear when they are first written."""
        while len(self._slots) <= layer_idx:
            self._slots.append(SlotLayer(self))
        return self._slots[layer_idx].update(key_states, value_states)

    def copy_row(self, source: int, targets: Tensor, length: int) -> None:
        """Share a prefix that was computed once with other rows."""
        for layer in self._slots:
            layer.copy_row(source, targets, length)
