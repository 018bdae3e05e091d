"""A policy of twenty thousand weights and hand-made samples, shared by the tests of trainer, loop and credit."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.engine.batching import Scheduler
from posttrain.model import Longcat2ForCausalLM
from posttrain.objective_settings import ClippedLoss, LossConfig
from posttrain.settings import TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import (
    Completion,
    Culprit,
    Failure,
    Limits,
    Message,
    Rollout,
    Sample,
    Sampling,
    Score,
    Segment,
    StopReason,
    Task,
    Weights,
)
from posttrain.weights import read_into
from tests.model.longcat2_tiny import tiny

TASK = Task(
    id="t/0",
    domain="agent",
    world="toy",
    prompt=(Message(role="user", content="go"),),
    thinking=False,
    limits=Limits(max_turns=3, max_tokens=8, timeout_s=5.0),
)


def sample(
    rollout: str, length: int = 8, advantage: float = 1.0, seed: int = 0, prompt: int = 3, **changes: Any
) -> Sample:
    """Random ids, all trained but the first ``prompt``."""
    generator = torch.Generator().manual_seed(seed)
    sampled = tuple(t >= prompt for t in range(length))
    fields: dict[str, Any] = {
        "rollout": rollout,
        "domain": "agent",
        "ids": tuple(torch.randint(3, 61, (length,), generator=generator).tolist()),
        "sampled": sampled,
        "logprobs": tuple(-2.0 if m else 0.0 for m in sampled),
        "advantages": tuple(advantage if m else 0.0 for m in sampled),
    }
    return Sample(**fields | changes)


def plain_logprobs(model: torch.nn.Module, ids: Sequence[int]) -> list[float]:
    """Log-prob of every token given the ones before it, one sequence, one forward; 0 for the first."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    logp_TV = torch.log_softmax(logits_TV[:-1], -1)
    return [0.0, *(float(logp_TV[t, i]) for t, i in enumerate(ids[1:]))]


def make_trainer(
    model: Longcat2ForCausalLM | None = None,
    loss: LossConfig | None = None,
    steps: int = 8,
    **config: Any,
) -> Trainer:
    """A trainer of a tiny model."""
    settings = TrainerConfig(**{"lr": 1e-2, "warmup_steps": 0, **config})
    return Trainer(model or tiny(), settings, loss or ClippedLoss(constant_length=8), steps)


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state as it is now."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    """Names whose bytes differ."""
    assert a.keys() == b.keys()
    return {k for k in a if not torch.equal(a[k], b[k])}


def rollout(
    rollout_id: str = "s/0/0",
    *,
    values: Sequence[int] = (5, 6),
    versions: Sequence[int] = (0, 0),
    score: float | None = 1.0,
    domain: str = "agent",
    error: str = "the sandbox is gone",
) -> Rollout:
    """Two tokens given, then ``values`` sampled with log-prob -1. Without a score it failed."""
    n = len(values)
    spoken = Segment(ids=tuple(values), sampled=(True,) * n, logprobs=(-1.0,) * n, versions=tuple(versions))
    return Rollout(
        id=rollout_id,
        group=rollout_id.rsplit("/", 1)[0],
        task=Task(id="t", domain=domain, world="toy", prompt=()),
        branches=((Segment.given((3, 4)), spoken),),
        messages=(),
        stop=StopReason.INFRASTRUCTURE if score is None else StopReason.SCORED,
        score=None if score is None else Score(value=score, outcome=score),
        error=Failure(culprit=Culprit.SANDBOX, message=error) if score is None else None,
    )


class InProcessEngine:
    """The local engine's scheduler without its process."""

    def __init__(self, folder: Path) -> None:
        model = Longcat2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.scheduler = Scheduler(model, num_slots=32, max_context=64)
        self._keys, self._waiting = itertools.count(), dict[int, asyncio.Future[Completion]]()
        self._pump_task: asyncio.Task[None] | None = None

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        from posttrain.engine.slots import Request

        key, future = next(self._keys), asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        self.scheduler.pending.append(Request(id=key, ids=tuple(ids), sampling=sampling))
        if self._pump_task is None:
            self._pump_task = asyncio.create_task(self._pump())
        return await future

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None:
        read_into(self.scheduler.model, weights.where)
        self.scheduler.set_version(weights.version)

    async def close(self) -> None:
        if self._pump_task is not None:
            self._pump_task.cancel()

    async def _pump(self) -> None:
        while self.scheduler.busy:
            self.scheduler.step()
            done, self.scheduler.done = self.scheduler.done, []
            for key, completion in done:
                future = self._waiting.pop(key)
                if not future.done():
                    future.set_result(completion)
            await asyncio.sleep(0)
        self._pump_task = None
