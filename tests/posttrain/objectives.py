"""Tokens made by hand and what an objective makes of them, in double precision, shared by the objectives' tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.objective import Extent, Stats, Tokens, loss
from posttrain.objective_settings import CispoLoss, ClippedLoss, DppoLoss, GrpoLoss, GspoLoss, LossConfig

KINDS = [DppoLoss, ClippedLoss, GrpoLoss, GspoLoss, CispoLoss]
BARE: dict[str, Any] = {"constant_length": 1, "reduction": "constant", "pull": 0.0, "token_band": None}
"""Switches off what is on by default in one objective or the other."""
ONE = Extent(rollouts=1, tokens=1)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(*probabilities: float) -> Tensor:
    return numbers(*probabilities).log()


def tokens(pi: Tensor, mu: Tensor, advantages: Tensor, rows: Sequence[int] | None = None, **given: Any) -> Tokens:
    """On one row, with prox = pi and an entropy of 0, unless told otherwise; ``pi`` a leaf of its own."""
    return Tokens(
        pi_N=pi.detach().clone().requires_grad_(),
        prox_N=given.pop("prox", pi.detach()),
        mu_N=mu,
        advantage_N=advantages,
        row_N=torch.tensor(rows or [0] * len(pi)),
        entropy_N=given.pop("entropy", torch.zeros_like(mu)),
        **given,
    )


def learn(config: LossConfig, given: Tokens, extent: Extent = ONE) -> tuple[float, list[float], Stats]:
    """Loss, its gradient in log pi, sums."""
    total, stats, _ = loss(given, config, extent)
    (gradient,) = torch.autograd.grad(total, given.pi_N)
    return total.item(), gradient.tolist(), stats
