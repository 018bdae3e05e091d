"""Training signals of the MoE: load control by bias, device-level balance, hidden z-loss.

Legend: T tokens (batch flattened), N routed and Z identity slots, E = N + Z, K = moe_topk, D groups of routed slots.
Source: LongCat-Flash report, arXiv 2509.01322, sections 2.1 and 3.
"""

import torch
from torch import Tensor

from posttrain.model.config import Longcat2Config


def slot_counts(slots_BTK: Tensor, live_BT: Tensor | None, num_slots: int) -> Tensor:
    """How often each slot was chosen by live tokens, float32 [E]."""
    slots = slots_BTK if live_BT is None else slots_BTK[live_BT.expand(slots_BTK.shape[:2])]
    return torch.bincount(slots.flatten(), minlength=num_slots).float()


def bias_update(counts_E: Tensor, config: Longcat2Config, rate: float) -> Tensor:
    """Step of the correction bias, float32 [E]: ``mu (K_e / (K N) - T_i / (K T_all))`` for routed slot i, 0 for
    identity slots. ``counts_E`` are those of the whole batch of an optimizer step; no tokens, no step."""
    routed, topk = config.n_routed_experts, config.moe_topk
    tokens_times_topk = counts_E.sum()
    step_E = torch.zeros_like(counts_E)
    if tokens_times_topk > 0:
        wanted = (config.moe_target_topk or topk) / (topk * routed)
        step_E[:routed] = rate * (wanted - counts_E[:routed] / tokens_times_topk)
    return step_E


def device_balance_loss(scores_TE: Tensor, slots_TK: Tensor, live_T: Tensor | None, config: Longcat2Config) -> Tensor:
    """``sum_j f_j P_j`` over D equal groups of routed slots and the group of identity slots; 1 when all are on target.

    ``P_j`` is the mean router probability of group j; ``f_j`` its share of the routings over the wanted share:
    ``D / (K_e T)`` times the routings into a routed group, ``1 / ((K - K_e) T)`` times those into identity slots.
    """
    if live_T is not None:
        scores_TE, slots_TK = scores_TE[live_T], slots_TK[live_T]
    tokens, groups = max(len(scores_TE), 1), config.router_balance_groups
    routed, topk, target = config.n_routed_experts, config.moe_topk, float(config.moe_target_topk or config.moe_topk)
    per_group = routed // groups
    counts_E = torch.bincount(slots_TK.flatten(), minlength=scores_TE.shape[1]).to(scores_TE.dtype)
    mean_E = scores_TE.sum(dim=0) / tokens
    load_D = counts_E[:routed].view(groups, per_group).sum(dim=1) * (groups / (target * tokens))
    loss = (load_D * mean_E[:routed].view(groups, per_group).sum(dim=1)).sum()
    if target < topk:
        loss = loss + counts_E[routed:].sum() / ((topk - target) * tokens) * mean_E[routed:].sum()
    return loss


def hidden_z_loss(hidden_BTH: Tensor, live_BT: Tensor | None) -> Tensor:
    """``mean_t (log sum_j exp |z_tj|)^2`` of the last layer's output before the final norm, against outliers."""
    z = hidden_BTH.float().abs().logsumexp(dim=-1).square()
    return (
        z.mean() if live_BT is None else z[live_BT.expand(z.shape)].sum() / live_BT.expand(z.shape).sum().clamp(min=1)
    )
