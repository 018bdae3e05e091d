"""What the engine's model chose travels with the tokens, and the trainer chooses the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experts.credit import samples_of
from posttrain.batch import pack
from posttrain.engine.batching import Scheduler
from posttrain.engine.slots import Request
from posttrain.errors import UserError
from posttrain.journal import rollout_from_dict, rollout_to_dict
from posttrain.model.layer import LayerReplay
from posttrain.settings import LoraConfig
from posttrain.trainer import Trainer
from posttrain.types import Choices, Completion, Rollout, Sample, Sampling, Score, Segment
from tests.model.longcat2_tiny import LSA, MTP, SHAPE, tiny
from tests.posttrain.small import make_trainer, rollout
from tests.posttrain.tiny import make_ids, make_model

TOLERANCE = 1e-4
K = LSA["index_topk"]
CASES = {"dense": {}, "lsa": LSA, "lsa-own": {**LSA, "cli_factor": 1}}


pytestmark = pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step",  # where a test looks at gradients instead of stepping
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft's call
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
)


def model_of(case: str, **changes: Any) -> Any:
    return tiny(seed=5, **MTP, **CASES[case], **changes)


def answer(scheduler: Scheduler, prompts: Sequence[tuple[int, ...]], max_tokens: int = 12) -> list[Completion]:
    for i, ids in enumerate(prompts):
        scheduler.pending.append(Request(id=i, ids=ids, sampling=Sampling(max_tokens=max_tokens, seed=i)))
    while scheduler.busy:
        scheduler.step()
    done, scheduler.done = dict(scheduler.done), []
    return [done[i] for i in range(len(prompts))]


def conversations(model: Any, draft_steps: int = 0) -> list[Rollout]:
    """Two turns each: more than there are slots, all lengths, two of one prompt; the second continues the row."""
    scheduler = Scheduler(model, 4, 96, draft_steps=draft_steps, record_choices=True)
    prompts = [make_ids(Random(i), n) for i, n in enumerate((1, 5, 40, 23, 31, 9))]
    prompts.append(prompts[2])
    more = [make_ids(Random(50 + i), 1 + i) for i in range(len(prompts))]
    first = answer(scheduler, prompts)
    second = answer(scheduler, [(*p, *a.ids, *m) for p, a, m in zip(prompts, first, more, strict=True)])
    out: list[Rollout] = []
    for i, (p, a, m, b) in enumerate(zip(prompts, first, more, second, strict=True)):
        spoken = replace(Segment.from_completion(a), choices=None)
        branch = (Segment.given(p), spoken, Segment.given(m), Segment.from_completion(b))
        out.append(replace(rollout(f"s/0/{i}"), branches=(branch,), score=Score(value=float(i % 2))))
    return out


def samples(rollouts: Sequence[Rollout]) -> list[Sample]:
    return [s for i, r in enumerate(rollouts) for s in samples_of(r, (-1.0) ** i)]


def perturbed(model: Any) -> Any:
    """The same policy, were it not for what it chooses."""
    model = deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "correction_bias" in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator))
            if ".indexer." in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def gap(trainer: Trainer, given: Sequence[Sample]) -> float:
    """Largest difference between the trainer's log-probs and the engine's."""
    batches = pack(given, 256, trainer.config.replay_choices)
    assert len(batches) > 1 and any(not b.real_BT.all() for b in batches)
    return max(
        (trainer._logprobs(b, False)[0] - b.behaviour_BT[b.sampled_BT]).abs().max().item() for b in batches
    )  # fmt: skip


# What is recorded


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("draft_steps", [0, 3])
def test_the_record_is_what_one_forward_of_everything_chooses(case: str, draft_steps: int) -> None:
    model = model_of(case)
    for sample in samples(conversations(model, draft_steps)):
        choices = sample.choices
        assert choices is not None and choices.positions == len(sample.ids) - 1
        with torch.no_grad():
            out = model(torch.tensor([sample.ids[:-1]]), use_cache=False, output_choices=True)
        slots = np.frombuffer(choices.slots, "<u2").reshape(choices.positions, *choices.slot_shape)
        want = torch.stack(out.slots, dim=2)[0]
        assert (np.sort(slots, axis=-1) == want.sort(dim=-1).values.numpy()).all()
        if case == "dense":
            assert (choices.columns, choices.column_shape) == (b"", (0, 0, 0))
            continue
        columns = np.frombuffer(choices.columns, "<i4").reshape(choices.positions, *choices.column_shape)
        for position in range(min(K, choices.positions)):  # all that is seen
            seen = [-1] * (K - position - 1) + list(range(position + 1))
            assert (columns[position] == seen).all()
        if choices.positions > K:
            assert (columns == torch.stack(out.index_sets, dim=2)[0].numpy()).all()


def test_columns_of_a_forward_that_is_dense_are_all_that_is_seen() -> None:
    """No more columns are visible than the budget: the model itself says nothing."""
    model: Any = tiny(seed=5, **{**LSA, "index_topk": 40})
    scheduler = Scheduler(model, 2, 31, record_choices=True)
    (completion,) = answer(scheduler, [make_ids(Random(0), 9)], 3)
    assert completion.choices is not None
    columns = np.frombuffer(completion.choices.columns, "<i4").reshape(11, *completion.choices.column_shape)
    assert (columns == [[[[-1] * (39 - p) + list(range(p + 1))]] * 2 for p in range(11)]).all()


def test_choices_of_different_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="are not of the same positions"):
        Choices(slots=bytes(2 * 5 * 6), slot_shape=(2, 3), columns=bytes(4 * 4 * 8), column_shape=(2, 1, 4))
    assert Choices(slots=bytes(2 * 5 * 6), slot_shape=(2, 3)).positions == 5
    ids = (3, 4, 5)
    with pytest.raises(ValueError, match="choices of 5 positions for 3 tokens"):
        Sample(
            rollout="r", domain="d", ids=ids, sampled=(True,) * 3, logprobs=(0.0,) * 3, advantages=(0.0,) * 3,
            choices=Choices(slots=bytes(2 * 5 * 6), slot_shape=(2, 3)),
        )  # fmt: skip


def test_a_model_that_does_not_say_what_it_chooses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"type llama does not say .* set engine\.record_choices to false"):
        Scheduler(make_model("llama"), 2, 64, record_choices=True)


# On the way


def test_a_rollout_with_choices_comes_back_equal() -> None:
    for one in conversations(model_of("lsa"))[:3]:
        text = json.dumps(rollout_to_dict(one), separators=(",", ":"))
        assert rollout_from_dict(json.loads(text)) == one
        choices = one.branches[0][-1].choices
        assert choices is not None and len(text) < len(choices.columns)


def test_a_batch_has_them_where_there_is_a_record_and_minus_one_elsewhere() -> None:
    def choices(positions: int, first: int) -> Choices:
        slots = np.arange(first, first + 4 * positions, dtype="<u2")
        columns = np.arange(-1, 6 * positions - 1, dtype="<i4")
        return Choices(
            slots=slots.tobytes(), slot_shape=(2, 2), columns=columns.tobytes(), column_shape=(2, 1, 3)
        )  # fmt: skip

    def sample(rollout: str, length: int, record: Choices) -> Sample:
        zeros = (0.0,) * length
        return Sample(
            rollout=rollout, domain="d", ids=(3,) * length, sampled=(True,) * length, logprobs=zeros, advantages=zeros,
            choices=record,
        )  # fmt: skip

    given = [sample("a", 3, choices(2, 65000)), sample("b", 1, choices(1, 7))]
    (batch,) = pack(given, 100, choices=True)
    assert batch.slots_BTLK is not None and batch.columns_BTLOK is not None
    none = [[-1, -1], [-1, -1]]
    assert batch.slots_BTLK.tolist() == [
        [[[65000, 65001], [65002, 65003]], [[65004, 65005], [65006, 65007]], none],
        [[[7, 8], [9, 10]], none, none],
    ]
    assert batch.columns_BTLOK[1].tolist() == [[[[-1, 0, 1]], [[2, 3, 4]]], [[[-1] * 3]] * 2, [[[-1] * 3]] * 2]
    (plain,) = pack(given, 100)
    assert plain.slots_BTLK is None and plain.columns_BTLOK is None


def test_samples_without_choices_are_refused() -> None:
    given = samples(conversations(model_of("dense")))
    trainer = make_trainer(model_of("dense"), replay_choices=True)
    with pytest.raises(UserError, match=r"set engine\.record_choices to true, or trainer\.replay_choices to false"):
        trainer.step([given[0], replace(given[1], choices=None)], 2)


# In the trainer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("draft_steps", [0, 3])
def test_logprobs_equal_the_engines_though_the_trainer_would_choose_otherwise(case: str, draft_steps: int) -> None:
    model = model_of(case)
    given = samples(conversations(model, draft_steps))
    other = perturbed(model)
    assert gap(make_trainer(deepcopy(other)), given) > 0.1
    assert gap(make_trainer(deepcopy(other), replay_choices=True), given) < TOLERANCE


def test_index_sets_and_slots_are_exactly_the_recorded_ones_and_free_where_there_is_none() -> None:
    model = model_of("lsa-own")
    given = samples(conversations(model))[2:5]
    given.sort(key=lambda s: -len(s.ids))  # as in the batch
    (batch,) = pack(given, 10_000, choices=True)
    assert batch.columns_BTLOK is not None and batch.slots_BTLK is not None
    replay = [LayerReplay(*r) for r in zip(batch.slots_BTLK.unbind(2), batch.columns_BTLOK.unbind(2), strict=True)]
    with torch.no_grad():
        inputs = {"attention_mask": batch.real_BT, "use_cache": False, "output_choices": True}
        out = perturbed(model)(batch.ids_BT, replay=replay, **inputs)
    columns_BTLOK, slots_BTLK = torch.stack(out.index_sets, dim=2), torch.stack(out.slots, dim=2)
    recorded_BT = batch.slots_BTLK[:, :, 0, 0] >= 0
    assert recorded_BT.sum(1).tolist() == [len(s.ids) - 1 for s in given]
    assert torch.equal(columns_BTLOK[recorded_BT], batch.columns_BTLOK[recorded_BT])
    assert torch.equal(slots_BTLK[recorded_BT], batch.slots_BTLK[recorded_BT].long())
    last = columns_BTLOK[torch.arange(3), torch.tensor([len(s.ids) - 1 for s in given])]
    assert ((last >= 0).sum(-1) == K).all(), "a token without a record attends to what its indexer chooses"


def gradients(model: Any, given: Sequence[Sample], checkpointing: bool = False, **options: Any) -> dict[str, Tensor]:
    """What one step would hand to the optimizer."""
    if checkpointing:
        model.gradient_checkpointing_enable()
    trainer = make_trainer(model, max_grad_norm=1e9, **options)
    found: dict[str, Tensor] = {}
    trainer.optimizer.step = lambda: found.update(  # pyright: ignore[reportAttributeAccessIssue]
        {n: p.grad.clone() for n, p in trainer.base.named_parameters() if p.grad is not None}
    )
    trainer.step(given, len(given))
    return found


@pytest.mark.parametrize("case", ["dense", "lsa"])
def test_gradients_are_those_of_a_trainer_that_chooses_so_itself(case: str) -> None:
    """And with gradient checkpointing, which runs every layer a second time."""
    model = model_of(case)
    given = samples(conversations(model))
    want = gradients(deepcopy(model), given)
    assert {"lm_head.weight", "model.layers.0.mlp.router.classifier.weight"} <= want.keys()
    for checkpointing in (False, True):
        for other in (model, perturbed(model)):
            got = gradients(deepcopy(other), given, checkpointing, replay_choices=True)
            assert got.keys() == want.keys()
            for name in want:
                assert torch.allclose(got[name], want[name], rtol=1e-3, atol=1e-5), name
    free = gradients(perturbed(model), given)
    assert not torch.allclose(free["lm_head.weight"], want["lm_head.weight"], rtol=1e-3, atol=1e-5)


def test_replay_with_adapters_several_updates_and_a_batch_within_the_budget() -> None:
    """A batch no longer than ``index_topk`` is dense: the recorded columns are all there are."""
    model = model_of("lsa")
    scheduler = Scheduler(model, 4, 96, record_choices=True)
    prompts = [make_ids(Random(i), 4 + i) for i in range(4)]
    given = [
        Sample(
            rollout=f"r/{i}", domain="d", ids=(*p, *c.ids), sampled=(False,) * len(p) + (True,) * len(c.ids),
            logprobs=(0.0,) * len(p) + c.logprobs, advantages=(1.0,) * (len(p) + len(c.ids)), choices=c.choices,
        )
        for i, (p, c) in enumerate(zip(prompts, answer(scheduler, prompts, 5), strict=True))
    ]  # fmt: skip
    assert max(len(s.ids) for s in given) <= K < SHAPE["max_position_embeddings"]
    options: dict[str, Any] = {"updates_per_batch": 2, "lora": LoraConfig(rank=2), "lr": 1e-7}
    stats = make_trainer(perturbed(model), replay_choices=True, **options).step(given, 4)
    assert stats["tokens"] == 20 and stats["gap_abs"] < TOLERANCE
    assert make_trainer(perturbed(model), **options).step(given, 4)["gap_abs"] > 0.1
