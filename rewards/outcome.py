"""Whether the task was solved."""

from __future__ import annotations

from posttrain.types import Rollout


class OutcomePart:
    """What the session's grader said, as it said it."""

    name = "outcome"

    def __call__(self, rollout: Rollout, outcome: float) -> float:
        """``outcome``."""
        return outcome
