"""A trainer of two processes takes the steps of one process, DDP and FSDP2 alike, and says so when one of them is gone.

On a CPU, by gloo. A pair takes seconds to start, so that a case looks at several things.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from posttrain.errors import RankError, UserError
from posttrain.mismatch import Gaps
from posttrain.model.checkpoint import load_any
from posttrain.objective_settings import ClippedLoss, DistillLoss, DppoLoss, GspoLoss, LossConfig
from posttrain.ranks import Place, Ranks, make_accelerator
from posttrain.settings import DdpConfig, FsdpConfig, LoraConfig, TrainerConfig
from posttrain.shards import gathered, whole_weight
from posttrain.trainer import Trainer
from posttrain.types import Sample
from posttrain.weights import FolderOutlet, SharedOutlet, read_into, state_of
from tests.model.longcat2_tiny import LSA, MTP
from tests.posttrain.small import sample
from tests.posttrain.tiny import make_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's call
]
PARALLEL = {"ddp": DdpConfig(type="ddp", processes=2, timeout_s=120), "fsdp": FsdpConfig(type="fsdp", processes=2)}
Steps = Sequence[Sequence[Sample]]


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Of different lengths and versions, with teachers."""
    return [
        sample(
            f"g/{i}",
            6 + i,
            (-1.0) ** i * (1 + i),
            seed=seed + i,
            teacher_logprobs=(-1.5,) * (6 + i),
            versions=(i % 2,) * (6 + i),
        )
        for i in range(count)
    ]


@contextmanager
def trainer_of(kind: str, loss: LossConfig, outlet: Any = None, shape: Any = None, **config: Any) -> Iterator[Trainer]:
    """A trainer, of one process without ``parallel``."""
    torch.manual_seed(0)  # adapters start at random
    settings = TrainerConfig(**{"lr": 1e-3, "warmup_steps": 0, "tokens_per_micro_batch": 16, **config})
    trainer = Trainer(make_model(kind, **(shape or {})), settings, loss, 4, outlet)
    try:
        yield trainer
    finally:
        trainer.close()


def taken(trainer: Trainer, steps: Steps) -> list[tuple[dict[str, float], dict[int, Gaps]]]:
    """Metrics and gaps of steps of which each makes a version."""
    found: list[tuple[dict[str, float], dict[int, Gaps]]] = []
    for part in steps:
        found.append((trainer.step(part, len(part) + 1), trainer.gaps))
        trainer.version += 1
    return found


def copied(tree: Any) -> Any:
    """The tree with tensors of its own."""
    if isinstance(tree, dict):
        return {k: copied(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [copied(v) for v in tree]
    return tree.clone() if isinstance(tree, Tensor) else tree


def close(got: Any, want: Any, atol: float = 1e-5) -> None:
    """Two trees are equal, their tensors and floats up to rounding."""
    assert isinstance(got, type(want))
    if isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            close(got[key], want[key], atol)
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            close(a, b, atol)
    elif isinstance(want, Tensor):
        assert got.dtype == want.dtype and torch.allclose(got.float(), want.float(), rtol=1e-4, atol=atol)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    elif isinstance(want, Gaps):
        assert (got.tokens, got.gated, got.bins) == (want.tokens, want.gated, want.bins)
        assert (got.total, got.largest) == pytest.approx((want.total, want.largest), rel=1e-4)
    else:
        assert got == want


CLIPPED, KL = ClippedLoss(constant_length=8), DppoLoss(constant_length=8, kl=0.1, entropy=0.01)
ODD: Steps = [samples(5), samples(1, seed=7), samples(3, seed=3)]
"""Odd numbers, and fewer than there are processes."""
LONGCAT = {**LSA, **MTP, "index_topk": 4, "index_init_tokens": 1, "index_local_tokens": 1, "indexer_loss_coef": 0.1}
LONGCAT |= {"mtp_loss_coef": 0.1, "router_aux_loss_coef": 0.1, "router_bias_update_rate": 0.01, "z_loss_coef": 0.01}
LONGCAT |= {"moe_target_topk": 3}
CASES: dict[str, tuple[str, str, LossConfig, dict[str, Any]]] = {
    "ddp": ("ddp", "qwen3", KL, {"updates_per_batch": 2, "weight_decay": 0.1}),
    "fsdp": ("fsdp", "qwen3", KL, {"updates_per_batch": 2, "weight_decay": 0.1}),
    "fsdp, tied": (
        "fsdp",
        "llama",
        GspoLoss(),
        {"activations": "recompute", "freeze": [r"layers\.0\.mlp"], "packed": True},
    ),
    "ddp, adapters": ("ddp", "llama", KL, {"lora": LoraConfig(rank=4, alpha=8.0), "packed": True}),
    "fsdp, adapters": ("fsdp", "llama", KL, {"lora": LoraConfig(rank=4, alpha=8.0), "activations": "recompute"}),
    # A row is a micro-batch here, since what the model adds to the loss is of a forward.
    "ddp, longcat2": ("ddp", "longcat2", DistillLoss(), {"tokens_per_micro_batch": 6, "shape": LONGCAT}),
    "fsdp, longcat2": ("fsdp", "longcat2", DistillLoss(), {"tokens_per_micro_batch": 6, "shape": LONGCAT}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(case: str, tmp_path: Path) -> None:
    """Weights, moments, metrics and gaps; what is published and saved; and a checkpoint of either goes on in the
    other."""
    parallel, kind, loss, options = CASES[case]
    with trainer_of(kind, loss, **options) as one:
        start = copied(one.weights())
        metrics = taken(one, ODD[:2])
        middle = copied(one.state())
        last = taken(one, ODD[2:])
        state, weights = copied(one.state()), copied(one.weights())
        if "lora" in options:
            one.save_adapter(tmp_path / "adapter")
    assert sum(not torch.equal(start[k], weights[k]) for k in start) >= 4

    outlet = FolderOutlet(tmp_path / "weights") if kind == "qwen3" else SharedOutlet()
    with trainer_of(kind, loss, outlet, parallel=PARALLEL[parallel], **options) as two:
        close(two.weights(), start, atol=0)
        close(taken(two, ODD[:2]), metrics)
        state_of_two = copied(two.state())
        close(state_of_two["optimizer"], middle["optimizer"])
        two.restore(middle)
        assert two.version == 2
        close(two.state()["model"], middle["model"], atol=0)
        close(taken(two, ODD[2:]), last)
        close(two.state()["optimizer"], state["optimizer"])
        close(two.weights(), weights)
        reader = make_model(kind, seed=9, **options.get("shape", {}))
        read_into(reader, two.publish().where)
        close(dict(state_of(reader)), copied(two.weights()), atol=0)
        whole = copied(two.weights())
    if "lora" in options:
        two.save_adapter(tmp_path / "same")
        same, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("same", "adapter"))
        close(same, wanted)
    two.save(tmp_path / "model")  # as a stage does, which has closed the trainer by then
    close(dict(state_of(load_any(tmp_path / "model", torch.float32))), whole, atol=1e-6)

    with trainer_of(kind, loss, **options) as again:
        again.restore(state_of_two)
        close(taken(again, ODD[2:]), last)
        close(again.weights(), weights)


def test_half_the_bits_are_nearly_the_same_step() -> None:
    """All of a forward is in bf16, and log-probs, weights and what is learned of them in float32."""
    with trainer_of("llama", CLIPPED) as one:
        (stats, _), *_ = taken(one, ODD[:1])
    with trainer_of("llama", CLIPPED, parallel=PARALLEL["fsdp"], mixed_precision="bf16") as two:
        (halved, _), *_ = taken(two, ODD[:1])
        assert all(t.dtype == torch.float32 for t in two.weights().values())
    for key in ("gap_abs", "entropy", "grad_norm", "ess_tokens"):
        assert halved[key] == pytest.approx(stats[key], rel=0.05) and halved[key] != stats[key]


class Sharded:
    """A head in parts, of which there is one in every rank."""

    def __init__(self, place: Place) -> None:
        make_accelerator(TrainerConfig(parallel=PARALLEL["fsdp"]), place)
        torch.manual_seed(0)
        self.place, self.head = place, torch.nn.Linear(4, 7, bias=False)
        self.whole = self.head.weight.detach().clone()
        fully_shard(self.head)

    def learn(self, hidden_ND: Tensor) -> Tensor:
        """Gradient of the whole weight; this rank's loss is ``rank + 1`` times the sum of all logits."""
        weight = whole_weight(self.head.weight)
        assert torch.equal(weight, self.whole)
        ((self.place.rank + 1) * (hidden_ND @ weight.T)).sum().backward()
        assert self.head.weight.grad is not None
        return gathered(self.head.weight.grad)


def test_a_head_in_parts_gets_the_mean_of_the_gradients() -> None:
    ranks, mine, hidden_ND = Ranks(PARALLEL["fsdp"]), list[Sharded](), torch.arange(12.0).view(3, 4)
    try:
        ranks.begin(Sharded, lambda: mine.append(Sharded(ranks.place)))
        found = ranks.together("learn", [hidden_ND], lambda: mine[0].learn(hidden_ND))
    finally:
        ranks.close()
    expected = 1.5 * torch.ones(7, 3) @ hidden_ND
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)


# Failures


def followers(trainer: Trainer) -> list[int]:
    assert trainer._ranks is not None
    return [process.pid for process in trainer._ranks._processes.values()]


def test_a_rank_that_is_killed_is_named_within_seconds() -> None:
    with trainer_of("llama", CLIPPED, parallel=PARALLEL["fsdp"]) as trainer:
        taken(trainer, ODD[:1])
        (pid,) = followers(trainer)
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RankError, match="rank 1 of the trainer was killed by SIGKILL during step") as caught:
            trainer.step(ODD[0], 5)
        assert time.monotonic() - began < 30
        assert "The same command goes on from the last checkpoint" in str(caught.value)
        with pytest.raises(RankError, match="gone, and cannot take part in step"):
            trainer.step(ODD[0], 5)
    with trainer_of("llama", CLIPPED) as alone:  # nothing of it is left in the process
        assert alone.step(ODD[0], 5)["tokens"] == sum(len(s.ids) - 3 for s in ODD[0])


def test_a_rank_that_stands_still_is_named_within_the_bound() -> None:
    with trainer_of("llama", CLIPPED, parallel=PARALLEL["ddp"]) as trainer:
        assert trainer._ranks is not None
        (pid,) = followers(trainer)
        os.kill(pid, signal.SIGSTOP)
        trainer._ranks._timeout_s = 3.0  # the start needed more
        with pytest.raises(RankError, match=r"ranks \[0, 1\] of the trainer did not end step within 3 s \(trainer"):
            trainer.step(ODD[0], 5)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_fails_on_all_ranks_is_raised_as_it_is() -> None:
    with trainer_of("llama", CLIPPED, parallel=PARALLEL["ddp"]) as trainer:
        bad = sample("g/0", 6, float("nan"))
        with pytest.raises(FloatingPointError, match=r"nan at version 0: lower trainer\.lr"):
            trainer.step([bad], 1)


# What is refused


def test_fsdp_of_longcat2_in_bf16_is_refused() -> None:
    with (
        pytest.raises(UserError, match=r"routers of type longcat2 must not: set it to no, or parallel\.type"),
        trainer_of("longcat2", CLIPPED, parallel=PARALLEL["fsdp"], mixed_precision="bf16"),
    ):
        pass
