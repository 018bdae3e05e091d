"""The shortcut layer (ScMoE): two attentions, two dense FFNs, one MoE that branches off and rejoins at the end.

Legend: B batch, T tokens, H hidden. Source: LongCat-Flash report arXiv 2509.01322, section 2.2.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.model.attention import AttentionPlan, LongcatMLA
from posttrain.model.config import Longcat2Config
from posttrain.model.moe import LongcatMLP, LongcatMoE
from posttrain.model.norm import LongcatRMSNorm


class LayerReplay(NamedTuple):
    """What a layer is told to choose, in place of its own choice."""

    slots_BTK: Tensor | None = None
    """MoE slots, integers, ``moe_topk`` a token; -1 in the first place: the router chooses for this token."""
    columns_BTOK: Tensor | None = None
    """Attended columns of each indexer (O = 2 / cli_factor a layer), int32, ``index_topk`` a token, -1 for none; -1
    throughout: the indexer chooses for this token. Not looked at where everything in sight is attended to."""


class LayerOutput(NamedTuple):
    """A layer's result. Losses are means over live tokens, None when they are not wanted."""

    x_BTH: Tensor
    slots_BTK: Tensor
    """MoE slots that were used, int64."""
    columns_BTOK: Tensor | None
    """Columns that each indexer chose, int32, -1 for none; None: everything that is seen."""
    index_loss: Tensor | None
    balance_loss: Tensor | None


class ShortcutLayer(GradientCheckpointingLayer):
    """Layer ``index`` owns the attention ids ``2 * index`` and ``2 * index + 1``."""

    def __init__(self, config: Longcat2Config, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.indexers_shared = config.cli_factor
        self.mlp = LongcatMoE(config)
        self.self_attn = nn.ModuleList([LongcatMLA(config, 2 * index + half) for half in (0, 1)])
        self.mlps = nn.ModuleList([LongcatMLP(hidden, config.ffn_hidden_size) for _ in (0, 1)])
        self.input_layernorm = nn.ModuleList([LongcatRMSNorm(hidden, eps) for _ in (0, 1)])
        self.post_attention_layernorm = nn.ModuleList([LongcatRMSNorm(hidden, eps) for _ in (0, 1)])

    def forward(
        self,
        x_BTH: Tensor,
        rotations_BTP: Tensor,
        plan: AttentionPlan,
        replay: LayerReplay,
        past_key_values: Cache | None = None,
    ) -> LayerOutput:
        """Residual stream [B, T, H] in and out."""
        chosen = (None, None) if replay.columns_BTOK is None else (replay.columns_BTOK[:, :, i] for i in (0, -1))
        first_choice, second_choice = chosen
        normed = self.input_layernorm[0](x_BTH)
        first = self.self_attn[0](normed, rotations_BTP, plan, past_key_values, None, first_choice)
        h = x_BTH + first.out_BTH
        u = self.post_attention_layernorm[0](h)
        routed = self.mlp(u, plan.live, replay.slots_BTK)  # added at the end: its dispatch can overlap with dense work
        h = h + self.mlps[0](u)
        normed = self.input_layernorm[1](h)
        second = self.self_attn[1](normed, rotations_BTP, plan, past_key_values, first.chosen, second_choice)
        h = h + second.out_BTH
        out = h + self.mlps[1](self.post_attention_layernorm[1](h)) + routed.out_BTH
        sets = [a.chosen.columns_BTK for a in (first, second) if a.chosen is not None]
        owned = [c for c in sets[:: self.indexers_shared] if c is not None]
        losses = [a.index_loss for a in (first, second) if a.index_loss is not None]
        # CLI: an owner learns from all the attentions that it serves
        index_loss = torch.stack(losses).sum() if losses else None
        columns_BTOK = torch.stack(owned, dim=2) if owned else None
        return LayerOutput(out, routed.slots_BTK, columns_BTOK, index_loss, routed.balance_loss)
