"""Multi-head latent attention (MLA) with a naive and an absorbed path, and the masks both use.

Legend: B batch, T current tokens, S cached columns (past and current), H hidden, h heads, N = qk_nope_head_dim,
R = qk_rope_head_dim, V = v_head_dim, C = kv_lora_rank (latent), P = R / 2.
Source: LongCat-Flash report arXiv 2509.01322 Eq. 6-8 (variance scales); absorbed form: DeepSeek-V2 arXiv 2405.04434.

Cache protocol: ``update(latents [B, 1, T, C], rotated shared keys [B, 1, T, R], attention_id)``; the latents are
normed and scaled. Sparse attention (LSA) would add one key set per shortcut layer and narrow ``AttentionPlan``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from posttrain.model.config import Longcat2Config
from posttrain.model.rope import rotate, softmax_scale


class LongcatRMSNorm(nn.Module):
    """Root mean square norm over the last axis, statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Normed x times weight times ``scale``, same shape and dtype as x."""
        weight = self.weight if scale == 1.0 else self.weight * scale
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every attention of one forward pass needs to know about masks and path."""

    bias: Tensor | None
    """Additive mask, broadcastable to [B, 1, T, S], or None."""
    is_causal: bool
    """True: no bias, no past; query t sees keys 0..t."""
    absorbed: bool
    """True: attend in latent space; False: expand keys and values per head."""
    key_length: int | None
    """Columns to use of what the cache returns; None: all (slot buffers)."""


class LongcatMLA(nn.Module):
    """One latent attention. Weight names follow the official checkpoints."""

    def __init__(self, config: Longcat2Config, attention_id: int) -> None:
        super().__init__()
        self.attention_id = attention_id
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

    def forward(self, x_BTH: Tensor, rotations_BTP: Tensor, plan: AttentionPlan, cache: Cache | None) -> Tensor:
        """Attention output [B, T, H] for normed input; writes the cache once when there is one."""
        q_BThD = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTH))).unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q_BThD.split((self.nope, self.rope), dim=-1)
        q_rope = rotate(q_rope, rotations_BTP.unsqueeze(2))
        latent_BTC, k_rope = self.kv_a_proj_with_mqa(x_BTH).split((self.latent, self.rope), dim=-1)
        latent_BSC = self.kv_a_layernorm(latent_BTC, self.alpha_kv)
        k_rope_BSR = rotate(k_rope, rotations_BTP)
        if cache is not None:
            keys, values = cache.update(latent_BSC.unsqueeze(1), k_rope_BSR.unsqueeze(1), self.attention_id)
            latent_BSC, k_rope_BSR = keys[:, 0, : plan.key_length], values[:, 0, : plan.key_length]
        attend = self._absorbed if plan.absorbed else self._naive
        return self.o_proj(attend(q_nope, q_rope, latent_BSC, k_rope_BSR, plan))

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
        batch, tokens = q_nope_BThN.shape[:2]
        w_k_hNC, w_v_hVC = self._kv_b_weight().unflatten(0, (self.heads, -1)).split((self.nope, self.value), dim=1)
        q_nope_hMN = q_nope_BThN.flatten(0, 1).transpose(0, 1) * self.logit_scale  # M = B * T
        q_latent = torch.bmm(q_nope_hMN, w_k_hNC).transpose(0, 1).reshape(batch, tokens * self.heads, -1)
        q_rope = q_rope_BThR.flatten(1, 2) * self.logit_scale
        logits = torch.bmm(q_latent, latent_BSC.mT)  # rows ordered (token, head)
        logits = torch.baddbmm(logits, q_rope, k_rope_BSR.mT)
        if plan.bias is not None:
            bias_BTS = plan.bias[:, 0]
            if tokens > 1:
                bias_BTS = bias_BTS.repeat_interleave(self.heads, dim=1)
            logits = logits + bias_BTS
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(latent_BSC.dtype)
        mixed_hMC = torch.bmm(weights, latent_BSC).view(batch * tokens, self.heads, -1).transpose(0, 1)
        out_hMV = torch.bmm(mixed_hMC, w_v_hVC.mT)
        return out_hMV.transpose(0, 1).reshape(batch, tokens, -1)

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


def causal_allowed(tokens: int, past: int, device: torch.device) -> Tensor:
    """Bool [1, 1, T, S]: query t (column past + t) sees columns up to itself."""
    rows = torch.arange(past, past + tokens, device=device)
    return (torch.arange(past + tokens, device=device) <= rows.unsqueeze(1))[None, None]
