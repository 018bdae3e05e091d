"""The gap between engine and trainer, token by token: counted by hand, and as a step of a tiny model reports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from posttrain.mismatch import EDGES, UNDONE, Gaps, Mismatch, from_record, to_record, together
from posttrain.objective import loss
from posttrain.objective_settings import (
    ClippedLoss,
    DistillLoss,
    DppoLoss,
    GrpoLoss,
    GspoLoss,
    LossConfig,
)
from posttrain.settings import TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Sample
from tests.model.longcat2_tiny import tiny
from tests.posttrain.objectives import BARE, KINDS, ONE, learn, numbers, tokens
from tests.posttrain.small import plain_logprobs, sample
from tests.posttrain.tiny import make_model


def counted(*gaps: float, gated: Sequence[bool] = ()) -> Gaps:
    return Gaps.of(np.array(gaps), np.array(gated or [False] * len(gaps)))


def filled(gaps: Gaps) -> dict[int, int]:
    return {place: count for place, count in enumerate(gaps.bins) if count}


# Counting


def test_gaps_counted_by_hand() -> None:
    """Eight bins a decade from 10^-6 on: 0.002 is (6 - 2.699) 8 = 26.4 edges up, 0.5 is (6 - 0.301) 8 = 45.6."""
    found = counted(0.0, 0.002, 0.002, 0.5, 20.0, gated=[False, False, True, False, True])
    assert filled(found) == {0: 1, 27: 2, 46: 1, len(EDGES): 1}
    assert EDGES[26] < 0.002 < EDGES[27] and EDGES[45] < 0.5 < EDGES[46] and (EDGES[0], EDGES[-1]) == (1e-6, 10.0)
    assert (found.tokens, found.gated, found.gated_share, found.largest) == (5, 2, 0.4, 20.0)
    assert found.mean == pytest.approx(20.504 / 5)


def test_a_quantile_lies_in_its_bin() -> None:
    """Half of the tokens are at 0.002: a quarter of all is half of that bin, in the logarithm."""
    found = counted(0.002, 0.002, 0.5, 0.5)
    assert found.quantile(0.25) == pytest.approx((EDGES[26] * EDGES[27]) ** 0.5)
    assert found.quantile(0.5) == pytest.approx(EDGES[27])
    assert found.quantile(1.0) == 0.5, "nothing is beyond the largest"
    assert counted(0.0, 0.0).quantile(0.5) == 0.0
    assert counted(20.0, 90.0).quantile(1.0) == 90.0


def test_quantiles_are_as_good_as_the_bins() -> None:
    rng = Random(0)
    gaps = sorted(10 ** rng.uniform(-5, 0.5) for _ in range(2000))
    found = counted(*gaps)
    for share in (0.1, 0.5, 0.9, 0.99):
        exact = gaps[int(share * len(gaps)) - 1]
        assert max(found.quantile(share) / exact, exact / found.quantile(share)) < 10 ** (1 / 8)


def test_gaps_add_up_and_survive_a_journal() -> None:
    first, second = {0: counted(0.1, 0.2)}, {1: counted(0.3), 0: counted(0.4, gated=[True])}
    whole = together([second, first])
    assert list(whole) == [0, 1]
    assert whole[0] == replace(counted(0.1, 0.2, 0.4, gated=[False, False, True]), total=whole[0].total)
    assert whole[0].total == pytest.approx(0.7)
    record = to_record(7, second)
    assert record["version"] == 7 and list(record["staleness"]) == ["1", "0"] and from_record(record) == second


def test_a_version_that_was_undone_is_no_staleness_of_zero() -> None:
    """Resumed at version 2, with rollouts that were made at versions up to 4."""
    mismatch = Mismatch(2)
    mismatch.add(numbers(0.1, -0.2, 0.3), torch.tensor([2, 3, 4]), torch.tensor([False, False, False]))
    mismatch.add(numbers(-0.4), torch.tensor([0]), torch.tensor([True]))
    found = mismatch.gaps()
    assert {age: g.tokens for age, g in found.items()} == {UNDONE: 2, 0: 1, 2: 1}
    assert found[UNDONE].mean == pytest.approx(0.25) and found[2].mean == pytest.approx(0.4) and found[2].gated == 1


# What is gated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("band", [None, (0.8, 1.25)], ids=["free", "band"])
def test_gated_is_what_has_no_gradient(kind: Callable[..., Any], band: tuple[float, float] | None) -> None:
    generator = torch.Generator().manual_seed(3)
    pi, mu = (-2 * torch.rand(40, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(40, generator=generator, dtype=torch.float64)
    given = tokens(pi, mu, advantages, [i // 4 for i in range(40)])
    config = kind(**{**BARE, "token_band": band, "importance_cap": None})
    _, gradient, _ = learn(config, given)
    gated = loss(given, config, ONE).gated_N.tolist()
    assert gated == [g == 0 for g in gradient]
    assert any(gated) == (config.type != "cispo" or band is not None) and not all(gated)


def test_gated_by_the_teachers_gate() -> None:
    """Ratios 1, 3 and 0.4 against a gate of [0.5, 2]."""
    mu = numbers(-1.0, -3.0, -1.0)
    given = tokens(mu + numbers(1.0, 3.0, 0.4).log(), mu, numbers(0, 0, 0), teacher_N=numbers(-1.0, -1.0, -1.0))
    assert loss(given, DistillLoss(), ONE).gated_N.tolist() == [False, True, True]


# What a step reports


def qwen() -> PreTrainedModel:
    torch.manual_seed(0)
    return make_model("qwen3", vocab_size=64)


MODELS = {"longcat2": tiny, "qwen3": qwen}
PROMPT = tuple(range(3, 23))


def shifted(model: PreTrainedModel, gaps: Sequence[Sequence[float]], versions: Sequence[Sequence[int]]) -> list[Sample]:
    """Samples with one prompt, of whose sampled tokens the trainer will find these log-probs above the engine's."""
    out = []
    for i, (own, ages) in enumerate(zip(gaps, versions, strict=True)):
        s = sample(f"g/{i}", len(PROMPT) + len(own), (-1.0) ** i, seed=i, prompt=len(PROMPT))
        ids = (*PROMPT, *s.ids[len(PROMPT) :])
        given = (0.0,) * len(PROMPT)
        logprobs = [p - g for p, g in zip(plain_logprobs(model, ids)[len(PROMPT) :], own, strict=True)]
        every = (-1,) * len(PROMPT) + tuple(ages)
        out.append(replace(s, ids=ids, logprobs=(*given, *logprobs), versions=every))
    return out


GAPS = [[0.003, -0.02, 0.3, -1.1, 2.0], [0.02, 0.005], [-0.3, 0.02, -0.03, 0.2]]
VERSIONS = [[5, 5, 4, 4, 2], [4, 5], [2, 2, 4, 5]]
"""Sampled, of one sample each; the trainer is at 5. Only -1.1 (ratio 0.33) and 2 (7.4) are outside of [0.5, 5]."""


def step(model: PreTrainedModel, samples: list[Sample], objective: LossConfig | None = None, **config: Any) -> Trainer:
    settings = TrainerConfig(**{"lr": 1e-2, "warmup_steps": 0, "share_prompts": False, **config})
    trainer = Trainer(model, settings, objective or DppoLoss(delta=1.0), 4)
    trainer.version = 5
    trainer.step(samples, 3)
    return trainer


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_tells_gaps_and_gates_by_staleness(kind: str) -> None:
    model = MODELS[kind]()
    found = step(model, shifted(model, GAPS, VERSIONS)).gaps
    assert list(found) == [0, 1, 3]
    assert [(g.tokens, g.gated) for g in found.values()] == [(4, 0), (4, 1), (3, 1)]
    assert found[0].mean == pytest.approx((0.003 + 0.02 + 0.005 + 0.2) / 4, abs=1e-5)
    assert found[1].mean == pytest.approx((0.3 + 1.1 + 0.02 + 0.03) / 4, abs=1e-5)
    assert found[3].mean == pytest.approx((2.0 + 0.3 + 0.02) / 3, abs=1e-5)
    assert [g.largest for g in found.values()] == pytest.approx([0.2, 1.1, 2.0], abs=1e-5)
    assert [g.bins for g in found.values()] == [
        counted(0.003, 0.02, 0.005, 0.2).bins,
        counted(0.3, 1.1, 0.02, 0.03).bins,
        counted(2.0, 0.3, 0.02).bins,
    ]


@pytest.mark.parametrize("size", [4096, 60, 1])
@pytest.mark.parametrize("share", [True, False])
def test_packing_padding_and_shared_prompts_change_nothing(size: int, share: bool) -> None:
    wanted = step(qwen(), shifted(qwen(), GAPS, VERSIONS)).gaps
    trainer = step(qwen(), shifted(qwen(), GAPS, VERSIONS), tokens_per_micro_batch=size, share_prompts=share)
    assert trainer._shares_prompts == share
    same = {age: replace(g, total=wanted[age].total, largest=wanted[age].largest) for age, g in trainer.gaps.items()}
    assert same == wanted
    for age, gaps in trainer.gaps.items():
        assert (gaps.total, gaps.largest) == pytest.approx((wanted[age].total, wanted[age].largest), abs=1e-5)


def test_what_is_not_trained_is_not_counted() -> None:
    """A token cap leaves versions on tokens that it takes out; a sample may be left without any."""
    model = tiny()
    first, second, third = shifted(model, GAPS, VERSIONS)
    capped = replace(first, sampled=(*first.sampled[:-1], False))
    trainer = step(model, [capped, replace(second, sampled=(False,) * len(second.ids)), third])
    assert {age: g.tokens for age, g in trainer.gaps.items()} == {0: 3, 1: 3, 3: 2}
    trainer.step([], 3)
    assert trainer.gaps == {}, "of the last step alone"


def test_samples_without_versions_are_as_old_as_their_rollout() -> None:
    model = tiny()
    samples = [replace(s, versions=None, oldest_version=3) for s in shifted(model, GAPS, VERSIONS)]
    assert {age: g.tokens for age, g in step(model, samples).gaps.items()} == {2: 11}


def test_several_updates_are_measured_from_the_start_of_the_step_where_prox_is_known() -> None:
    exact = [[0.0] * len(row) for row in GAPS]
    largest = {}
    for objective in (ClippedLoss(constant_length=8), GspoLoss(token_band=(0.5, 2.0)), GrpoLoss(constant_length=8)):
        found = step(tiny(), shifted(tiny(), exact, VERSIONS), objective, updates_per_batch=2, lr=0.1).gaps
        assert sum(g.tokens for g in found.values()) == 11
        largest[objective.type] = max(g.largest for g in found.values())
    assert largest["clipped"] < 1e-5 and largest["gspo"] < 1e-5
    assert largest["grpo"] > 1e-2, "it asks for no prox, and a forward for the sake of a report is not made"
