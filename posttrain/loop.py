"""Rollouts -> credit -> batch -> step -> weights, and around.

Three coroutines and a watcher in one TaskGroup, so that a crash anywhere ends the run. Who may start and what is
trained next is the scheduler's business (``posttrain.scheduler``).

- produce  waits for a free admission slot; ``learn`` frees slots when a version is published or a group is given up,
           ``collect`` when a group turns out to be worthless. It starts groups; a group is G rollouts side by side.
- collect  waits for a finished group (started by ``produce``), asks ``credit`` for samples, puts them on the shelf.
- learn    waits for a full batch on the shelf (filled by ``collect``), takes the oldest groups, steps beside the loop
           in a thread, publishes, waits until the engine has the weights. It alone is finite; its end ends the others.
- tell     waits for nobody: it writes down, again and again, who waits for what (``posttrain.waits``).

``max_staleness`` K = 0 is the synchronous mode: groups start B at a time, the engine is asked in lockstep, and a run
repeats bit for bit.

Every rollout is journalled when it arrives, before anything may drop it. A group whose number is not in the
checkpoint's ``finished`` is run again after a kill, with those journalled rollouts of it that batches in time have room
for (``Scheduler.oldest``). In synchronous mode that goes for whole batches: the last bits of a log-prob depend on who
shared its forward, so a batch of groups that the kill cut short is sampled again, and comes out the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain import waits
from posttrain.engine.lockstep import Lockstep
from posttrain.engine.pinned import Pinned
from posttrain.errors import EngineError, in_order
from posttrain.groups import (
    Group,
    Journal,
    RunRollout,
    TaskSource,
    attempt_of,
    breaker,
    derive_seed,
    index_of,
    oldest_version,
    place_of,
    spread,
)
from posttrain.journal import task_from_dict, task_to_dict
from posttrain.protocols import Credit, Engine
from posttrain.scheduler import Scheduler
from posttrain.settings import LoopConfig
from posttrain.threads import Beside
from posttrain.trainer import Trainer
from posttrain.types import Culprit, Rollout, Sample, Task

log = logging.getLogger(__name__)

_LOG_S = 60.0
"""At most, between two times that a wait of the trainer's is logged."""


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
        source: TaskSource,
        run_rollout: RunRollout,
        journal: Journal,
        on_step: Callable[[int, dict[str, float], Sequence[Group]], None],
        checkpoint: Callable[[dict[str, Any]], None],
        shares: Mapping[str, float] | None = None,
        oversample: Mapping[str, float] | None = None,
        waits_file: Path | None = None,
    ) -> None:
        self.config, self.name, self.seed = config, name, seed
        self.engine: Engine = Lockstep(engine) if config.max_staleness == 0 else engine
        self.trainer, self.credit, self.source, self.run_rollout = trainer, credit, source, run_rollout
        self.journal, self.on_step, self.checkpoint, self.waits_file = journal, on_step, checkpoint, waits_file
        parts = shares if config.quotas else None
        self.books = Scheduler(config, version=trainer.version, shares=parts, oversample=oversample)
        self.finished: set[int] = set()
        """Numbers of groups that are trained or dropped for good."""
        self.kept: dict[int, list[Rollout]] = {}
        """Journalled rollouts of unfinished groups, from before a kill."""
        self.groups: dict[int, Group] = {}
        """Groups that were started and may still be trained."""
        self._tasks: dict[int, Task] = {}
        """Tasks of groups that are to be started again."""
        self._again: set[int] = set()
        """Groups that were given up and start anew before any other."""
        self._attempts: defaultdict[int, Counter[int]] = defaultdict(Counter)
        """Rollouts made so far for the places of an unfinished group: each has a name and a seed of its own."""
        self._next = 0
        self._playing: dict[int, asyncio.Task[None]] = {}
        self._arrived: list[Group] = []
        self._unseen: list[Group] = []
        self._seen: set[int] = set()
        """Groups from before a kill that the source was told of."""
        self._invalid_in_a_row = 0
        self._counts: dict[str, int] = dict.fromkeys(("stale", "evicted", "dropped_invalid", "filtered", "retries"), 0)
        self._changes = waits.Changes(config.wait_s)
        self._training, self._judging = Beside("trainer"), Beside("credit")
        self._rollout_at = self._group_at = time.monotonic()
        """When a rollout came last; when there was news for the trainer: a group, a step, or one that had failed."""

    def resume(self, state: Mapping[str, Any], journalled: Sequence[Rollout]) -> None:
        """Continue from a checkpoint's state (see ``state``) and everything the journal holds."""
        self.finished = set(state["finished"])
        self.books.accepted = state["accepted"]
        if "source" in state:
            self.source.restore(state["source"])
        if "books" in state:
            self.books.restore(state["books"])
            self._tasks = {int(n): task_from_dict(t) for n, t in state["tasks"].items()}
            self._seen = set(state["seen"])
            self._counts |= state["counts"]
        for rollout in {place_of(r): r for r in journalled if r.valid}.values():
            number, _ = place_of(rollout)
            if number not in self.finished:
                self.kept.setdefault(number, []).append(rollout)
            elif (was := self.books.spent.get(number)) and not 0 <= rollout.oldest_version < was.version:  # given up
                again = Group(number=number, task=rollout.task, version=was.version)
                self.groups.setdefault(number, again).rollouts.append(rollout)
        if self.config.max_staleness:  # else a batch that was cut short comes out as it was, names and all
            for (number, index), rollout in [(place_of(r), r) for r in journalled]:
                if number not in self.finished:
                    self._attempts[number][index] = max(self._attempts[number][index], attempt_of(rollout) + 1)

    def state(self) -> dict[str, Any]:
        """For ``resume``, taken between two steps; the trainer's is in it."""
        self._tell_source()
        open_groups = {n: g.task for n, g in self.groups.items() if n not in self.finished} | self._tasks
        return {
            "finished": sorted(self.finished),
            "accepted": self.trainer.version * self.config.groups_per_step,
            "books": self.books.state(),
            "source": self.source.state(),
            "tasks": {str(n): task_to_dict(t) for n, t in sorted(open_groups.items())},
            "seen": sorted(self._seen | {*self.books.shelf}),
            "counts": dict(self._counts),
            "trainer": self.trainer.state(),
        }

    async def run(self) -> None:
        """Train until ``config.steps`` versions exist. Raises what first went wrong in any coroutine, as it is."""
        if self.trainer.version >= self.config.steps:
            return
        await self._load()
        try:
            for group in self.groups.values():  # of before a kill, to be trained once more
                group.rollouts.sort(key=lambda r: r.id)
                group.samples = await self._credit(group.number, group.rollouts)
            async with asyncio.TaskGroup() as tasks:
                who, every = f"{self.name}: learn", min(_LOG_S, self.config.wait_s / 10)
                telling = waits.telling(self.waits_file, self._queues, who, every)
                helpers = list[asyncio.Task[None]]()
                with waits.acting(who):  # a task too: a group puts an error of its own body last, whenever that came
                    tasks.create_task(self._learn(helpers))
                helpers += [tasks.create_task(x) for x in (self._produce(tasks), self._collect(), telling)]
        except BaseExceptionGroup as group:
            first, *others = in_order(group)
            for other in others:
                log.error("%s: then also %s: %s", self.name, type(other).__name__, other)
            raise first from None
        finally:
            self._training.close()
            self._judging.close()

    async def _until(self, ready: Callable[[], bool], what: Callable[[], str], moved: Callable[[], float]) -> None:
        """Wait until ``ready()``; bounded and named."""
        try:
            await self._changes.until(ready, what, moved)
        except TimeoutError as error:
            found = waits.text(waits.snapshot(self._queues()), time.time())
            raise TimeoutError(f"{self.name}: {error} at version {self.trainer.version}: {found}") from error

    def _moved(self) -> float:
        return max(self._rollout_at, self._group_at)

    def _queues(self) -> dict[str, float]:
        books = self.books
        return {
            "running groups": sum(t.running > 0 for t in books.running.values()),
            "running rollouts": sum(t.running for t in books.running.values()),
            "arrived groups": len(self._arrived),
            "groups on the shelf": len(books.shelf),
            "free slots": books.slots(),
        }

    async def _produce(self, tasks: asyncio.TaskGroup) -> None:
        with waits.acting(f"{self.name}: produce"):
            while True:
                await self._until(lambda: self.books.slots() > 0, lambda: "an admission slot", self._moved)
                self._tell_source()
                batch = [self._claim() for _ in range(self.books.slots())]
                if isinstance(self.engine, Lockstep) and any(len(g.kept) < self._size(g.task) for g in batch):
                    for group in batch:
                        group.kept = []
                        self.books.running[group.number].running = self._size(group.task)
                for group in batch:
                    self._play(group, tasks)

    def _tell_source(self) -> None:
        for group in sorted(self._unseen, key=lambda g: g.number):
            self.source.seen(group.task, [r for r in group.rollouts if r.valid])
        self._unseen.clear()

    def _claim(self) -> Group:
        """The next group to start: the first number that was neither trained nor started."""
        while self._next in self.finished or self._next in self.groups:
            self._next += 1
        number = min(self._again, default=self._next)
        self._again.discard(number)
        found = self.kept.pop(number, [])
        oldest = self.books.oldest()
        kept = [r for r in found if r.oldest_version >= oldest]
        task = self._tasks.pop(number, None)
        if task is None:
            task = self.source.task(number, self.books.world() if self.books.shares else "")
            # Of a group that started after the checkpoint, the source may give another task now, or another size.
            task = next((r.task for r in found if (r.task.id, r.task.rollouts) != (task.id, task.rollouts)), task)
        group = self.groups[number] = Group(number=number, task=task, kept=kept)
        began = min((r.oldest_version for r in kept if r.oldest_version >= 0), default=None)
        group.version = self.books.start(number, self._size(task) - len(kept), task.world, began).version
        return group

    def _size(self, task: Task) -> int:
        """Rollouts of a group of it."""
        return task.rollouts or self.config.group_size

    def _play(self, group: Group, tasks: asyncio.TaskGroup) -> None:
        if isinstance(self.engine, Lockstep):
            self.engine.enter(self._size(group.task) - len(group.kept))
        playing = tasks.create_task(self._group(group), name=f"{self.name}/{group.number}")
        self._playing[group.number] = playing

    async def _group(self, group: Group) -> None:
        taken = {index_of(r) for r in group.kept}
        missing = [i for i in range(self._size(group.task)) if i not in taken]
        engine = self.engine
        if self.config.versions == "pinned":
            engine = Pinned(engine, self.books.running[group.number].pinned)
        async with asyncio.TaskGroup() as episodes:  # not gather, which would leave the others behind on an error
            made = [episodes.create_task(self._one(engine, group, index)) for index in missing]
        group.rollouts = sorted([*group.kept, *(m.result() for m in made)], key=lambda r: r.id)
        self._arrived.append(group)
        del self._playing[group.number]
        await self._changes.tell()

    async def _one(self, engine: Engine, group: Group, index: int) -> Rollout:
        name, attempts = f"{self.name}/{group.number}", self._attempts[group.number]
        rollout: Rollout | None = None
        try:
            for tried in range(self.config.attempts):
                attempt = attempts[index]
                attempts[index] += 1
                rollout_id = f"{name}/{index}" + (f".{attempt}" if attempt else "")
                seed = derive_seed(self.seed, rollout_id)
                with waits.acting(rollout_id):
                    rollout = await self.run_rollout(engine, group.task, rollout_id, name, seed)
                self.journal.write(rollout)
                self._rollout_at = time.monotonic()
                if rollout.valid:
                    break
                self._group_at = self._rollout_at
                self._counts["retries"] += 1
                log.warning("%s: %s (%s)", rollout_id, rollout.stop, rollout.error and rollout.error.message)
                if tried + 1 < self.config.attempts:
                    with waits.acting(rollout_id), waits.waiting("what broke to come back"):
                        await asyncio.sleep(self.config.retry_s * 2**tried)
            assert rollout is not None  # attempts > 0
            if rollout.error is not None and rollout.error.culprit is Culprit.ENGINE:  # it serves all, or nobody
                raise EngineError(f"{rollout.id}: {rollout.error.message}")
            if not self._given_up(group):  # in this very moment, before it was told to stop
                self.books.rollout_done(group.number)
            return rollout
        finally:
            if isinstance(self.engine, Lockstep):
                self.engine.leave()

    async def _collect(self) -> None:
        with waits.acting(f"{self.name}: collect"):
            while True:
                await self._until(lambda: bool(self._arrived), lambda: "a finished group", self._moved)
                group = self._arrived[0]
                if not self._given_up(group):
                    await self._judge(group, [r for r in group.rollouts if r.valid])
                del self._arrived[0]
                await self._changes.tell()

    async def _judge(self, group: Group, valid: Sequence[Rollout]) -> None:
        number, again = group.number, group.number in self._seen and bool(group.kept)
        if len(valid) < max(1, self._size(group.task) // 2):
            self._drop(number, "dropped_invalid")
            self._invalid_in_a_row += 1
            if self._invalid_in_a_row > self.config.max_invalid_groups:
                raise RuntimeError(breaker(self.name, group, self._invalid_in_a_row))
        else:
            self._invalid_in_a_row = 0
            group.samples = await self._credit(number, valid)
            if self._given_up(group):  # meanwhile
                return
            if self.config.filter_silent and not group.samples:
                self._drop(number, "filtered")
            else:
                self.books.shelve(number, again)
                self._group_at = time.monotonic()
        self._seen.discard(number)
        if not again:
            self._unseen.append(group)

    async def _credit(self, number: int, valid: Sequence[Rollout]) -> list[Sample]:
        with waits.waiting(f"the credit of group {number}"):
            return await self._judging.run(self.credit, valid, patience_s=self.config.wait_s)

    def _drop(self, number: int, why: str) -> None:
        self.books.drop(number)
        del self.groups[number]
        self._finish(number)
        self._counts[why] += 1

    def _finish(self, number: int) -> None:
        self.finished.add(number)
        self._attempts.pop(number, None)

    async def _learn(self, helpers: Sequence[asyncio.Task[None]]) -> None:
        c = self.config
        while self.trainer.version < c.steps:
            started = time.monotonic()
            await self._until(self.books.ready, self._wanted, lambda: self._group_at)
            batch, staleness = self._take()
            await self._changes.tell()  # what was evicted may start again, while this step goes on
            waited = time.monotonic() - started
            samples, rollouts = [s for g in batch for s in g.samples], sum(r.valid for g in batch for r in g.rollouts)
            with waits.waiting(f"a trainer step on {len(samples)} samples"):
                stats = await self._training.run(self.trainer.step, samples, rollouts, patience_s=c.wait_s)
            self._group_at = time.monotonic()
            stepped = time.monotonic() - started - waited
            self.trainer.version += 1
            await self._load()
            self._group_at = time.monotonic()
            stats |= spread(staleness) | {
                "time/wait_s": waited,
                "time/step_s": stepped,
                "time/publish_s": time.monotonic() - started - waited - stepped,
            }
            self.on_step(self.trainer.version, stats | {k: float(v) for k, v in self._counts.items()}, batch)
            if self.trainer.version % c.checkpoint_every == 0 or self.trainer.version == c.steps:
                self.checkpoint(self.state())
            await self._changes.tell()
        for other in [*helpers, *self._playing.values()]:
            other.cancel()

    def _wanted(self) -> str:
        """What the trainer waits for."""
        due = self.books.due() if self.config.stragglers == "drain" and self.config.max_staleness else []
        if due and len(self.books.shelf) >= self.config.groups_per_step:
            return f"group {due[0]}, which must be trained before version {self.trainer.version + 1}"
        return f"{self.config.groups_per_step} groups to train on"

    def _take(self) -> tuple[list[Group], list[int]]:
        """The groups of the next step, and the staleness of each."""
        taken = self.books.take()
        for number in taken.stale:
            self._give_up(number, "stale")
        for number in self.books.due():
            if number in self._playing:  # else it is being judged
                self._playing.pop(number).cancel()
            self.books.drop(number, useless=False)
            self._give_up(number, "evicted")
        batch = [self.groups[n] for n in sorted((*taken.batch, *taken.reused))]
        for number in taken.batch:
            self._finish(number)
        self.groups = {n: g for n, g in self.groups.items() if n not in self.finished or n in self.books.spent}
        return batch, [max(0, self.trainer.version - oldest_version(g)) for g in batch]

    def _given_up(self, group: Group) -> bool:
        return self.groups.get(group.number) is not group

    def _give_up(self, number: int, why: str) -> None:
        """A group that is too old to be trained: its task starts again, on the newest version."""
        self._tasks[number] = self.groups.pop(number).task
        self._again.add(number)
        self._counts[why] += 1

    async def _load(self) -> None:
        keep = self.books.resident() if self.config.versions == "pinned" and self.config.max_staleness else ()
        with waits.waiting(f"the engine to take version {self.trainer.version}"):
            await self.engine.load(self.trainer.publish(), keep)
        self.books.published(self.trainer.version)
