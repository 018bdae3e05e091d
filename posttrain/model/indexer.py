"""The lightning indexer of LSA: which tokens each token attends to.

Legend: B batch, T current tokens, S cached columns, s some of them, I index heads, D = index_head_dim,
R rotary width, P = R / 2, Q = q_lora_rank.
Source: LongCat Sparse Attention, arXiv 2608.01662 (CLI: one indexer for ``cli_factor`` attentions).

Cache protocol: ``update(keys [B, 1, T, D], keys of no width, config.index_cache_id(owner))``.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from posttrain.model.config import Longcat2Config
from posttrain.model.norm import LongcatRMSNorm
from posttrain.model.rope import rotate, rotate_halves

_CHUNK_SCORES = 1 << 20
"""Per-head scores alive at once on a CPU. A quarter, or four times as many, is a fifth slower."""


class IndexQueries(NamedTuple):
    """What scores are made of; an owner hands it on to the attentions that share its set, for their part in its loss.
    In the order of ``index_scores``."""

    q_BTID: Tensor
    w_BTI: Tensor
    """Float32, every scale folded in."""
    k_BSD: Tensor


class LongcatIndexer(nn.Module):
    """Scores every visible token for every current one. Learns from its own loss alone: its inputs are detached."""

    def __init__(self, config: Longcat2Config, attention_id: int, alpha_q: float) -> None:
        super().__init__()
        self.heads, self.width, self.rope = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.cache_id = config.index_cache_id(attention_id)
        self.turn = rotate if config.indexer_rope_interleave else rotate_halves
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.width, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.width, bias=False)
        self.k_norm = LongcatRMSNorm(self.width, config.index_k_norm_eps)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False, dtype=torch.float32)
        # The latent comes in without its variance scale; relu is homogeneous, so the scale can sit on the weights.
        self.scale = alpha_q * (self.heads * self.width) ** -0.5

    def keys(self, x_BTH: Tensor, rotations_BTP: Tensor, cache: Cache | None, columns: int | None) -> Tensor:
        """Normed and rotated keys of all columns, [B, S, D]; writes the cache once when there is one."""
        k_BTD = self._turn(self.k_norm(self.wk(x_BTH.detach())), rotations_BTP)
        if cache is None:
            return k_BTD
        return cache.update(k_BTD.unsqueeze(1), k_BTD[..., :0].unsqueeze(1), self.cache_id)[0][:, 0, :columns]

    def queries(self, x_BTH: Tensor, c_q_BTQ: Tensor, rotations_BTP: Tensor, k_BSD: Tensor) -> IndexQueries:
        """Queries from the normed query latent, and the weight of every head."""
        q_BTID = self.wq_b(c_q_BTQ.detach()).unflatten(-1, (self.heads, self.width))
        q_BTID = self._turn(q_BTID, rotations_BTP.unsqueeze(-2))
        with torch.autocast(x_BTH.device.type, enabled=False):
            w_BTI = self.weights_proj(x_BTH.detach().float()) * self.scale
        return IndexQueries(q_BTID, w_BTI, k_BSD)

    def _turn(self, x: Tensor, rotations_P: Tensor) -> Tensor:
        """Rotates the first R values, leaves the rest free of position."""
        return torch.cat((self.turn(x[..., : self.rope], rotations_P), x[..., self.rope :]), dim=-1)


def index_scores(q_BTID: Tensor, w_BTI: Tensor, k_BSD: Tensor) -> Tensor:
    """I_{t,s} = sum_j w_{t,j} relu(q_{t,j} . k_s), float32 [B, T, S]; nothing of T x I x S is made."""
    if q_BTID.is_cuda and q_BTID.dtype == k_BSD.dtype != torch.float64 and find_spec("triton") is not None:
        from posttrain.model import sparse_triton  # triton is not on every platform

        return sparse_triton.index_scores(q_BTID, k_BSD, w_BTI)
    batch, tokens, heads, _ = q_BTID.shape
    q_BMD, k_BSD = q_BTID.float().reshape(batch, tokens * heads, -1), k_BSD.float()  # M = T * I
    out_BTS = q_BMD.new_empty(batch, tokens, k_BSD.shape[1])
    width = max(256, _CHUNK_SCORES // max(tokens * heads, 1))
    # One buffer for all chunks: fresh pages for each would cost a quarter of the time.
    dots = q_BMD.new_empty(tokens * heads * min(width, k_BSD.shape[1]))
    for q_MD, w_TI, k_SD, out_TS in zip(q_BMD, w_BTI, k_BSD, out_BTS, strict=True):
        for left in range(0, k_SD.shape[0], width):
            k_sD, out_Ts = k_SD[left : left + width], out_TS[:, left : left + width]
            dots_Ms = dots[: tokens * heads * k_sD.shape[0]].view(tokens * heads, -1)
            torch.mm(q_MD, k_sD.mT, out=dots_Ms).relu_()
            out_Ts.copy_(torch.bmm(w_TI.unsqueeze(1), dots_Ms.view(tokens, heads, -1)).squeeze(1))
    return out_BTS
