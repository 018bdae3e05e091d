"""The objectives, as pure functions of per-token log-probs.

Both return a sum divided by a constant that the caller fixes for the whole step, so that neither padding nor the split
into micro-batches changes the result. Shapes: N trained tokens of one micro-batch, flattened.

pi: the policy being trained. prox: the same policy at the start of the step. mu: the engine that sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.settings import ClippedLoss, DistillLoss

Stats = dict[str, float]
"""Sums over trained tokens; the caller divides by their number."""


def clipped_loss(
    pi_N: Tensor, prox_N: Tensor, mu_N: Tensor, advantage_N: Tensor, config: ClippedLoss
) -> tuple[Tensor, Stats]:
    """Sum over tokens of ``-min(prox/mu, C) * max(min(r A, clip(r, 1-low, 1+high) A), negative * A if A < 0)`` with
    ``r = pi/prox``, not yet divided. Eq. 4 with its outer max applied only where A < 0: as printed it would flatten
    every positive token."""
    ratio_N = (pi_N - prox_N).exp()
    weight_N = (prox_N - mu_N).exp().clamp_max(config.importance_cap).detach()
    clipped_N = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage_N
    surrogate_N = torch.minimum(ratio_N * advantage_N, clipped_N)
    bounded_N = torch.maximum(surrogate_N, config.clip_negative * advantage_N)
    surrogate_N = torch.where(advantage_N < 0, bounded_N, surrogate_N)
    with torch.no_grad():
        flat_N = (surrogate_N != ratio_N * advantage_N) & (advantage_N != 0)
        capped_N = (prox_N - mu_N).exp() > config.importance_cap
        stats = {
            "clipped": flat_N.sum().item(),
            "importance_capped": capped_N.sum().item(),
            "kl_behaviour": _k3(pi_N.detach(), mu_N).sum().item(),
        }
    return -(weight_N * surrogate_N).sum(), stats


def distill_loss(
    pi_N: Tensor, mu_N: Tensor, teacher_N: Tensor, share_N: Tensor, config: DistillLoss
) -> tuple[Tensor, Stats]:
    """Sum over tokens of ``-share * w * sg[clip(log teacher - log pi, +-5)] * log pi`` with the gate
    ``w = sg[pi/mu]`` inside [low, high], else 0. ``share_N`` is 1/|y| of the token's response, which does not shrink
    when tokens are gated. The log-ratio is an advantage (stop-gradient): differentiated directly, the teacher would
    vanish from the gradient."""
    with torch.no_grad():
        raw_N = teacher_N - pi_N
        advantage_N = raw_N.clamp(-config.advantage_clip, config.advantage_clip)
        ratio_N = (pi_N - mu_N).exp()
        inside_N = (ratio_N >= config.gate_low) & (ratio_N <= config.gate_high)
        weight_N = torch.where(inside_N, ratio_N, 0.0)
        stats = {
            "gated": (~inside_N).sum().item(),
            "advantage_clipped": (raw_N.abs() > config.advantage_clip).sum().item(),
            "kl_teacher": (-raw_N).sum().item(),
            "kl_behaviour": _k3(pi_N, mu_N).sum().item(),
        }
    return -(share_N * weight_N * advantage_N * pi_N).sum(), stats


def _k3(pi_N: Tensor, mu_N: Tensor) -> Tensor:
    """Non-negative estimate of KL(mu || pi) from tokens drawn from mu (Schulman's k3)."""
    log_ratio_N = pi_N - mu_N
    return log_ratio_N.exp() - 1 - log_ratio_N
