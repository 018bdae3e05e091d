"""Sequences end to end: the numbers of the padded form, none of them seen by another, and where it is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from posttrain.batch import pack
from posttrain.errors import UserError
from posttrain.objective_settings import ClippedLoss, DppoLoss
from posttrain.packing import packed
from posttrain.settings import LoraConfig, TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Sample
from tests.model.longcat2_tiny import tiny
from tests.posttrain.small import sample
from tests.posttrain.tiny import make_model


def samples() -> list[Sample]:
    """Of very different lengths; now and then something is given."""
    found = []
    for place, length in enumerate([29, 4, 17, 2, 40, 9, 3, 31]):
        s = sample(f"s/{place}/0", length, advantage=place - 3.0, seed=place)
        mask = (False, *(i % 5 != 3 for i in range(length - 1)))
        found.append(replace(s, sampled=mask, logprobs=tuple(-2.0 * m for m in mask)))
    return found


SAMPLES = samples()


def model_of(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return make_model(kind, vocab_size=64, **(experts if kind == "qwen3_moe" else {}), **changes)


def trainer(pack_them: bool, kind: str = "qwen3", size: int = 4096, **changes: Any) -> Trainer:
    config = TrainerConfig(lr=1e-3, warmup_steps=0, tokens_per_micro_batch=size, packed=pack_them, **changes)
    return Trainer(model_of(kind), config, DppoLoss(kl=0.01), 4)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": 50},
        {"size": 1},
        {"lora": LoraConfig(rank=2, alpha=4, targets=["q_proj", "o_proj"])},
        {"activations": "recompute"},
    ],
    ids=["together", "two rows", "alone", "adapter", "recomputed"],
)
def test_a_step_is_that_of_the_padded_form(kind: str, changes: dict[str, Any]) -> None:
    ours, plain = trainer(True, kind, **changes), trainer(False, kind, **changes)
    for _ in range(2):
        assert ours.step(SAMPLES, 8) == pytest.approx(plain.step(SAMPLES, 8), rel=2e-4, abs=2e-5)
    for (name, a), (_, b) in zip(ours.weights().items(), plain.weights().items(), strict=True):
        # Adam's first step is lr in size whatever the gradient's: where that is nearly 0 its sign is rounding.
        assert float((a - b).abs().mean()) < 4e-5, name


def test_log_probs_and_gradients_are_those_of_the_padded_form() -> None:
    found = []
    for one in (trainer(True), trainer(False)):
        (batch,) = pack(SAMPLES, 10_000, packed=one.config.packed)
        logp_N, entropy_N, _ = one._logprobs(batch, True)
        (logp_N.sum() + 0.1 * entropy_N.sum()).backward()
        found.append((logp_N, [p.grad for p in one.model.parameters()]))
    (ours, our_grads), (plain, plain_grads) = found
    assert ours.detach().numpy() == pytest.approx(plain.detach().numpy(), abs=1e-5)
    for a, b in zip(our_grads, plain_grads, strict=True):
        assert a is not None and b is not None and float((a - b).abs().max()) < 1e-4 * max(1.0, float(b.abs().max()))


def test_a_sequence_does_not_see_the_one_before_it() -> None:
    """Exactly: the others' tokens change nothing, not even a rounding."""
    one = trainer(True)
    first = [SAMPLES[0], SAMPLES[4]]
    other = [replace(SAMPLES[0], ids=tuple((i + 1) % 64 for i in SAMPLES[0].ids)), SAMPLES[4]]
    values = []
    for pair in (first, other):
        (batch,) = pack(pair, 1000, packed=True)
        assert batch.ids_BT.shape[0] == 2
        values.append(one._logprobs(batch, False)[0][batch.sampled_BT.nonzero()[:, 0] == 0])
    assert values[0].equal(values[1])


def test_a_row_by_hand() -> None:
    a = replace(SAMPLES[3], rollout="a", ids=(5, 6), sampled=(False, True), logprobs=(0.0, -1.0), advantages=(0.0, 1.0))
    b = replace(a, rollout="b", ids=(7, 8, 9), sampled=(False, True, True), logprobs=(0.0,) * 3, advantages=(0.0,) * 3)
    (batch,) = pack([a, b], 5, packed=True)
    row = packed(batch)
    assert row.ids_1S.tolist() == [[7, 8, 9, 5, 6]]
    assert row.positions_1S.tolist() == [[0, 1, 2, 0, 1]]
    assert row.starts_B1.tolist() == [0, 3, 5] and row.longest == 3
    assert row.before_N.tolist() == [0, 1, 3]
    assert len(pack([a, b], 5)) == 2, "with padding they would be 6 tokens"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: tiny(), "a model of type longcat2 has more than full attention"),
        (lambda: make_model("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1), "type qwen3 has"),
        (lambda: make_model("mistral", sliding_window=4), "the model's attention needs sliding_window"),
    ],
)
def test_a_model_that_would_look_across_is_refused(model: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"trainer.packed: .*{words}.*set it to false"):
        made = Trainer(model(), TrainerConfig(packed=True), ClippedLoss(), 4)
        made.step([s for s in SAMPLES if max(s.ids) < made.base.config.vocab_size], 8)


def test_shared_prompts_and_one_row_are_too_much() -> None:
    with pytest.raises(ValidationError, match="packed: with share_prompts sequences have a row each"):
        TrainerConfig(packed=True, share_prompts=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_kernel_of_a_gpu_gives_the_log_probs_of_the_padded_form() -> None:
    values = []
    for one in (trainer(True, mixed_precision="bf16"), trainer(False)):
        (batch,) = pack(SAMPLES, 10_000, packed=one.config.packed)
        values.append(one._logprobs(batch, False)[0].float().cpu())
    assert float((values[0] - values[1]).abs().max()) < 0.1
