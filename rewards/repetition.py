"""Whether the agent repeats itself to no end."""

from __future__ import annotations

import json
from collections.abc import Sequence

from posttrain.types import Message, Rollout

NGRAM = 6
"""Words in a row that count as one phrase. Long enough that saying a word five times, when asked to, is none."""


class RepetitionPart:
    """1 less the larger of two shares: calls made before with the same answer, and phrases said before.

    A call that is made again after an error and then answered differently is no repetition. Phrases are counted
    within one message, thinking and visible text together: two requests may well need the same words.
    """

    name = "repetition"

    def __call__(self, rollout: Rollout, outcome: float) -> float:
        """In 0..1."""
        texts = [f"{m.thinking} {m.content}" for m in rollout.messages[len(rollout.task.prompt) :] if _agent(m)]
        return 1.0 - max(repeated_calls(rollout.messages), max(map(repeated_phrases, texts), default=0.0))


def repeated_calls(messages: Sequence[Message]) -> float:
    """Share of calls that were made before, arguments and answer alike."""
    seen: set[tuple[str, str, str]] = set()
    total = 0
    for i, message in enumerate(messages):
        for j, call in enumerate(message.tool_calls):
            after = messages[i + 1 + j] if i + 1 + j < len(messages) else None
            answer = after.content if after is not None and after.role == "tool" else ""
            seen.add((call.name, json.dumps(dict(call.arguments), sort_keys=True, default=str), answer))
            total += 1
    return 1.0 - len(seen) / total if total else 0.0


def repeated_phrases(text: str) -> float:
    """Share of ``text``'s phrases of ``NGRAM`` words that occurred in it before."""
    words = text.split()
    phrases = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return 1.0 - len(set(phrases)) / len(phrases) if phrases else 0.0


def _agent(message: Message) -> bool:
    return message.role == "assistant"
