"""A stage as it would go, by events: the loop's own scheduler, driven by a clock that nobody waits for.

Rollouts sample a turn on a device, wait for the environment, and so on; a group whose rollouts are all there goes to
the shelf; the trainer takes batches, steps and publishes. What starts when, on which version, and what is trained next
is ``posttrain.scheduler``'s, as in ``posttrain.loop``. Equal configs give equal results.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from posttrain.scheduler import Scheduler, Ticket
from posttrain.simulate_devices import Device, Fleet, Request
from posttrain.simulate_draws import Sampler
from posttrain.simulate_settings import SimulationConfig


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the steps after the warm-up came to."""

    steps: int
    seconds: float
    """That they took."""
    steps_per_hour: float
    tokens_per_s: float
    """Sampled tokens that were trained on, a second; those of reused groups once more."""
    trainer_idle: float
    """Share of the time that the trainer waited for a batch."""
    engines_busy: float
    """Share of the time that a device had a request, over the devices."""
    load_ratio: float
    """Running requests over capacity, over devices and time."""
    staleness: dict[int, int]
    """Groups trained, by the versions between their oldest token and what they trained."""
    staleness_mean: float
    groups_in_system: float
    """Groups started and not yet taken, over time. Over B it is about the mean staleness (Little's law)."""
    resident_versions: int
    """Versions that sampled at once, at most."""
    mixed: float
    """Share of the trained rollouts that have tokens of more than one version."""
    evicted: int
    """Groups that were given up for their age and started anew; with ``drain`` there are none."""
    filtered: int
    """Groups without a signal that were replaced."""
    reused: int
    """Places in batches that trained groups filled once more."""
    worlds: dict[str, float]
    """Shares in the batches."""
    requests: int
    """Turns that were asked for."""
    moved: int
    """Requests that went on on another device, caches and all."""
    recomputed_tokens: float
    """Whose cache was made anew under new weights."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Group:
    number: int
    world: str
    ticket: Ticket
    silent: bool
    tokens: float
    requests: list[Request] = field(default_factory=list)
    oldest: int = 0


@dataclass(slots=True)
class _Counts:
    """What is measured from the end of the warm-up on."""

    since: float = 0.0
    steps: int = 0
    tokens: float = 0.0
    idle: float = 0.0
    in_system: float = 0.0
    staleness: Counter[int] = field(default_factory=Counter[int])
    worlds: Counter[str] = field(default_factory=Counter[str])
    rollouts: int = 0
    mixed: int = 0
    resident: int = 0
    asked: int = 0
    events: Counter[str] = field(default_factory=Counter[str])


class Simulation:
    """One stage. ``run()`` once. ``on_step`` hears the number of every step."""

    def __init__(self, config: SimulationConfig, on_step: Callable[[int], None] = lambda step: None) -> None:
        self.config, self.on_step = config, on_step
        c = config.loop
        self.shares = {w: load.share for w, load in sorted(config.worlds.items())}
        self.books = Scheduler(c, shares=self.shares if c.quotas else None)
        self.pinned = c.versions == "pinned"
        self.lockstep = config.engines.lockstep and c.max_staleness == 0
        self.fleet = Fleet(config.engines, pinned=self.pinned, wake=self._wake)
        self._samplers = {
            w: (Sampler(load.turns), Sampler(load.tokens), Sampler(load.latency)) for w, load in config.worlds.items()
        }
        self.groups: dict[int, _Group] = {}
        """Started and not yet trained or given up."""
        self.spent: dict[int, _Group] = {}
        """Trained; may be trained once more."""
        self.rollouts: Counter[int] = Counter()
        """Under way, a version that was the newest when they started."""
        self.now = 0.0
        self.counts = _Counts()
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._order = itertools.count()
        self._next = 0
        self._again: set[int] = set()
        self._attempts: Counter[int] = Counter()
        self._held: list[Request] = []
        self._waits_since: float | None = 0.0
        """The trainer's."""
        self._watched = 0.0

    def run(self) -> Outcome:
        """All steps. Raises RuntimeError if nothing can go on any more."""
        self._start()
        if self.fleet.apart:
            self._later(self.config.engines.rebalance_s, self._rebalance, None)
        while self.books.version < self.config.loop.steps:
            if not self._events:
                raise RuntimeError(f"at version {self.books.version} nothing is left to happen: {self.books.running}")
            self.now, _, happen, what = heapq.heappop(self._events)
            happen(what)
        return self._outcome()

    def _later(self, seconds: float, happen: Callable[..., None], what: Any) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), happen, what))

    def _wake(self, at: float, device: Device) -> None:
        heapq.heappush(self._events, (at, next(self._order), self._sampled, device))

    # Rollouts

    def _start(self) -> None:
        for _ in range(self.books.slots()):
            self._begin()
        self._release()
        if self.fleet.lacks(self.books.version):
            self.fleet.repartition(self.now, self.rollouts)

    def _begin(self) -> None:
        number = min(self._again, default=self._next)
        self._again.discard(number)
        self._next = max(self._next, number + 1)
        size = self.config.loop.group_size
        rng = np.random.default_rng([self.config.seed, number])
        names = list(self.shares)
        drawn = names[
            int(np.searchsorted(np.cumsum([*self.shares.values()]), rng.random() * sum(self.shares.values())))
        ]
        world = self.books.world() if self.books.shares else drawn
        load = self.config.worlds[world]
        silent = self.config.loop.filter_silent and rng.random() < load.silent
        self._watch()
        ticket = self.books.start(number, size, world)
        rng = np.random.default_rng([self.config.seed, number, self._attempts[number]])
        turns, tokens, latency = self._samplers[world]
        counts = np.maximum(1, np.rint(turns.draw(rng, size))).astype(int).tolist()
        lengths = np.maximum(1.0, np.rint(tokens.draw(rng, size, max(counts)))).tolist()
        waits = latency.draw(rng, size, max(counts)).tolist()
        total = sum(sum(row[:n]) for row, n in zip(lengths, counts, strict=True))
        group = _Group(number=number, world=world, ticket=ticket, silent=silent, tokens=total)
        self.groups[number] = group
        self.rollouts[ticket.pinned] += size
        for row, wait, n in zip(lengths, waits, counts, strict=True):
            request = Request(group, ticket.pinned, row[:n], wait[:n], load.prompt_tokens)
            group.requests.append(request)
            self._ask(request)

    def _ask(self, request: Request) -> None:
        if self.lockstep:
            self._held.append(request)
        else:
            self.fleet.ask(self.now, request)

    def _release(self) -> None:
        """In lockstep, turns are sampled together, when every rollout waits for one."""
        if self._held and len(self._held) >= self.rollouts.total():
            held, self._held = self._held, []
            for request in held:
                self.fleet.ask(self.now, request)

    def _sampled(self, device: Device) -> None:
        if device.due != self.now:  # planned anew since
            return
        for request in self.fleet.fire(self.now, device):
            at = self.now + request.latencies[request.turn]
            heapq.heappush(self._events, (at, next(self._order), self._answered, request))

    def _answered(self, request: Request) -> None:
        if not request.live:
            return
        group: _Group = request.group
        request.turn += 1
        if request.turn < len(request.tokens):
            request.fresh = self.config.worlds[group.world].answer_tokens
            self._ask(request)
            self._release()
            return
        self.books.rollout_done(group.number)
        self._over(request)
        self._release()
        if not group.ticket.running:
            self._judge(group)

    def _over(self, request: Request) -> None:
        version = request.version
        self.rollouts[version] -= 1
        if not self.rollouts[version]:
            del self.rollouts[version]
            if version != self.books.version:
                self.fleet.repartition(self.now, self.rollouts)

    def _judge(self, group: _Group) -> None:
        self._watch()
        group.oldest = min(r.first for r in group.requests)
        if group.silent:
            self.books.drop(group.number)
            del self.groups[group.number]
            self.counts.events["filtered"] += 1
        else:
            self.books.shelve(group.number)
        self._start()
        self._train()

    # Training

    def _train(self) -> None:
        if self._waits_since is None or not self.books.ready():
            return
        counts, version = self.counts, self.books.version
        counts.idle += self.now - self._waits_since
        self._waits_since = None
        self._watch()
        counts.resident = max(counts.resident, len(self.books.resident()))
        taken = self.books.take()
        assert not taken.stale, "the scheduler lets nothing grow too old"
        batch = [self.groups[n] for n in taken.batch] + [self.spent[n] for n in taken.reused]
        for number in self.books.due():
            self._evict(self.groups.pop(number))
        for group in batch:
            counts.staleness[version - group.oldest] += 1
            counts.worlds[group.world] += 1
            counts.mixed += sum(r.first != r.last for r in group.requests)
            counts.rollouts += len(group.requests)
        counts.events["reused"] += len(taken.reused)
        for number in taken.batch:
            self.spent[number] = self.groups.pop(number)
            self._attempts.pop(number, None)
        tokens = sum(g.tokens for g in batch)
        counts.tokens += tokens
        trainer = self.config.trainer
        self._later(trainer.step_s + trainer.token_s * tokens + trainer.publish_s, self._published, None)
        self._start()

    def _evict(self, group: _Group) -> None:
        self.counts.events["evicted"] += 1
        self._attempts[group.number] += 1
        self._again.add(group.number)
        self.books.drop(group.number, useless=False)
        for request in group.requests:
            if request.turn < len(request.tokens):
                self.fleet.withdraw(self.now, request)
                self._over(request)

    def _published(self, _: None) -> None:
        version = self.books.version + 1
        self.books.published(version)
        self.spent = {n: g for n, g in self.spent.items() if n in self.books.spent}
        self.fleet.swap(self.now, version)
        self.counts.steps += 1
        if version == self.config.warmup:
            self._watch()
            self.fleet.reset(self.now)
            self.counts = _Counts(since=self.now, asked=self.fleet.asked)
        self.on_step(version)
        if version < self.config.loop.steps:
            self._start()
            self.fleet.repartition(self.now, self.rollouts)
            self._waits_since = self.now
            self._train()

    def _rebalance(self, _: None) -> None:
        self.fleet.repartition(self.now, self.rollouts)
        if self._events:
            self._later(self.config.engines.rebalance_s, self._rebalance, None)

    # Figures

    def _watch(self) -> None:
        """Called before the number of groups in the system changes."""
        held = len(self.books.running) + len(self.books.shelf)
        self.counts.in_system += held * (self.now - self._watched)
        self._watched = self.now

    def _outcome(self) -> Outcome:
        self._watch()
        self.fleet.settle(self.now)
        c, fleet, devices = self.counts, self.fleet, self.config.engines
        seconds = self.now - c.since
        trained = c.staleness.total()
        return Outcome(
            steps=c.steps,
            seconds=seconds,
            steps_per_hour=3600 * c.steps / seconds,
            tokens_per_s=c.tokens / seconds,
            trainer_idle=c.idle / seconds,
            engines_busy=fleet.busy / (seconds * devices.count),
            load_ratio=fleet.area / (seconds * devices.count * devices.capacity),
            staleness=dict(sorted(c.staleness.items())),
            staleness_mean=sum(s * n for s, n in c.staleness.items()) / trained,
            groups_in_system=c.in_system / seconds,
            resident_versions=c.resident if self.pinned else 1,
            mixed=c.mixed / c.rollouts,
            evicted=c.events["evicted"],
            filtered=c.events["filtered"],
            reused=c.events["reused"],
            worlds={w: c.worlds[w] / trained for w in self.shares},
            requests=fleet.asked - c.asked,
            moved=fleet.moved,
            recomputed_tokens=fleet.recomputed,
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A stage as configured, and the same one synchronously, on the same draws."""

    planned: Outcome
    synchronous: Outcome
    speedup: float
    """Steps an hour over steps an hour."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def simulate(config: SimulationConfig, on_step: Callable[[int], None] = lambda step: None) -> Comparison:
    """``config`` and its synchronous form (K = 0). ``on_step`` hears of the steps of both."""
    alone = config.model_copy(update={"loop": config.loop.model_copy(update={"max_staleness": 0})})
    planned, synchronous = Simulation(config, on_step).run(), Simulation(alone, on_step).run()
    return Comparison(
        planned=planned, synchronous=synchronous, speedup=planned.steps_per_hour / synchronous.steps_per_hour
    )


def table(found: Comparison) -> Table:
    """Both, side by side."""
    both = (found.planned, found.synchronous)
    rows = Table("", "planned", "synchronous")
    percent = {
        "trainer idle": [o.trainer_idle for o in both],
        "engines busy": [o.engines_busy for o in both],
        "request-load ratio": [o.load_ratio for o in both],
        "rollouts of several versions": [o.mixed for o in both],
    } | {f"share of {w}": [o.worlds[w] for o in both] for w in found.planned.worlds}
    numbers = {
        "steps an hour": [o.steps_per_hour for o in both],
        "trained tokens a second": [o.tokens_per_s for o in both],
        "staleness, mean": [o.staleness_mean for o in both],
        "groups in the system": [o.groups_in_system for o in both],
    }
    counts = {
        "versions at once": [o.resident_versions for o in both],
        "groups evicted": [o.evicted for o in both],
        "groups filtered": [o.filtered for o in both],
        "groups reused": [o.reused for o in both],
        "requests moved": [o.moved for o in both],
    }
    for name, values in numbers.items():
        rows.add_row(name, *(f"{v:,.2f}" for v in values))
    for age in sorted(set(found.planned.staleness) | set(found.synchronous.staleness)):
        rows.add_row(f"groups {age} versions old", *(f"{o.staleness.get(age, 0):,}" for o in both))
    for name, values in percent.items():
        rows.add_row(name, *(f"{v:.1%}" for v in values))
    for name, values in counts.items():
        rows.add_row(name, *(f"{v:,}" for v in values))
    rows.add_row("speed-up", f"{found.speedup:.2f}", "1")
    return rows
