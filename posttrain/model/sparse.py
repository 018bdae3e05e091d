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

_CPU_CHUNK = 300_000
"""Gathered values alive at once: 4 queries of 512 x 144, or 2 of 512 x 576. With 512 KB of second-level cache a quarter
or four times as many cost 10 to 25 %."""
_GPU_CHUNK = 1 << 26


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
        if _has_kernel(q_BThD, kv_BSD, value_width):
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


def _has_kernel(q_BThD: Tensor, kv_BSD: Tensor, value_width: int) -> bool:
    return (
        q_BThD.is_cuda
        and q_BThD.dtype == kv_BSD.dtype != torch.float64
        and value_width * q_BThD.element_size() <= 1024  # more does not fit the shared memory of most cards
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
            rows_nKC = part.rows_nKD[..., :value_width]
            if out_NhC.dtype == rows_nKC.dtype:
                torch.bmm(part.weights_nhK, rows_nKC, out=out_NhC[part.span])
            else:
                out_NhC[part.span] = torch.bmm(part.weights_nhK, rows_nKC)
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
    (batch, tokens, heads, width), count = q_BThD.shape, columns_BTK.shape[-1]
    exact = _exact(q_BThD, kv_BSD)
    q_NhD, kv_MD, columns_NK = q_BThD.flatten(0, 1), kv_BSD.flatten(0, 1), columns_BTK.flatten(0, 1)
    queries = q_NhD.shape[0]
    chunk = _CPU_CHUNK if q_NhD.device.type == "cpu" else _GPU_CHUNK
    # At least two: a batched product of one is slower.
    step = min(max(2, chunk // (count * max(width, heads))), max(1, queries))
    rows_nKD = kv_MD.new_empty(step, count, width, dtype=exact)
    weights_nhK = q_NhD.new_empty(step, heads, count, dtype=exact)
    first_N1 = torch.arange(queries, device=q_NhD.device).unsqueeze(1) // tokens * kv_BSD.shape[1]
    for start in range(0, queries, step):
        span = slice(start, min(start + step, queries))
        rows, weights = rows_nKD[: span.stop - start], weights_nhK[: span.stop - start]
        columns_nK = columns_NK[span].long()
        seen_nK = columns_nK >= 0 if int(columns_nK.min()) < 0 else None
        if seen_nK is not None:
            columns_nK = columns_nK.clamp(min=0)
        if batch > 1:
            columns_nK = columns_nK + first_N1[span]
        columns_L = columns_nK.flatten()
        if kv_MD.dtype == exact:
            torch.index_select(kv_MD, 0, columns_L, out=rows.view(-1, width))
        else:
            rows.copy_(kv_MD.index_select(0, columns_L).view(rows.shape))
        q_nhD = q_NhD[span].to(exact)
        torch.bmm(q_nhD, rows.mT, out=weights)
        if seen_nK is None:
            torch.softmax(weights, dim=-1, out=weights)
        else:
            # Finite, so that a query without any column is a number until the product; masked_fill_ is far slower.
            seen_n1K = seen_nK.unsqueeze(1).to(exact)
            weights.add_((1 - seen_n1K) * torch.finfo(exact).min)
            torch.softmax(weights, dim=-1, out=weights).mul_(seen_n1K)
        yield _Part(span, q_nhD, columns_L, rows, weights)


def _exact(q_BThD: Tensor, kv_BSD: Tensor) -> torch.dtype:
    """Float32; float64 when an input is."""
    return torch.promote_types(torch.promote_types(q_BThD.dtype, kv_BSD.dtype), torch.float32)
