"""Sequences end to end in one row, without padding; attention stays within each of them.

On a GPU that is torch's variable-length attention, a flash kernel that needs half precision, else torch's usual
attention, one sequence after another.

Shapes: B sequences, T tokens of the longest, S tokens of all, N trained tokens, H heads, D of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from posttrain.batch import Batch
from posttrain.errors import UserError

NAME = "posttrain_packed"
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A micro-batch as one row."""

    ids_1S: Tensor
    """Token ids."""
    positions_1S: Tensor
    """Of each in its own sequence."""
    starts_B1: Tensor
    """Where each begins, int32, and after them the end of the last."""
    longest: int
    """T."""
    before_N: Tensor
    """Where the token before each trained one is: what its log-prob is computed from."""

    def arguments(self) -> dict[str, Any]:
        """For the forward of a model that was given to ``enable``."""
        return {
            "input_ids": self.ids_1S,
            "position_ids": self.positions_1S,
            "cu_seq_lens_q": self.starts_B1,
            "cu_seq_lens_k": self.starts_B1,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def packed(batch: Batch) -> Packed:
    """The same sequences in the same order."""
    real_BT, device = batch.real_BT, batch.real_BT.device
    if not real_BT.any():  # a batch that is idle is forwarded too
        real_BT = torch.ones_like(real_BT)
    starts_B1 = torch.zeros(len(real_BT) + 1, dtype=torch.int32, device=device)
    starts_B1[1:] = real_BT.sum(1).cumsum(0)
    rows_N, columns_N = batch.sampled_BT.nonzero(as_tuple=True)
    positions_BT = torch.arange(real_BT.shape[1], device=device).expand_as(real_BT)
    return Packed(
        ids_1S=batch.ids_BT[real_BT][None],
        positions_1S=positions_BT[real_BT][None],
        starts_B1=starts_B1,
        longest=real_BT.shape[1],
        before_N=starts_B1[rows_N].long() + columns_N - 1,
    )


def enable(model: PreTrainedModel) -> None:
    """Have the model's attention heed the bounds of sequences. Raises UserError if it is not made of transformers'
    exchangeable attention, or looks at the tokens in another way too, which would see across the bounds."""
    if not only_full_attention(model):
        kind = model.config.get_text_config().model_type
        raise UserError(
            f"trainer.packed: a model of type {kind} has more than full attention, which could look from "
            "one sequence into another: set it to false"
        )
    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)


def only_full_attention(model: PreTrainedModel) -> bool:
    """Whether all that one token sees of others comes through full attention of transformers' exchangeable kind."""
    kinds = {*(getattr(model.config.get_text_config(), "layer_types", None) or ("full_attention",))}
    return model._supports_attention_backend and not model._is_stateful and kinds == {"full_attention"}


def refuse_unknown(key: str, **kwargs: Any) -> None:
    """Raises UserError for what a layer asks of attention and ``key`` cannot give, see transformers' interface."""
    unknown = [k for k in ("softcap", "sliding_window", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if unknown:
        raise UserError(f"{key}: the model's attention needs {unknown[0]}, which it cannot have: set it to false")


def _attention(
    module: nn.Module,
    query_1HSD: Tensor,
    key_1HSD: Tensor,
    value_1HSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it; the output is ``[1, S, H, D]``."""
    refuse_unknown("trainer.packed", **kwargs)
    if attention_mask is not None or cu_seq_lens_q is None:
        raise UserError("trainer.packed: the model's attention needs a mask, which it cannot have: set it to false")
    grouped = query_1HSD.shape[1] != key_1HSD.shape[1]
    if query_1HSD.is_cuda and query_1HSD.dtype in _HALF:
        from torch.nn.attention.varlen import varlen_attn

        q_SHD, k_SHD, v_SHD = (x[0].transpose(0, 1) for x in (query_1HSD, key_1HSD, value_1HSD))
        out_SHD = varlen_attn(
            q_SHD, k_SHD, v_SHD, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
            scale=scaling, window_size=(-1, 0), enable_gqa=grouped,
        )  # fmt: skip
        assert isinstance(out_SHD, Tensor)
        return out_SHD[None], None
    return _one_by_one(query_1HSD, key_1HSD, value_1HSD, cu_seq_lens_q, scaling, grouped), None


@torch.compiler.disable()
def _one_by_one(
    query_1HSD: Tensor, key_1HSD: Tensor, value_1HSD: Tensor, starts_B1: Tensor, scaling: float | None, grouped: bool
) -> Tensor:
    lengths, dtype = starts_B1.diff().tolist(), query_1HSD.dtype
    # In float32, see ``posttrain.attention``: half precision comes here on a CPU alone.
    with torch.autocast(query_1HSD.device.type, enabled=False):
        parts = zip(*(x.float().split(lengths, dim=2) for x in (query_1HSD, key_1HSD, value_1HSD)), strict=True)
        out = [scaled_dot_product_attention(*p, is_causal=True, scale=scaling, enable_gqa=grouped) for p in parts]
    return torch.cat(out, dim=2).to(dtype).transpose(1, 2)


__all__ = ["NAME", "Packed", "enable", "only_full_attention", "packed", "refuse_unknown"]
