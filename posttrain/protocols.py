"""The seams. Whatever differs between a laptop and a cluster is behind one of these; each has a contract suite."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import Protocol, runtime_checkable

from posttrain.types import (
    Completion,
    ExecResult,
    Message,
    Rollout,
    Sample,
    Sampling,
    Task,
    TeacherScores,
    Tool,
    ToolCall,
    Weights,
)


@runtime_checkable
class Engine(Protocol):
    """Samples from a policy. Log-probs it returns equal the trainer's for the same weights and tokens."""

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        """Continue ``ids``. Raises EngineError if the engine died, the bound on the wait ran out, or the version that
        the request is pinned to is not resident, or is dropped meanwhile."""
        ...

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None:
        """Make ``weights`` the newest version; returns when new requests will sample from it. Versions in ``keep`` stay
        resident beside it, and requests pinned to one of them (``Sampling.version``) go on there; every other older
        version is dropped, and requests that are not pinned go on under the new weights."""
        ...

    async def close(self) -> None:
        """Free everything; idempotent."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """Judges a student's own tokens."""

    def score(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[bool]]) -> list[TeacherScores]:
        """Log-prob of every masked token of each sequence given the tokens before it; and the support at these places,
        if the teacher was made to give one."""
        ...


@runtime_checkable
class Sandbox(Protocol):
    """Where model output runs. Every method raises SandboxError if the sandbox itself is broken."""

    @property
    def profile(self) -> str:
        """How it is isolated, to be recorded with results."""
        ...

    async def exec(self, command: str, *, timeout_s: float = 10.0, stdin: str = "") -> ExecResult:
        """Run ``command`` (Python source for a Python sandbox, shell for a container)."""
        ...

    async def read(self, path: str) -> bytes:
        """Contents of a file under the work folder. Raises FileNotFoundError or PermissionError (escape)."""
        ...

    async def write(self, path: str, data: bytes) -> None:
        """Create or replace a file under the work folder. Raises PermissionError on escape."""
        ...

    async def close(self) -> None:
        """Free everything, killing what still runs; idempotent."""
        ...


@runtime_checkable
class Session(Protocol):
    """One opened task: the state that the tools change. One that runs code may have an attribute ``profile``, a string
    that says how that is isolated."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What the model may call."""
        ...

    async def call(self, call: ToolCall) -> str:
        """Run one tool. Raises ToolError for what the model should read, SandboxError for broken infrastructure."""
        ...

    async def reply(self, message: Message) -> Message | None:
        """The user's next words after a message without calls, or None when the conversation is over."""
        ...

    async def grade(self, messages: Sequence[Message]) -> float:
        """Outcome in 0..1 from the final state and the conversation."""
        ...

    async def close(self) -> None:
        """Free everything; idempotent."""
        ...


@runtime_checkable
class World(Protocol):
    """A family of tasks with the state and the tools they need."""

    name: str
    domain: str

    def tasks(self, split: str, n: int, seed: int) -> list[Task]:
        """``n`` tasks of ``split`` ('demo', 'train' or 'eval'); the same arguments give the same
        tasks, and the splits are disjoint."""
        ...

    async def demonstrate(self, task: Task, rng: Random) -> list[Message]:
        """What follows the prompt in one demonstration, the habit (good or bad) drawn from ``rng``; tool messages
        hold what the real session answered."""
        ...

    async def open(self, task: Task) -> Session:
        """A fresh session. Raises SandboxError if it cannot be had."""
        ...

    async def check(self) -> dict[str, float]:
        """Scores of the reference and of the empty solution: must be ``{'reference': 1.0, 'empty': 0.0}``."""
        ...


@runtime_checkable
class Reward(Protocol):
    """What is good: a finished episode in, a named part out."""

    name: str

    def __call__(self, rollout: Rollout, outcome: float) -> float:
        """Part of the score. Pure; ``outcome`` is what the session's grader said."""
        ...


@runtime_checkable
class Credit(Protocol):
    """Turns a finished group into training samples."""

    def __call__(self, group: Sequence[Rollout]) -> list[Sample]:
        """Samples with an advantage or teacher log-probs; empty if the group teaches nothing."""
        ...


__all__ = [
    "Credit",
    "Engine",
    "Reward",
    "Sandbox",
    "Session",
    "Teacher",
    "World",
]
