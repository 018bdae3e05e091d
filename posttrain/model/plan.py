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

from posttrain.model.attention import AttentionPlan, absorbed_is_cheaper, additive_bias
from posttrain.model.config import Longcat2Config
from posttrain.model.visibility import Visibility, from_documents, from_mask, from_padding

AttentionPath = Literal["auto", "naive", "absorbed"]
IndexerStage = Literal["dense", "sparse"]


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """Everything about one forward pass that does not depend on hidden states."""

    attention: AttentionPlan
    position_ids: Tensor
    """int64 [1 or B, T]."""
    live: Tensor | None
    """Bool [B, T], False on padding among the current tokens; None: no padding."""


@dataclass(frozen=True, slots=True)
class ForwardShape:
    """Sizes of one forward pass; ``past`` is 0 without a cache."""

    batch: int
    tokens: int
    past: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Ways:
    """How a model was told to attend (``Longcat2Model`` holds one)."""

    path: AttentionPath = "auto"
    """Dense attention: naive, absorbed, or whichever needs fewer multiplications."""
    stage: IndexerStage = "sparse"
    """dense: LSA attends to everything while its indexers learn (arXiv 2608.01662, warm-up)."""
    learn_index: bool = False
    """Whether this forward computes the indexers' loss."""


def make_plan(
    config: Longcat2Config,
    shape: ForwardShape,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    ways: Ways,
) -> ForwardPlan:
    """Builds the plan of one forward pass.

    Raises:
        ValueError: a mask of the wrong shape, or a StaticCache (use DynamicCache or a slot buffer).
    """
    if isinstance(cache, StaticCache):
        raise ValueError("StaticCache is not supported by longcat2; use DynamicCache or a slot cache with a 4-D mask")
    live, slots, bias = None, False, None
    positions = position_ids
    if attention_mask is not None and attention_mask.ndim == 4:
        slots = cache is not None
        positions = _positions_of_4d(shape, attention_mask, position_ids, slots)
        visibility = from_mask(attention_mask, positions, slots)
        bias = None if attention_mask.dtype == torch.bool else attention_mask.to(shape.dtype)
    else:
        real_BS = _padding(shape, attention_mask)
        if real_BS is not None:
            live = real_BS[:, -shape.tokens :]
            visibility, default_positions = from_padding(real_BS, shape.tokens)
        else:
            packed = shape.past == 0 and position_ids is not None and shape.tokens > 1
            documents = from_documents(position_ids) if packed and position_ids is not None else None
            visibility = documents or Visibility.causal(shape.tokens, shape.past, shape.device)
            default_positions = visibility.last_BT
        positions = default_positions if position_ids is None else position_ids
    attention = _attention(config, shape, visibility, bias, slots, ways, live)
    return ForwardPlan(attention, positions, live)


def _padding(shape: ForwardShape, mask_BS: Tensor | None) -> Tensor | None:
    """Bool [B, past + T], False on padding; None if there is none."""
    if mask_BS is None:
        return None
    columns = shape.past + shape.tokens
    if mask_BS.shape != (shape.batch, columns):
        raise ValueError(
            f"attention_mask has shape {tuple(mask_BS.shape)}; expected [batch, past + tokens] = "
            f"({shape.batch}, {columns}), or 4-D [batch, 1, tokens, columns]"
        )
    real_BS = mask_BS.to(device=shape.device, dtype=torch.bool)
    return None if real_BS.all() else real_BS


def _positions_of_4d(shape: ForwardShape, mask: Tensor, position_ids: Tensor | None, slots: bool) -> Tensor:
    if mask.shape[0] not in (1, shape.batch) or mask.shape[1] != 1 or mask.shape[2] != shape.tokens:
        raise ValueError(f"4-D attention_mask has shape {tuple(mask.shape)}; expected [batch, 1, {shape.tokens}, S]")
    if position_ids is not None:
        return position_ids
    if slots:
        raise ValueError("a 4-D attention_mask with a cache needs position_ids: cache column == position")
    return torch.arange(shape.tokens, device=shape.device).unsqueeze(0)


def _attention(
    config: Longcat2Config,
    shape: ForwardShape,
    visibility: Visibility,
    bias: Tensor | None,
    slots: bool,
    ways: Ways,
    live: Tensor | None,
) -> AttentionPlan:
    columns = visibility.columns
    sparse = config.use_lsa and ways.stage == "sparse" and columns > (config.index_topk or 0)
    has_past = columns > shape.tokens if slots else shape.past > 0
    absorbed = ways.path == "absorbed"
    if ways.path == "auto":
        absorbed = has_past and absorbed_is_cheaper(config, shape.tokens, columns)
    plain = visibility.allowed_BTS is None and not bool(visibility.first_BT.any())
    is_causal = plain and shape.past == 0 and shape.tokens > 1 and not absorbed
    if not sparse and bias is None and not is_causal and not (plain and shape.tokens == 1):
        bias = additive_bias(visibility.rows(0, shape.tokens).unsqueeze(1), shape.dtype)
    return AttentionPlan(
        bias=bias,
        is_causal=is_causal,
        absorbed=absorbed,
        key_length=columns,
        visibility=visibility,
        sparse=sparse,
        learn_index=ways.learn_index,
        live=live,
    )
