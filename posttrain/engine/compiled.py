"""``engine.compile``: the forward that reads one token of every request, in fused kernels.

Forwards of more tokens, prompts above all, stay as they are: most of their time goes into matrix products anyway, and
every other kind of shapes would be compiled by itself.

Shapes: B rows, H heads of queries, h heads of keys, T tokens a row, S visible columns, d head size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from posttrain.engine.one_token import attend_one_token
from posttrain.errors import UserError
from posttrain.packing import only_full_attention, refuse_unknown
from posttrain.prepare import compile_layers

_ATTENTION = "posttrain_one_token"


def attend(
    module: Any,
    query_BHTd: Tensor,
    key_BhSd: Tensor,
    value_BhSd: Tensor,
    mask_B1TS: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention."""
    refuse_unknown("engine.compile", **kwargs)
    scale = query_BHTd.shape[3] ** -0.5 if scaling is None else scaling
    if query_BHTd.shape[2] > 1:
        options: Any = {"attn_mask": mask_B1TS, "scale": scale, "enable_gqa": True}
        return scaled_dot_product_attention(query_BHTd, key_BhSd, value_BhSd, **options).transpose(1, 2), None
    return attend_one_token(query_BHTd, key_BhSd, value_BhSd, mask_B1TS, scale), None


def enable(model: Any) -> None:
    """Compile ``model``, in place, when it is first called. Raises UserError for one that cannot be."""
    compile_layers(model, "engine.compile")
    if not only_full_attention(model):
        kind = model.config.get_text_config().model_type
        raise UserError(f"engine.compile: a model of type {kind} has more than full attention: set it to false")
    AttentionInterface.register(_ATTENTION, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_ATTENTION)


def only_if(one_token: bool) -> AbstractContextManager[Any]:
    """In which a model that was enabled runs compiled, or as it is."""
    return torch.compiler.set_stance("default" if one_token else "force_eager")
