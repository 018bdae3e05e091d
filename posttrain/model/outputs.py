"""What a forward gives. Legend: B batch, T tokens, H hidden, L layers, K chosen columns, O indexers a layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from posttrain.model.plan import ForwardPlan


@dataclass
class Longcat2Output(BaseModelOutputWithPast):
    """What a forward gives besides hidden states; losses are None unless the config wants them and it trains."""

    slots: tuple[Tensor, ...] | None = None
    """MoE slots used by each layer, int64 [B, T, moe_topk]; only on demand."""
    index_sets: tuple[Tensor | None, ...] | None = None
    """Columns chosen by each layer's indexers, int32 [B, T, O, K], -1 for none; None: everything in sight."""
    index_loss: Tensor | None = None
    """Sum over the layers of the indexers' KL."""
    balance_loss: Tensor | None = None
    """Mean over the layers of the device-level balance loss."""
    z_loss: Tensor | None = None
    plan: ForwardPlan | None = None
    """How it was computed."""


@dataclass
class Longcat2CausalOutput(CausalLMOutputWithPast):
    """See ``Longcat2Output``."""

    aux_loss: Tensor | None = None
    """All auxiliary losses with their coefficients; part of ``loss`` already when there are labels."""
    mtp_loss: Tensor | None = None
    index_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    slots: tuple[Tensor, ...] | None = None
    index_sets: tuple[Tensor | None, ...] | None = None
    last_hidden_state: Tensor | None = None
    """After the final norm, [B, T, H]: what the draft block starts from."""


def total(losses: Sequence[Tensor | None], scale: float = 1.0) -> Tensor | None:
    """Sum of those that are there, times ``scale``; None if none is."""
    there = [loss for loss in losses if loss is not None]
    return torch.stack(there).sum() * scale if there else None
