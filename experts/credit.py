"""Group-relative advantages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from posttrain.config import Config
from posttrain.types import Rollout, Sample


class GroupCreditConfig(Config):
    """How rewards become advantages."""

    scale: Literal["none", "std"] = "none"
    """Divide by the group's standard deviation (GRPO) or not (Dr. GRPO, arXiv 2503.20783)."""


class GroupCredit:
    """Each rollout's value minus its group's mean, on every token it sampled. Implements ``protocols.Credit``."""

    def __init__(self, config: GroupCreditConfig) -> None:
        self.config = config

    def __call__(self, group: Sequence[Rollout]) -> list[Sample]:
        """Empty if all values are equal: such a group has no gradient."""
        values = [r.score.value for r in group if r.score is not None]
        mean, spread = statistics.fmean(values), statistics.pstdev(values)
        if spread == 0:
            return []
        scale = spread if self.config.scale == "std" else 1.0
        return [
            sample
            for rollout in group
            if rollout.score is not None
            for sample in samples_of(rollout, (rollout.score.value - mean) / scale)
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
            choices=next((s.choices for s in reversed(branch) if s.choices is not None), None),
        )
        for branch in rollout.branches
    ]
