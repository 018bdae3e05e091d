"""What the terms are divided by, what the metrics are, and what the settings refuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from experts.config import ExpertConfig
from posttrain.objective import Extent, Stats, Tokens, loss, means, reduce
from posttrain.objective_settings import (
    ClippedLoss,
    DistillLoss,
    DppoLoss,
    GrpoLoss,
    GspoLoss,
    LossConfig,
    PolicyLossConfig,
    Reduction,
)
from tests.posttrain.objectives import KINDS, learn, logs, numbers, tokens

TERMS, ROWS = numbers(1, 2, 6, 4, 5), [0, 0, 1, 1, 1]
"""Two responses: sums 3 and 15, means 1.5 and 5."""


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("constant", 18 / (4 * 10)), ("token", 18 / 20), ("response", (1.5 + 5) / 4)],
    ids=["by 4 rollouts x T_max 10", "by the 20 tokens of the step", "mean of each, by 4 rollouts"],
)
def test_reductions_by_hand(reduction: Reduction, expected: float) -> None:
    given = tokens(torch.zeros(5), torch.zeros(5), torch.zeros(5), ROWS)
    assert reduce(TERMS, given, reduction, 10, Extent(rollouts=4, tokens=20)).item() == pytest.approx(expected)


def part(whole: Tokens, rows: Sequence[int]) -> Tokens:
    """Only these rows, numbered anew, as a micro-batch has them."""
    keep = torch.cat([(whole.row_N == row).nonzero()[:, 0] for row in rows])
    values = {f.name: None if (t := getattr(whole, f.name)) is None else t[keep] for f in fields(whole)}
    order = {row: i for i, row in enumerate(rows)}
    return Tokens(**{**values, "row_N": torch.tensor([order[int(r)] for r in whole.row_N[keep]])})


def summed(parts: Sequence[Tokens], config: LossConfig, extent: Extent) -> tuple[Tensor, Stats]:
    total, sums = torch.zeros((), dtype=torch.float64), Stats()
    for tokens_of_part in parts:
        value, stats, _ = loss(tokens_of_part, config, extent)
        total = total + value
        sums = {k: sums.get(k, 0.0) + v for k, v in stats.items()}
    return total, means(sums, 1)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*KINDS, DistillLoss]),
    reduction=st.sampled_from(["constant", "token", "response"]),
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    shuffled=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_neither_loss_nor_gradient_nor_metrics_depend_on_the_split(
    kind: type[GrpoLoss], reduction: Reduction, lengths: list[int], shuffled: Any, seed: int
) -> None:
    """Whole responses dealt out in any way to one to three micro-batches; every term on."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    mu, step, drift, other, advantage = torch.randn(5, n, dtype=torch.float64, generator=generator).unbind()
    mu = -1 - mu.abs()
    whole = tokens(
        mu + 0.4 * drift + 0.4 * step, mu, advantage, [i for i, k in enumerate(lengths) for _ in range(k)],
        prox=mu + 0.4 * drift, entropy=other.abs(), reference_N=mu + other, teacher_N=mu + step,
    )  # fmt: skip
    config: LossConfig = DistillLoss()
    if kind is not DistillLoss:
        bounds = {"token_band": (0.5, 2.0), "sequence_band": (0.7, 1.5), "sequence_cap": 3.0}
        config = kind(reduction=reduction, pull=0.1, kl=0.1, entropy=0.1, **bounds)
    extent, rows = Extent(rollouts=len(lengths) + 1, tokens=n), list(range(len(lengths)))
    shuffled.shuffle(rows)
    cut = 1 + len(rows) // 3
    parts = [part(whole, rows[i : i + cut]) for i in range(0, len(rows), cut)]
    together, metrics = summed([whole], config, extent)
    apart, split_metrics = summed(parts, config, extent)
    (expected,) = torch.autograd.grad(together, whole.pi_N)
    (gradient,) = torch.autograd.grad(apart, whole.pi_N)
    assert apart.item() == pytest.approx(together.item())
    assert torch.allclose(gradient, expected, atol=1e-12)
    assert split_metrics == pytest.approx(metrics)


# Metrics


def test_effective_sample_sizes_by_hand() -> None:
    """pi/mu 1, 3 | 1/2, 1/2: over tokens 5^2 / (4 * 10.5); the products 3 and 1/4: 3.25^2 / (2 * 9.0625)."""
    mu = torch.full((4,), -2.0, dtype=torch.float64)
    given = tokens(mu + numbers(1, 3, 0.5, 0.5).log(), mu, numbers(1, 1, 1, 1), [0, 0, 1, 1])
    _, _, stats = learn(GrpoLoss(), given)
    found = means(stats, 1)
    assert found["ess_tokens"] == pytest.approx(25 / 42)
    assert found["ess_sequences"] == pytest.approx(3.25**2 / (2 * 9.0625))


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_the_effective_sample_size_of_equal_weights_is_one(ratio: float) -> None:
    mu = torch.full((6,), -2.0, dtype=torch.float64)
    _, _, stats = learn(GrpoLoss(), tokens(mu + math.log(ratio), mu, torch.ones(6), [0, 0, 1, 1, 2, 2]))
    found = means(stats, 1)
    assert (found["ess_tokens"], found["ess_sequences"]) == pytest.approx((1, 1))


def test_means_are_over_tokens_and_the_loss_over_updates() -> None:
    """Two micro-batches of the same two tokens, pi/mu 1 and 1.5, each an update of its own; 1.5 is clipped."""
    mu = logs(0.2, 0.2)
    given = tokens(mu + numbers(1, 1.5).log(), mu, numbers(1, 1))
    config = GrpoLoss(constant_length=1)
    value, _, stats = learn(config, given)
    found = means({k: 2 * v for k, v in stats.items()}, updates=2)
    assert found["loss/constant"] == pytest.approx(value) == pytest.approx(-2.2)
    assert found["grpo/clipped"] == 0.5
    assert found["gap_abs"] == pytest.approx(math.log(1.5) / 2)
    assert found["kl_behaviour"] == pytest.approx((0.5 - math.log(1.5)) / 2)
    assert not any("weight" in k or k in ("tokens", "sequences") for k in found)


def test_of_no_tokens_there_are_no_means() -> None:
    assert means({}, 0) == {}


@pytest.mark.parametrize("reduction", ["constant", "token", "response"])
def test_the_reduction_is_named_in_the_metrics(reduction: Reduction) -> None:
    _, _, stats = learn(GrpoLoss(reduction=reduction), tokens(logs(0.5), logs(0.5), numbers(1)))
    assert [k for k in stats if k.startswith("loss/")] == [f"loss/{reduction}"]


# Settings


def test_the_default_of_an_expert_is_the_recommended_one() -> None:
    found = ExpertConfig(worlds={"w": 1.0}).loss
    assert found == DppoLoss()
    assert (found.reduction, found.token_band, found.pull, found.kl) == ("constant", (0.5, 5.0), 1e-3, 0)


@pytest.mark.parametrize("band", [[0.5, 0.9], [1.1, 2.0], [-0.1, 2.0]])
def test_a_band_has_one_inside(band: list[float]) -> None:
    with pytest.raises(ValidationError, match="a band of ratios is"):
        TypeAdapter(PolicyLossConfig).validate_python({"type": "grpo", "token_band": tuple(band)})


@pytest.mark.parametrize(
    ("loss_config", "expected"),
    [
        (GrpoLoss(), False),
        (GrpoLoss(kl=1.0, entropy=1.0, pull=1.0), False),
        (ClippedLoss(), True),
        (DppoLoss(), True),
        (GspoLoss(sequence_band=(0.99, 1.01)), True),
        (GrpoLoss(sequence_cap=3.0), True),
        (ClippedLoss(importance_cap=None), False),
    ],
)
def test_who_needs_prox(loss_config: PolicyLossConfig, expected: bool) -> None:
    assert loss_config.uses_prox is expected
    pi, prox, mu = logs(0.11, 0.36), logs(0.105, 0.38), logs(0.1, 0.4)
    t = tokens(pi, mu, numbers(1, -1), prox=prox, reference_N=logs(0.5, 0.5))
    elsewhere = replace(t, prox_N=logs(0.9, 0.38))
    assert (learn(loss_config, t)[1] != learn(loss_config, elsewhere)[1]) is expected


@pytest.mark.parametrize("kind", [*KINDS, DistillLoss])
def test_settings_survive_their_own_text(kind: type[GrpoLoss]) -> None:
    adapter = TypeAdapter(LossConfig)
    assert adapter.validate_json(adapter.dump_json(kind())) == kind()
