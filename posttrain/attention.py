"""Attention in float32 on a CPU, whatever the rest of a forward is in: there torch's attention in bf16 (2.13) takes ten
times as long on the way back, while products of matrices take a fifth.

Shapes: B sequences, H heads, T tokens, D of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_NAME = "posttrain_float32"


def enable(model: PreTrainedModel) -> None:
    """For a model that has torch's attention through transformers' exchangeable kind; others stay as they are."""
    if model._supports_attention_backend and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(_NAME)


def _attention(
    module: nn.Module, query_BHTD: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers calls it."""
    with torch.autocast("cpu", enabled=False):
        whole = query_BHTD.float(), key.float(), value.float()
        out_BTHD, _ = sdpa_attention_forward(module, *whole, attention_mask, **kwargs)
    return out_BTHD.to(query_BHTD.dtype), None


__all__ = ["enable"]
