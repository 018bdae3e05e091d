"""Whether the agent's calls could be read and run."""

from __future__ import annotations

from posttrain.types import Rollout


class CallsPart:
    """1 less the share of calls that were malformed or answered with an error; 1 where nothing was called.

    A turn that could not be read counts as one call. An error that the tool made on its own (a busy desk) counts too:
    every rollout of the group meets it, so it cancels in the group's advantage.
    """

    name = "calls"

    def __call__(self, rollout: Rollout, outcome: float) -> float:
        """In 0..1."""
        unread = len(rollout.parse_errors)
        made = unread + sum(len(m.tool_calls) for m in rollout.messages if m.role == "assistant")
        return 1.0 - min(1.0, (unread + rollout.tool_errors) / made) if made else 1.0
