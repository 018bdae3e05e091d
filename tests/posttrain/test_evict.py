"""What is given up: stragglers under ``loop.stragglers: evict``, wherever they are when their batch is taken."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from posttrain.groups import Group, place_of
from posttrain.protocols import Engine
from posttrain.scheduler import Taken
from posttrain.types import Rollout, Sample, Task
from tests.posttrain.counting import Counting, Source, config
from tests.posttrain.test_resume import another_at_every_ask


def test_evict_gives_a_straggler_up_and_starts_its_task_anew() -> None:
    """K = 1: when the batch of version 1 is full, group 0 of version 0 is too old for any later one."""
    c = config(steps=6, groups_per_step=1, group_size=1, max_staleness=1, max_running=2, stragglers="evict")
    parts = Counting(c, step_s=lambda: 0.005)
    plain = parts.play

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        while rollout_id == "s/0/0":
            await asyncio.sleep(0.001)
        return await plain(engine, task, rollout_id, group, seed)

    loop = parts.settle()
    loop.run_rollout = play
    parts.run(loop)
    assert parts.trained == [[1], [2], [0], [3], [4], [5]]
    assert loop._counts["evicted"] == 1 and loop._counts["stale"] == 0
    assert [r.id for r in parts.journal if r.group == "s/0"] == ["s/0/0.1"], "another name, and so another seed"
    assert parts.open == 0


def test_what_is_evicted_keeps_task_and_size() -> None:
    """Group 0 has more than one rollout; one place is slow, and those that were there are made anew as well."""
    c = config(steps=6, groups_per_step=1, max_staleness=1, max_running=2, stragglers="evict")
    parts, source = Counting(c, step_s=lambda: 0.005), another_at_every_ask()
    plain = parts.play

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        while rollout_id == "s/0/1":
            await asyncio.sleep(0.001)
        return replace(await plain(engine, task, rollout_id, group, seed), task=task)

    loop = parts.settle()
    loop.run_rollout, loop.source = play, source
    parts.run(loop)
    assert parts.trained == [[1], [2], [0], [3], [4], [5]] and loop._counts["evicted"] == 1
    assert {r.task.id for r in parts.journal if r.group == "s/0"} == {"t/0.0"}
    assert ["s/0/0.1", "s/0/1.1"] in parts.credited, "as many as it began with"
    assert max(Counter(n for n, _ in source.asked).values()) == 1
    assert all(r.task.id == f"t/{n}.{n}" for r in parts.journal for n in [place_of(r)[0]])


def test_what_is_evicted_starts_again_while_the_step_goes_on() -> None:
    """The step on version 1 does not end before group 0, given up when its batch was taken, is under way again: on
    version 1, the newest that there is. Thinking-2601, Fig. 5."""
    c = config(steps=4, groups_per_step=1, group_size=1, max_staleness=1, max_running=2, stragglers="evict")
    parts = Counting(c)
    again, versions = threading.Event(), dict[str, int]()
    loop, plain, step = parts.settle(), parts.play, parts.step

    def patient(samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        if parts.version == 1:
            assert again.wait(20), "the slot is free, and nobody was told"
        return step(samples, num_rollouts)

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        while rollout_id == "s/0/0":
            await asyncio.sleep(0.001)
        if rollout_id == "s/0/0.1":
            versions[rollout_id] = parts.version
            again.set()
        return await plain(engine, task, rollout_id, group, seed)

    loop.run_rollout, parts.step = play, patient  # pyright: ignore[reportAttributeAccessIssue]
    parts.run(loop)
    assert versions == {"s/0/0.1": 1} and loop._counts["evicted"] == 1
    assert max(x["staleness_max"] for x in parts.logged) <= 1


def test_a_group_may_be_given_up_while_it_is_judged() -> None:
    """K = 2: group 0 is done when the batch of version 2 is taken, but not its credit, which comes too late."""
    c = config(steps=5, groups_per_step=1, group_size=1, max_staleness=2, max_running=3, stragglers="evict")
    parts = Counting(c)
    judged, late = threading.Event(), threading.Event()
    loop, source = parts.settle(), Source(parts.task)
    plain, step, credit, on_step = parts.play, parts.step, parts.credit, loop.on_step

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        while rollout_id == "s/0/0" and 3 not in loop.books.shelf:
            await asyncio.sleep(0.001)
        return await plain(engine, task, rollout_id, group, seed)

    def patient(samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        assert parts.version != 1 or judged.wait(20)
        return step(samples, num_rollouts)

    def slow(group: Sequence[Rollout]) -> list[Sample]:
        if group[0].id == "s/0/0":
            judged.set()
            assert late.wait(20)
        return credit(group)

    def tell(version: int, stats: dict[str, float], batch: Sequence[Group]) -> None:
        on_step(version, stats, batch)
        if version == 3:
            late.set()

    loop.run_rollout, loop.credit, loop.source, loop.on_step = play, slow, source, tell
    parts.step = patient  # pyright: ignore[reportAttributeAccessIssue]
    parts.run(loop)
    assert parts.trained[:3] == [[1], [2], [3]]
    assert sorted(n for batch in parts.trained for n in batch) == sorted({n for batch in parts.trained for n in batch})
    assert loop._counts["evicted"] == 1 and loop._counts["stale"] == 0
    assert [r.id for r in parts.journal if r.group == "s/0"] == ["s/0/0", "s/0/0.1"]
    assert ["s/0/0"] not in source.told
    assert max(x["staleness_max"] for x in parts.logged) <= 2


def test_a_group_may_be_given_up_in_the_moment_in_which_it_ends() -> None:
    """Its last rollout returns after the books closed on it, and before its task is told to stop."""
    c = config(steps=6, groups_per_step=1, group_size=1, max_staleness=1, max_running=2, stragglers="evict")
    parts = Counting(c)
    loop = parts.settle()
    plain, take, done = parts.play, loop.books.take, loop.books.rollout_done
    ends: list[asyncio.Future[None]] = []
    counted: list[int] = []

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        made = await plain(engine, task, rollout_id, group, seed)
        if rollout_id == "s/0/0":
            ends.append(asyncio.get_running_loop().create_future())
            await ends[0]
        return made

    def just_then() -> Taken:
        if parts.version == 1:
            ends[0].set_result(None)
        return take()

    def count(number: int) -> None:
        counted.append(number)
        done(number)

    loop.run_rollout = play
    loop.books.take, loop.books.rollout_done = just_then, count  # pyright: ignore[reportAttributeAccessIssue]
    parts.run(loop)
    assert parts.trained == [[1], [2], [0], [3], [4], [5]]
    assert loop._counts["evicted"] == 1 and loop._counts["stale"] == 0
    assert [r.id for r in parts.journal if r.group == "s/0"] == ["s/0/0", "s/0/0.1"]
    assert counted.count(0) == 1, "the books of the group that was started in its stead are its own"
