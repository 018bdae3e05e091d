"""Kernels of sparse_attend for CUDA, flash style: one program per query and 16 heads, online softmax over blocks of K.

Legend: as in posttrain.model.sparse; H heads of a block, J columns of a block. Kernel arguments in capitals are
compile-time constants; BLOCK_X is X rounded up to a power of two that tl.dot takes, what is beyond X is masked.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (triton's types know neither numbers passed for constants nor kernels that call each other)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_HEADS = 16
"""Heads of a program: the least tl.dot takes, so that 16 x 512 float32 sums fit its registers."""
_SCORES = 64
"""Columns of a program that scores."""


def sparse_attend(q_BThD: Tensor, kv_BSD: Tensor, columns_BTK: Tensor, value_width: int) -> Tensor:
    """``posttrain.model.sparse.sparse_attend`` for float32, bfloat16 or float16 (both of one type).

    The gradient of ``kv`` is summed by atomic float32 adds, in whatever order: two runs differ in the last bits.
    Output and the gradient of ``q`` do not.
    """
    with torch.cuda.device_of(q_BThD):  # triton launches on the current device
        return _SparseAttention.apply(q_BThD, kv_BSD, columns_BTK, value_width)


@torch.no_grad()
def index_scores(q_BTID: Tensor, k_BSD: Tensor, w_BTI: Tensor) -> Tensor:
    """The indexer's ``sum_i w_i relu(q_i . k_s)`` of every token for every column, float32 [B, T, S], no gradient.

    Args:
        q_BTID: queries of I index heads, D wide here, of the type of ``k_BSD``.
        w_BTI: float32, every scale folded in.
    """
    q_BTID, k_BSD, w_BTI = q_BTID.contiguous(), k_BSD.contiguous(), w_BTI.contiguous()
    (batch, tokens, heads, width), rows = q_BTID.shape, k_BSD.shape[1]
    out_BTS = w_BTI.new_empty(batch, tokens, rows)
    block = max(16, triton.next_power_of_2(width))
    grid = (batch * tokens, triton.cdiv(rows, _SCORES))
    _index_scores[grid](q_BTID, k_BSD, w_BTI, out_BTS, tokens, rows, heads, width, _HEADS, _SCORES, block, _precision())
    return out_BTS


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q_BThD: Tensor, kv_BSD: Tensor, columns_BTK: Tensor, value_width: int) -> Tensor:
        q_BThD, kv_BSD, columns_BTK = q_BThD.contiguous(), kv_BSD.contiguous(), columns_BTK.contiguous()
        batch, tokens, heads, _ = q_BThD.shape
        out_BThC = q_BThD.new_empty(batch, tokens, heads, value_width)
        lse_BTh = q_BThD.new_empty(batch, tokens, heads, dtype=torch.float32)
        grid = (batch * tokens, triton.cdiv(heads, _HEADS))
        shape = _shape(q_BThD, kv_BSD, columns_BTK, value_width)
        _forward[grid](q_BThD, kv_BSD, columns_BTK, out_BThC, lse_BTh, **shape)
        ctx.save_for_backward(q_BThD, kv_BSD, columns_BTK, out_BThC, lse_BTh)
        return out_BThC

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BThC: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BThD, kv_BSD, columns_BTK, out_BThC, lse_BTh = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        grad_BThC = grad_BThC.contiguous()
        batch, tokens, heads, _ = q_BThD.shape
        dq_BThD = torch.empty_like(q_BThD)
        dkv_BSD = torch.zeros_like(kv_BSD, dtype=torch.float32)
        delta_BTh = (grad_BThC.float() * out_BThC.float()).sum(dim=-1)
        shape = _shape(q_BThD, kv_BSD, columns_BTK, grad_BThC.shape[-1])
        inputs = (q_BThD, kv_BSD, columns_BTK, grad_BThC, lse_BTh, delta_BTh)
        _backward_q[(batch * tokens, triton.cdiv(heads, _HEADS))](*inputs, dq_BThD, **shape)
        _backward_kv[(batch * tokens, triton.cdiv(columns_BTK.shape[-1], shape["BLOCK_J"]))](*inputs, dkv_BSD, **shape)
        return dq_BThD, dkv_BSD.to(kv_BSD.dtype), None, None


def _shape(q_BThD: Tensor, kv_BSD: Tensor, columns_BTK: Tensor, value_width: int) -> dict[str, Any]:
    """The arguments that all three kernels share."""
    _, tokens, heads, width = q_BThD.shape
    short = q_BThD.element_size() == 2
    return {
        "tokens": tokens,
        "rows": kv_BSD.shape[1],
        "heads": heads,
        "places": columns_BTK.shape[-1],
        "C": value_width,
        "R": width - value_width,
        "BLOCK_H": _HEADS,
        "BLOCK_J": 32 if short else 16,
        "BLOCK_C": max(16, triton.next_power_of_2(value_width)),
        "BLOCK_R": max(16, triton.next_power_of_2(width - value_width)),
        "PRECISION": _precision(),
        "num_warps": 4 if value_width <= 256 else 8,  # in 16 bits no register spills, says the compiler
        "num_stages": 2,
    }


def _precision() -> str:
    """How float32 is multiplied: as three products on the tensor cores, near exact, unless torch is told otherwise."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def _rows(ptr, index_X, ok_X, stride: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to values FIRST .. FIRST + WIDTH of the rows ``index_X``, and which of them exist: both [X, BLOCK]."""
    place = tl.arange(0, BLOCK)
    ok = ok_X[:, None] & (place < WIDTH)[None, :]
    return ptr + index_X[:, None] * stride + FIRST + place[None, :], ok


@triton.jit
def _load(ptr, index_X, ok_X, stride: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The values there; 0 where there is none."""
    at, ok = _rows(ptr, index_X, ok_X, stride, FIRST, WIDTH, BLOCK)
    return tl.load(at, mask=ok, other=0.0)


@triton.jit
def _columns(columns_ptr, query, start, places, BLOCK_J: tl.constexpr):
    """Columns of a block as int64, and which of its places have one."""
    place_J = start + tl.arange(0, BLOCK_J)
    column_J = tl.load(columns_ptr + query * places + place_J, mask=place_J < places, other=-1).to(tl.int64)
    return column_J, column_J >= 0


@triton.jit
def _logits(q_HC, q_HR, kv_JC, kv_JR, ok_J, PRECISION: tl.constexpr):
    """q . kv, -inf in empty places."""
    logits_HJ = tl.dot(q_HC, tl.trans(kv_JC), input_precision=PRECISION)
    logits_HJ = tl.dot(q_HR, tl.trans(kv_JR), logits_HJ, input_precision=PRECISION)
    return tl.where(ok_J[None, :], logits_HJ, float("-inf"))


@triton.jit
def _weights(q_HC, q_HR, grad_HC, lse_H, delta_H, kv_JC, kv_JR, ok_J, PRECISION: tl.constexpr):
    """Attention weights and the gradient of the logits, in the type of the inputs."""
    weights_HJ = tl.exp(_logits(q_HC, q_HR, kv_JC, kv_JR, ok_J, PRECISION) - lse_H[:, None])
    d_weights_HJ = tl.dot(grad_HC, tl.trans(kv_JC), input_precision=PRECISION)
    d_logits_HJ = weights_HJ * (d_weights_HJ - delta_H[:, None])
    return weights_HJ.to(q_HC.dtype), d_logits_HJ.to(q_HC.dtype)


@triton.jit
def _forward(
    q_ptr,
    kv_ptr,
    columns_ptr,
    out_ptr,
    lse_ptr,
    tokens,
    rows,
    heads,
    places,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, and the log-sum-exp of the logits: 0 where a query has no column."""
    query = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    ok_H, index_H = head_H < heads, query * heads + head_H
    kv_ptr += query // tokens * rows * (C + R)
    q_HC = _load(q_ptr, index_H, ok_H, C + R, 0, C, BLOCK_C)
    q_HR = _load(q_ptr, index_H, ok_H, C + R, C, R, BLOCK_R)
    top_H = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    sum_H = tl.zeros((BLOCK_H,), tl.float32)
    out_HC = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    for start in range(0, places, BLOCK_J):
        column_J, ok_J = _columns(columns_ptr, query, start, places, BLOCK_J)
        kv_JC = _load(kv_ptr, column_J, ok_J, C + R, 0, C, BLOCK_C)
        kv_JR = _load(kv_ptr, column_J, ok_J, C + R, C, R, BLOCK_R)
        logits_HJ = _logits(q_HC, q_HR, kv_JC, kv_JR, ok_J, PRECISION)
        last_H, top_H = top_H, tl.maximum(top_H, tl.max(logits_HJ, 1))
        base_H = tl.where(top_H == float("-inf"), 0.0, top_H)  # nothing but empty places so far
        weights_HJ, scale_H = tl.exp(logits_HJ - base_H[:, None]), tl.exp(last_H - base_H)
        sum_H = sum_H * scale_H + tl.sum(weights_HJ, 1)
        out_HC = tl.dot(weights_HJ.to(kv_JC.dtype), kv_JC, out_HC * scale_H[:, None], input_precision=PRECISION)
    empty_H = sum_H == 0
    sum_H = tl.where(empty_H, 1.0, sum_H)
    at, ok = _rows(out_ptr, index_H, ok_H, C, 0, C, BLOCK_C)
    tl.store(at, (out_HC / sum_H[:, None]).to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(lse_ptr + index_H, tl.where(empty_H, 0.0, top_H + tl.log(sum_H)), mask=ok_H)


@triton.jit
def _backward_q(
    q_ptr,
    kv_ptr,
    columns_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    tokens,
    rows,
    heads,
    places,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of q: a program has a query and a block of heads, and goes over the columns."""
    query = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    ok_H, index_H = head_H < heads, query * heads + head_H
    kv_ptr += query // tokens * rows * (C + R)
    q_HC = _load(q_ptr, index_H, ok_H, C + R, 0, C, BLOCK_C)
    q_HR = _load(q_ptr, index_H, ok_H, C + R, C, R, BLOCK_R)
    grad_HC = _load(grad_ptr, index_H, ok_H, C, 0, C, BLOCK_C)
    lse_H = tl.load(lse_ptr + index_H, mask=ok_H, other=0.0)
    delta_H = tl.load(delta_ptr + index_H, mask=ok_H, other=0.0)
    dq_HC, dq_HR = tl.zeros((BLOCK_H, BLOCK_C), tl.float32), tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    for start in range(0, places, BLOCK_J):
        column_J, ok_J = _columns(columns_ptr, query, start, places, BLOCK_J)
        kv_JC = _load(kv_ptr, column_J, ok_J, C + R, 0, C, BLOCK_C)
        kv_JR = _load(kv_ptr, column_J, ok_J, C + R, C, R, BLOCK_R)
        _, d_HJ = _weights(q_HC, q_HR, grad_HC, lse_H, delta_H, kv_JC, kv_JR, ok_J, PRECISION)
        dq_HC = tl.dot(d_HJ, kv_JC, dq_HC, input_precision=PRECISION)
        dq_HR = tl.dot(d_HJ, kv_JR, dq_HR, input_precision=PRECISION)
    at, ok = _rows(dq_ptr, index_H, ok_H, C + R, 0, C, BLOCK_C)
    tl.store(at, dq_HC.to(dq_ptr.dtype.element_ty), mask=ok)
    at, ok = _rows(dq_ptr, index_H, ok_H, C + R, C, R, BLOCK_R)
    tl.store(at, dq_HR.to(dq_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _backward_kv(
    q_ptr,
    kv_ptr,
    columns_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dkv_ptr,
    tokens,
    rows,
    heads,
    places,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of kv: a program has a query and a block of columns, and goes over the heads. The weights are computed
    again, but every value is added to memory once for all heads."""
    query = tl.program_id(0).to(tl.int64)
    column_J, ok_J = _columns(columns_ptr, query, tl.program_id(1) * BLOCK_J, places, BLOCK_J)
    first = query // tokens * rows * (C + R)
    kv_JC = _load(kv_ptr + first, column_J, ok_J, C + R, 0, C, BLOCK_C)
    kv_JR = _load(kv_ptr + first, column_J, ok_J, C + R, C, R, BLOCK_R)
    dkv_JC, dkv_JR = tl.zeros((BLOCK_J, BLOCK_C), tl.float32), tl.zeros((BLOCK_J, BLOCK_R), tl.float32)
    for start in range(0, heads, BLOCK_H):
        head_H = start + tl.arange(0, BLOCK_H)
        ok_H, index_H = head_H < heads, query * heads + head_H
        q_HC = _load(q_ptr, index_H, ok_H, C + R, 0, C, BLOCK_C)
        q_HR = _load(q_ptr, index_H, ok_H, C + R, C, R, BLOCK_R)
        grad_HC = _load(grad_ptr, index_H, ok_H, C, 0, C, BLOCK_C)
        lse_H = tl.load(lse_ptr + index_H, mask=ok_H, other=0.0)
        delta_H = tl.load(delta_ptr + index_H, mask=ok_H, other=0.0)
        weights_HJ, d_HJ = _weights(q_HC, q_HR, grad_HC, lse_H, delta_H, kv_JC, kv_JR, ok_J, PRECISION)
        dkv_JC = tl.dot(tl.trans(d_HJ), q_HC, dkv_JC, input_precision=PRECISION)
        dkv_JC = tl.dot(tl.trans(weights_HJ), grad_HC, dkv_JC, input_precision=PRECISION)
        dkv_JR = tl.dot(tl.trans(d_HJ), q_HR, dkv_JR, input_precision=PRECISION)
    at, ok = _rows(dkv_ptr + first, column_J, ok_J, C + R, 0, C, BLOCK_C)
    tl.atomic_add(at, dkv_JC, mask=ok)
    at, ok = _rows(dkv_ptr + first, column_J, ok_J, C + R, C, R, BLOCK_R)
    tl.atomic_add(at, dkv_JR, mask=ok)


@triton.jit
def _index_scores(
    q_ptr,
    k_ptr,
    w_ptr,
    out_ptr,
    tokens,
    rows,
    heads,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program has a query and a block of all columns, and goes over the index heads."""
    query = tl.program_id(0).to(tl.int64)
    column_J = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    ok_J = column_J < rows
    k_JD = _load(k_ptr + query // tokens * rows * D, column_J.to(tl.int64), ok_J, D, 0, D, BLOCK_D)
    score_J = tl.zeros((BLOCK_J,), tl.float32)
    for start in range(0, heads, BLOCK_H):
        head_H = start + tl.arange(0, BLOCK_H)
        ok_H, index_H = head_H < heads, query * heads + head_H
        q_HD = _load(q_ptr, index_H, ok_H, D, 0, D, BLOCK_D)
        w_H = tl.load(w_ptr + index_H, mask=ok_H, other=0.0)
        dots_HJ = tl.dot(q_HD, tl.trans(k_JD), input_precision=PRECISION)
        score_J += tl.sum(w_H[:, None] * tl.maximum(dots_HJ, 0.0), 0)
    tl.store(out_ptr + query * rows + column_J, score_J, mask=ok_J)
