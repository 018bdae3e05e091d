"""The kernels of token-sparse latent attention against the plain path: by triton's interpreter, and on a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain.model import sparse

SHAPES = [
    # B, T, S, h, C, R, K: odd ones, more than one block of heads and of columns, and no rotary part
    (2, 3, 19, 3, 8, 4, 5),
    (1, 2, 60, 16, 96, 16, 40),
    (2, 1, 50, 20, 24, 8, 33),
    (1, 2, 30, 5, 20, 0, 7),
]
INTERPRETED = [*((shape, torch.float32) for shape in SHAPES), (SHAPES[2], torch.float16)]
"""The interpreter multiplies bfloat16 wrongly, so float16 stands for the 16-bit types."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def compare(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Values and both gradients; the first query has no column, the last lacks a few."""
    from posttrain.model import sparse_triton

    batch, tokens, columns, heads, latent, rotary, count = shape
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, heads, latent + rotary) * (latent + rotary) ** -0.5
    kv = torch.randn(batch, columns, latent + rotary)
    chosen = torch.rand(batch, tokens, columns).argsort(-1)[..., :count].sort(-1).values.int()
    chosen[0, 0], chosen[-1, -1, : count // 2] = -1, -1
    grad = torch.randn(batch, tokens, heads, latent)

    def run(attend: object) -> list[Tensor]:
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, kv)]
        out = attend(*leaves, chosen.to(device), latent)  # pyright: ignore[reportCallIssue]
        return [out, *torch.autograd.grad(out, leaves, grad.to(device, dtype))]

    ours, plain = run(sparse_triton.sparse_attend), run(sparse._SparseAttention.apply)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert ours[0][0, 0].eq(0).all() and ours[1][0, 0].eq(0).all() and ours[1].ne(0).any()


def compare_scores(dtype: torch.dtype, device: str) -> None:
    from posttrain.model.sparse_triton import index_scores

    torch.manual_seed(0)
    q, k, w = torch.randn(2, 3, 20, 24), torch.randn(2, 70, 24), torch.randn(2, 3, 20)
    q, k, w = q.to(device, dtype), k.to(device, dtype), w.to(device)
    scores = index_scores(q, k, w)
    dots = torch.einsum("btid,bsd->btis", q.double(), k.double()).relu()
    torch.testing.assert_close(scores.double(), torch.einsum("bti,btis->bts", w.double(), dots), rtol=1e-4, atol=1e-3)


@needs_triton
def test_kernels_by_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=root, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal"] * (len(INTERPRETED) + 1)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 64, 700, 64, 128, 16, 512), (2, 5, 900, 33, 512, 64, 600)])
def test_kernels_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if shape[4] * dtype.itemsize > 1024:
        pytest.skip("left to the plain path")
    compare(shape, dtype, "cuda")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_on_a_gpu(dtype: torch.dtype) -> None:
    compare_scores(dtype, "cuda")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_deterministic_algorithms_take_the_plain_path() -> None:
    q, kv = torch.randn(1, 1, 1, 8, device="cuda"), torch.randn(1, 2, 8, device="cuda")
    assert sparse._has_kernel(q, kv, 8)
    torch.use_deterministic_algorithms(True)
    try:
        assert not sparse._has_kernel(q, kv, 8)
    finally:
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    for shape, dtype in INTERPRETED:
        compare(shape, dtype, "cpu")
        print("equal")
    compare_scores(torch.float32, "cpu")
    print("equal")
