"""Multi-head latent attention (MLA): dense (naive or absorbed) or over chosen tokens (LSA, LoZA).

Legend: B batch, T current tokens, S cached columns (past and current), H hidden, h heads, N = qk_nope_head_dim,
R = qk_rope_head_dim, V = v_head_dim, C = kv_lora_rank (latent), P = R / 2, K chosen tokens.
Source: LongCat-Flash report arXiv 2509.01322 Eq. 6-8 (variance scales); absorbed form: DeepSeek-V2 arXiv 2405.04434.

Cache protocol: ``update(latents [B, 1, T, C], rotated shared keys [B, 1, T, R], config.attention_cache_id(id))``;
the latents are normed and scaled.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from posttrain.model.config import Longcat2Config
from posttrain.model.index_loss import index_loss
from posttrain.model.indexer import IndexQueries, LongcatIndexer
from posttrain.model.norm import LongcatRMSNorm
from posttrain.model.rope import rotate, softmax_scale
from posttrain.model.selection import select
from posttrain.model.sparse import sparse_attend
from posttrain.model.streaming import streaming_columns
from posttrain.model.visibility import Visibility


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every attention of one forward pass needs to know about masks and path."""

    bias: Tensor | None
    """Additive mask, broadcastable to [B, 1, T, S], or None."""
    is_causal: bool
    """True: no bias, no past; query t sees keys 0..t."""
    absorbed: bool
    """True: attend in latent space; False: expand keys and values per head."""
    key_length: int
    """Columns to use of what the cache returns, S."""
    visibility: Visibility
    """What each token sees."""
    sparse: bool
    """Whether LSA chooses: more columns than ``index_topk``, and not the indexers' warm-up."""
    learn_index: bool
    """Whether the indexers' loss is wanted."""
    live: Tensor | None
    """Bool [B, T], False on padding; None: no padding."""


class IndexSet(NamedTuple):
    """What the owner of an indexer hands on to the attentions that share it."""

    columns_BTK: Tensor | None
    """Chosen columns, int32, -1 for none; None: everything that is seen."""
    queries: IndexQueries | None
    """Present only when the loss is wanted."""


class Attended(NamedTuple):
    out_BTH: Tensor
    chosen: IndexSet | None
    index_loss: Tensor | None
    """KL of this attention's weights to the indexer's (arXiv 2608.01662), mean over tokens."""


class LongcatMLA(nn.Module):
    """One latent attention. Weight names follow the official checkpoints."""

    def __init__(self, config: Longcat2Config, attention_id: int) -> None:
        super().__init__()
        self.attention_id, self.cache_id = attention_id, config.attention_cache_id(attention_id)
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        hidden, eps = config.hidden_size, config.latent_norm_eps or config.rms_norm_eps
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_layernorm = LongcatRMSNorm(config.q_lora_rank, eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = LongcatRMSNorm(self.latent, eps)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)
        alpha_q = (hidden / config.q_lora_rank) ** 0.5 if config.mla_scale_q_lora else 1.0
        self.alpha_kv = (hidden / self.latent) ** 0.5 if config.mla_scale_kv_lora else 1.0
        # alpha_q scales the whole query, so it is folded into the softmax scale
        self.logit_scale = softmax_scale(self.nope + self.rope, config.rope_parameters or {}) * alpha_q
        self.config = config
        self.streaming = config.streams(attention_id)
        if config.owns_indexer(attention_id):
            self.indexer = LongcatIndexer(config, attention_id, alpha_q)

    def forward(
        self,
        x_BTH: Tensor,
        rotations_BTP: Tensor,
        plan: AttentionPlan,
        cache: Cache | None,
        shared: IndexSet | None = None,
        replay_BTK: Tensor | None = None,
    ) -> Attended:
        """Attention output for normed input; writes the cache once when there is one.

        Args:
            shared: the owner's set, for an attention without an indexer.
            replay_BTK: columns to attend to in place of the indexer's choice, which a token of -1 alone keeps.
        """
        c_q_BTQ, q_nope, q_rope = self.queries(x_BTH, rotations_BTP)
        latent_BSC, k_rope_BSR = self.keys(x_BTH, rotations_BTP)
        if cache is not None:
            keys, values = cache.update(latent_BSC.unsqueeze(1), k_rope_BSR.unsqueeze(1), self.cache_id)
            latent_BSC, k_rope_BSR = keys[:, 0, : plan.key_length], values[:, 0, : plan.key_length]
        index = shared
        if self.config.owns_indexer(self.attention_id):
            index = self._index(x_BTH, c_q_BTQ, rotations_BTP, plan, cache, replay_BTK)
        columns_BTK = index.columns_BTK if index is not None else None
        if self.streaming:
            columns_BTK = streaming_columns(plan.visibility, self.config).expand(len(x_BTH), -1, -1)
        if columns_BTK is not None:
            out_BTD = self._sparse(q_nope, q_rope, latent_BSC, k_rope_BSR, columns_BTK)
        else:
            attend = self._absorbed if plan.absorbed else self._naive
            out_BTD = attend(q_nope, q_rope, latent_BSC, k_rope_BSR, plan)
        loss = None
        if index is not None and index.queries is not None:
            with torch.no_grad():
                q_BThE = self.latent_queries(q_nope, q_rope)
                kv_BSE = torch.cat((latent_BSC, k_rope_BSR), dim=-1)
            loss = index_loss(index.queries, q_BThE, kv_BSE, columns_BTK, plan.visibility, plan.live)
        return Attended(self.o_proj(out_BTD), index, loss)

    def queries(self, x_BTH: Tensor, rotations_BTP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed query latent [B, T, q_lora_rank], and per head the part free of position and the rotated part."""
        c_q_BTQ = self.q_a_layernorm(self.q_a_proj(x_BTH))
        q_BThD = self.q_b_proj(c_q_BTQ).unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q_BThD.split((self.nope, self.rope), dim=-1)
        return c_q_BTQ, q_nope, rotate(q_rope, rotations_BTP.unsqueeze(2))

    def keys(self, x_BTH: Tensor, rotations_BTP: Tensor) -> tuple[Tensor, Tensor]:
        """Normed and scaled latents [B, T, C], rotated shared keys [B, T, R]."""
        latent_BTC, k_rope = self.kv_a_proj_with_mqa(x_BTH).split((self.latent, self.rope), dim=-1)
        return self.kv_a_layernorm(latent_BTC, self.alpha_kv), rotate(k_rope, rotations_BTP)

    def _index(
        self,
        x_BTH: Tensor,
        c_q_BTQ: Tensor,
        rotations_BTP: Tensor,
        plan: AttentionPlan,
        cache: Cache | None,
        replay_BTK: Tensor | None,
    ) -> IndexSet:
        """Index keys are kept from the first token on; queries are made only where there is something to choose."""
        k_BSD = self.indexer.keys(x_BTH, rotations_BTP, cache, plan.key_length)
        free_BT1 = None if replay_BTK is None else (replay_BTK < 0).all(dim=-1, keepdim=True)
        choose = plan.sparse and (free_BT1 is None or bool(free_BT1.any()))
        if not choose and not plan.learn_index:
            return IndexSet(replay_BTK if plan.sparse else None, None)
        queries = self.indexer.queries(x_BTH, c_q_BTQ, rotations_BTP, k_BSD)
        columns_BTK = replay_BTK
        if choose:
            columns_BTK = select(queries, plan.visibility, self.config, self.attention_id // self.config.cli_factor)
            if free_BT1 is not None and replay_BTK is not None:
                columns_BTK = torch.where(free_BT1, columns_BTK, replay_BTK)
        return IndexSet(columns_BTK if plan.sparse else None, queries if plan.learn_index else None)

    def _sparse(
        self, q_nope_BThN: Tensor, q_rope_BThR: Tensor, latent_BSC: Tensor, k_rope_BSR: Tensor, columns_BTK: Tensor
    ) -> Tensor:
        """Attends in latent space to the chosen columns only; returns [B, T, h * V]."""
        if columns_BTK.shape[1] * columns_BTK.shape[2] < latent_BSC.shape[1]:
            # A step of decoding copies what was chosen, not the whole cache.
            rows_BM = columns_BTK.flatten(1).clamp(min=0).long()
            latent_BSC, k_rope_BSR = (
                x.gather(1, rows_BM.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for x in (latent_BSC, k_rope_BSR)
            )
            places = torch.arange(rows_BM.shape[1], device=rows_BM.device).view(1, *columns_BTK.shape[1:])
            columns_BTK = places.masked_fill(columns_BTK < 0, -1)
        kv_BSE = torch.cat((latent_BSC, k_rope_BSR), dim=-1)
        # Queries against latents are several times as wide as those that they are made of: without gradients they live
        # for a few tokens only. With them one call sums the gradient of kv in float32.
        step = 64 if q_nope_BThN.device.type == "cpu" else 4096
        if torch.is_grad_enabled():
            step = q_nope_BThN.shape[1]
        mixed_BTD = [
            self.values(sparse_attend(self.latent_queries(q_nope_BtN, q_rope_BtR), kv_BSE, columns_BtK, self.latent))
            for q_nope_BtN, q_rope_BtR, columns_BtK in zip(
                q_nope_BThN.split(step, 1), q_rope_BThR.split(step, 1), columns_BTK.split(step, 1), strict=True
            )
        ]
        return mixed_BTD[0] if len(mixed_BTD) == 1 else torch.cat(mixed_BTD, dim=1)

    def latent_queries(self, q_nope_BThN: Tensor, q_rope_BThR: Tensor) -> Tensor:
        """Scaled queries against ``[latent | rotated key]`` rows, [B, T, h, C + R]."""
        w_k_hNC = self._kv_b_weight().unflatten(0, (self.heads, -1))[:, : self.nope]
        q_hMN = q_nope_BThN.flatten(0, 1).transpose(0, 1)  # M = B * T
        q_latent = torch.bmm(q_hMN, w_k_hNC).transpose(0, 1).unflatten(0, q_nope_BThN.shape[:2])
        return torch.cat((q_latent, q_rope_BThR), dim=-1) * self.logit_scale

    def values(self, mixed_BThC: Tensor) -> Tensor:
        """Values per head of mixed latents, [B, T, h * V]."""
        w_v_hVC = self._kv_b_weight().unflatten(0, (self.heads, -1))[:, self.nope :]
        out_hMV = torch.bmm(mixed_BThC.flatten(0, 1).transpose(0, 1), w_v_hVC.mT)
        return out_hMV.transpose(0, 1).reshape(*mixed_BThC.shape[:2], -1)

    def _naive(
        self, q_nope_BThN: Tensor, q_rope_BThR: Tensor, latent_BSC: Tensor, k_rope_BSR: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """Keys and values expanded per head; returns [B, T, h * V]."""
        k_nope, v = self.kv_b_proj(latent_BSC).unflatten(-1, (self.heads, -1)).split((self.nope, self.value), dim=-1)
        k_rope = k_rope_BSR.unsqueeze(2).expand(-1, -1, self.heads, -1)
        q, k = torch.cat((q_nope_BThN, q_rope_BThR), dim=-1), torch.cat((k_nope, k_rope), dim=-1)
        surplus = q.shape[-1] - self.value  # fused kernels want one width for q, k and v
        if surplus > 0:
            v = F.pad(v, (0, surplus))
        elif surplus < 0:
            q, k = F.pad(q, (0, -surplus)), F.pad(k, (0, -surplus))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=plan.bias, is_causal=plan.is_causal, scale=self.logit_scale
        )
        return out[..., : self.value].transpose(1, 2).flatten(2)

    def _absorbed(
        self, q_nope_BThN: Tensor, q_rope_BThR: Tensor, latent_BSC: Tensor, k_rope_BSR: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """All heads attend to the shared latents (multi-query); returns [B, T, h * V]."""
        tokens = q_nope_BThN.shape[1]
        q_latent, q_rope = (
            self.latent_queries(q_nope_BThN, q_rope_BThR).flatten(1, 2).split((self.latent, self.rope), dim=-1)
        )
        logits = torch.bmm(q_latent, latent_BSC.mT)  # rows ordered (token, head)
        logits = torch.baddbmm(logits, q_rope, k_rope_BSR.mT)
        if plan.bias is not None:
            bias_BTS = plan.bias[:, 0]
            if tokens > 1:
                bias_BTS = bias_BTS.repeat_interleave(self.heads, dim=1)
            logits = logits + bias_BTS
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(latent_BSC.dtype)
        return self.values(torch.bmm(weights, latent_BSC).unflatten(1, (tokens, self.heads)))

    def _kv_b_weight(self) -> Tensor:
        """Weight of kv_b_proj [h * (N + V), C]; of the wrapped map when an adapter replaced the plain layer."""
        if type(self.kv_b_proj) is nn.Linear:
            return self.kv_b_proj.weight
        probe = self.kv_a_layernorm.weight
        return self.kv_b_proj(torch.eye(self.latent, dtype=probe.dtype, device=probe.device)).mT


def absorbed_is_cheaper(config: Longcat2Config, tokens: int, columns: int) -> bool:
    """Compares multiply-adds of the two paths for ``tokens`` queries against ``columns`` cached columns."""
    heads, latent, value = config.num_attention_heads, config.kv_lora_rank, config.v_head_dim
    expand = latent * heads * (config.qk_nope_head_dim + value)
    naive = columns * expand + tokens * columns * heads * (config.qk_head_dim + value)
    absorbed = tokens * expand + tokens * columns * heads * (2 * latent + config.qk_rope_head_dim)
    return absorbed < naive


def additive_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``allowed`` (bool) else the lowest finite value: a fully masked row stays finite."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)
