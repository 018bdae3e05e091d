"""What a loop is given, and the groups that go through it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.protocols import Engine
from posttrain.types import Rollout, Sample, Task


class RunRollout(Protocol):
    """One episode from task to score; never raises for what an episode may do."""

    async def __call__(self, engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout: ...


class Journal(Protocol):
    """Where rollouts go when they arrive."""

    def write(self, record: Rollout) -> None: ...


class TaskSource(Protocol):
    """Which task a group works on. What it learns from groups is its own, and part of the checkpoint."""

    def task(self, number: int, world: str) -> Task:
        """The task of group ``number``, of ``world`` if that is not empty. Asked once, as the group first starts, and
        after a kill again if that was after the checkpoint."""
        ...

    def seen(self, task: Task, rollouts: Sequence[Rollout]) -> None:
        """A group of ``task`` has ended; told in the order of the groups' numbers in synchronous mode."""
        ...

    def state(self) -> dict[str, Any]:
        """For ``restore``."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        ...


@dataclass(slots=True, kw_only=True)
class Group:
    """A group from its start until it is trained."""

    number: int
    task: Task
    kept: list[Rollout] = field(default_factory=list)
    """Rollouts from before a kill."""
    rollouts: list[Rollout] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    version: int = 0
    """No token of it is older."""


def derive_seed(*parts: object) -> int:
    """63 bits that depend on every part."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def oldest_version(group: Group) -> int:
    """Of all tokens that were sampled in it."""
    return min((r.oldest_version for r in group.rollouts if r.valid and r.oldest_version >= 0), default=group.version)


def spread(staleness: Sequence[int]) -> dict[str, float]:
    """Mean, maximum and histogram (groups) of the staleness in a batch."""
    counts = {f"staleness/{age}": float(n) for age, n in sorted(Counter(staleness).items())}
    return {"staleness_mean": sum(staleness) / len(staleness), "staleness_max": max(staleness), **counts}


def index_of(rollout: Rollout) -> int:
    """Place of the rollout in its group, whichever attempt it is."""
    return int(rollout.id.rsplit("/", 1)[1].split(".")[0])


def place_of(rollout: Rollout) -> tuple[int, int]:
    """Number of its group, and its place there."""
    return int(rollout.group.rsplit("/", 1)[1]), index_of(rollout)


def attempt_of(rollout: Rollout) -> int:
    """Which attempt at its place it was, from 0."""
    return int(rollout.id.rsplit("/", 1)[1].partition(".")[2] or 0)


def breaker(name: str, group: Group, count: int) -> str:
    """Why a run stops in which groups are worthless, one after the other."""
    errors = [f"{r.stop}: {r.error.message if r.error else 'no message'}" for r in group.rollouts if not r.valid]
    return f"{name}: {count} groups in a row had too few valid rollouts; look at rollouts/ and at: {errors[0]}"
