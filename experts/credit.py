"""Group-relative advantages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config import Config
from posttrain.types import Rollout, Sample, StopReason
from rewards.repetition import RepetitionPart

TRUNCATED = (StopReason.CONTEXT_OVERFLOW, StopReason.AGENT_TIMEOUT)
"""Ends that a limit put. ``LOOP`` is none of them: it is the agent's own repetition."""
_REPETITION = RepetitionPart()


class LengthPenalty(Config):
    """Soft overlong punishment (DAPO, arXiv 2503.14476, Eq. 13), in tokens sampled over a whole rollout.

    Not a term of the loss: subtracted before the baseline, it cancels where all of a group are as long, and a value
    never falls below 0, so that brevity alone is never a way to earn."""

    free: Annotated[int, Field(ge=0)]
    """Tokens that cost nothing."""
    full: Annotated[int, Field(gt=0)]
    """Tokens from which on all of ``weight`` is taken off; linear in between."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What it can cost."""

    @model_validator(mode="after")
    def _in_order(self) -> LengthPenalty:
        if self.full <= self.free:
            raise ValueError(f"full: {self.full} tokens must be more than free, {self.free}")
        return self

    def __call__(self, tokens: int) -> float:
        """What a rollout of so many sampled tokens loses."""
        return self.weight * min(1.0, max(0.0, (tokens - self.free) / (self.full - self.free)))


class GroupCreditConfig(Config):
    """How rewards become advantages."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a value is compared with: the mean of its group (GRPO, arXiv 2402.03300), or of the others in it (RLOO,
    arXiv 2402.14740), which does not depend on the value itself and so leaves the gradient unbiased."""
    scale: Literal["none", "std"] = "none"
    """Divide by the group's standard deviation (GRPO) or not (Dr. GRPO, arXiv 2503.20783)."""
    length: LengthPenalty | None = None
    """What long rollouts lose before they are compared; null: nothing."""
    truncated: Literal["keep", "mask"] = "keep"
    """mask: a rollout that the window, the turns or the clock cut short is neither compared nor trained, unless it was
    cut for repeating itself (arXiv 2509.18883)."""
    repetition: Annotated[float, Field(gt=0, le=1)] = 0.5
    """With mask: share of its calls or phrases said before from which on a rollout repeats itself."""
    token_cap: Annotated[int, Field(gt=0)] | None = None
    """Tokens of one rollout that are trained at most, drawn anew for every rollout; null: all."""


class GroupCredit:
    """Each rollout's value minus its group's baseline, on every token it sampled. Implements ``protocols.Credit``."""

    def __init__(self, config: GroupCreditConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed

    def __call__(self, group: Sequence[Rollout]) -> list[Sample]:
        """Empty if all values are equal: such a group has no gradient."""
        scored = [(r, self._value(r, r.score.value)) for r in group if r.score is not None and self._complete(r)]
        values = [value for _, value in scored]
        if not values:
            return []
        mean, spread = statistics.fmean(values), statistics.pstdev(values)
        if spread == 0:
            return []
        scale = spread if self.config.scale == "std" else 1.0
        if self.config.baseline == "leave_one_out":
            # r - (sum - r) / (n - 1) = n / (n - 1) * (r - mean)
            scale *= (len(values) - 1) / len(values)
        return [sample for rollout, value in scored for sample in self._samples(rollout, (value - mean) / scale)]

    def _value(self, rollout: Rollout, value: float) -> float:
        penalty = self.config.length
        return value if penalty is None else max(0.0, value - penalty(rollout.sampled_tokens))

    def _complete(self, rollout: Rollout) -> bool:
        """Whether its value says how good it is. What was cut short could still have become right: left in the mean,
        its 0 would raise the others' advantages, and so contribute to the loss after all."""
        if self.config.truncated == "keep" or rollout.stop not in TRUNCATED:
            return True
        return 1.0 - _REPETITION(rollout, 0.0) >= self.config.repetition

    def _samples(self, rollout: Rollout, advantage: float) -> list[Sample]:
        samples = samples_of(rollout, advantage)
        cap = self.config.token_cap
        return samples if cap is None else capped(samples, cap, Random(f"{self.seed}/{rollout.id}"))


def capped(samples: Sequence[Sample], cap: int, rng: Random) -> list[Sample]:
    """The samples of one rollout with at most ``cap`` trained tokens, drawn uniformly from all of its n. Advantages are
    n / cap of what they were, so that the expected sum over tokens stays; the last ones, or the first, would be blind
    to a part of every long rollout. Samples that are left without a trained token are dropped."""
    places = [(i, t) for i, sample in enumerate(samples) for t, sampled in enumerate(sample.sampled) if sampled]
    if len(places) <= cap:
        return list(samples)
    kept, weight = set(rng.sample(places, cap)), len(places) / cap
    return [
        replace(
            sample,
            sampled=tuple((i, t) in kept for t in range(len(sample.ids))),
            advantages=tuple(a * weight if (i, t) in kept else 0.0 for t, a in enumerate(sample.advantages)),
        )
        for i, sample in enumerate(samples)
        if any((i, t) in kept for t in range(len(sample.ids)))
    ]


def samples_of(rollout: Rollout, advantage: float) -> list[Sample]:
    """One sample a branch, the advantage on every sampled token."""
    return [
        Sample(
            rollout=rollout.id,
            domain=rollout.task.domain,
            ids=tuple(i for s in branch for i in s.ids),
            sampled=tuple(m for s in branch for m in s.sampled),
            logprobs=tuple(p for s in branch for p in s.logprobs),
            advantages=tuple(advantage if m else 0.0 for s in branch for m in s.sampled),
            oldest_version=rollout.oldest_version,
            versions=tuple(v for s in branch for v in s.versions),
            choices=next((s.choices for s in reversed(branch) if s.choices is not None), None),
        )
        for branch in rollout.branches
    ]
