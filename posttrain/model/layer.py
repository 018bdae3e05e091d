"""The shortcut layer (ScMoE): two attentions, two dense FFNs, one MoE that branches off and rejoins at the end.

Legend: B batch, T tokens, H hidden. Source: LongCat-Flash report arXiv 2509.01322, section 2.2.
"""

from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.model.attention import AttentionPlan, LongcatMLA, LongcatRMSNorm
from posttrain.model.config import Longcat2Config
from posttrain.model.moe import LongcatMLP, LongcatMoE


class ShortcutLayer(GradientCheckpointingLayer):
    """Layer ``index`` owns the attention ids ``2 * index`` and ``2 * index + 1``."""

    def __init__(self, config: Longcat2Config, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.mlp = LongcatMoE(config)
        self.self_attn = nn.ModuleList([LongcatMLA(config, 2 * index + half) for half in (0, 1)])
        self.mlps = nn.ModuleList([LongcatMLP(hidden, config.ffn_hidden_size) for _ in (0, 1)])
        self.input_layernorm = nn.ModuleList([LongcatRMSNorm(hidden, eps) for _ in (0, 1)])
        self.post_attention_layernorm = nn.ModuleList([LongcatRMSNorm(hidden, eps) for _ in (0, 1)])

    def forward(
        self, x_BTH: Tensor, rotations_BTP: Tensor, plan: AttentionPlan, past_key_values: Cache | None = None
    ) -> Tensor:
        """Residual stream [B, T, H] in and out."""
        h = x_BTH + self.self_attn[0](self.input_layernorm[0](x_BTH), rotations_BTP, plan, past_key_values)
        u = self.post_attention_layernorm[0](h)
        shortcut = self.mlp(u)  # added at the end: its dispatch can overlap with the dense work below
        h = h + self.mlps[0](u)
        h = h + self.self_attn[1](self.input_layernorm[1](h), rotations_BTP, plan, past_key_values)
        return h + self.mlps[1](self.post_attention_layernorm[1](h)) + shortcut
