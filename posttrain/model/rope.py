"""Interleaved rotary positions with YaRN.

Legend: B batch, T tokens, R rotary width per head (qk_rope_head_dim), P = R / 2 pairs, ``...`` any leading axes.
Sources: YaRN arXiv 2309.00071; LongCat reads the mscale into the softmax scale, never into cos/sin.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1}
_YARN_KEYS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", *_YARN_DEFAULTS}


def normalise_rope_parameters(
    rope_parameters: Mapping[str, Any] | None,
    rope_scaling: Mapping[str, Any] | None,
    rope_theta: float | None,
    default_theta: float,
) -> dict[str, Any]:
    """Brings the old (rope_theta + rope_scaling) and new (rope_parameters) spellings to one dict.

    ``deepseek_yarn`` becomes ``yarn``; missing beta/mscale fields get the family's values (32, 1, 1, 1).

    Raises:
        ValueError: unknown rope type or key, a missing YaRN field, or two different descriptions.
    """
    for name, value in (("rope_parameters", rope_parameters), ("rope_scaling", rope_scaling)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r} must be a mapping with a rope_type (or type), or null")
    if rope_parameters and rope_scaling and dict(rope_parameters) != dict(rope_scaling):
        raise ValueError("rope_parameters and rope_scaling disagree: they are two names of one field, keep one")
    rope = {key: value for key, value in (rope_parameters or rope_scaling or {}).items() if value is not None}
    rope_type = rope.pop("type", None)
    rope_type = rope.pop("rope_type", rope_type) or "default"
    theta = rope.pop("rope_theta", rope_theta)
    if rope_theta is not None and theta != rope_theta:
        raise ValueError(f"rope_theta={rope_theta} and rope_theta={theta} inside the rope dict disagree, keep one")
    theta = default_theta if theta is None else theta
    for name, value in {"rope_theta": theta, **rope}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"rope field {name}={value!r} must be a number, not below 0")
    theta = float(theta)
    if theta <= 1:
        raise ValueError(f"rope_theta={theta} must be above 1: frequencies fall with it")
    if rope_type in ("default", "none"):
        if rope:
            raise ValueError(f"rope type 'default' does not take {sorted(rope)}; set rope_type to 'yarn'?")
        return {"rope_type": "default", "rope_theta": theta}
    if rope_type not in ("yarn", "deepseek_yarn"):
        raise ValueError(f"rope type {rope_type!r} is not implemented; use 'default', 'yarn' or 'deepseek_yarn'")
    rope = {**_YARN_DEFAULTS, **rope, "rope_type": "yarn", "rope_theta": theta}
    if unknown := sorted(set(rope) - _YARN_KEYS):
        raise ValueError(f"rope fields {unknown} are not implemented for yarn; remove them")
    for name in ("factor", "original_max_position_embeddings"):
        if name not in rope:
            raise ValueError(f"yarn needs {name} in rope_parameters (or rope_scaling)")
    if rope["factor"] < 1:
        raise ValueError(f"yarn factor {rope['factor']} must be at least 1")
    if rope["mscale"] != rope["mscale_all_dim"]:
        raise ValueError(
            f"yarn mscale={rope['mscale']} != mscale_all_dim={rope['mscale_all_dim']}: scaled cos/sin are not "
            "implemented; LongCat models use equal values"
        )
    return rope


def softmax_scale(qk_head_dim: int, rope_parameters: Mapping[str, Any]) -> float:
    """sigma = qk_head_dim^-0.5 * mscale^2, with mscale = 0.1 * mscale_all_dim * ln(factor) + 1 under YaRN, else 1."""
    scale = qk_head_dim**-0.5
    if rope_parameters["rope_type"] == "yarn":
        scale *= (0.1 * rope_parameters["mscale_all_dim"] * math.log(rope_parameters["factor"]) + 1.0) ** 2
    return scale


def inverse_frequencies(rope_width: int, rope_parameters: Mapping[str, Any]) -> Tensor:
    """Radians per position of each pair, float32 [P]; YaRN blends interpolated and original ones (YaRN section 3)."""
    theta = rope_parameters["rope_theta"]
    inv_freq_P = theta ** -(torch.arange(0, rope_width, 2, dtype=torch.float64) / rope_width)
    if rope_parameters["rope_type"] == "yarn":
        original = rope_parameters["original_max_position_embeddings"]

        def correction(rotations: float) -> float:
            return rope_width * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

        low = max(math.floor(correction(rope_parameters["beta_fast"])), 0)
        high = min(math.ceil(correction(rope_parameters["beta_slow"])), rope_width - 1)
        width = max(high - low, 0.001)  # an empty ramp becomes a step
        ramp_P = ((torch.arange(rope_width // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
        inv_freq_P = inv_freq_P * (ramp_P / rope_parameters["factor"] + (1 - ramp_P))
    return inv_freq_P.float()


def rotations(position_ids_BT: Tensor, inv_freq_P: Tensor) -> Tensor:
    """Unit complex numbers e^(i * position * inv_freq), complex64 [B, T, P]."""
    angles_BTP = position_ids_BT.unsqueeze(-1).float() * inv_freq_P.float()
    return torch.polar(torch.ones_like(angles_BTP), angles_BTP)


def rotate(x: Tensor, rotations_P: Tensor) -> Tensor:
    """Rotates adjacent pairs (x0, x1), (x2, x3), ... of the last axis.

    Args:
        x: [..., R].
        rotations_P: complex64, broadcastable to [..., P].

    Returns:
        [..., R] in x's dtype, pairs kept adjacent.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
        pairs = pairs.contiguous()  # view_as_complex needs even strides
    turned = torch.view_as_complex(pairs) * rotations_P
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, rotations_P: Tensor) -> Tensor:
    """As ``rotate``, but value j is paired with value j + P (half-split style, as DeepSeek-V3.2's indexer)."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rotations_P.real, rotations_P.imag
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
