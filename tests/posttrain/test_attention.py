"""Attention of a bf16 forward on a CPU: float32's of what it is given, and nothing of it is left in what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from posttrain import attention, packing
from posttrain.objective_settings import ClippedLoss
from posttrain.settings import TrainerConfig
from posttrain.trainer import Trainer
from tests.posttrain.small import sample
from tests.posttrain.tiny import make_model

LENGTHS = [3, 5, 2]


def _whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    module: Any = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    return attention._attention(module, query, key, value, None)[0]  # pyright: ignore[reportPrivateUsage]


def _packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    starts_B1 = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0)
    module: Any = SimpleNamespace()
    given: Any = {"cu_seq_lens_q": starts_B1, "max_length_q": max(LENGTHS)}
    return packing._attention(module, query, key, value, None, **given)[0]  # pyright: ignore[reportPrivateUsage]


def _plain(lengths: list[int], *given: Tensor) -> Tensor:
    parts = zip(*(x.split(lengths, dim=2) for x in given), strict=True)
    return torch.cat([scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in parts], 2)


@pytest.mark.parametrize(("attend", "lengths"), [(_whole, [10]), (_packed, LENGTHS)])
def test_it_is_float32s_of_the_rounded_inputs_rounded_once(attend: Callable[..., Tensor], lengths: list[int]) -> None:
    torch.manual_seed(0)
    given = [torch.randn(1, heads, 10, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    by_out = torch.randn(1, 10, 4, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(*given)
        grads = torch.autograd.grad(got, given, by_out)
    whole = [x.detach().float().requires_grad_() for x in given]
    want = _plain(lengths, *whole).transpose(1, 2)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())
    for grad, wanted in zip(grads, torch.autograd.grad(want, whole, by_out.float()), strict=True):
        assert torch.equal(grad, wanted.bfloat16())


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_step_in_bf16_is_nearly_that_in_float32(kind: str, shared: bool, tmp_path: Path) -> None:
    samples = [sample(f"s/{place}/0", 12, advantage=place - 1.5, seed=place // 2) for place in range(4)]

    def step(precision: Any) -> dict[str, float]:
        config = TrainerConfig(mixed_precision=precision, share_prompts=shared)
        trainer = Trainer(make_model(kind), config, ClippedLoss(), 1)
        stats = trainer.step(samples, 4)
        trainer.save_policy(tmp_path / precision)
        trainer.close()
        return stats

    whole, half = step("no"), step("bf16")
    assert half["grad_norm"] != whole["grad_norm"]
    for name in ("entropy", "grad_norm"):
        assert half[name] == pytest.approx(whole[name], rel=0.03)
    saved = [json.loads((tmp_path / p / "config.json").read_text()) for p in ("no", "bf16")]
    assert saved[0] == saved[1]


def test_another_attention_stays() -> None:
    model = make_model("llama")
    model.set_attn_implementation("eager")
    attention.enable(model)
    assert model.config._attn_implementation == "eager"
    longcat2 = make_model("longcat2")
    before = longcat2.config._attn_implementation
    attention.enable(longcat2)
    assert longcat2.config._attn_implementation == before
