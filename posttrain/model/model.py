"""LongCat-2.0 style decoder for transformers (``causal`` puts the head on it).

Legend: B batch, T current tokens, S cached columns, H hidden, V vocabulary, G number of n-gram tables.

Cache protocol, one ``past_key_values.update`` each per forward:
* each attention: latents [B, 1, T, kv_lora_rank] as keys, rotated shared keys [B, 1, T, rope] as values;
* each indexer: its keys [B, 1, T, index_head_dim], values of no width;
* with n-gram on: token ids int64 [B, 1, T, 1] as both (padding stored as -1).
The config's ``*_cache_id`` methods say where. Any transformers cache that grows works; see ``posttrain.model.plan`` for
slot buffers. The draft block (``model.mtp``) has two places after these, written by ``draft`` alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from posttrain.model.balance import bias_update, hidden_z_loss, slot_counts
from posttrain.model.config import Longcat2Config
from posttrain.model.layer import LayerOutput, LayerReplay, ShortcutLayer
from posttrain.model.moe import LongcatRoutedBank, LongcatRouter
from posttrain.model.mtp import LongcatMTP
from posttrain.model.ngram import PADDING, NgramHasher, table_rows
from posttrain.model.norm import LongcatRMSNorm
from posttrain.model.outputs import Longcat2Output, total
from posttrain.model.plan import AttentionPath, ForwardPlan, ForwardShape, IndexerStage, Ways, make_plan
from posttrain.model.rope import inverse_frequencies, rotations


class LongcatRotary(nn.Module):
    """Holds the inverse frequencies, float32 [rope / 2], not saved."""

    inv_freq: Tensor

    def __init__(self, config: Longcat2Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self.compute(), persistent=False)

    def compute(self) -> Tensor:
        """Inverse frequencies from the config."""
        return inverse_frequencies(self.config.qk_rope_head_dim, self.config.rope_parameters or {})

    def forward(self, position_ids_BT: Tensor) -> Tensor:
        """Complex rotations [B, T, rope / 2]."""
        return rotations(position_ids_BT, self.inv_freq)


class Longcat2PreTrainedModel(PreTrainedModel):
    """Shared transformers settings and weight initialisation."""

    config: Longcat2Config  # type: ignore[assignment]
    config_class = Longcat2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ShortcutLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = False
    _keep_in_fp32_modules_strict = {"router.classifier", "e_score_correction_bias", "weights_proj"}  # noqa: RUF012
    # The draft block reads the model's own word embedding, of which official checkpoints hold a copy, and no n-grams;
    # and a config may do without the block.
    _keys_to_ignore_on_load_unexpected = [r"\.mtp\."]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights of std ``initializer_range``; norms one; correction bias zero.

        The input embedding is the mean of 1 + G branches. The word embedding starts at ``initializer_range * (1 + G)``
        so that the mean has the usual std ``initializer_range``; each n-gram branch starts at 1/20 of it (tables at
        that std, projections at ``(H / G)^-0.5``, which keeps the scale). Rows of unseen n-grams stay near zero
        instead of adding noise; with equal branches a small model learned measurably slower in its first 300 steps.
        """
        own_std = getattr(module, "init_std", None)
        if own_std is not None and isinstance(module, nn.Embedding | nn.Linear):
            init.normal_(module.weight, mean=0.0, std=own_std)
            return
        super()._init_weights(module)
        if isinstance(module, LongcatRoutedBank):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LongcatRouter):
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, LongcatRotary):
            init.copy_(module.inv_freq, module.compute())


class Longcat2Model(Longcat2PreTrainedModel):
    """Embedding, ``num_layers`` shortcut layers, the final norm and the draft block."""

    def __init__(self, config: Longcat2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.hasher: NgramHasher | None = NgramHasher(config) if config.use_ngram else None
        self._add_ngram_modules(config)
        self.layers = nn.ModuleList([ShortcutLayer(config, i) for i in range(config.num_layers)])
        self.norm = LongcatRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = LongcatRotary(config)
        self.mtp: LongcatMTP | None = LongcatMTP(config) if config.mtp_num_layers else None
        self.gradient_checkpointing = False
        self.ways = Ways()
        self.load: Tensor | None = None
        """Routings to each slot since the biases were last updated, float32 [L, N + Z]."""
        self.post_init()

    def _add_ngram_modules(self, config: Longcat2Config) -> None:
        """Tables and projections under their checkpoint names, and their initial scales (see ``_init_weights``)."""
        if not config.use_ngram:
            return
        tables = config.num_ngram_tables
        width = config.hidden_size // tables
        word_std = config.initializer_range * (1 + tables)
        self.embed_tokens.init_std = word_std  # type: ignore[assignment]
        for t, rows in enumerate(table_rows(config)):
            table, projection = nn.Embedding(rows, width), nn.Linear(width, config.hidden_size, bias=False)
            table.init_std, projection.init_std = word_std / 20, width**-0.5  # type: ignore[assignment]
            self.add_module(f"oe_embed_tokens{t}", table)
            self.add_module(f"oe_embed_proj{t}", projection)

    def ngram_tables(self) -> list[Any]:
        """The G hashed embedding tables, [M_t, H / G] each."""
        return [getattr(self, f"oe_embed_tokens{t}") for t in range(self.config.num_ngram_tables)]

    def ngram_projections(self) -> list[Any]:
        """The G projections H / G -> H."""
        return [getattr(self, f"oe_embed_proj{t}") for t in range(self.config.num_ngram_tables)]

    def set_attention_path(self, path: AttentionPath) -> None:
        """Forces the naive or the absorbed path of dense attention, or returns the choice to the model ("auto")."""
        if path not in ("auto", "naive", "absorbed"):
            raise ValueError(f"attention path {path!r} is unknown; use 'auto', 'naive' or 'absorbed'")
        self.ways = replace(self.ways, path=path)

    def set_indexer_stage(self, stage: IndexerStage) -> None:
        """ "dense": attend to everything while the indexers learn from it; "sparse": attend to what they choose."""
        if stage not in ("dense", "sparse"):
            raise ValueError(f"indexer stage {stage!r} is unknown; use 'dense' or 'sparse'")
        self.ways = replace(self.ways, stage=stage)

    def update_router_biases(self, decay: float = 1.0) -> None:
        """One step of the bias controller on the routings counted since the last one, over all processes; ``decay``
        scales ``router_bias_update_rate``. Does nothing when the rate is 0."""
        counts_LE, self.load = self.load, None
        if counts_LE is None:
            return
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts_LE)
        routers = [module for module in self.modules() if isinstance(module, LongcatRouter)]
        for router, counts_E in zip(routers, counts_LE, strict=True):
            router.e_score_correction_bias += bias_update(
                counts_E, self.config, self.config.router_bias_update_rate * decay
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_choices: bool = False,
        replay: Sequence[LayerReplay] | None = None,
        **_: Any,
    ) -> Longcat2Output:
        """Runs the decoder.

        Args:
            input_ids: int64 [B, T].
            attention_mask: None (all tokens real), [B, past + T] (1 = real, padding left or right), or
                [B, 1, T, S] bool (True attends) or additive, passed straight to attention.
            position_ids: int64 [1 or B, T]; by default counted from each row's first real token.
            past_key_values: cache to extend in place; created when ``use_cache`` and None.
            inputs_embeds: [B, T, H] instead of input_ids; only with n-gram off.
            use_cache: None means ``config.use_cache`` outside training mode.
            output_hidden_states: also return the embedding, each layer's output, the last one after the final norm.
            output_choices: also return the MoE slots and the index sets.
            replay: one a layer, what to choose in place of its own choice.

        Returns:
            last_hidden_state [B, T, H] after the final norm.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds, embeds with n-gram on, or a bad mask.
        """
        source = self._check_inputs(input_ids, inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            past_key_values, use_cache = None, False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        slots = attention_mask is not None and attention_mask.ndim == 4
        past = 0 if past_key_values is None or slots else int(past_key_values.get_seq_length())
        batch, tokens = source.shape[:2]
        shape = ForwardShape(batch, tokens, past, source.device, self.embed_tokens.weight.dtype)
        learns = self.training and torch.is_grad_enabled()
        ways = replace(self.ways, learn_index=learns and self.config.indexer_loss_coef > 0)
        plan = make_plan(self.config, shape, attention_mask, position_ids, past_key_values, ways)
        x_BTH = source if inputs_embeds is not None else self._embed(source, plan, past_key_values)
        rotations_BTP = self.rotary(plan.position_ids)
        states, layers = [x_BTH], []
        for layer, choices in zip(self.layers, replay or [LayerReplay()] * len(self.layers), strict=True):
            out = LayerOutput(*layer(x_BTH, rotations_BTP, plan.attention, choices, past_key_values=past_key_values))
            x_BTH = out.x_BTH
            states.append(x_BTH)
            layers.append(out)
        if learns and self.config.router_bias_update_rate:
            self._count(layers, plan)
        z_loss = hidden_z_loss(x_BTH, plan.live) if learns and self.config.z_loss_coef else None
        states[-1] = x_BTH = self.norm(x_BTH)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return Longcat2Output(
            last_hidden_state=x_BTH,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
            slots=tuple(out.slots_BTK for out in layers) if output_choices else None,
            index_sets=tuple(out.columns_BTOK for out in layers) if output_choices else None,
            index_loss=total([out.index_loss for out in layers]),
            balance_loss=total([out.balance_loss for out in layers], 1 / len(layers)),
            z_loss=z_loss,
            plan=plan,
        )

    def _count(self, layers: Sequence[LayerOutput], plan: ForwardPlan) -> None:
        counts_LE = torch.stack([slot_counts(o.slots_BTK, plan.live, self.config.num_moe_slots) for o in layers])
        self.load = counts_LE if self.load is None else self.load + counts_LE

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None and self.config.use_ngram:
            raise ValueError("inputs_embeds cannot be used with n-gram embedding: it hashes token ids; pass input_ids")
        source = input_ids if inputs_embeds is None else inputs_embeds
        if source is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        return source

    def _embed(self, input_ids_BT: Tensor, plan: ForwardPlan, cache: Cache | None) -> Tensor:
        """Mean of the word embedding and the projected n-gram rows, [B, T, H]."""
        word_BTH = self.embed_tokens(input_ids_BT)
        if self.hasher is None:
            return word_BTH
        row_BTG = self.hasher.ids(self._contexts(self.hasher, input_ids_BT, plan, cache))
        branches = zip(self.ngram_tables(), self.ngram_projections(), row_BTG.unbind(-1), strict=True)
        total_BTH = word_BTH
        for table, projection, row_BT in branches:
            total_BTH = total_BTH + projection(table(row_BT))
        return total_BTH * (1.0 / (1 + self.config.num_ngram_tables))

    def _contexts(self, hasher: NgramHasher, ids_BT: Tensor, plan: ForwardPlan, cache: Cache | None) -> Tensor:
        """Token contexts [B, T, n] of the current tokens; writes the token history into the cache."""
        history_BS = ids_BT if plan.live is None else ids_BT.masked_fill(~plan.live, PADDING)
        if cache is not None:
            column = history_BS[:, None, :, None]
            stored = cache.update(column, column, self.config.ngram_cache_id)[0][:, 0, :, 0]
            history_BS = stored[:, : plan.attention.key_length]
        return hasher.contexts(history_BS, plan.attention.visibility)
