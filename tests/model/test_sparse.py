"""Token-sparse latent attention, the plain path."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.model import sparse
from posttrain.model.sparse import sparse_attend, support_probs

SHAPES = [
    # B, T, S, h, C, R, K
    (2, 7, 19, 3, 8, 4, 5),
    (1, 33, 40, 4, 16, 2, 11),
    (5, 1, 12, 2, 6, 3, 12),
    (1, 4, 9, 1, 5, 0, 1),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves q and kv, and ascending columns; the first query has none, the last has a few."""
    batch, tokens, columns, heads, latent, rotary, count = shape
    generator = torch.Generator().manual_seed(seed)
    q, kv = (
        torch.randn(*size, latent + rotary, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in ((batch, tokens, heads), (batch, columns))
    )
    order = torch.rand(batch, tokens, columns, generator=generator).argsort(-1)[..., :count]
    chosen = order.sort(-1).values.int()
    if tokens > 1:
        chosen[0, 0] = -1
        chosen[-1, -1, : count // 2] = -1
    return q, kv, chosen


def dense(q: Tensor, kv: Tensor, columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Output and weights [B, T, h, S] of attention over all rows, masked."""
    seen = torch.zeros(*columns.shape[:2], kv.shape[1] + 1, dtype=torch.bool)
    seen.scatter_(2, torch.where(columns < 0, kv.shape[1], columns.long()), True)
    seen = seen[..., :-1].unsqueeze(2)
    logits = torch.einsum("bthd,bsd->bths", q, kv).masked_fill(~seen, torch.finfo(q.dtype).min)
    weights = logits.softmax(-1) * seen
    return torch.einsum("bths,bsc->bthc", weights, kv[..., :width]), weights


def gradients(out: Tensor, leaves: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_dense_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, kv, columns = inputs(shape, dtype)
    width, tolerance = shape[4], TOLERANCE[dtype]
    out, (expected, weights) = sparse_attend(q, kv, columns, width), dense(q, kv, columns, width)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(out, (q, kv)), gradients(expected, (q, kv)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    probs = weights.mean(2).gather(2, columns.clamp(min=0).long()).masked_fill(columns < 0, 0).float()
    torch.testing.assert_close(support_probs(q, kv, columns), probs, rtol=2e-5, atol=2e-6)


def test_gradcheck() -> None:
    q, kv, columns = inputs((2, 3, 6, 2, 3, 2, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda q, kv: sparse_attend(q, kv, columns, 3), (q, kv))


def test_an_empty_place_gives_nothing_and_gets_nothing() -> None:
    q, kv, columns = inputs((1, 6, 20, 2, 8, 4, 5), torch.float32)
    columns.clamp_(max=18)[columns == 0] = 1  # neither the row that stands in for no column nor the last one
    columns[0, 3] = -1
    padded = torch.cat((torch.full((1, 6, 3), -1), columns), dim=-1)
    out, wide = sparse_attend(q, kv, columns, 8), sparse_attend(q, kv, padded, 8)
    torch.testing.assert_close(wide, out, rtol=1e-6, atol=1e-6)
    assert out[0, [0, 3]].eq(0).all() and out[0, 1].ne(0).all()
    dq, dkv = gradients(wide, (q, kv))
    assert dq[0, [0, 3]].eq(0).all() and dq[0, 1].ne(0).all()
    assert dkv[0, [0, 19]].eq(0).all()
    assert support_probs(q, kv, padded)[..., :3].eq(0).all()


def test_probabilities_sum_to_one_over_the_support() -> None:
    q, kv, columns = inputs((2, 9, 30, 3, 8, 4, 6), torch.bfloat16)
    probs = support_probs(q, kv, columns)
    assert probs.dtype == torch.float32 and not probs.requires_grad
    torch.testing.assert_close(probs.sum(-1), columns.ge(0).any(-1).float())


def test_the_order_and_type_of_columns_do_not_matter() -> None:
    q, kv, columns = inputs((2, 9, 30, 3, 8, 4, 6), torch.float32)
    out = sparse_attend(q, kv, columns, 8)
    torch.testing.assert_close(sparse_attend(q, kv, columns.flip(-1), 8), out)
    assert torch.equal(sparse_attend(q, kv, columns.long(), 8), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_runs_are_bitwise_equal(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    shape = (2, 11, 64, 16, 32, 8, 48)
    q, kv, columns = inputs(shape, dtype)

    def run() -> tuple[Tensor, ...]:
        out = sparse_attend(q, kv, columns, shape[4])
        return out, support_probs(q, kv, columns), *gradients(out, (q, kv))

    first = run()
    for values in (1, 3 * 48 * 40, 7 * 48 * 40, 1 << 30):
        monkeypatch.setattr(sparse, "_CPU_CHUNK", values)
        for ours, theirs in zip(run(), first, strict=True):
            assert torch.equal(ours, theirs), values


def test_views_of_a_longer_cache_give_the_same() -> None:
    q, kv, columns = inputs((2, 7, 19, 3, 8, 4, 5), torch.float32)
    with torch.no_grad():
        cache = torch.cat((kv, torch.full_like(kv, torch.nan)), dim=1)
        halves = torch.cat((q, q), dim=-1)[..., :12]
        assert not halves.is_contiguous()
        assert torch.equal(sparse_attend(halves, cache[:, :19], columns, 8), sparse_attend(q, kv, columns, 8))


def test_bfloat16_is_rounded_once() -> None:
    q, kv, columns = inputs((2, 30, 64, 4, 32, 8, 16), torch.bfloat16)
    out = sparse_attend(q, kv, columns, 32)
    q32, kv32 = q.detach().float().requires_grad_(), kv.detach().float().requires_grad_()
    exact = sparse_attend(q32, kv32, columns, 32)
    assert torch.equal(out, exact.bfloat16())
    for ours, theirs in zip(gradients(out, (q, kv)), gradients(exact.bfloat16(), (q32, kv32)), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_gradients_of_many_queries_are_summed_in_float32() -> None:
    tokens = 3000
    q = torch.ones(1, tokens, 1, 4, dtype=torch.bfloat16)
    kv = torch.ones(1, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    sparse_attend(q, kv, torch.ones(1, tokens, 1, dtype=torch.int32), 4).sum().backward()
    assert kv.grad is not None
    assert kv.grad[0].float().tolist() == [[0.0] * 4, [float(torch.tensor(3000.0).bfloat16())] * 4]


def test_autocast_leaves_float32_alone() -> None:
    q, kv, columns = inputs((1, 12, 30, 3, 8, 4, 6), torch.float32)
    plain = sparse_attend(q, kv, columns, 8)
    expected = (plain, support_probs(q, kv, columns), *gradients(plain, (q, kv)))
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_attend(q, kv, columns, 8)
        ours = (out, support_probs(q, kv, columns), *gradients(out, (q, kv)))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


class _Largest(TorchDispatchMode):
    """Values of the largest tensor any operation returns."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.values = max(self.values, out.numel())
        return out


def test_nothing_grows_but_outputs_and_gradients() -> None:
    tokens, heads, width, count = 3000, 4, 8, 64
    q, kv, columns = inputs((1, tokens, tokens, heads, width - 2, 2, count), torch.float32)
    kept: list[int] = []
    with _Largest() as largest, saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        gradients(sparse_attend(q, kv, columns, width - 2), (q, kv))
    # Gathered, the rows of all queries would be 1.5 million values, as would the weights be half of it.
    assert largest.values <= max(sparse._CPU_CHUNK, tokens * heads * width) < tokens * count * heads
    assert set(kept) == {q.data_ptr(), kv.data_ptr(), columns.data_ptr()}


def test_without_gradients_nothing_is_kept() -> None:
    q, kv, columns = inputs((1, 12, 30, 3, 8, 4, 6), torch.float32)
    with torch.no_grad():
        assert sparse_attend(q, kv, columns, 8).grad_fn is None
    assert sparse_attend(q.detach(), kv.detach(), columns, 8).grad_fn is None
