"""Who starts, on which policy version, and what is trained next: DORA's rules, without clock, tasks or tensors.

The loop tells it what happens; the simulator (``posttrain.simulate``) tells the same class what would. B groups make a
batch, K is ``max_staleness``, and a group's version is the newest one when it starts: no token of it is older. A group
of version w is trained at version w + K at the latest, because of three rules together.

- Admission (AReaL): a group starts only while ``running + accepted < (K + version + 1) B``. So no more groups have ever
  started at w or before than are trained up to version w + K.
- Oldest first: a batch takes the groups of the oldest versions.
- Room: when the batch of version v is taken, at most ``(K - a) B`` groups of age a (``v - w``) or more may be left,
  those under way among them: so many can still be trained in time. Groups beyond that are *due*. ``drain`` waits until
  they are in the batch; ``evict`` gives them up and has them started anew, on the newest version.

With ``shares``, what is started keeps the worlds' parts in what is trained, counting what of a world turns out to be of
use; a batch takes at most ``tolerance`` more of a world than its part, so that no slow world stalls the trainer and
none floods it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from posttrain.settings import LoopConfig

_MEMORY = 0.95
"""Of how useful a world's groups were, a group."""


@dataclass(slots=True, kw_only=True)
class Ticket:
    """A group from its start until it is trained or given up."""

    number: int
    world: str
    version: int
    """No token of it is older."""
    pinned: int
    """The newest version when it started: what its rollouts are sampled by, if versions are pinned."""
    running: int
    """Rollouts that are still under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a step trains on, and what it leaves behind."""

    batch: tuple[int, ...]
    """Groups, oldest first."""
    reused: tuple[int, ...]
    """Groups of earlier batches that are trained once more."""
    stale: tuple[int, ...]
    """Groups that had grown too old, which the rules forbid: dropped, and to be reported."""


class Scheduler:
    """The books of one stage. Every method is a moment's work; nothing waits here."""

    def __init__(
        self,
        config: LoopConfig,
        *,
        version: int = 0,
        accepted: int = 0,
        shares: Mapping[str, float] | None = None,
        oversample: Mapping[str, float] | None = None,
    ) -> None:
        self.config, self.version, self.accepted = config, version, accepted
        whole = sum(shares.values()) if shares else 1.0
        self.shares = {w: s / whole for w, s in sorted((shares or {}).items())}
        self.running: dict[int, Ticket] = {}
        """Groups whose rollouts are being made, or judged."""
        self.shelf: dict[int, Ticket] = {}
        """Groups to train on."""
        self.spent: dict[int, Ticket] = {}
        """Groups of the last batches, which may be trained once more."""
        self.trained: Counter[str] = Counter()
        """Groups trained, a world."""
        self.useful: dict[str, float] = {w: 1.0 / (oversample or {}).get(w, 1.0) for w in self.shares}
        """Share of the groups of a world that reached the shelf, of late; ``oversample`` says what to begin with."""
        self._taken = False

    # Starting

    def slots(self) -> int:
        """Groups that may start now. Synchronously (K = 0) they start B at a time, when nothing runs."""
        c = self.config
        if c.max_staleness == 0 and self.running:
            return 0
        ahead = (c.max_staleness + self.version + 1) * c.groups_per_step - self.accepted - len(self.running)
        limit = c.groups_per_step if c.max_staleness == 0 else c.max_running
        sampling = sum(t.running > 0 for t in self.running.values())
        return max(0, min(limit - sampling, ahead))

    def world(self) -> str:
        """The world that is furthest behind its share; what runs counts as far as such groups were of use."""

        def part(world: str) -> float:
            going = sum(t.world == world for t in self.running.values()) * self.useful[world]
            there = sum(t.world == world for t in self.shelf.values())
            return (self.trained[world] + there + going + self.useful[world]) / self.shares[world]

        return min(self.shares, key=lambda w: (part(w), w))

    def start(self, number: int, rollouts: int, world: str = "", oldest: int | None = None) -> Ticket:
        """A group begins, with ``rollouts`` to be made. ``oldest``: version of rollouts that it has from before."""
        version = self.version if oldest is None else min(self.version, oldest)
        ticket = Ticket(number=number, world=world, version=version, pinned=self.version, running=rollouts)
        self.running[number] = ticket
        return ticket

    def oldest(self) -> int:
        """Of rollouts from before a kill, the oldest version that a group which starts now may go on with: the batches
        that come in time have room for it beside what is there."""
        room = 0 if self._taken else self.config.groups_per_step
        surplus = self._surplus(self._older(self.shelf, self.running))
        full = (age for age, n in enumerate(surplus) if age and n >= room)
        return self.version - next(full, self.config.max_staleness + 1) + 1

    def rollout_done(self, number: int) -> None:
        """One of its rollouts is there."""
        self.running[number].running -= 1

    def shelve(self, number: int, again: bool = False) -> None:
        """The group can be trained on. ``again``: it could before a kill, which the books know."""
        ticket = self.running.pop(number)
        self.shelf[number] = ticket
        self.accepted += 1
        if not again:
            self._learn(ticket.world, 1.0)

    def drop(self, number: int, useless: bool = True) -> None:
        """The group is of no use, or given up; another one may start in its place."""
        ticket = self.running.pop(number)
        if useless:
            self._learn(ticket.world, 0.0)

    def _learn(self, world: str, use: float) -> None:
        if world in self.useful:
            self.useful[world] = max(0.05, _MEMORY * self.useful[world] + (1 - _MEMORY) * use)

    # Training

    def due(self) -> list[int]:
        """Groups under way that this version's batch would have to hold, later ones having no room for them in time;
        when it is taken: those that have missed it. Oldest first."""
        picked = set[int]() if self._taken else {t.number for t in self._plan()[0]}
        left = self._older({n: t for n, t in self.shelf.items() if n not in picked})
        room = [-n for n in self._surplus(left)]
        late: list[int] = []
        for ticket in sorted(self.running.values(), key=_age_order, reverse=True):
            older = range(self._age(ticket) + 1)
            if min(room[a] for a in older) > 0:
                for a in older:
                    room[a] -= 1
            else:
                late.append(ticket.number)
        return late[::-1]

    def ready(self) -> bool:
        """Whether ``take`` gives a batch."""
        there, must = self._older(self.shelf), self._must()
        if there[0] < self._fresh() or any(n < m for n, m in zip(there, must, strict=True)):
            return False
        return self._plan()[1]

    def take(self) -> Taken:
        """The next batch. Call only when ``ready``; then, for ``evict``, give up the groups that were ``due``."""
        last = self.version - self.config.max_staleness
        stale = sorted(n for n, t in self.shelf.items() if t.version < last)
        for number in stale:
            del self.shelf[number]
            self.accepted -= 1
        batch = sorted(t.number for t in self._plan()[0])
        reused = sorted(self.spent)[: self.config.groups_per_step - len(batch)]
        for number in reused:
            del self.spent[number]
        for number in batch:
            ticket = self.shelf.pop(number)
            self.trained[ticket.world] += 1
            if self.config.reuse:
                self.spent[number] = ticket
        # Places that reuse fills start no groups: what is admitted ahead counts batches.
        self.accepted += len(reused)
        self._taken = True
        return Taken(batch=tuple(batch), reused=tuple(reused), stale=tuple(stale))

    def published(self, version: int) -> None:
        """New groups start on ``version``. What is too old to be trained once more is forgotten."""
        self.version, self._taken = version, False
        last = version - self.config.max_staleness
        self.spent = {n: t for n, t in self.spent.items() if t.version >= last}

    def resident(self) -> set[int]:
        """Versions that something still runs on, and the newest; at most K + 1 of them."""
        return {t.pinned for t in self.running.values() if t.running} | {self.version}

    def _fresh(self) -> int:
        """Groups of the next batch that were not trained before."""
        wanted = math.floor(self.config.reuse * self.config.groups_per_step)
        return self.config.groups_per_step - min(wanted, len(self.spent))

    def _age(self, ticket: Ticket) -> int:
        return min(self.version - ticket.version, self.config.max_staleness)

    def _older(self, *books: Mapping[int, Ticket]) -> list[int]:
        """Groups of age a or more, for every a from 0 to K; without those that are too old."""
        k = self.config.max_staleness
        versions = Counter([t.version for book in books for t in book.values()])
        return [sum(n for v, n in versions.items() if a <= self.version - v <= k) for a in range(k + 1)]

    def _surplus(self, older: Sequence[int]) -> list[int]:
        """How many of these groups of age a or more the batches after this version's have no room for in time."""
        c = self.config
        return [n - (c.max_staleness - age) * c.groups_per_step for age, n in enumerate(older)]

    def _must(self) -> list[int]:
        """Groups of age a or more that the next batch must hold, for every a."""
        waited = [self.running] if self.config.stragglers == "drain" else []
        return [min(self.config.groups_per_step, n) for n in self._surplus(self._older(self.shelf, *waited))]

    def _plan(self) -> tuple[list[Ticket], bool]:
        """The next batch, oldest first, as far as it is there; and whether it is whole."""
        last = self.version - self.config.max_staleness
        must = self._must()
        count = max(self._fresh(), *must)
        order = sorted((t for t in self.shelf.values() if t.version >= last), key=_age_order)
        picked, passed = self._share(order, count)
        # What is there and cannot wait goes, whatever its world.
        for age, surplus in reversed(list(enumerate(self._surplus(self._older(self.shelf))))):
            lacking = min(count, surplus) - self._count(picked, age)
            for ticket in [t for t in passed if self._age(t) >= age][: max(0, lacking)]:
                passed.remove(ticket)
                picked = sorted([*picked[: count - 1], ticket], key=_age_order)
        enough = all(self._count(picked, age) >= n for age, n in enumerate(must))
        return picked, enough and len(picked) == count

    def _count(self, tickets: Sequence[Ticket], age: int) -> int:
        return sum(self._age(t) >= age for t in tickets)

    def _share(self, order: Sequence[Ticket], count: int) -> tuple[list[Ticket], list[Ticket]]:
        """The first ``count`` as the worlds' parts allow, and the others."""
        room = {w: math.ceil(s * (1 + self.config.tolerance) * count) for w, s in self.shares.items()}
        picked: list[Ticket] = []
        passed: list[Ticket] = []
        for ticket in order:
            if len(picked) < count and room.get(ticket.world, 1) > 0:
                picked.append(ticket)
                if ticket.world in room:
                    room[ticket.world] -= 1
            else:
                passed.append(ticket)
        return picked, passed

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the journal."""
        spent = [asdict(t) for _, t in sorted(self.spent.items())]
        return {"trained": dict(self.trained), "useful": dict(self.useful), "spent": spent}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.trained = Counter(state["trained"])
        self.useful |= {w: u for w, u in state["useful"].items() if w in self.useful}
        self.spent = {t["number"]: Ticket(**t) for t in state["spent"]} if self.config.reuse else {}


def _age_order(ticket: Ticket) -> tuple[int, int]:
    return ticket.version, ticket.number


def partition(devices: int, requests: Mapping[int, int]) -> dict[int, int]:
    """Devices of every version that has requests: ``DP_w = round(DP R_w / sum R)`` (DORA, arXiv 2604.26256), rounded so
    that they add up, with one at least for each as far as they go; what is left over goes to the newest."""
    waiting = {v: n for v, n in sorted(requests.items(), reverse=True) if n > 0}
    if not waiting:
        return {}
    whole = sum(waiting.values())
    exact = {v: devices * n / whole for v, n in waiting.items()}
    found = {v: math.floor(x) for v, x in exact.items()}
    spare = devices - sum(found.values())
    for v in _by_remainder(exact, found)[:spare]:
        found[v] += 1
    for v in [v for v, n in found.items() if n == 0]:
        richest = max(found, key=lambda w: found[w])
        if found[richest] > 1:
            found[richest] -= 1
            found[v] += 1
    return found


def _by_remainder(exact: Mapping[int, float], found: Mapping[int, int]) -> Sequence[int]:
    return sorted(exact, key=lambda v: (found[v] - exact[v], -v))
