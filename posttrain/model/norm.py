"""Root mean square norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LongcatRMSNorm(nn.Module):
    """Root mean square norm over the last axis, statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Normed x times weight times ``scale``, same shape and dtype as x."""
        weight = self.weight if scale == 1.0 else self.weight * scale
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps)
