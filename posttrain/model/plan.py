"""Turns the caller's attention_mask / position_ids / cache into positions, token history and an ``AttentionPlan``.

Legend: B batch, T current tokens, S cached columns (past and current).

Two rules for where the current tokens are in the cache:
* mask None or 2-D: they are the last T of ``past + T`` columns;
* mask 4-D with a cache: column == position, so a slot buffer [B, 1, S, ...] may be longer than what is in use.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache, StaticCache

from posttrain.model.attention import AttentionPlan, absorbed_is_cheaper, additive_bias, causal_allowed
from posttrain.model.config import Longcat2Config

AttentionPath = Literal["auto", "naive", "absorbed"]


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """Everything about one forward pass that does not depend on hidden states."""

    attention: AttentionPlan
    position_ids: Tensor
    """int64 [1 or B, T]."""
    live: Tensor | None
    """Bool [B, T], False on padding among the current tokens; None: no padding."""
    slots: bool
    """True: cache column == position (4-D mask and a cache)."""


@dataclass(frozen=True, slots=True)
class ForwardShape:
    """Sizes of one forward pass; ``past`` is 0 without a cache."""

    batch: int
    tokens: int
    past: int
    device: torch.device
    dtype: torch.dtype


def make_plan(
    config: Longcat2Config,
    shape: ForwardShape,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    path: AttentionPath,
) -> ForwardPlan:
    """Builds the plan of one forward pass.

    Raises:
        ValueError: a mask of the wrong shape, or a StaticCache (use DynamicCache or a slot buffer).
    """
    if isinstance(cache, StaticCache):
        raise ValueError("StaticCache is not supported by longcat2; use DynamicCache or a slot cache with a 4-D mask")
    if attention_mask is not None and attention_mask.ndim == 4:
        return _plan_from_4d(config, shape, attention_mask, position_ids, cache, path)
    if attention_mask is not None:
        columns = shape.past + shape.tokens
        if attention_mask.shape != (shape.batch, columns):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected [batch, past + tokens] = "
                f"({shape.batch}, {columns}), or 4-D [batch, 1, tokens, columns]"
            )
        real_BS = attention_mask.to(device=shape.device, dtype=torch.bool)
        # Padding at the right of an uncached row is hidden from every real token by causality alone.
        needless = real_BS.all() or (cache is None and not (real_BS[:, 1:] & ~real_BS[:, :-1]).any())
        attention_mask = None if needless else real_BS
    absorbed = _choose(config, path, shape.tokens, shape.past + shape.tokens, shape.past > 0)
    allowed = _allowed(shape, attention_mask, position_ids, absorbed)
    attention = AttentionPlan(
        bias=None if allowed is None else additive_bias(allowed, shape.dtype),
        is_causal=allowed is None and shape.past == 0 and shape.tokens > 1,
        absorbed=absorbed,
        key_length=shape.past + shape.tokens,
    )
    if position_ids is None:
        position_ids = _default_positions(shape, attention_mask)
    live = None if attention_mask is None else attention_mask[:, -shape.tokens :]
    return ForwardPlan(attention, position_ids, live, slots=False)


def _plan_from_4d(
    config: Longcat2Config,
    shape: ForwardShape,
    mask: Tensor,
    position_ids: Tensor | None,
    cache: Cache | None,
    path: AttentionPath,
) -> ForwardPlan:
    """A 4-D mask goes straight to attention (bool: True attends; else additive)."""
    if mask.shape[0] not in (1, shape.batch) or mask.shape[1] != 1 or mask.shape[2] != shape.tokens:
        raise ValueError(f"4-D attention_mask has shape {tuple(mask.shape)}; expected [batch, 1, {shape.tokens}, S]")
    if position_ids is None:
        if cache is not None:
            raise ValueError("a 4-D attention_mask with a cache needs position_ids: cache column == position")
        position_ids = torch.arange(shape.tokens, device=shape.device).unsqueeze(0)
    columns = mask.shape[-1]
    bias = additive_bias(mask, shape.dtype) if mask.dtype == torch.bool else mask.to(shape.dtype)
    absorbed = _choose(config, path, shape.tokens, columns, cache is not None and columns > shape.tokens)
    return ForwardPlan(AttentionPlan(bias, False, absorbed, columns), position_ids, None, slots=cache is not None)


def _choose(config: Longcat2Config, path: AttentionPath, tokens: int, columns: int, has_past: bool) -> bool:
    if path != "auto":
        return path == "absorbed"
    return has_past and absorbed_is_cheaper(config, tokens, columns)


def _allowed(
    shape: ForwardShape, padding_mask: Tensor | None, position_ids: Tensor | None, absorbed: bool
) -> Tensor | None:
    """Bool [1 or B, 1, T, S] of what may be seen, or None when plain causality (or one token) needs no mask."""
    packed = padding_mask is None and shape.past == 0 and position_ids is not None and shape.tokens > 1
    segments_BT = None
    if packed and position_ids is not None:
        restarts = position_ids.diff(dim=1) != 1
        if restarts.any():  # several documents in one row: positions restart
            segments_BT = torch.nn.functional.pad(restarts.cumsum(dim=1), (1, 0))
    if segments_BT is None and padding_mask is None:
        no_mask = shape.tokens == 1 or (shape.past == 0 and not absorbed)
        return None if no_mask else causal_allowed(shape.tokens, shape.past, shape.device)
    allowed = causal_allowed(shape.tokens, shape.past, shape.device)
    if segments_BT is not None:
        return allowed & (segments_BT.unsqueeze(-1) == segments_BT.unsqueeze(-2)).unsqueeze(1)
    assert padding_mask is not None
    # a padding query may see nothing: its bias row is constant and finite, so its output is finite and unused
    return allowed & padding_mask[:, None, None, :]


def _default_positions(shape: ForwardShape, padding_mask: Tensor | None) -> Tensor:
    """Consecutive positions, counted from the first non-padding token of each row."""
    if padding_mask is None:
        return torch.arange(shape.past, shape.past + shape.tokens, device=shape.device).unsqueeze(0)
    return (padding_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -shape.tokens :]
