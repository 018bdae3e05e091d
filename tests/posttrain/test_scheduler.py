"""The scheduler alone: DORA's properties over random schedules, its published example, devices shared out."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from posttrain.scheduler import Scheduler, Taken, Ticket, partition
from posttrain.settings import LoopConfig
from tests.posttrain.counting import config

WORLDS = ("a", "b", "c")


class Schedules(RuleBasedStateMachine):
    """Any order of starts, ends, judgements, steps and publications that a driver may come up with."""

    config: LoopConfig
    books: Scheduler

    @initialize(
        k=st.integers(0, 3),
        b=st.integers(1, 4),
        running=st.integers(1, 16),
        evict=st.booleans(),
        reuse=st.sampled_from([0.0, 0.5]),
        worlds=st.integers(0, 3),
        tolerance=st.sampled_from([0.0, 0.5]),
    )
    def open(self, k: int, b: int, running: int, evict: bool, reuse: float, worlds: int, tolerance: float) -> None:
        self.config = config(
            max_staleness=k, groups_per_step=b, max_running=running, stragglers="evict" if evict else "drain",
            reuse=reuse if k else 0.0, quotas=worlds > 0, tolerance=tolerance,
        )  # fmt: skip
        shares = {w: 1.0 + i for i, w in enumerate(WORLDS[:worlds])}
        self.books = Scheduler(self.config, shares=shares or None)
        self.number, self.batches, self.taken = 0, 0, False
        self.again: set[int] = set()
        self.dropped: set[int] = set()
        self.trained: Counter[int] = Counter()
        self.born: dict[int, int] = {}
        """The newest version when the group last started."""

    # What may happen

    @rule(most=st.integers(1, 16), size=st.integers(1, 2))
    def start(self, most: int, size: int) -> None:
        for _ in range(min(most, self.books.slots())):
            number = min(self.again, default=self.number)
            self.again.discard(number)
            self.number = max(self.number, number + 1)
            ticket = self.books.start(number, size, self.books.world() if self.books.shares else "")
            self.born[number] = self.books.version
            assert ticket.version == ticket.pinned == self.books.version

    @rule(data=st.data(), most=st.integers(1, 20))
    def rollouts_end(self, data: st.DataObject, most: int) -> None:
        for _ in range(most):
            if going := self.sampling():
                self.books.rollout_done(data.draw(st.sampled_from(going)))

    @rule(data=st.data(), useful=st.lists(st.sampled_from([True, True, True, False]), min_size=1, max_size=12))
    def judge(self, data: st.DataObject, useful: list[bool]) -> None:
        for good in useful[: len(self.unjudged())]:
            number = data.draw(st.sampled_from(self.unjudged()))
            if good:
                self.books.shelve(number)
            else:
                self.books.drop(number)
                self.dropped.add(number)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """As when a resource is lost: the group starts again."""
        if self.books.running:
            self._again(data.draw(st.sampled_from(sorted(self.books.running))))

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """Groups end in any order until a batch is there."""
        self.publish()
        while not self.books.ready():
            if self.books.running:
                self._end(data.draw(st.sampled_from(sorted(self.books.running))))
            else:
                assert self.books.slots()
                self.start(self.books.slots(), 1)
        self.take()

    @rule()
    def take(self) -> None:
        if self.taken or not self.books.ready():
            return
        shelf, due = dict(self.books.shelf), self.books.due()
        spent = dict(self.books.spent)
        taken = self.books.take()
        self.taken = True
        self.batches += 1
        self._check(taken, shelf, spent)
        if self.config.stragglers == "drain":
            assert due == [] == self.books.due(), "nothing that could be trained is left to grow too old"
        for number in self.books.due():
            self._again(number)
        for number in taken.batch:
            assert self.trained[number] == 0
        for number in taken.reused:
            assert self.trained[number] == 1
        self.trained.update((*taken.batch, *taken.reused))

    @rule()
    def publish(self) -> None:
        if self.taken:
            self.taken = False
            self.books.published(self.books.version + 1)

    def _end(self, number: int) -> None:
        while self.books.running[number].running:
            self.books.rollout_done(number)
        self.books.shelve(number)

    def _again(self, number: int) -> None:
        self.books.drop(number, useless=False)
        self.again.add(number)

    def _check(self, taken: Taken, shelf: dict[int, Ticket], spent: dict[int, Ticket]) -> None:
        version, k, b = self.books.version, self.config.max_staleness, self.config.groups_per_step
        assert taken.stale == ()
        assert len(taken.batch) + len(taken.reused) == b and taken.batch
        assert len(taken.reused) <= math.floor(self.config.reuse * b)
        chosen = [shelf[n] for n in taken.batch]
        assert all(t.version == self.born[t.number] for t in chosen)
        assert max(version - t.version for t in [*chosen, *(spent[n] for n in taken.reused)]) <= k
        left = [t for n, t in shelf.items() if n not in taken.batch]
        if not self.books.shares:
            assert max(t.version for t in chosen) <= min((t.version for t in left), default=version)
        for world, count in Counter(t.world for t in chosen).items():
            part = self.books.shares.get(world, 1) * (1 + self.config.tolerance if self.books.shares else 1)
            if count > math.ceil(part * len(chosen)):
                # Then of those left on the shelf not one more could be trained in time.
                ages = [version - t.version for t in chosen if t.world == world]
                full = [a for a in range(k + 1) if sum(version - t.version >= a for t in left) == (k - a) * b]
                assert any(a <= age for a in full for age in ages)

    # What always holds

    @invariant()
    def versions(self) -> None:
        assert len(self.books.resident()) <= self.config.max_staleness + 1
        last = self.books.version - self.config.max_staleness
        assert all(t.version >= last for t in [*self.books.running.values(), *self.books.shelf.values()])

    @invariant()
    def admission(self) -> None:
        books, c = self.books, self.config
        assert books.accepted == self.batches * c.groups_per_step + len(books.shelf)
        assert len(books.running) + books.accepted <= (c.max_staleness + books.version + 1) * c.groups_per_step
        assert len(self.sampling()) <= (c.max_running if c.max_staleness else c.groups_per_step)
        if c.max_staleness == 0:
            assert not (books.slots() and books.running), "the next batch starts when nothing runs"

    @invariant()
    def nothing_is_lost(self) -> None:
        parts = [set(self.trained), self.dropped, set(self.books.running), set(self.books.shelf), self.again]
        assert sorted(n for part in parts for n in part) == list(range(self.number))

    @invariant()
    def no_deadlock(self) -> None:
        if not self.books.running and not self.books.slots() and not self.taken:
            assert self.books.ready()

    def teardown(self) -> None:
        """From anywhere, K + 1 batches later all that was under way or on the shelf is trained."""
        if not hasattr(self, "books"):
            return
        there = {*self.books.running, *self.books.shelf}
        for _ in range(self.config.max_staleness + 1):
            self.publish()
            while not self.books.ready():
                for number in list(self.books.running):
                    self._end(number)
                if not self.books.ready():
                    assert self.books.slots()
                    self.start(self.books.slots(), 1)
            self.take()
        assert there <= set(self.trained)

    def sampling(self) -> list[int]:
        return sorted(n for n, t in self.books.running.items() if t.running)

    def unjudged(self) -> list[int]:
        return sorted(n for n, t in self.books.running.items() if not t.running)


Schedules.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
TestSchedules = Schedules.TestCase


# Examples


def end(books: Scheduler, *numbers: int) -> None:
    """Groups of one rollout are done, and of use."""
    for number in numbers:
        books.rollout_done(number)
        books.shelve(number)


def test_the_published_example_of_staleness_two() -> None:
    """LongCat-Flash-Thinking (arXiv 2509.18883), Fig. 5: at step n the prompts 5, 8, 3, 1, 6 and 2 end in that order
    and fill the batch of six; 10 and 12, of version n - 2, are discarded and rescheduled; the others go on, each with
    its own version."""
    books = Scheduler(config(groups_per_step=6, group_size=1, max_running=13, max_staleness=2, stragglers="evict"))

    def begin(*numbers: int) -> None:
        for number in numbers:
            assert books.slots() > 0
            books.start(number, 1)

    begin(*range(100, 106), 10, 12, 1, 3)
    end(books, *range(100, 106))
    assert books.take().batch == tuple(range(100, 106)) and books.due() == []
    books.published(1)
    begin(*range(106, 112), 5, 8, 4)
    end(books, *range(106, 112))
    assert books.take().batch == tuple(range(106, 112)) and books.due() == []
    books.published(2)
    begin(2, 6, 7, 9, 11)

    for number in (5, 8, 3, 1, 6):
        end(books, number)
        assert not books.ready()
    end(books, 2)
    assert books.ready() and books.resident() == {0, 1, 2}
    assert books.take() == Taken(batch=(1, 2, 3, 5, 6, 8), reused=(), stale=())
    assert books.due() == [10, 12]
    for number in books.due():
        books.drop(number, useless=False)
    begin(10, 12)
    assert {n: t.pinned for n, t in books.running.items()} == {4: 1, 7: 2, 9: 2, 11: 2, 10: 2, 12: 2}
    books.published(3)
    begin(13, 14)
    end(books, 4, 10)
    assert {n: t.pinned for n, t in books.running.items()} == {7: 2, 9: 2, 11: 2, 12: 2, 13: 3, 14: 3}
    assert (books.shelf[4].version, books.shelf[10].version) == (1, 2)


def test_of_a_version_no_more_may_be_left_than_later_batches_hold() -> None:
    """B = 1, K = 2: groups 1 and 2 of version 0 have the batches of versions 1 and 2. The younger 3 must not take one,
    though neither is due to be in the next batch by its age."""
    for stragglers in ("drain", "evict"):
        c = config(groups_per_step=1, group_size=1, max_running=9, max_staleness=2, stragglers=stragglers)
        books = Scheduler(c)
        for number in range(3):
            books.start(number, 1)
        end(books, 0)
        books.take()
        books.published(1)
        books.start(3, 1)
        end(books, 3)
        assert books.ready() == (stragglers == "evict")
        if stragglers == "drain":
            assert books.due() == [1]
            end(books, 2)
            assert books.ready() and books.due() == [] and books.take().batch == (2,)
        else:
            assert books.take().batch == (3,) and books.due() == [1]


def test_synchronously_a_batch_starts_when_the_last_one_is_trained() -> None:
    books = Scheduler(config(groups_per_step=3, group_size=1, max_running=1, max_staleness=0))
    trained = []
    for step in range(3):
        assert books.slots() == 3
        for number in range(3 * step, 3 * step + 3):
            books.start(number, 1)
        for number in range(3 * step, 3 * step + 3):
            assert books.slots() == 0 and not books.ready()
            end(books, number)
        trained.append(books.take().batch)
        assert books.slots() == 0
        books.published(step + 1)
    assert trained == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]


def test_worlds_have_their_parts_but_what_cannot_wait_goes() -> None:
    """B = 2, K = 1, half and half without tolerance."""
    c = config(groups_per_step=2, group_size=1, max_running=9, max_staleness=1, quotas=True, tolerance=0.0)
    books = Scheduler(c, shares={"a": 1.0, "b": 1.0})
    worlds = [books.start(n, 1, books.world()).world for n in range(4)]
    assert worlds == ["a", "b", "a", "b"]
    end(books, 0, 2)
    assert not books.ready(), "both are of world a"
    end(books, 1)
    assert books.take().batch == (0, 1)
    books.published(1)
    books.drop(3)
    books.start(4, 1, "a")
    end(books, 4)
    assert not books.ready(), "2 and 4 are of world a, and only 2 must go"
    books.start(5, 1, "b")
    end(books, 5)
    assert books.take().batch == (2, 5)


def test_groups_that_would_grow_too_old_go_whatever_their_world() -> None:
    """As above, but both places of version 1 are what 2 and 3 of version 0 have left."""
    c = config(groups_per_step=2, group_size=1, max_running=9, max_staleness=1, quotas=True, tolerance=0.0)
    books = Scheduler(c, shares={"a": 1.0, "b": 1.0})
    for number, world in enumerate("abaa"):
        books.start(number, 1, world)
    end(books, 0, 1)
    books.take()
    books.published(1)
    books.start(4, 1, "b")
    end(books, 2, 4)
    assert not books.ready()
    end(books, 3)
    assert books.take().batch == (2, 3)


def test_what_the_worlds_parts_leave_behind_counts_when_groups_are_given_up() -> None:
    """B = 2, K = 2: the batch of version 1 is one of each world, so 3 and 4 take the places of version 2."""
    c = config(groups_per_step=2, group_size=1, max_running=9, max_staleness=2, quotas=True, tolerance=0.0)
    books = Scheduler(c.model_copy(update={"stragglers": "evict"}), shares={"a": 1.0, "b": 1.0})
    for number, world in enumerate("abaaaa"):
        books.start(number, 1, world)
    end(books, 0, 1)
    books.take()
    books.published(1)
    for number in (6, 7):
        books.start(number, 1, "b")
    end(books, 6, 2, 3, 4)
    assert books.take().batch == (2, 6)
    assert books.due() == [5]


def test_a_resumed_group_is_as_old_as_the_rollouts_that_it_has() -> None:
    books = Scheduler(config(groups_per_step=1, max_staleness=2), version=3, accepted=3)
    ticket = books.start(7, 1, oldest=2)
    assert (ticket.version, ticket.pinned) == (2, 3)
    assert books.start(8, 2, oldest=5).version == 3, "tokens of versions that the kill undid count as the newest"


def test_state_survives() -> None:
    books = Scheduler(config(groups_per_step=1, group_size=1, quotas=True), shares={"a": 3.0, "b": 1.0})
    books.start(0, 1, "a")
    end(books, 0)
    books.take()
    books.start(1, 1, "b")
    books.drop(1)
    other = Scheduler(books.config, shares={"a": 3.0, "b": 1.0})
    other.restore(books.state())
    assert (other.trained, other.useful) == (books.trained, books.useful)
    assert other.trained == {"a": 1} and other.useful == pytest.approx({"a": 1.0, "b": 0.95})


# Devices of versions


@settings(max_examples=300)
@given(devices=st.integers(1, 60), requests=st.dictionaries(st.integers(0, 30), st.integers(0, 500), max_size=5))
def test_devices_are_shared_out_by_requests(devices: int, requests: dict[int, int]) -> None:
    asked = dict(requests)
    found = partition(devices, requests)
    waiting = {v: n for v, n in asked.items() if n}
    assert requests == asked and set(found) == set(waiting)
    if not waiting:
        return
    assert sum(found.values()) == devices
    assert min(found.values()) >= (1 if devices >= len(waiting) else 0)
    exact = {v: devices * n / sum(waiting.values()) for v, n in waiting.items()}
    assert all(abs(found[v] - x) < 1 or found[v] == 1 or min(exact.values()) < 1 for v, x in exact.items())
    rounded = {v: round(x) for v, x in exact.items()}
    assume(all(abs(x % 1 - 0.5) > 1e-9 for x in exact.values()))
    if sum(rounded.values()) == devices and min(rounded.values()) >= 1:
        assert found == rounded


CASES: list[tuple[int, dict[int, int], dict[int, int]]] = [
    (10, {3: 50, 4: 30, 5: 20}, {3: 5, 4: 3, 5: 2}),
    (4, {3: 1, 4: 1, 5: 98}, {3: 1, 4: 1, 5: 2}),
    (3, {1: 10, 2: 10}, {1: 1, 2: 2}),
    (1, {1: 1, 2: 9}, {1: 0, 2: 1}),
    (5, {1: 0, 2: 7}, {2: 5}),
    (5, {}, {}),
]


@pytest.mark.parametrize(("devices", "requests", "wanted"), CASES)
def test_devices_by_hand(devices: int, requests: dict[int, int], wanted: dict[Any, int]) -> None:
    assert partition(devices, requests) == wanted
