"""Attention of every query to columns of its own: LSA (arXiv 2608.01662) over the latents of absorbed MLA.

Legend: B batch, T queries, S columns, K chosen columns, h heads, C latent width, R rotary width, D = C + R;
N = B * T queries, M = B * S rows, n queries of a chunk.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_CHUNK_VALUES = {"cpu": 300_000, "cuda": 1 << 26}
"""Gathered values alive at once. On a CPU the size decides the speed: 4 queries of 512 x 144 or 2 of 512 x 576 did best
with 512 KB of second-level cache; half and double cost 10 to 20 %."""


def sparse_attend(q_BThD: Tensor, kv_BSD: Tensor, columns_BTK: Tensor, value_width: int) -> Tensor:
    """Each query's softmax over the logits ``q . kv[column]`` of its columns, times ``kv[column, :value_width]``.

    Memory beyond inputs, output and gradients is that of a few queries. With deterministic algorithms switched on,
    CUDA takes this plain path, else a kernel whose gradient of ``kv`` depends on the order of atomic adds.

    Args:
        q_BThD: scaled queries.
        kv_BSD: rows ``[latent | rotated key]``, all finite. Gradients of many queries are summed in float32.
        columns_BTK: int32 or int64; -1 is an empty place. A column may come once in a query: a second time counts as
            one more key. Ascending order reads memory best.

    Returns:
        [B, T, h, ``value_width``] in the type of ``q_BThD``; zeros where a query has no column.
    """
    with torch.autocast(q_BThD.device.type, enabled=False):
        if _has_kernel(q_BThD, kv_BSD):
            from posttrain.model import sparse_triton  # triton is not on every platform

            return sparse_triton.sparse_attend(q_BThD, kv_BSD, columns_BTK, value_width)
        return _SparseAttention.apply(q_BThD, kv_BSD, columns_BTK, value_width)


@torch.no_grad()
def support_probs(q_BThD: Tensor, kv_BSD: Tensor, columns_BTK: Tensor) -> Tensor:
    """Attention weights of each query's columns, mean over heads: float32 [B, T, K], 0 in empty places."""
    probs_NK = q_BThD.new_empty(columns_BTK.shape, dtype=torch.float32).flatten(0, 1)
    with torch.autocast(q_BThD.device.type, enabled=False):
        for part in _parts(q_BThD, kv_BSD, columns_BTK):
            probs_NK[part.span] = part.weights_nhK.mean(dim=1).float()
    return probs_NK.view(columns_BTK.shape)


def _has_kernel(q_BThD: Tensor, kv_BSD: Tensor) -> bool:
    return (
        q_BThD.is_cuda
        and q_BThD.dtype == kv_BSD.dtype != torch.float64
        and not torch.are_deterministic_algorithms_enabled()
        and find_spec("triton") is not None
    )


class _SparseAttention(torch.autograd.Function):
    """Keeps its inputs only: the backward pass gathers again, and logits that are there give the weights by one fused
    softmax, so a saved log-sum-exp would spare nothing."""

    @staticmethod
    def forward(ctx: FunctionCtx, q_BThD: Tensor, kv_BSD: Tensor, columns_BTK: Tensor, value_width: int) -> Tensor:
        ctx.save_for_backward(q_BThD, kv_BSD, columns_BTK)
        out_BThC = q_BThD.new_empty(*q_BThD.shape[:3], value_width)
        out_NhC = out_BThC.view(-1, *out_BThC.shape[2:])
        for part in _parts(q_BThD, kv_BSD, columns_BTK):
            out_NhC[part.span] = torch.bmm(part.weights_nhK, part.rows_nKD[..., :value_width])
        return out_BThC

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BThC: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BThD, kv_BSD, columns_BTK = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        exact, width = _exact(q_BThD, kv_BSD), grad_BThC.shape[-1]
        grad_NhC = grad_BThC.flatten(0, 1)
        dq_BThD = torch.empty_like(q_BThD, memory_format=torch.contiguous_format)
        dq_NhD = dq_BThD.view(-1, *q_BThD.shape[2:])
        dkv_MD = kv_BSD.new_zeros(kv_BSD.shape, dtype=exact).flatten(0, 1)
        with torch.autocast(q_BThD.device.type, enabled=False):
            for part in _parts(q_BThD, kv_BSD, columns_BTK):
                rows_nKD, weights_nhK = part.rows_nKD, part.weights_nhK
                g_nhC = grad_NhC[part.span].to(exact)
                d_nhK = torch.bmm(g_nhC, rows_nKD[..., :width].mT)
                d_nhK.sub_((d_nhK * weights_nhK).sum(dim=-1, keepdim=True)).mul_(weights_nhK)
                dq_NhD[part.span] = torch.bmm(d_nhK, rows_nKD)
                # The rows were read for the last time: their place takes their gradient.
                torch.bmm(d_nhK.mT, part.q_nhD, out=rows_nKD)
                rows_nKD[..., :width].baddbmm_(weights_nhK.mT, g_nhC)
                dkv_MD.index_add_(0, part.columns_L, rows_nKD.flatten(0, 1))
        return dq_BThD, dkv_MD.view(kv_BSD.shape).to(kv_BSD.dtype), None, None


class _Part(NamedTuple):
    """A few queries with what they attend to; the next part overwrites the tensors of this one."""

    span: slice
    """Which of the N queries."""
    q_nhD: Tensor
    columns_L: Tensor
    """Rows of the M, L = n * K; 0 in empty places."""
    rows_nKD: Tensor
    weights_nhK: Tensor
    """0 in empty places."""


def _parts(q_BThD: Tensor, kv_BSD: Tensor, columns_BTK: Tensor) -> Iterator[_Part]:
    """Softmax weights of all queries in turn, exact (see there) whatever the inputs' type."""
    (_, tokens, heads, width), count = q_BThD.shape, columns_BTK.shape[-1]
    exact = _exact(q_BThD, kv_BSD)
    q_NhD, kv_MD, columns_NK = q_BThD.flatten(0, 1), kv_BSD.flatten(0, 1), columns_BTK.flatten(0, 1)
    queries = q_NhD.shape[0]
    # At least two: a batched product of one is slower.
    step = min(max(2, _CHUNK_VALUES[q_NhD.device.type] // (count * max(width, heads))), max(1, queries))
    rows_nKD = kv_MD.new_empty(step, count, width, dtype=exact)
    weights_nhK = q_NhD.new_empty(step, heads, count, dtype=exact)
    first_N1 = torch.arange(queries, device=q_NhD.device).unsqueeze(1) // tokens * kv_BSD.shape[1]
    for start in range(0, queries, step):
        span = slice(start, min(start + step, queries))
        columns_nK = columns_NK[span].long()
        empty_n1K = (columns_nK < 0).unsqueeze(1)
        has_empty = bool(empty_n1K.any())
        columns_L = (columns_nK.clamp(min=0) + first_N1[span]).flatten()
        rows, weights = rows_nKD[: span.stop - start], weights_nhK[: span.stop - start]
        if kv_MD.dtype == exact:
            torch.index_select(kv_MD, 0, columns_L, out=rows.view(-1, width))
        else:
            rows.copy_(kv_MD.index_select(0, columns_L).view(rows.shape))
        q_nhD = q_NhD[span].to(exact)
        torch.bmm(q_nhD, rows.mT, out=weights)
        if has_empty:
            weights.masked_fill_(empty_n1K, -torch.inf)
        torch.softmax(weights, dim=-1, out=weights)
        if has_empty:  # also where a query has no column at all, and the softmax is not a number
            weights.masked_fill_(empty_n1K, 0.0)
        yield _Part(span, q_nhD, columns_L, rows, weights)


def _exact(q_BThD: Tensor, kv_BSD: Tensor) -> torch.dtype:
    """Float32; float64 when an input is."""
    return torch.promote_types(torch.promote_types(q_BThD.dtype, kv_BSD.dtype), torch.float32)
