"""LongCat-2.0 style decoder for transformers: ``Longcat2Model`` and ``Longcat2ForCausalLM``.

Legend: B batch, T current tokens, S cached columns, H hidden, V vocabulary, G number of n-gram tables.

Cache protocol, one ``past_key_values.update`` each per forward:
* attention id a in 0..2L-1: latents [B, 1, T, kv_lora_rank] as keys, rotated shared keys [B, 1, T, rope] as values;
* with n-gram on, id 2L: token ids int64 [B, 1, T, 1] as both (padding stored as -1).
Any transformers cache that grows works; see ``posttrain.model.plan`` for slot buffers. Sparse attention and MTP are
not here: they would hang on ``LongcatMLA`` and on the normed output of ``Longcat2Model``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from posttrain.model.attention import LongcatRMSNorm
from posttrain.model.config import Longcat2Config
from posttrain.model.layer import ShortcutLayer
from posttrain.model.moe import LongcatRoutedBank, LongcatRouter
from posttrain.model.ngram import PADDING, NgramHasher, table_rows
from posttrain.model.plan import AttentionPath, ForwardPlan, ForwardShape, make_plan
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
    _keep_in_fp32_modules_strict = {"router.classifier", "e_score_correction_bias"}  # noqa: RUF012

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
    """Embedding, ``num_layers`` shortcut layers and the final norm."""

    def __init__(self, config: Longcat2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.hasher: NgramHasher | None = NgramHasher(config) if config.use_ngram else None
        self._add_ngram_modules(config)
        self.layers = nn.ModuleList([ShortcutLayer(config, i) for i in range(config.num_layers)])
        self.norm = LongcatRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = LongcatRotary(config)
        self.gradient_checkpointing = False
        self.attention_path: AttentionPath = "auto"
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
        """Forces the naive or the absorbed attention path, or returns the choice to the model ("auto")."""
        if path not in ("auto", "naive", "absorbed"):
            raise ValueError(f"attention path {path!r} is unknown; use 'auto', 'naive' or 'absorbed'")
        self.attention_path = path

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
        **_: Any,
    ) -> BaseModelOutputWithPast:
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
        plan = make_plan(self.config, shape, attention_mask, position_ids, past_key_values, self.attention_path)
        x_BTH = source if inputs_embeds is not None else self._embed(source, plan, past_key_values)
        rotations_BTP = self.rotary(plan.position_ids)
        states = [x_BTH]
        for layer in self.layers:
            x_BTH = layer(x_BTH, rotations_BTP, plan.attention, past_key_values=past_key_values)
            states.append(x_BTH)
        states[-1] = x_BTH = self.norm(x_BTH)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTH,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

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
            stored = cache.update(column, column, self.config.num_attentions)[0][:, 0, :, 0]
            if plan.slots:
                return hasher.gather(stored, plan.position_ids)
            history_BS = stored[:, : plan.attention.key_length]
        context_BTn = hasher.window(history_BS, ids_BT.shape[1])
        # a position smaller than the step back means another document of a packed row
        steps_n = torch.arange(hasher.context, device=ids_BT.device)
        return context_BTn.masked_fill(plan.position_ids.unsqueeze(-1) < steps_n, PADDING)


class Longcat2ForCausalLM(Longcat2PreTrainedModel, GenerationMixin):
    """``Longcat2Model`` with an untied output head."""

    def __init__(self, config: Longcat2Config) -> None:
        super().__init__(config)
        self.model = Longcat2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_attention_path(self, path: AttentionPath) -> None:
        """See ``Longcat2Model.set_attention_path``."""
        self.model.set_attention_path(path)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits [B, T, V]; see ``Longcat2Model.forward`` for the inputs.

        Args:
            labels: int64 [B, T], -100 ignored; shifted inside. ``loss`` is the mean cross entropy (or the sum divided
                by ``num_items_in_batch`` when that keyword is given).
            logits_to_keep: n > 0: only the last n positions; a 1-D index tensor: those positions; 0: all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=kwargs.pop("output_hidden_states", None),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
