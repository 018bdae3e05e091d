"""What a ``Longcat2Config`` must hold: aliases merged, contradictions and what is not there refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.model.config import Longcat2Config

# canonical (LongCat-2.0, Lite-Sparse) name -> other official name
ALIASES = {
    "oe_vocab_size_ratio": "ngram_vocab_size_ratio",
    "oe_neighbor_num": "emb_neighbor_num",
    "oe_split_num": "emb_split_num",
}
_NGRAM = ("oe_vocab_size_ratio", "oe_neighbor_num", "oe_split_num")

# field -> (values that are accepted, cure); anything else is refused
ACCEPTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_method": ((None, "MLA", "LSA"), 'set it to "MLA" or "LSA"'),
    "use_mla": ((None, 1, True), "set it to 1"),
    "index_k_norm_type": ((None, "rms"), 'set it to "rms": the index key norm of this family'),
    "dsa_mtp_cli": ((None, True), "set it to true: all draft steps share the first one's index set"),
    "mtp_replicate_modules": ((None, True), "set it to true: one block serves all draft steps"),
    "mtp_disable_over_tokenizer": ((None, True), "set it to true: the draft block reads the word embedding alone"),
    "zero_expert_type": ((None, "identity"), 'set it to "identity"'),
    "norm_topk_prob": ((None, False), "set it to false: top-k weights are not renormalised in this family"),
    "router_bias": ((None, False), "set it to false: the router has no bias vector in this family"),
    "attention_bias": ((None, False), "set it to false: the projections have no biases in this family"),
    "attention_dropout": ((None, 0, 0.0), "set it to 0"),
    "hidden_act": ((None, "silu"), 'set it to "silu"'),
    "tie_word_embeddings": ((None, False), "set it to false: embed_tokens and lm_head are two tensors on disk"),
    "fold_mla_scales": ((None, False), "set it to false and unfold the latent norms (checkpoint.unfold_scales)"),
    "ngram_exclude_sp_token": ((None, False), "set it to false: only EOS stops the n-gram look-back"),
    "quantization_config": ((None,), "load the bf16 or float32 checkpoint"),
}


def merge_aliases(config: Longcat2Config, kwargs: dict[str, Any]) -> None:
    """Moves other official names onto the canonical fields; raises ValueError on conflict or half an n-gram."""
    for name, alias in ALIASES.items():
        value = kwargs.pop(alias, None)
        if value is None:
            continue
        current = getattr(config, name)
        if current is not None and current != value:
            raise ValueError(
                f"{name}={current} and {alias}={value} disagree: they are two names of one field, keep one"
            )
        setattr(config, name, value)
    blocks = kwargs.pop("num_nextn_predict_layers", None)  # of the draft; its steps where nothing else says
    if config.mtp_num_layers is None:
        config.mtp_num_layers = blocks
    elif blocks not in (None, 1, config.mtp_num_layers):
        raise ValueError(
            f"mtp_num_layers={config.mtp_num_layers} and num_nextn_predict_layers={blocks} disagree: one draft "
            "block is applied mtp_num_layers times; remove num_nextn_predict_layers"
        )
    given = {name: getattr(config, name) for name in _NGRAM}
    if config.oe_vocab_size_ratio:
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ValueError(f"n-gram embedding is on (oe_vocab_size_ratio) but {', '.join(missing)} is not set")
    elif any(given.values()):
        raise ValueError(f"{given}: n-gram fields without oe_vocab_size_ratio; set it, or remove the others")


def refuse_unimplemented(config: Longcat2Config, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a field whose value asks for something this package does not implement."""
    for name, (accepted, cure) in ACCEPTED.items():
        value = kwargs.get(name, getattr(config, name, None))
        if not any(value is good or value == good for good in accepted):
            shown = name if isinstance(value, dict) else f"{name}={value!r}"
            raise ValueError(f"config field {shown} is not implemented in posttrain.model; {cure}")
    if kwargs.get("attention_method") == "LSA" and not config.use_lsa:
        raise ValueError('attention_method="LSA" without index_topk: set index_topk, or attention_method to "MLA"')


def check(config: Longcat2Config) -> None:
    """Raises ValueError when sizes are not positive or contradict each other."""
    _positive(
        config,
        "vocab_size hidden_size num_layers num_attention_heads ffn_hidden_size q_lora_rank kv_lora_rank "
        "qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts moe_topk expert_ffn_hidden_size",
    )
    for name in ("zero_expert_num", "mtp_num_layers"):
        if (getattr(config, name) or 0) < 0:
            raise ValueError(f"{name}={getattr(config, name)} must not be negative")
    if config.moe_topk > config.num_moe_slots:
        raise ValueError(
            f"moe_topk={config.moe_topk} is larger than n_routed_experts + zero_expert_num = {config.num_moe_slots}"
        )
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim={config.qk_rope_head_dim} must be even: RoPE rotates pairs")
    for name in ("hidden_size", "expert_ffn_hidden_size"):
        if getattr(config, name) % 8:
            raise ValueError(f"{name}={getattr(config, name)} must be a multiple of 8 (grouped matmul alignment)")
    _check_signals(config)
    if config.use_ngram:
        _check_ngram(config)
    if config.use_lsa:
        _check_lsa(config)
    elif config.use_hi:
        raise ValueError("use_hi=True needs LSA: set index_topk, or use_hi to false")
    if config.streaming_attentions:
        _check_streaming(config)


def _positive(config: Longcat2Config, names: str) -> None:
    for name in names.split():
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")


def _check_ngram(config: Longcat2Config) -> None:
    neighbours, splits = config.oe_neighbor_num or 0, config.oe_split_num or 0
    if neighbours < 2 or splits < 1:
        raise ValueError(f"oe_neighbor_num={neighbours} must be at least 2 and oe_split_num={splits} at least 1")
    tables = config.num_ngram_tables
    if config.hidden_size % tables:
        raise ValueError(
            f"hidden_size={config.hidden_size} is not divisible by the number of n-gram tables {tables} "
            f"(oe_split_num * (oe_neighbor_num - 1)); change oe_split_num or oe_neighbor_num"
        )
    if int((config.oe_vocab_size_ratio or 0) * config.vocab_size) < 1:
        raise ValueError(f"oe_vocab_size_ratio={config.oe_vocab_size_ratio} gives empty n-gram tables")


def _check_lsa(config: Longcat2Config) -> None:
    _positive(config, "index_topk index_n_heads index_head_dim")
    forced = config.index_init_tokens + config.index_local_tokens
    for name in ("index_init_tokens", "index_local_tokens"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)} must not be negative")
    if forced > (config.index_topk or 0):
        raise ValueError(
            f"index_topk={config.index_topk} is smaller than the forced part, index_init_tokens + index_local_tokens = "
            f"{config.index_init_tokens} + {config.index_local_tokens}: raise index_topk or lower the forced part"
        )
    if config.index_head_dim < config.qk_rope_head_dim:
        raise ValueError(
            f"index_head_dim={config.index_head_dim} must be at least qk_rope_head_dim={config.qk_rope_head_dim}: "
            "RoPE turns that many of its first values"
        )
    if config.cli_factor not in (1, 2):
        raise ValueError(f"cli_factor={config.cli_factor} must be 1 or 2: a shortcut layer has two attentions")
    if config.use_hi:
        _positive(config, "hi_page_size hi_block_size hi_pages hi_min_tokens")
        if config.hi_page_size % config.hi_block_size:
            raise ValueError(
                f"hi_page_size={config.hi_page_size} must be a multiple of hi_block_size={config.hi_block_size}"
            )
        room = config.hi_page_size * config.hi_pages
        if room < (config.index_topk or 0):
            raise ValueError(
                f"hi_pages={config.hi_pages} pages of {config.hi_page_size} hold {room} tokens, fewer than "
                f"index_topk={config.index_topk}: raise hi_pages"
            )


def _check_streaming(config: Longcat2Config) -> None:
    _positive(config, "streaming_block_size streaming_local_blocks")
    if config.use_lsa:
        raise ValueError("streaming_attentions and index_topk are two sparsities of one attention: remove one of them")
    if config.streaming_sink_blocks < 0:
        raise ValueError(f"streaming_sink_blocks={config.streaming_sink_blocks} must not be negative")
    for attention in config.streaming_attentions or ():
        if not 0 <= attention < config.num_attentions:
            raise ValueError(
                f"streaming_attentions: there is no attention {attention}; ids run from 0 to "
                f"{config.num_attentions - 1}"
            )


def _check_signals(config: Longcat2Config) -> None:
    for name in (
        "mtp_loss_coef",
        "indexer_loss_coef",
        "router_aux_loss_coef",
        "z_loss_coef",
        "router_bias_update_rate",
    ):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)} must not be negative")
    for name, needed, there in (
        ("mtp_loss_coef", "mtp_num_layers", bool(config.mtp_num_layers)),
        ("indexer_loss_coef", "index_topk", config.use_lsa),
        ("router_bias_update_rate", "moe_target_topk", config.moe_target_topk is not None),
        ("router_aux_loss_coef", "moe_target_topk", config.moe_target_topk is not None),
    ):
        if getattr(config, name) and not there:
            raise ValueError(f"{name}={getattr(config, name)} needs {needed}: set it, or {name} to 0")
    target = config.moe_target_topk
    if target is not None and not 0 < target <= config.moe_topk:
        raise ValueError(f"moe_target_topk={target} must be above 0 and at most moe_topk={config.moe_topk}")
    if target is not None and config.zero_expert_num == 0 and target != config.moe_topk:
        raise ValueError(
            f"moe_target_topk={target} below moe_topk={config.moe_topk} needs identity slots: set zero_expert_num"
        )
    groups = config.router_balance_groups
    if groups < 1 or config.n_routed_experts % groups:
        raise ValueError(f"router_balance_groups={groups} must divide n_routed_experts={config.n_routed_experts}")
