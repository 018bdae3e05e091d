"""Dense SwiGLU and the MoE with identity ("zero") slots.

Legend: T tokens (batch flattened), H hidden, F = expert_ffn_hidden_size, N routed, Z identity, K = moe_topk, M rows
sent to routed ones (at most T * K).
Source: LongCat-Flash report arXiv 2509.01322, section 2.1; identity scaling follows the published modelling code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.model.balance import device_balance_loss
from posttrain.model.config import Longcat2Config


class LongcatMLP(nn.Module):
    """Dense SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LongcatRouter(nn.Module):
    """Float32 softmax router; selection uses bias-corrected scores, weights the uncorrected ones."""

    e_score_correction_bias: Tensor

    def __init__(self, config: Longcat2Config) -> None:
        super().__init__()
        self.topk = config.moe_topk
        self.n_routed = config.n_routed_experts
        self.gamma = float(config.routed_scaling_factor)
        self.scale_identity = config.scale_identity_experts
        self.classifier = nn.Linear(config.hidden_size, config.num_moe_slots, bias=False, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_moe_slots, dtype=torch.float32))

    def forward(self, x_TH: Tensor, replay_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Routes each token; with ``replay_TK`` to the slots that it names (a row that starts with -1: free choice).

        Returns:
            scores_TE: softmax over all N + Z slots, float32 (for load-balance losses).
            weights_TK: scaled, not renormalised weights of the chosen slots, float32.
            slots_TK: chosen slots, int64; ``>= N`` means identity. No order within a row.
        """
        with torch.autocast(x_TH.device.type, enabled=False):
            scores_TE = self._logits(x_TH.float()).softmax(dim=-1)
        slots_TK = torch.topk(scores_TE.detach() + self.e_score_correction_bias, self.topk, dim=-1, sorted=False)[1]
        if replay_TK is not None:
            slots_TK = torch.where(replay_TK[:, :1] < 0, slots_TK, replay_TK.long())
        weights_TK = scores_TE.gather(1, slots_TK)
        if self.scale_identity:
            weights_TK = weights_TK * self.gamma
        else:
            weights_TK = torch.where(slots_TK < self.n_routed, weights_TK * self.gamma, weights_TK)
        return scores_TE, weights_TK, slots_TK

    def _logits(self, x_TH: Tensor) -> Tensor:
        if type(self.classifier) is nn.Linear:
            return F.linear(x_TH, self.classifier.weight.float())
        return self.classifier(x_TH).float()  # an adapter wraps the layer


class LongcatRoutedBank(nn.Module):
    """Weights of the N routed SwiGLUs, fused: gate rows first, then up rows."""

    def __init__(self, config: Longcat2Config) -> None:
        super().__init__()
        n, hidden, width = config.n_routed_experts, config.hidden_size, config.expert_ffn_hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(n, hidden, width))

    def forward(self, x_MH: Tensor, ends_N: Tensor) -> Tensor:
        """Applies SwiGLU n to rows ends[n-1]..ends[n] (int32 cumulative counts); [M, H] -> [M, H]."""
        gate_up = F.grouped_mm(x_MH, self.gate_up_proj.to(x_MH.dtype).mT, offs=ends_N)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.to(x_MH.dtype).mT, offs=ends_N)


class Routed(NamedTuple):
    out_BTH: Tensor
    slots_BTK: Tensor
    """Slots that were used, int64; identity slot N on padding."""
    balance_loss: Tensor | None


class LongcatMoE(nn.Module):
    """Routed SwiGLUs plus identity slots. Tokens are sorted by slot, so cost grows with M, not with N * T."""

    def __init__(self, config: Longcat2Config) -> None:
        super().__init__()
        self.config = config
        self.n_routed = config.n_routed_experts
        self.router = LongcatRouter(config)
        self.experts = LongcatRoutedBank(config)  # the checkpoint's name for the routed bank

    def forward(self, x_BTH: Tensor, live_BT: Tensor | None = None, replay_BTK: Tensor | None = None) -> Routed:
        """Output [B, T, H]. Padding (``live_BT`` False) goes to an identity slot and costs no matmul."""
        x_TH = x_BTH.flatten(0, -2)
        live_T = None if live_BT is None else live_BT.expand(x_BTH.shape[:2]).flatten()
        replay_TK = None if replay_BTK is None else replay_BTK.flatten(0, -2)
        scores_TE, weights_TK, slots_TK = self.router(x_TH, replay_TK)
        if live_T is not None and self.config.zero_expert_num:
            slots_TK = torch.where(live_T.unsqueeze(1), slots_TK, self.n_routed)
        loss = None
        if self.training and self.config.router_aux_loss_coef and torch.is_grad_enabled():
            loss = device_balance_loss(scores_TE, slots_TK, live_T, self.config)
        out_BTH = self.combine(x_TH, weights_TK, slots_TK).view_as(x_BTH)
        return Routed(out_BTH, slots_TK.view(*x_BTH.shape[:2], -1), loss)

    def combine(self, x_TH: Tensor, weights_TK: Tensor, slots_TK: Tensor) -> Tensor:
        """Weighted sum of the chosen slots' outputs, [T, H], for a given routing."""
        identity_T1 = (weights_TK * (slots_TK >= self.n_routed)).sum(dim=1, keepdim=True)
        out_TH = x_TH * identity_T1.to(x_TH.dtype)
        sorted_slots, order = slots_TK.flatten().sort(stable=True)
        bounds = torch.arange(self.n_routed, device=x_TH.device)
        ends_N = torch.searchsorted(sorted_slots, bounds, right=True, out_int32=True)
        order_M = order[: int(ends_N[-1])]  # drops identity; one host sync on an accelerator
        if order_M.numel() == 0 and not torch.is_grad_enabled():
            return out_TH
        rows_M = order_M // slots_TK.shape[1]
        y_MH = self.experts(x_TH.index_select(0, rows_M), ends_N)
        weights_M1 = weights_TK.flatten().index_select(0, order_M).unsqueeze(1)
        return out_TH.index_add(0, rows_M, (y_MH * weights_M1).to(x_TH.dtype))
