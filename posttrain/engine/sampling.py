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
    temperature_N = torch.tensor([s.temperature for s in slots])
    greedy_N = temperature_N == 0
    scaled_NV = logits_NV / torch.where(greedy_N, 1.0, temperature_N)[:, None]
    logprobs_NV = torch.log_softmax(scaled_NV, dim=-1)
    cdf_NV = logprobs_NV.double().exp().cumsum(-1)
    numbers = [s.uniforms[s.sampled + n] for s, n in zip(slots, ahead, strict=True)]
    uniform_N = torch.tensor(numbers, dtype=torch.float64)
    drawn_N = torch.searchsorted(cdf_NV, (uniform_N * cdf_NV[:, -1])[:, None], right=True)[:, 0]
    token_N = drawn_N.clamp_max(logits_NV.shape[-1] - 1)
    if greedy_N.any():
        token_N = torch.where(greedy_N, logprobs_NV.argmax(-1), token_N)
    return token_N, logprobs_NV.gather(1, token_N[:, None])[:, 0]
