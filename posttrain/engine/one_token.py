"""Attention of one token a request, as an operation that a compiled forward calls: ``one_token.cpp``, built when it is
first called, with the compiler and in the cache that torch uses for the rest of the forward.

Shapes: B requests, H heads of queries, h heads of keys, S visible columns, d and e sizes of a key and of a value.
"""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = "-ffast-math", "-ffp-contract=fast"
"""Sums in any order, so that they are vectors' sums."""


@cache
def _library(group: int, key_size: int, value_size: int) -> CDLL:
    """``one_token.cpp`` for these sizes: loops whose lengths are known are a third faster."""
    from torch._inductor.codecache import CppCodeCache

    sizes = f"#define GROUP {group}\n#define KEY {key_size}\n#define VALUE {value_size}\n"
    source = sizes + _SOURCE.read_text(encoding="utf-8")
    library = CppCodeCache.load(source, extra_flags=_FLAGS)
    torch.set_flush_denormal(False)  # what is linked with -ffast-math turns it on in this thread (gcc before 13)
    return library


@torch.library.custom_op("posttrain::attend_one_token", mutates_args=(), device_types="cpu")
def attend_one_token(
    query_BHTd: Tensor, key_BhSd: Tensor, value_BhSe: Tensor, mask_B1TS: Tensor, scale: float
) -> Tensor:
    """``[B, 1, H, e]`` for T = 1, in float32. Columns of which the additive mask has float32's lowest number are not
    read; a request that may see none gets zeros."""
    batch, heads, _, size = query_BHTd.shape
    shared, columns, value_size = value_BhSe.shape[1:]
    mask_B1TS = mask_B1TS.expand(batch, 1, 1, columns)
    tensors = query_BHTd.contiguous(), key_BhSd, value_BhSe, mask_B1TS
    assert all(t.dtype == torch.float32 and t.stride(-1) == 1 for t in tensors), "float32, with columns in one piece"
    out_B1He = query_BHTd.new_empty(batch, 1, heads, value_size)
    strides = [(c_int64 * 3)(*t.stride()[:3]) for t in (key_BhSd, value_BhSe)]
    counts = [c_int64(n) for n in (batch, shared, columns)]
    _library(heads // shared, size, value_size).attend(
        *(c_void_p(t.data_ptr()) for t in (*tensors, out_B1He)),
        *counts, *strides, c_int64(mask_B1TS.stride(0)), c_float(scale), c_int(torch.get_num_threads()),
    )  # fmt: skip
    return out_B1He


@attend_one_token.register_fake
def _(query_BHTd: Tensor, key_BhSd: Tensor, value_BhSe: Tensor, mask_B1TS: Tensor, scale: float) -> Tensor:
    return query_BHTd.new_empty(query_BHTd.shape[0], 1, query_BHTd.shape[1], value_BhSe.shape[3])
