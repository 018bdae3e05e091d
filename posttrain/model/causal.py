"""``Longcat2ForCausalLM``: the decoder with its head, its losses and its draft steps.

Legend: B batch, T current tokens, H hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.utils.generic import can_return_tuple

from posttrain.model.config import Longcat2Config
from posttrain.model.model import Longcat2Model, Longcat2PreTrainedModel
from posttrain.model.mtp import Drafted, draft_loss
from posttrain.model.outputs import Longcat2CausalOutput, Longcat2Output, total
from posttrain.model.plan import AttentionPath, ForwardShape, make_plan


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

    @property
    def has_aux_loss(self) -> bool:
        """Whether training adds anything to the loss of the labels."""
        c = self.config
        return any((c.mtp_loss_coef, c.indexer_loss_coef, c.router_aux_loss_coef, c.z_loss_coef))

    def freeze_idle(self) -> None:
        """Turns off the gradients of what no loss of this config reaches: indexers, draft block."""
        for name, parameter in self.named_parameters():
            of_draft = ".mtp." in name and not self.config.mtp_loss_coef
            if not self.config.indexer_loss_coef if ".indexer." in name else of_draft:
                parameter.requires_grad_(False)

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
    ) -> Longcat2CausalOutput:
        """Next-token logits [B, T, V]; see ``Longcat2Model.forward`` for the inputs.

        Args:
            labels: int64 [B, T], -100 ignored; shifted inside. ``loss`` is the mean cross entropy (or the sum divided
                by ``num_items_in_batch`` when that keyword is given) plus ``aux_loss`` at the same scale.
            logits_to_keep: n > 0: only the last n positions; a 1-D index tensor: those positions; 0: all.
        """
        passed = {name: kwargs.pop(name, None) for name in ("output_hidden_states", "replay")}
        outputs: Longcat2Output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_choices=kwargs.pop("output_choices", False),
            **passed,
        )
        hidden_BTH = outputs.last_hidden_state
        assert hidden_BTH is not None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(hidden_BTH[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.vocab_size, **kwargs)
        mtp_loss = None
        if self.training and torch.is_grad_enabled():
            mtp_loss = self._draft_loss(input_ids, labels, outputs, kwargs.get("num_items_in_batch"))
        aux_loss = self._aux_loss(outputs, mtp_loss, labels, kwargs.get("num_items_in_batch"))
        if loss is not None and aux_loss is not None:
            loss = loss + aux_loss
        return Longcat2CausalOutput(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            aux_loss=aux_loss,
            mtp_loss=mtp_loss,
            index_loss=outputs.index_loss,
            balance_loss=outputs.balance_loss,
            z_loss=outputs.z_loss,
            slots=outputs.slots,
            index_sets=outputs.index_sets,
            last_hidden_state=hidden_BTH,
        )

    def _draft_loss(
        self, input_ids: Tensor | None, labels: Tensor | None, outputs: Longcat2Output, items: Any
    ) -> Tensor | None:
        """Cross entropy of the draft steps; their indexer's loss is added to the others'. Without labels every live
        token is one, and the draft learns alone: nothing flows into the policy, which then has another objective."""
        mtp, plan, hidden_BTH = self.model.mtp, outputs.plan, outputs.last_hidden_state
        wanted = self.config.mtp_loss_coef or outputs.index_loss is not None
        if mtp is None or not wanted or input_ids is None or plan is None or hidden_BTH is None:
            return None
        embedded_BTH, head = self.model.embed_tokens(input_ids), self.lm_head.weight
        if labels is None:
            labels = input_ids if plan.live is None else input_ids.masked_fill(~plan.live, -100)
            hidden_BTH, embedded_BTH, head = hidden_BTH.detach(), embedded_BTH.detach(), head.detach()
        states, index_loss = mtp.unroll(
            hidden_BTH, embedded_BTH, lambda by: self.model.rotary(plan.position_ids + by), plan.attention
        )
        if index_loss is not None:
            outputs.index_loss = total([outputs.index_loss, index_loss])
        if not self.config.mtp_loss_coef:
            return None
        visibility = plan.attention.visibility
        return draft_loss(lambda state: F.linear(state, head), states, labels, visibility, items)

    def _aux_loss(self, outputs: Longcat2Output, mtp_loss: Tensor | None, labels: Tensor | None, items: Any):
        """Sum of the auxiliary losses with their coefficients; None if there is none."""
        c = self.config
        # Means over this forward's tokens become its share of a loss that is divided by the tokens of a whole batch.
        share = 1.0 if items is None or labels is None else (labels != -100).sum() / items
        parts = [
            None if mtp_loss is None else mtp_loss * c.mtp_loss_coef,
            None if outputs.index_loss is None else outputs.index_loss * (c.indexer_loss_coef * share),
            None if outputs.balance_loss is None else outputs.balance_loss * (c.router_aux_loss_coef * share),
            None if outputs.z_loss is None else outputs.z_loss * (c.z_loss_coef * share),
        ]
        return total(parts)

    def draft(
        self,
        hidden_BTH: Tensor,
        ids_BT: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
        columns_BTK: Tensor | None = None,
    ) -> tuple[Tensor, Drafted]:
        """One step of the draft block over a slot cache: logits [B, T, V] of the token after ``ids_BT``.

        ``hidden_BTH`` are the model's states one token earlier (step 1) or the last step's; mask and positions are as
        in ``Longcat2Model.forward`` with a slot cache. ``columns_BTK``: what to attend to from step 2 on.

        Raises:
            ValueError: the config has no draft block.
        """
        if self.model.mtp is None:
            raise ValueError("mtp_num_layers is 0: this model has no draft block")
        batch, tokens = ids_BT.shape
        shape = ForwardShape(batch, tokens, 0, ids_BT.device, hidden_BTH.dtype)
        plan = make_plan(self.config, shape, attention_mask, position_ids, past_key_values, self.model.ways)
        rotations_BTP = self.model.rotary(plan.position_ids)
        embedded_BTH = self.model.embed_tokens(ids_BT)
        drafted = self.model.mtp(hidden_BTH, embedded_BTH, rotations_BTP, plan.attention, past_key_values, columns_BTK)
        return self.lm_head(drafted.hidden_BTH), drafted
