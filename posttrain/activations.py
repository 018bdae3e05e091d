"""Bytes that a forward pass keeps for the way back, a token, by formula: what torch's autograd saves of these layers.

A norm keeps what it is given and the same without its weight, in float32, and the maps behind it keep what it returns.
A SwiGLU keeps gate, silu of gate, up and their product; fused attention queries, keys, values and what it returns.
By Liger's kernels a norm keeps what it is given alone, in the precision that it has, and a SwiGLU no silu.

Legend: w bytes of a value in the precision of the forward (4, or 2 under autocast), D hidden, I inner width of a
feed-forward, Q and C latents of queries and of keys and values, N and R parts of a head without and with a position,
V its value, h heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.model import Longcat2Config

FLOAT = 4
"""Bytes of a value where nothing asks for less."""


class NoEstimate(Exception):
    """Says what is not known of a model or engine."""


def kept_per_token(config: Any, width: int, longest: int, attended: int, liger: bool = False) -> int:
    """Of all layers and the last norm, for sequences of ``longest`` tokens at the most. ``width`` is w, ``attended``
    that of attention of transformers (``posttrain.attention``), ``liger`` whether its kernels compute a model of them.

    Raises NoEstimate for a config that does not say how wide its layers are."""
    if config.model_type == "longcat2":
        layers = config.num_layers * longcat_layer(config, width, longest)
        branches = config.num_ngram_tables
        hidden = config.hidden_size
        ngrams = width * hidden if branches else 0  # rows of all tables together are one hidden state
        draft = (config.mtp_num_layers or 0) * _draft_step(config, width) if config.mtp_loss_coef else 0
        return layers + ngrams + draft + _norm(hidden, width)
    text = config.get_text_config()
    try:
        layers = text.num_hidden_layers * common_layer(text, width, attended, liger)
        return layers + _norm(text.hidden_size, width, liger)
    except (AttributeError, TypeError) as error:
        raise NoEstimate(
            f"a model of type {config.model_type} does not say how wide its layers are ({error})"
        ) from None


def common_layer(c: Any, width: int, attended: int, liger: bool = False) -> int:
    """A layer of the Llama and Qwen kind, by the names that transformers gives to its fields."""
    hidden, heads = c.hidden_size, c.num_attention_heads
    size = getattr(c, "head_dim", None) or hidden // heads
    queries, keys = heads * size, (getattr(c, "num_key_value_heads", None) or heads) * size
    attention = attended * (2 * queries + 2 * keys)
    if attended != width:  # what the map behind it is given
        attention += width * queries
    if "qwen3" in c.model_type:  # norms of queries and keys; what they return is among the above
        attention += (width if liger else FLOAT + width) * (queries + keys)
    chosen = getattr(c, "num_experts_per_tok", None)
    inner = (getattr(c, "moe_intermediate_size", None) if chosen else None) or getattr(c, "intermediate_size", None)
    feed_forward = width * (3 if liger else 4) * (inner or 4 * hidden)
    if chosen:
        feed_forward = chosen * (feed_forward + width * 2 * hidden)
    return 2 * _norm(hidden, width, liger) + attention + feed_forward


def longcat_layer(c: Longcat2Config, width: int, longest: int) -> int:
    """Two attentions, two dense SwiGLUs, and as many routed ones as a token uses on the mean."""
    hidden = c.hidden_size
    used = c.moe_target_topk or c.moe_topk * c.n_routed_experts / c.num_moe_slots
    routed = FLOAT * (3 * hidden + 4 * c.expert_ffn_hidden_size)  # the routed bank computes in the residual's float32
    router = FLOAT * 3 * c.num_moe_slots + (FLOAT * hidden if width < FLOAT else 0)
    dense = 2 * width * 4 * c.ffn_hidden_size
    return 4 * _norm(hidden, width) + 2 * _latent_attention(c, width, longest) + dense + int(used * routed) + router


def _latent_attention(c: Longcat2Config, width: int, longest: int) -> int:
    latents = _norm(c.q_lora_rank, width) + _norm(c.kv_lora_rank, width) + FLOAT * c.qk_rope_head_dim
    heads, value = c.num_attention_heads, c.v_head_dim
    query, latent = c.qk_nope_head_dim + c.qk_rope_head_dim, c.kv_lora_rank + c.qk_rope_head_dim
    if c.use_lsa and longest > (c.index_topk or 0):
        # In latent space: queries before and after, keys, weighted latents, the columns.
        kept = heads * (query + latent + c.kv_lora_rank + value) + latent
        return latents + width * kept + FLOAT * (c.index_topk or 0)
    widest = max(query, value)  # fused kernels want one width
    return latents + width * heads * (4 * widest + value)


def _draft_step(c: Longcat2Config, width: int) -> int:
    joined = 4 * _norm(c.hidden_size, width) + width * 2 * c.hidden_size
    return joined + _latent_attention(c, width, 1) + width * 4 * c.ffn_hidden_size


def _norm(width_of_it: int, width: int, liger: bool = False) -> int:
    return ((1 if liger else 2) * FLOAT + width) * width_of_it


__all__ = ["FLOAT", "NoEstimate", "common_layer", "kept_per_token", "longcat_layer"]
