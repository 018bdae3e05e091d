"""Rollouts -> credit -> batch -> step -> weights, and around.

Three coroutines, joined by two stores that admission bounds; one TaskGroup, so that a crash anywhere ends the run.

- produce  waits for a free admission slot; ``learn`` frees slots when a version is published or a group is too old,
           ``collect`` when a group turns out to be worthless. It starts groups; a group is G rollouts side by side.
- collect  waits for a finished group (started by ``produce``), asks ``credit`` for samples, puts them on the shelf.
- learn    waits for a full batch on the shelf (filled by ``collect``), takes the oldest groups, steps beside the loop
           in a thread, publishes, waits until the engine has the weights. It alone is finite; its end ends the others.

Admission (AReaL): a group may start while ``running < max_running`` and ``running + accepted < (K + version + 1) * B``,
so what is trained at ``version`` started at ``version - K`` or later. ``max_staleness`` K = 0 is the synchronous mode:
groups start B at a time, the engine is asked in lockstep, and a run repeats bit for bit.

Every rollout is journalled when it arrives, before anything may drop it. A group whose number is not in the
checkpoint's ``finished`` is run again after a kill, with the journalled rollouts of it taken as they are. In
synchronous mode that goes for whole batches: the last bits of a log-prob depend on who shared its forward, so a batch
of groups that the kill cut short is sampled again, and comes out the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.engine.lockstep import Lockstep
from posttrain.protocols import Credit, Engine
from posttrain.settings import LoopConfig
from posttrain.trainer import Trainer
from posttrain.types import Rollout, Sample, StopReason, Task

log = logging.getLogger(__name__)


class RunRollout(Protocol):
    """One episode from task to score; never raises for what an episode may do."""

    async def __call__(self, engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout: ...


class Journal(Protocol):
    """Where rollouts go when they arrive."""

    def write(self, record: Rollout) -> None: ...


@dataclass(slots=True, kw_only=True)
class Group:
    """A finished group on its way to the trainer."""

    number: int
    rollouts: list[Rollout]
    samples: list[Sample] = field(default_factory=list)


def derive_seed(*parts: object) -> int:
    """63 bits that depend on every part."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Loop:
    """One stage of training. ``await run()`` once."""

    def __init__(
        self,
        config: LoopConfig,
        *,
        name: str,
        seed: int,
        engine: Engine,
        trainer: Trainer,
        credit: Credit,
        task: Callable[[int], Task],
        run_rollout: RunRollout,
        journal: Journal,
        on_step: Callable[[int, dict[str, float], Sequence[Group]], None],
        checkpoint: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.name, self.seed = config, name, seed
        self.engine: Engine = Lockstep(engine) if config.max_staleness == 0 else engine
        self.trainer, self.credit, self.task, self.run_rollout = trainer, credit, task, run_rollout
        self.journal, self.on_step, self.checkpoint = journal, on_step, checkpoint
        self.finished: set[int] = set()
        """Numbers of groups that are trained or dropped for good."""
        self.kept: dict[int, list[Rollout]] = {}
        """Journalled rollouts of unfinished groups, from before a kill."""
        self._next, self._accepted = 0, 0
        self._running: set[asyncio.Task[None]] = set()
        self._arrived: list[Group] = []
        self._shelf: list[Group] = []
        self._invalid_in_a_row = 0
        self._counts = {"dropped_stale": 0, "dropped_invalid": 0, "retries": 0}
        self._changed = asyncio.Condition()

    def resume(self, state: Mapping[str, Any], journalled: Sequence[Rollout]) -> None:
        """Continue from a checkpoint's state (see ``_state``) and everything the journal holds."""
        self.finished = set(state["finished"])
        self._accepted = state["accepted"]
        latest = {(int(r.group.rsplit("/", 1)[1]), _index(r)): r for r in journalled if r.valid}
        for (number, _), rollout in latest.items():
            if number not in self.finished:
                self.kept.setdefault(number, []).append(rollout)

    def _state(self) -> dict[str, Any]:
        trained = self.trainer.version * self.config.groups_per_step
        return {"finished": sorted(self.finished), "accepted": trained, "trainer": self.trainer.state()}

    async def run(self) -> None:
        """Train until ``config.steps`` versions exist. Raises what first went wrong in any coroutine, as it is."""
        if self.trainer.version >= self.config.steps:
            return
        await self.engine.load(self.trainer.publish())
        try:
            async with asyncio.TaskGroup() as tasks:
                helpers = [tasks.create_task(self._produce(tasks)), tasks.create_task(self._collect())]
                await self._learn()
                for helper in [*helpers, *self._running]:
                    helper.cancel()
        except BaseExceptionGroup as group:
            first, *others = _leaves(group)
            for other in others:
                log.error("%s: then also %s: %s", self.name, type(other).__name__, other)
            raise first from None

    async def _until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until ``ready()``; bounded and named."""
        try:
            async with asyncio.timeout(self.config.wait_s), self._changed:
                await self._changed.wait_for(ready)
        except TimeoutError as error:
            raise TimeoutError(
                f"{self.name}: waited {self.config.wait_s:g} s for {what} at version {self.trainer.version}: "
                f"{len(self._running)} groups running, {len(self._arrived)} arrived, {len(self._shelf)} on the shelf"
            ) from error

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _slots(self) -> int:
        c = self.config
        running = len(self._running) + len(self._arrived)
        if c.max_staleness == 0 and running:
            return 0
        ahead = (c.max_staleness + self.trainer.version + 1) * c.groups_per_step - self._accepted - running
        limit = c.groups_per_step if c.max_staleness == 0 else c.max_running
        return min(limit - len(self._running), ahead)

    async def _produce(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await self._until(lambda: self._slots() > 0, "an admission slot")
            batch = [self._claim() for _ in range(self._slots())]
            cut_short = any(len(kept) < self.config.group_size for _, kept in batch)
            for number, kept in batch:
                if isinstance(self.engine, Lockstep):
                    kept = [] if cut_short else kept
                    self.engine.enter(self.config.group_size - len(kept))
                running = tasks.create_task(self._group(number, kept), name=f"{self.name}/{number}")
                self._running.add(running)
                running.add_done_callback(self._running.discard)

    def _claim(self) -> tuple[int, list[Rollout]]:
        """Number of the next group to start, and what the journal held of it."""
        while self._next in self.finished:
            self._next += 1
        number, self._next = self._next, self._next + 1
        return number, self.kept.pop(number, [])

    async def _group(self, number: int, kept: list[Rollout]) -> None:
        task, taken = self.task(number), {_index(r) for r in kept}
        missing = [i for i in range(self.config.group_size) if i not in taken]
        async with asyncio.TaskGroup() as episodes:  # not gather, which would leave the others behind on an error
            made = [episodes.create_task(self._one(task, number, index)) for index in missing]
        rollouts = sorted([*kept, *(m.result() for m in made)], key=lambda r: r.id)
        self._arrived.append(Group(number=number, rollouts=rollouts))
        self._running.discard(asyncio.current_task())  # pyright: ignore[reportArgumentType]
        await self._notify()

    async def _one(self, task: Task, number: int, index: int) -> Rollout:
        group = f"{self.name}/{number}"
        try:
            for attempt in range(self.config.attempts):
                rollout_id = f"{group}/{index}" + (f".{attempt}" if attempt else "")
                seed = derive_seed(self.seed, rollout_id)
                rollout = await self.run_rollout(self.engine, task, rollout_id, group, seed)
                self.journal.write(rollout)
                if rollout.valid or rollout.stop is StopReason.CANCELLED:
                    break
                self._counts["retries"] += 1
                log.warning("%s: %s (%s)", rollout_id, rollout.stop, rollout.error and rollout.error.message)
            return rollout  # pyright: ignore[reportPossiblyUnboundVariable]  # attempts > 0
        finally:
            if isinstance(self.engine, Lockstep):
                self.engine.leave()

    async def _collect(self) -> None:
        while True:
            await self._until(lambda: bool(self._arrived), "a finished group")
            group = self._arrived[0]
            valid = [r for r in group.rollouts if r.valid]
            if len(valid) >= max(1, self.config.group_size // 2):
                group.samples = await asyncio.to_thread(self.credit, valid)
                self._shelf.append(group)
                self._accepted += 1
                self._invalid_in_a_row = 0
            else:
                self._drop(group, "dropped_invalid")
                self._invalid_in_a_row += 1
                if self._invalid_in_a_row > self.config.max_invalid_groups:
                    raise RuntimeError(_breaker(self.name, group, self._invalid_in_a_row))
            self._arrived.remove(group)
            await self._notify()

    def _drop(self, group: Group, why: str) -> None:
        self.finished.add(group.number)
        self._counts[why] += 1

    def _staleness(self, group: Group) -> int:
        versions = [r.oldest_version for r in group.rollouts if r.valid and r.oldest_version >= 0]
        return max(0, self.trainer.version - min(versions, default=self.trainer.version))

    async def _learn(self) -> None:
        c = self.config
        while self.trainer.version < c.steps:
            started = time.monotonic()
            await self._until(self._full, f"{c.groups_per_step} groups to train on")
            self._shelf.sort(key=lambda g: g.number)
            batch, self._shelf = self._shelf[: c.groups_per_step], self._shelf[c.groups_per_step :]
            staleness = [self._staleness(g) for g in batch]
            waited = time.monotonic() - started
            samples = [s for g in batch for s in g.samples]
            rollouts = sum(r.valid for g in batch for r in g.rollouts)
            stats = await asyncio.to_thread(self.trainer.step, samples, rollouts)
            stepped = time.monotonic() - started - waited
            self.trainer.version += 1
            await self.engine.load(self.trainer.publish())
            self.finished |= {g.number for g in batch}
            stats |= {
                "staleness_mean": sum(staleness) / len(staleness),
                "staleness_max": max(staleness),
                "time/wait_s": waited,
                "time/step_s": stepped,
                "time/publish_s": time.monotonic() - started - waited - stepped,
            }
            self.on_step(self.trainer.version, stats | {k: float(v) for k, v in self._counts.items()}, batch)
            if self.trainer.version % c.checkpoint_every == 0 or self.trainer.version == c.steps:
                self.checkpoint(self._state())
            await self._notify()

    def _full(self) -> bool:
        """Whether a batch is there, after throwing out what has grown too old (admission makes that rare)."""
        for group in [g for g in self._shelf if self._staleness(g) > self.config.max_staleness]:
            self._shelf.remove(group)
            self._accepted -= 1
            self._drop(group, "dropped_stale")
        return len(self._shelf) >= self.config.groups_per_step


def _index(rollout: Rollout) -> int:
    """Place of the rollout in its group, whichever attempt it is."""
    return int(rollout.id.rsplit("/", 1)[1].split(".")[0])


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The errors in a group of groups, in the order in which they came."""
    return [e for x in group.exceptions for e in (_leaves(x) if isinstance(x, BaseExceptionGroup) else [x])]


def _breaker(name: str, group: Group, count: int) -> str:
    errors = [f"{r.stop}: {r.error.message if r.error else 'no message'}" for r in group.rollouts if not r.valid]
    return f"{name}: {count} groups in a row had too few valid rollouts; look at rollouts/ and at: {errors[0]}"
