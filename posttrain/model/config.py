"""Configuration of the LongCat-2.0 family (``model_type`` "longcat2").

Field names are those of the official ``config.json`` files. Both official n-gram naming schemes are read; only the
``oe_*`` one is kept. What contradicts itself, or asks for what this package does not do, is refused with a
``ValueError`` that names the field and the cure (``config_checks``), so a model never silently differs from its config.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from posttrain.model.config_checks import check, merge_aliases, refuse_unimplemented
from posttrain.model.rope import normalise_rope_parameters


@strict
class Longcat2Config(PreTrainedConfig):
    """Shape and switches of a LongCat-2.0 style model (reference: LongCat-Flash report arXiv 2509.01322).

    ``num_layers`` counts shortcut layers; each has two attentions, two dense FFNs and one MoE. ``num_hidden_layers``
    is derived and counts *cache* layers (see the ``*_cache_id`` methods), so that ``DynamicCache(config=config)`` has a
    place for each ``update`` call. Every part is a switch of its own: LSA by ``index_topk``, n-gram by
    ``oe_vocab_size_ratio``, MTP by ``mtp_num_layers``, LoZA by ``streaming_attentions``, identity slots by
    ``zero_expert_num``.

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
    # LSA (arXiv 2608.01662): tokens a query attends to, of which the first ``init`` and the last ``local`` are forced.
    # None or 0: dense attention. One indexer serves ``cli_factor`` attentions.
    index_topk: int | None = None
    index_n_heads: int = 32
    index_head_dim: int = 128
    index_init_tokens: int = 16
    index_local_tokens: int = 1024
    index_k_norm_eps: float = 1e-6
    indexer_rope_interleave: bool = True
    cli_factor: int = 2
    # Hierarchical indexing: pages are chosen before tokens, in prefills that reach ``hi_min_tokens`` columns, by all
    # indexers but the first ``hi_skip_indexers``.
    use_hi: bool = False
    hi_page_size: int = 128
    hi_block_size: int = 8
    hi_pages: int = 1024
    hi_min_tokens: int = 262144
    hi_skip_indexers: int = 4
    # LoZA (arXiv 2512.23966): ids of the attentions that see only the first and the last blocks.
    streaming_attentions: list[int] | None = None
    streaming_block_size: int = 128
    streaming_sink_blocks: int = 1
    streaming_local_blocks: int = 7
    # MTP: draft steps of the one block that is applied again and again; None or 0: no block.
    mtp_num_layers: int | None = None
    # Training signals; a coefficient of 0 switches a loss off. ``moe_target_topk`` is K_e, the routed slots a token
    # shall use on average; ``router_bias_update_rate`` is mu of the bias controller.
    mtp_loss_coef: float = 0.0
    indexer_loss_coef: float = 0.0
    router_aux_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    moe_target_topk: float | int | None = None
    router_bias_update_rate: float = 0.0
    router_balance_groups: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        for derived in ("head_dim", "qk_head_dim", "model_type"):  # transformers writes them; ours are computed
            kwargs.pop(derived, None)
        merge_aliases(self, kwargs)
        refuse_unimplemented(self, kwargs)
        legacy_layers = kwargs.pop("num_hidden_layers", None)
        self.rope_parameters = normalise_rope_parameters(
            self.rope_parameters, kwargs.pop("rope_scaling", None), kwargs.pop("rope_theta", None), self.default_theta
        )
        check(self)
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
    def use_lsa(self) -> bool:
        """Whether attention is sparse above ``index_topk`` visible tokens."""
        return bool(self.index_topk)

    @property
    def dense_context(self) -> int | None:
        """Tokens of context up to which every attention sees all of it; None: it always does."""
        if self.use_lsa:
            return self.index_topk
        blocks = self.streaming_sink_blocks + self.streaming_local_blocks
        return blocks * self.streaming_block_size if self.streaming_attentions else None

    @property
    def num_attentions(self) -> int:
        """Attention ids of the backbone run from 0 to this minus one; the draft block's attention has this id."""
        return 2 * self.num_layers

    def owns_indexer(self, attention_id: int) -> bool:
        """Whether an attention has an indexer of its own; the others reuse the set of the last one that has."""
        return self.use_lsa and attention_id % self.cli_factor == 0

    def streams(self, attention_id: int) -> bool:
        """Whether an attention sees only the first and the last blocks."""
        return attention_id in (self.streaming_attentions or ())

    def attention_cache_id(self, attention_id: int) -> int:
        """Cache id of an attention's latents and rotary keys."""
        return attention_id if attention_id < self.num_attentions else self.num_hidden_layers

    def index_cache_id(self, attention_id: int) -> int:
        """Cache id of an owner's index keys."""
        in_draft = attention_id == self.num_attentions
        return self.num_hidden_layers + 1 if in_draft else self.num_attentions + attention_id // self.cli_factor

    @property
    def ngram_cache_id(self) -> int:
        """Cache id of the n-gram token history."""
        return self.num_attentions + (self.num_attentions // self.cli_factor if self.use_lsa else 0)

    @property
    def num_hidden_layers(self) -> int:
        """Number of cache layers that a forward writes; derived, not stored. The draft block's own two follow them."""
        return self.ngram_cache_id + int(self.use_ngram)

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
