"""A group's prompt forwarded once: the same log-probs and gradients as row by row, and where it is not done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from posttrain.batch import pack
from posttrain.objective_settings import ClippedLoss, DistillLoss, TopkEstimator
from posttrain.prompts import can_share, shared
from posttrain.settings import LoraConfig, TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Sample, Support
from tests.model.longcat2_tiny import tiny
from tests.posttrain.small import sample
from tests.posttrain.tiny import make_model

LONG, SHORT = tuple(range(3, 23)), tuple(range(30, 38))


def group(number: int, prompt: tuple[int, ...], lengths: list[int]) -> list[Sample]:
    made = []
    for place, n in enumerate(lengths):
        s = sample(f"s/{number}/{place}", len(prompt) + n, advantage=place - 1.0, seed=10 * number + place)
        mask = (False,) * len(prompt) + tuple(i % 5 != 3 for i in range(n))  # now and then something is given
        ids = prompt + s.ids[len(prompt) :]
        made.append(replace(s, ids=ids, sampled=mask, logprobs=tuple(-2.0 * m for m in mask)))
    return made


SAMPLES = [*group(0, LONG, [7, 3, 9]), *group(1, SHORT, [5, 5]), *group(2, tuple(range(23, 43)), [4, 8]),
           *group(3, (9,), [6])]  # fmt: skip


def qwen(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return make_model("qwen3", vocab_size=64, **changes)


def trainer(share: bool, size: int = 4096, model: PreTrainedModel | None = None, **changes: Any) -> Trainer:
    config = TrainerConfig(lr=1e-3, warmup_steps=0, tokens_per_micro_batch=size, share_prompts=share, **changes)
    return Trainer(model or qwen(), config, ClippedLoss(constant_length=8), 4)


@pytest.mark.parametrize("size", [4096, 40, 1])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=4, targets=["q_proj", "down_proj"])])
def test_a_step_is_that_of_the_plain_form(size: int, lora: LoraConfig | None) -> None:
    ours, plain = trainer(True, size, lora=lora), trainer(False, lora=lora)
    found, wanted = ours.step(SAMPLES, 8), plain.step(SAMPLES, 8)
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    for (name, a), (_, b) in zip(ours.weights().items(), plain.weights().items(), strict=True):
        # Adam's first step is lr in size whatever the gradient's: where that is nearly 0 its sign is rounding.
        assert float((a - b).abs().mean()) < 2e-5, name


def test_every_sampled_token_has_its_own_log_prob() -> None:
    ours, plain = trainer(True), trainer(False)
    values = []
    for t in (ours, plain):
        found: dict[tuple[int, ...], float] = {}
        for batch in pack(SAMPLES, 60, share=t is ours):
            logp_N, _, _ = t._logprobs(batch, False)
            rows = batch.sampled_BT.nonzero()[:, 0]
            for row in range(len(batch.ids_BT)):
                ids = tuple(batch.ids_BT[row][batch.sampled_BT[row]].tolist())
                found |= {(*ids, place): float(v) for place, v in enumerate(logp_N[rows == row])}
        values.append(found)
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert len(values[0]) == sum(sum(s.sampled) for s in SAMPLES)


def test_a_step_on_supports_is_that_of_the_plain_form() -> None:
    """What teachers say is by trained token, of which none is in a prompt."""
    loss = DistillLoss(estimator=TopkEstimator(type="topk"), gate_low=1e-9, gate_high=1e9)
    judged: list[Sample] = []
    for number, s in enumerate(SAMPLES):
        ids = np.array([[(i + number) % 64, 5, 6] for i, m in zip(s.ids, s.sampled, strict=True) if m], "<i4")
        support = Support(ids=ids.tobytes(), logprobs=(-ids / 20).astype("<f4").tobytes(), width=3)
        judged.append(replace(s, teacher_logprobs=(-2.0,) * len(s.ids), teacher_support=support))
    found = []
    for share in (True, False):
        config = TrainerConfig(lr=1e-3, warmup_steps=0, share_prompts=share)
        found.append(Trainer(qwen(), config, loss, 4).step(judged, 8))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)
    assert 0 < found[0]["tail"] < 1 and found[0]["grad_norm"] > 0.01


def test_gradients_are_those_of_the_plain_form() -> None:
    grads = []
    for share in (True, False):
        t = trainer(share)
        for batch in pack(SAMPLES, 60, share=share):
            logp_N, entropy_N, _ = t._logprobs(batch, True)
            (logp_N.sin().sum() + entropy_N.sum()).backward()
        grads.append({n: p.grad for n, p in t.base.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_micro_batches_hold_whole_prompts_and_keep_to_their_size() -> None:
    batches = pack(SAMPLES, 60, share=True)
    assert sum(len(b.ids_BT) for b in batches) == len(SAMPLES)
    for batch in batches:
        prompts = 0 if batch.prompts is None else batch.prompts.ids_PH.numel()
        assert len(batch.ids_BT) == 1 or batch.ids_BT.numel() + prompts <= 60
        assert not batch.sampled_BT[:, 0].any()
    heads = [b.prompts.ids_PH.tolist() for b in batches if b.prompts is not None]
    assert heads[0][0] == list(LONG[:-1]) or heads[0][0] == list(range(23, 42))
    assert sum(map(len, heads)) <= 4


def test_nothing_is_shared_where_it_saves_next_to_nothing() -> None:
    assert shared(group(0, LONG, [7])) == {}
    assert shared([*group(0, (9,), [60, 60]), *group(1, SHORT, [5])]) == {}
    assert set(shared(SAMPLES)) == {LONG[:-1], SHORT[:-1], tuple(range(23, 42)), ()}


def test_models_that_remember_more_than_keys_and_values_are_left_alone() -> None:
    assert can_share(qwen())
    windowed = qwen(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    assert not can_share(windowed)
    assert not trainer(True, model=windowed)._shares_prompts
    assert not trainer(True, model=tiny())._shares_prompts
    assert not trainer(False)._shares_prompts
