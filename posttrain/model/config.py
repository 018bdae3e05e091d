"""Configuration of the LongCat-2.0 family (``model_type`` "longcat2").

Field names are those of the official ``config.json`` files. Both official n-gram naming schemes are read; only the
``oe_*`` one is kept. Everything this package does not implement (sparse attention, MTP, ...) is refused with a
``ValueError`` that names the field and the cure, so a model never silently differs from its config.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from posttrain.model.rope import normalise_rope_parameters

# n-gram fields: canonical (LongCat-2.0, Lite-Sparse) name -> Flash-Lite name
_NGRAM_ALIASES = {
    "oe_vocab_size_ratio": "ngram_vocab_size_ratio",
    "oe_neighbor_num": "emb_neighbor_num",
    "oe_split_num": "emb_split_num",
}

# field -> (values that mean "off", cure); anything else is refused
_UNIMPLEMENTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "index_topk": ((None, 0), "remove the LSA fields: dense MLA is what LSA computes for up to index_topk tokens"),
    "mtp_num_layers": ((None, 0), "set it to 0 and drop the model.mtp.* weights: drafting is optional"),
    "num_nextn_predict_layers": ((None, 0), "set it to 0 and drop the model.mtp.* weights: drafting is optional"),
    "attention_method": ((None, "MLA"), 'set it to "MLA"'),
    "use_mla": ((None, 1, True), "set it to 1"),
    "zero_expert_type": ((None, "identity"), 'set it to "identity"'),
    "norm_topk_prob": ((None, False), "set it to false: top-k weights are not renormalised in this family"),
    "router_bias": ((None, False), "set it to false: the router has no bias vector in this family"),
    "attention_bias": ((None, False), "set it to false: the projections have no biases in this family"),
    "attention_dropout": ((None, 0, 0.0), "set it to 0"),
    "hidden_act": ((None, "silu"), 'set it to "silu"'),
    "tie_word_embeddings": ((None, False), "set it to false: embed_tokens and lm_head are two tensors on disk"),
    "use_hi": ((None, False), "set it to false"),
    "fold_mla_scales": ((None, False), "set it to false and export unfolded latent norms"),
    "ngram_exclude_sp_token": ((None, False), "set it to false: only EOS stops the n-gram look-back"),
    "quantization_config": ((None,), "load the bf16 or float32 checkpoint"),
}


@strict
class Longcat2Config(PreTrainedConfig):
    """Shape and switches of a LongCat-2.0 style model (reference: LongCat-Flash report arXiv 2509.01322).

    ``num_layers`` counts shortcut layers; each has two attentions, two dense FFNs and one MoE. ``num_hidden_layers``
    is derived and counts *cache* layers: ``2 * num_layers``, plus one for the n-gram token history when n-gram
    embedding is on, so that ``DynamicCache(config=config)`` has a slot for each ``update`` call.

    Raises:
        ValueError: a field asks for something not implemented, or fields contradict each other.
    """

    model_type = "longcat2"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_local_experts": "n_routed_experts",
        "num_experts_per_tok": "moe_topk",
        "intermediate_size": "ffn_hidden_size",
        "moe_intermediate_size": "expert_ffn_hidden_size",
    }
    default_theta = 10_000_000.0

    vocab_size: int = 131072
    hidden_size: int = 6144
    num_layers: int = 28
    num_attention_heads: int = 64
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    # eps of q_a_layernorm / kv_a_layernorm; None means rms_norm_eps (SGLang, vLLM). transformers uses 1e-6.
    latent_norm_eps: float | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    ffn_hidden_size: int = 12288
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    mla_scale_q_lora: bool = True
    mla_scale_kv_lora: bool = True
    n_routed_experts: int = 512
    zero_expert_num: int = 256
    moe_topk: int = 12
    expert_ffn_hidden_size: int = 2048
    routed_scaling_factor: float | int = 6.0
    # True: identity outputs are multiplied by routed_scaling_factor too (transformers, vLLM). False: SGLang's reading.
    scale_identity_experts: bool = True
    # n-gram embedding: rows per table / vocab_size, largest n, sub-tables per n. None or 0 ratio: off.
    oe_vocab_size_ratio: float | int | None = None
    oe_neighbor_num: int | None = None
    oe_split_num: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _merge_ngram_aliases(self, kwargs)
        _refuse_unimplemented(self, kwargs)
        legacy_layers = kwargs.pop("num_hidden_layers", None)
        self.rope_parameters = normalise_rope_parameters(
            self.rope_parameters, kwargs.pop("rope_scaling", None), kwargs.pop("rope_theta", None), self.default_theta
        )
        _validate_shapes(self)
        if legacy_layers not in (None, 2 * self.num_layers, self.num_hidden_layers):
            raise ValueError(
                f"num_hidden_layers={legacy_layers} contradicts num_layers={self.num_layers}: each shortcut layer has "
                "two attentions. Give num_layers only."
            )
        super().__post_init__(**kwargs)

    @property
    def use_ngram(self) -> bool:
        """Whether the n-gram embedding is on."""
        return bool(self.oe_vocab_size_ratio)

    @property
    def num_ngram_tables(self) -> int:
        """Number of hashed tables: ``oe_split_num * (oe_neighbor_num - 1)``, 0 when n-gram is off."""
        return (self.oe_split_num or 0) * ((self.oe_neighbor_num or 1) - 1) if self.use_ngram else 0

    @property
    def num_attentions(self) -> int:
        """Attention ids run from 0 to this minus one; the n-gram history has this id in the cache."""
        return 2 * self.num_layers

    @property
    def num_hidden_layers(self) -> int:
        """Number of cache layers (see the class docstring); derived, not stored."""
        return self.num_attentions + int(self.use_ngram)

    @property
    def qk_head_dim(self) -> int:
        """Query/key width per head: position-free part plus rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def head_dim(self) -> int:
        """Rotary width per head (the name transformers' rope helpers look for)."""
        return self.qk_rope_head_dim

    @property
    def num_moe_slots(self) -> int:
        """Router outputs: routed plus identity."""
        return self.n_routed_experts + self.zero_expert_num

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """EOS ids as a tuple (empty when there is none)."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _merge_ngram_aliases(config: Longcat2Config, kwargs: dict[str, Any]) -> None:
    """Moves Flash-Lite's n-gram names onto the ``oe_*`` fields; raises ValueError on conflict or a partial set."""
    for name, alias in _NGRAM_ALIASES.items():
        value = kwargs.pop(alias, None)
        if value is None:
            continue
        current = getattr(config, name)
        if current is not None and current != value:
            raise ValueError(
                f"{name}={current} and {alias}={value} disagree: they are two names of one field, keep one"
            )
        setattr(config, name, value)
    given = {name: getattr(config, name) for name in _NGRAM_ALIASES}
    if config.oe_vocab_size_ratio:
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ValueError(f"n-gram embedding is on (oe_vocab_size_ratio) but {', '.join(missing)} is not set")
    elif any(given.values()):
        raise ValueError(f"{given}: n-gram fields without oe_vocab_size_ratio; set it, or remove the others")


def _refuse_unimplemented(config: Longcat2Config, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a field whose value asks for something this package does not implement."""
    for name, (off_values, cure) in _UNIMPLEMENTED.items():
        value = kwargs.get(name, getattr(config, name, None))
        if not any(value is off or value == off for off in off_values):
            raise ValueError(f"config field {name}={value!r} is not implemented in posttrain.model; {cure}")


def _validate_shapes(config: Longcat2Config) -> None:
    """Raises ValueError when sizes are not positive or contradict each other."""
    positive = "vocab_size hidden_size num_layers num_attention_heads ffn_hidden_size q_lora_rank kv_lora_rank "
    positive += "qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts moe_topk expert_ffn_hidden_size"
    for name in positive.split():
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.zero_expert_num < 0:
        raise ValueError(f"zero_expert_num={config.zero_expert_num} must not be negative")
    if config.moe_topk > config.num_moe_slots:
        raise ValueError(
            f"moe_topk={config.moe_topk} is larger than n_routed_experts + zero_expert_num = {config.num_moe_slots}"
        )
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim={config.qk_rope_head_dim} must be even: RoPE rotates pairs")
    for name in ("hidden_size", "expert_ffn_hidden_size"):
        if getattr(config, name) % 8:
            raise ValueError(f"{name}={getattr(config, name)} must be a multiple of 8 (grouped matmul alignment)")
    if config.use_ngram:
        _validate_ngram(config)


def _validate_ngram(config: Longcat2Config) -> None:
    """Raises ValueError for n-gram fields that do not describe a set of tables."""
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
