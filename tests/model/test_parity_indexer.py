"""Our indexer and sparse attention against transformers' (GLM-MoE-DSA, DeepSeek-V3.2), with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV32Config, GlmMoeDsaConfig
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention, GlmMoeDsaIndexer

from posttrain.model import Longcat2Config
from posttrain.model.attention import LongcatMLA
from posttrain.model.indexer import LongcatIndexer, index_scores
from posttrain.model.plan import ForwardShape, Ways, make_plan
from posttrain.model.rope import inverse_frequencies, rotations
from posttrain.model.selection import select
from posttrain.model.visibility import Visibility
from tests.model.longcat2_tiny import LSA, SHAPE, randomise

T, TOPK = 40, 9
SHARED = {
    name: SHAPE[name] for name in ("hidden_size", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "vocab_size")
}
SHARED |= {name: SHAPE[name] for name in ("qk_nope_head_dim", "v_head_dim", "num_attention_heads")}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FIELDS: dict[str, Any] = {**LSA, "index_topk": TOPK, "index_init_tokens": 0, "index_local_tokens": 0}


def _config(**changes: Any) -> Longcat2Config:
    plain = {"mla_scale_q_lora": False, "mla_scale_kv_lora": False, "latent_norm_eps": 1e-6}
    return Longcat2Config(**{**SHAPE, **FIELDS, **plain, "rope_parameters": dict(ROPE), **changes})


def _theirs(kind: type, layers: int = 2) -> Any:
    extra = {"num_key_value_heads": SHAPE["num_attention_heads"], "head_dim": SHAPE["qk_rope_head_dim"]}
    index = {name: FIELDS[name] for name in ("index_topk", "index_n_heads", "index_head_dim")}
    config = kind(**SHARED, **extra, **index, num_hidden_layers=layers, rope_parameters=dict(ROPE))
    config._attn_implementation = "eager"
    return config


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """States, query latents, angles [1, T, P]."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, T, SHAPE["hidden_size"], generator=generator)
    latent = torch.randn(2, T, SHAPE["q_lora_rank"], generator=generator)
    frequencies = inverse_frequencies(SHAPE["qk_rope_head_dim"], ROPE)
    return x, latent, torch.arange(T)[None, :, None] * frequencies


def _causal() -> Tensor:
    return torch.zeros(1, T, T).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)


@pytest.mark.parametrize("style", ["interleaved", "halves"])
def test_the_indexer_chooses_what_theirs_chooses(style: str) -> None:
    interleaved = style == "interleaved"
    kind, config = (GlmMoeDsaIndexer, GlmMoeDsaConfig) if interleaved else (DeepseekV32Indexer, DeepseekV32Config)
    ours = LongcatIndexer(_config(indexer_rope_interleave=interleaved), 0, alpha_q=1.0)
    ours.k_norm = nn.LayerNorm(LSA["index_head_dim"], eps=1e-6)  # type: ignore[assignment]  # theirs
    randomise(ours, seed=3)
    theirs = kind(_theirs(config), 0)
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    x, latent, angles = _inputs()
    turned = torch.polar(torch.ones_like(angles), angles)
    both = torch.cat((angles, angles), dim=-1)
    with torch.no_grad():
        queries = ours.queries(x, latent, turned, ours.keys(x, turned, None, None))
        scores = index_scores(*queries) + _causal()
        want = theirs(x, latent, (both.cos(), both.sin()), _causal(), None)
    # Equal scores may be broken differently: the chosen scores are compared, sorted.
    chosen = scores.gather(2, want.long()).sort(dim=-1).values
    best = scores.topk(TOPK, dim=-1).values.sort(dim=-1).values
    kept = best > -torch.inf
    assert kept.sum() > 2 * T * (TOPK - 1) - TOPK * TOPK
    assert (chosen[kept] - best[kept]).abs().max() < 1e-5
    sets = select(queries, Visibility.causal(T, 0, x.device), _config(), 0)
    mine = torch.zeros(2, T, T + 1, dtype=torch.bool).scatter(2, sets.long() % (T + 1), True)[..., :T]
    other = torch.zeros(2, T, T, dtype=torch.bool).scatter(2, want.long(), True) & (_causal() == 0)
    clear = (best[..., :1] != 0).squeeze(-1) & kept.all(dim=-1)  # no zeros at the threshold, so no ties
    assert clear.sum() > T and torch.equal(mine[clear], other[clear])


def test_an_owner_and_the_attention_that_shares_its_set() -> None:
    config = _theirs(GlmMoeDsaConfig)
    config.indexer_types = ["full", "shared"]
    ours = nn.ModuleList([LongcatMLA(_config(), half) for half in (0, 1)])
    ours[0].indexer.k_norm = nn.LayerNorm(LSA["index_head_dim"], eps=1e-6)  # type: ignore[union-attr]
    randomise(ours, seed=6)
    theirs = nn.ModuleList([GlmMoeDsaAttention(config, i) for i in (0, 1)])
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    x, _, angles = _inputs()
    plan = make_plan(_config(), ForwardShape(2, T, 0, x.device, x.dtype), None, None, None, Ways()).attention
    turned = rotations(torch.arange(T).unsqueeze(0), inverse_frequencies(SHAPE["qk_rope_head_dim"], ROPE))
    both = torch.cat((angles, angles), dim=-1)
    mask = _causal().unsqueeze(0).clamp(min=torch.finfo(torch.float32).min)
    with torch.no_grad():
        first = ours[0](x, turned, plan, None)
        second = ours[1](x + 1, turned, plan, None, first.chosen)
        want, _, chosen = theirs[0](x, (both.cos(), both.sin()), mask)
        want_second, _, again = theirs[1](x + 1, (both.cos(), both.sin()), mask, prev_topk_indices=chosen)
    assert plan.sparse and torch.equal(chosen, again)
    mine = first.chosen.columns_BTK
    assert torch.equal(mine, second.chosen.columns_BTK)
    # Rows whose sets agree (all but those with ties at the threshold) must agree in what is attended to.
    pairs = [
        [set(own.tolist()) - {-1} == {c for c in other.tolist() if c <= t} for t, (own, other) in enumerate(rows)]
        for rows in (zip(m, w, strict=True) for m, w in zip(mine, chosen, strict=True))
    ]
    agree = torch.tensor(pairs)
    assert agree.float().mean() > 0.6
    assert (first.out_BTH - want)[agree].abs().max() < 1e-5
    assert (second.out_BTH - want_second)[agree].abs().max() < 1e-5
