"""From logits to tokens. Shapes: N tokens to draw, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.engine.slots import Slot


def draw(logits_NV: Tensor, slots: Sequence[Slot], ahead: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs, [N] each: for each slot the token ``ahead`` places after the next one.

    It is where the cumulative sum of its distribution passes the number that belongs to this token of the request; at
    temperature 0 the most likely one."""
    temperatures = [s.temperature for s in slots]
    if any(t not in (0, 1) for t in temperatures):
        logits_NV = logits_NV / torch.tensor([t or 1.0 for t in temperatures])[:, None]
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    cdf_NV = logprobs_NV.exp().cumsum(-1, dtype=torch.float64)
    numbers = [s.uniforms[s.sampled + n] for s, n in zip(slots, ahead, strict=True)]
    uniform_N = torch.tensor(numbers, dtype=torch.float64)
    drawn_N = torch.searchsorted(cdf_NV, (uniform_N * cdf_NV[:, -1])[:, None], right=True)[:, 0]
    token_N = drawn_N.clamp_max(logits_NV.shape[-1] - 1)
    if 0 in temperatures:
        token_N = torch.where(torch.tensor(temperatures) == 0, logprobs_NV.argmax(-1), token_N)
    return token_N, logprobs_NV.gather(1, token_N[:, None])[:, 0]
