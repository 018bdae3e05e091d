"""Metrics of a batch, by hand."""

from __future__ import annotations

from dataclasses import replace

from experts.stats import batch_stats, staleness_by_length
from posttrain.groups import Group
from posttrain.types import Message, Rollout, Score, StopReason, ToolCall
from tests.posttrain.small import TASK, rollout, sample


def said(*texts: str) -> tuple[Message, ...]:
    return (*TASK.prompt, *(Message(role="assistant", content=t) for t in texts))


def played(place: int, tokens: int, version: int, **changes: object) -> Rollout:
    made = rollout(f"s/0/{place}", values=(5,) * tokens, versions=(version,) * tokens)
    return replace(made, task=TASK, **changes)  # pyright: ignore[reportArgumentType]


def test_staleness_of_the_shorter_and_of_the_longer_half() -> None:
    """Trained from version 7: lengths 1, 2 | 3, 9, 9 of versions 7, 6 | 5, 6, 4."""
    rollouts = [played(i, n, v) for i, (n, v) in enumerate([(9, 6), (1, 7), (3, 5), (2, 6), (9, 4)])]
    assert staleness_by_length(rollouts, 7) == {"staleness_short": 0.5, "staleness_long": 2.0}
    assert staleness_by_length(rollouts[:1], 7) == {}
    empty = played(5, 0, 0)
    assert staleness_by_length([*rollouts, empty], 7) == {"staleness_short": 0.5, "staleness_long": 2.0}


def test_a_batch() -> None:
    """Four rollouts, one of them invalid: means are over the other three, counts over all."""
    again = Message(role="assistant", content="", tool_calls=(ToolCall(name="f", arguments={}),))
    answer = Message(role="tool", content="1")
    cut = played(0, 4, 2, messages=said("a b", "c"), parse_errors=("open_call", "unfinished"), tool_errors=1)
    cut = replace(cut, stop=StopReason.CONTEXT_OVERFLOW, score=Score(value=0.25, outcome=0.0, parts={"format": 0.5}))
    looped = played(1, 2, 3, messages=(*TASK.prompt, again, answer, again, answer), stop=StopReason.LOOP)
    good = played(2, 6, 3, messages=said("done"), score=Score(value=1.0, outcome=1.0, parts={"format": 1.0}))
    broken = rollout("s/1/0", score=None)
    groups = [
        Group(number=0, task=TASK, rollouts=[cut, looped, good], samples=[sample("s/0/0")]),
        Group(number=1, task=TASK, rollouts=[broken]),
    ]
    assert batch_stats(groups, 4) == {
        "rollouts": 4,
        "invalid": 1,
        "parse_errors": 2 / 3,
        "parse_failures": 2 / 5,
        "tool_errors": 1 / 3,
        "sampled_tokens": 4.0,
        "truncated": 1 / 3,
        "repetition": 0.5 / 3,
        "silent_groups": 0.5,
        "stop/context_overflow": 1.0,
        "stop/loop": 1.0,
        "stop/scored": 1.0,
        "stop/infrastructure": 1.0,
        "reward": 0.75,
        "outcome": 2 / 3,
        "outcome/toy": 2 / 3,
        "reward/format": 0.75,
        "staleness_short": 0.0,
        "staleness_long": 0.5,
    }
