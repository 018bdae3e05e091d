"""Log-probs in chunks against the plain formula: values, gradients, memory."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from posttrain.logprobs import bare, plain_head, token_logprobs
from tests.model.longcat2_tiny import tiny


def plain(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    logp_NV = torch.log_softmax(hidden_ND @ weight_VD.T, -1)
    return logp_NV.gather(1, ids_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


def made(n: int = 13, d: int = 6, v: int = 11, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 25, 1000])
@pytest.mark.parametrize("of_entropy", [0.0, 0.3])
def test_values_and_gradients_are_those_of_the_plain_formula(chunk: int, of_entropy: float) -> None:
    hidden, weight, ids = made()
    scale = torch.linspace(-1, 2, len(ids))
    found, wanted = token_logprobs(hidden, weight, ids, chunk=chunk), plain(hidden, weight, ids)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad((scale * logp).sum() + of_entropy * (scale.flip(0) * entropy).sum(), [hidden, weight])
        for logp, entropy in (found, wanted)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 25, 1000])
@pytest.mark.parametrize("of_entropy", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "against float64"])
def test_of_several_tokens_a_row_they_are_the_plain_formula_s(
    chunk: int, of_entropy: float, dtype: torch.dtype
) -> None:
    """Columns: the first token, three others, and two that equal the first here and there."""
    hidden, weight, first = made()
    generator = torch.Generator().manual_seed(1)
    others = torch.stack([torch.randperm(10, generator=generator)[:5] for _ in first])
    others = others + (others >= first[:, None])  # none is the first
    again = torch.rand(others.shape, generator=generator) < 0.3
    ids = torch.cat([first[:, None], torch.where(again, first[:, None], others)], 1)
    assert (ids[:, 1:] == first[:, None]).sum(1).max() > 1, "a row has the first several times"
    scale = torch.randn(ids.shape, generator=generator)
    inputs = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    logp_NV = torch.log_softmax(inputs[0] @ inputs[1].T, -1)
    wanted = logp_NV.gather(1, ids), -(logp_NV.exp() * logp_NV).sum(-1)
    found = token_logprobs(hidden, weight, ids, chunk=chunk)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad((scale * logp).sum() + of_entropy * (scale[:, 1] * entropy).sum(), given)
        for (logp, entropy), given in ((found, [hidden, weight]), (wanted, inputs))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-6)


def test_one_token_a_row_is_the_same_in_either_shape_bit_for_bit() -> None:
    hidden, weight, ids = made()
    scale = torch.linspace(-1, 2, len(ids))
    flat, column = token_logprobs(hidden, weight, ids)[0], token_logprobs(hidden, weight, ids[:, None])[0]
    assert flat.shape == (13,) and column.shape == (13, 1) and torch.equal(flat, column[:, 0])
    for a, b in zip(
        torch.autograd.grad((scale * flat).sum(), [hidden, weight]),
        torch.autograd.grad((scale[:, None] * column).sum(), [hidden, weight]),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_gradients_numerically() -> None:
    """By finite differences. The function works in float32, so they are wide."""
    hidden, weight, ids = made(5, 3, 4)

    def value(h: Tensor, w: Tensor) -> float:
        logp, entropy = token_logprobs(h, w, ids, chunk=4)
        return float((logp.sin() + entropy.cos()).double().sum())

    logp, entropy = token_logprobs(hidden, weight, ids, chunk=4)
    grads = torch.autograd.grad((logp.sin() + entropy.cos()).sum(), [hidden, weight])
    step = 1e-2
    for which, grad in enumerate(grads):
        for place in range(grad.numel()):
            moved = []
            for sign in (1, -1):
                inputs = [hidden.detach().clone(), weight.detach().clone()]
                inputs[which].view(-1)[place] += sign * step
                moved.append(value(*inputs))
            assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(float(grad.view(-1)[place]), abs=2e-3)


def test_in_bfloat16_only_the_product_is() -> None:
    hidden, weight, ids = made(dtype=torch.bfloat16)
    logp, entropy = token_logprobs(hidden, weight, ids, chunk=30)
    logp_NV = torch.log_softmax((hidden @ weight.T).float(), -1)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp, logp_NV.gather(1, ids[:, None])[:, 0])
    logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16  # pyright: ignore[reportOptionalMemberAccess]


def test_in_bfloat16_a_token_that_is_nearly_certain_keeps_its_small_gradient() -> None:
    hidden = torch.tensor([[8.0]], dtype=torch.bfloat16, requires_grad=True)
    weight, ids = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16), torch.tensor([0])
    logp, _ = token_logprobs(hidden, weight, ids)
    logp.sum().backward()
    rare = 1 / (1 + math.exp(8))
    assert hidden.grad is not None and float(hidden.grad) == pytest.approx(rare, rel=0.01)


def test_a_weight_that_is_frozen_gets_no_gradient_and_costs_none() -> None:
    hidden, weight, ids = made()
    logp, _ = token_logprobs(hidden, weight.detach(), ids)
    logp.sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_the_bare_model_gives_what_its_head_is_given() -> None:
    model = tiny()
    head = plain_head(model)
    assert head is not None and head is model.lm_head
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        with bare(head):
            hidden = model(input_ids=ids, use_cache=False).logits
        logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(hidden @ head.weight.T, logits)


def test_a_model_that_does_more_to_its_logits_is_left_alone() -> None:
    class Capped(nn.Module):
        config = SimpleNamespace(final_logit_softcapping=30.0)

        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.head = nn.Linear(2, 3, bias=bias)

        def get_output_embeddings(self) -> nn.Linear:
            return self.head

    assert plain_head(Capped(False)) is None
    Capped.config.final_logit_softcapping = None
    model = Capped(False)
    assert plain_head(model) is model.head
    assert plain_head(Capped(True)) is None
    assert plain_head(nn.Linear(2, 3)) is None


PEAK = """
import sys, torch
from posttrain.logprobs import token_logprobs
torch.set_num_threads(1)
def step(n, v):
    torch.manual_seed(0)
    h, w = torch.randn(n, 16, requires_grad=True), torch.randn(v, 16, requires_grad=True)
    ids = torch.randint(v, (n,))
    if sys.argv[1] == "chunks":
        logp, _ = token_logprobs(h, w, ids)
    else:
        z = torch.log_softmax(h @ w.T, -1)
        logp = z.gather(1, ids[:, None])[:, 0]
    logp.sum().backward()
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
step(8, 40)  # what is loaded at the first call is no memory of the computation
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = peak()
step(512, 40_000)
print((peak() - before) / 1024)
"""


def test_memory_is_a_small_part_of_the_plain_form_s() -> None:
    mib = {
        way: float(subprocess.run([sys.executable, "-c", PEAK, way], capture_output=True, text=True, check=True).stdout)
        for way in ("chunks", "plain")
    }
    assert mib["plain"] > 150, "two of 78 MiB at the least"
    assert mib["chunks"] < mib["plain"] / 10 + 10, mib
