"""What becomes of a conversation that grows long: kept, summarised by the model itself, or begun anew.

LongCat-Flash-Thinking-2601 (arXiv 2601.16725) does the first of the two rewrites by length, the second at a limit of
turns, and both together. Tools keep their state through a rewrite; only what the model reads changes.
"""

from __future__ import annotations

from enum import Enum, auto

from pydantic import BaseModel, ConfigDict, Field

from posttrain.types import Message, Task

SUMMARISE = Message(role="user", content="summarise")
"""Asks for the summary."""


class ContextConfig(BaseModel):
    """When the context is rewritten. By default never; with both limits whichever is reached first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    summarise_above: int | None = Field(default=None, gt=0)
    """Tokens of context above which the model is asked for a summary, and goes on from the task and that."""
    summary_tokens: int = Field(default=64, gt=0)
    """Longest summary."""
    discard_after: int | None = Field(default=None, gt=0)
    """Turns after which everything but the task is forgotten."""
    rewrites: int = Field(default=8, ge=0)
    """Rewrites an episode, of both kinds together."""


class Rewrite(Enum):
    """What is done to the context."""

    SUMMARISE = auto()
    DISCARD = auto()


def due(config: ContextConfig, *, tokens: int, turns: int, rewrites: int) -> Rewrite | None:
    """The rewrite that a context of ``tokens`` is due for, ``turns`` after the last of so far ``rewrites``."""
    if rewrites >= config.rewrites:
        return None
    if config.discard_after is not None and turns >= config.discard_after:
        return Rewrite.DISCARD
    if config.summarise_above is not None and tokens > config.summarise_above:
        return Rewrite.SUMMARISE
    return None


def rewritten(task: Task, summary: str | None) -> list[Message]:
    """What the model reads from now on."""
    if summary is None:
        return list(task.prompt)
    return [*task.prompt, Message(role="user", content=f"so far: {summary}")]
