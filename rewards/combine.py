"""Parts become one number. Every part is in 0..1 with 1 for nothing to complain of; a weight is what it can cost."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

from posttrain.errors import RewardError
from posttrain.protocols import Reward
from posttrain.types import Rollout, Score
from rewards.calls import CallsPart
from rewards.outcome import OutcomePart
from rewards.repetition import RepetitionPart

PARTS: tuple[Reward, ...] = (OutcomePart(), CallsPart(), RepetitionPart())
"""Every part there is; ``RewardConfig`` has a weight of the same name for each."""


class RewardConfig(BaseModel):
    """Weights, one a part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outcome: float = Field(default=1.0, ge=0.0, le=1.0)
    """What solving the task is worth."""
    calls: float = Field(default=0.1, ge=0.0, le=1.0)
    """Taken off when every call is malformed or fails; pro rata below."""
    repetition: float = Field(default=0.1, ge=0.0, le=1.0)
    """Taken off when everything repeats; pro rata below."""


def score(rollout: Rollout, outcome: float, config: RewardConfig) -> Score:
    """``clip(w_outcome * outcome - sum over the others of w * (1 - part), 0, 1)``; ``outcome`` is kept as graded.

    So a failed episode is worth 0 however tidy it was: tidiness is never a way to earn. Raises RewardError if a part
    is no number in 0..1.
    """
    weights: dict[str, float] = config.model_dump()
    parts: dict[str, float] = {}
    value = 0.0
    for part in PARTS:
        number = part(rollout, outcome)
        if not (math.isfinite(number) and 0.0 <= number <= 1.0):
            raise RewardError(f"{part.name} of {rollout.id} is {number}, not a number in 0..1")
        parts[part.name] = number
        weight = weights[part.name]
        value += weight * number if part.name == "outcome" else -weight * (1.0 - number)
    return Score(value=min(1.0, max(0.0, value)), parts=parts, outcome=outcome)
