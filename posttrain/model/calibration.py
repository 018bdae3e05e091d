"""Which attentions can do with the streaming pattern (LoZA calibration, arXiv 2512.23966).

Every attention gives ``alpha * full + (1 - alpha) * streaming`` with a scalar alpha of its own. On the LM loss, with
the weights frozen, alpha rises where the full context is needed; the attentions whose alpha stays smallest may stream.

Legend: B batch, T tokens, A attentions, K streaming columns, E latent and rotary width, H hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from posttrain.model.attention import Attended, LongcatMLA
from posttrain.model.config import Longcat2Config
from posttrain.model.model import Longcat2Model
from posttrain.model.sparse import sparse_attend
from posttrain.model.streaming import streaming_columns


@contextmanager
def mixed(model: Longcat2Model, pattern: Longcat2Config, alphas_A: Tensor) -> Iterator[None]:
    """Inside, every attention of the backbone mixes by its alpha; afterwards the model is as it was. Without a cache.

    ``pattern``: whose ``streaming_*`` sizes to try. Gradients reach ``alphas_A``; freezing the rest is the caller's.
    """
    attentions = [module for module in model.layers.modules() if isinstance(module, LongcatMLA)]
    if len(alphas_A) != len(attentions):
        raise ValueError(f"{len(alphas_A)} alphas for {len(attentions)} attentions: give one each")
    handles = [a.register_forward_hook(_mix(pattern, alphas_A, place)) for place, a in enumerate(attentions)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def least(alphas_A: Tensor, share: float) -> list[int]:
    """Ids of the ``share`` of attentions whose alpha is smallest, ascending; of equal ones the first."""
    return sorted(alphas_A.argsort(stable=True)[: round(share * len(alphas_A))].tolist())


def _mix(pattern: Longcat2Config, alphas_A: Tensor, place: int) -> Callable[[LongcatMLA, Any, Attended], Attended]:
    def hook(attention: LongcatMLA, inputs: Any, full: Attended) -> Attended:
        x_BTH, rotations_BTP, plan, cache = inputs[:4]
        if cache is not None:
            raise ValueError("calibration sees the current tokens only: pass use_cache=False")
        _, q_nope, q_rope = attention.queries(x_BTH, rotations_BTP)
        kv_BSE = torch.cat(attention.keys(x_BTH, rotations_BTP), dim=-1)
        columns_BTK = streaming_columns(plan.visibility, pattern).expand(len(x_BTH), -1, -1)
        mixed_BThC = sparse_attend(attention.latent_queries(q_nope, q_rope), kv_BSE, columns_BTK, attention.latent)
        streamed_BTH = attention.o_proj(attention.values(mixed_BThC))
        alpha = alphas_A[place]
        return full._replace(out_BTH=alpha * full.out_BTH + (1 - alpha) * streamed_BTH)

    return hook
