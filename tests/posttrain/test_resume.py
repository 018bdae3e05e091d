"""The loop after a kill, with a trainer and an engine that only count: nothing lost, nothing twice, bounds kept."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from posttrain.groups import index_of, place_of
from posttrain.protocols import Engine
from posttrain.types import Rollout, Sample, Task
from tests.posttrain.counting import Boom, Counting, Source, config, shakes
from tests.posttrain.small import TASK, rollout


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_and_nothing_trained_twice_after_a_kill(seed: int, k: int) -> None:
    c = config(steps=9, groups_per_step=2, max_running=5, max_staleness=k, checkpoint_every=2)
    first = Counting(c, latency=shakes(seed, 0.002), step_s=shakes(seed, 0.002), stop_at=5)
    with pytest.raises(Boom, match="killed"):
        first.run()
    state = first.states[-1]
    assert state["trainer"] == {"version": 4} and state["accepted"] == 8
    assert bool(state["tasks"]) == (k > 0), "what was under way"
    done = {n for batch in first.trained[:4] for n in batch}
    assert done <= set(state["finished"])

    second = Counting(c, latency=shakes(seed + 9, 0.002), step_s=shakes(seed + 9, 0.002), version=4)
    loop = second.settle()
    loop.resume(state, first.journal)
    kept = {r.id for r in first.journal if int(r.group.split("/")[1]) not in state["finished"]}
    assert {r.id for rs in loop.kept.values() for r in rs} == kept and kept
    second.run(loop)
    # The surviving history: the first life up to version 4, then the second.
    trained = [n for batch in first.trained[:4] + second.trained for n in batch]
    assert len(trained) == len(set(trained)) == 18
    assert not set(state["finished"]) & {n for batch in second.trained for n in batch}
    # What the journal held was not sampled again, and every group of it was taken up.
    assert not kept & set(second.asked)
    assert not loop.kept
    given = {i for ids in second.credited for i in ids}
    assert {i for i in kept if int(i.split("/")[1]) in set(trained)} <= given
    lost = {n for n in range(max(trained)) if n not in trained} - loop.finished
    assert lost <= set(loop.books.shelf) | second.started, "what is not trained or dropped was still under way"


def another_at_every_ask() -> Source:
    """No task is asked for twice without its showing: another id, and a rollout more, than the ask before."""
    asks = itertools.count()

    def give(number: int) -> Task:
        ask = next(asks)
        return replace(TASK, id=f"t/{number}.{ask}", rollouts=2 + ask)

    return Source(give)


def test_groups_under_way_keep_task_and_size_after_a_kill() -> None:
    """Killed with the checkpoint of version 2: 4 is half there, of 5 and 7 nothing came, 6 is on the shelf."""
    c = config(steps=5, groups_per_step=2, max_staleness=2, max_running=6, checkpoint_every=2, wait_s=10.0)
    first, source = Counting(c), another_at_every_ask()
    loop, plain, step = first.settle(), first.play, first.step

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        while group in ("s/5", "s/7") or rollout_id in ("s/4/0", "s/4/3"):
            await asyncio.sleep(0.001)
        return replace(await plain(engine, task, rollout_id, group, seed), task=task)

    def patient(samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        while first.version == 1 and not (6 in loop.books.shelf and 7 in loop.groups):
            time.sleep(0.001)
        return step(samples, num_rollouts)

    def killed(state: dict[str, Any]) -> None:
        first.states.append(state)
        raise Boom("killed")

    loop.run_rollout, loop.source, loop.checkpoint = play, source, killed
    first.step = patient  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Boom, match="killed"):
        first.run(loop)
    assert first.trained == [[0, 1], [2, 3]]
    begun = [t["id"] for t in first.states[-1]["tasks"].values()]
    assert begun == ["t/4.4", "t/5.5", "t/6.6", "t/7.7"]

    second = Counting(c, version=2)
    loop, plain = second.settle(), second.play

    async def go_on(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        return replace(await plain(engine, task, rollout_id, group, seed), task=task)

    loop.run_rollout, loop.source = go_on, source
    loop.resume(json.loads(json.dumps(first.states[-1])), first.journal)
    second.run(loop)
    trained = [n for batch in second.trained for n in batch]
    assert len(trained) == 6 and {4, 5, 6, 7} <= set(trained)
    for numbers in (ids for ids in second.credited if ids[0].split("/")[1] in "4567"):
        number = int(numbers[0].split("/")[1])
        assert [index_of(rollout(i)) for i in numbers] == list(range(2 + number)), "as many as it began with"
    assert all(r.task.id == f"t/{n}.{n}" for r in first.journal + second.journal for n in [place_of(r)[0]])
    assert set(Counter(n for n, _ in source.asked).values()) == {1}


@pytest.mark.parametrize("invalid", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_after_a_kill_nobody_is_told_of_a_group_twice(seed: int, invalid: bool) -> None:
    """What lay on the shelf is credited again, but neither the source nor the worlds' use learns from it again, not
    even if a place of a group was given up for invalid and is tried once more."""
    c = config(steps=9, groups_per_step=2, max_running=8, max_staleness=3, checkpoint_every=1, quotas=True, attempts=1)
    slow: Any = {"latency": shakes(seed, 0.001), "step_s": lambda: 0.02, "shares": {"a": 1.0}}
    if invalid:
        slow["fails"] = lambda rollout_id: place_of(rollout(rollout_id))[1] == 1
    first = Counting(c, stop_at=5, **slow)
    loop, step = first.settle(), first.step

    def patient(samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        while not loop.books.shelf:  # however busy the machine is
            time.sleep(0.001)
        return step(samples, num_rollouts)

    first.step = patient  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Boom, match="killed"):
        first.run(loop)
    state = first.states[-1]
    source = loop.source
    assert isinstance(source, Source) and state["seen"], "groups on the shelf"
    told = {ids[0].split("/")[1] for ids in source.told[: state["source"]["told"]]}
    assert {str(n) for n in state["seen"]} <= told

    second = Counting(c, version=4, **slow)
    loop = second.settle()
    loop.resume(state, first.journal)
    use = loop.books.useful["a"]
    second.run(loop)
    source = loop.source
    assert isinstance(source, Source)
    later = [ids[0].split("/")[1] for ids in source.told if ids]
    assert not {str(n) for n in state["seen"]} & set(later) and len(later) == len(set(later))
    assert set(state["seen"]) <= {n for batch in second.trained for n in batch}
    assert loop.books.useful["a"] >= use
    assert invalid or second.logged[-1]["retries"] == 0


def test_after_a_kill_earlier_batches_are_still_there_to_be_trained_once_more() -> None:
    """Rollouts take long, so no batch is full of groups that cannot wait: half of each was trained before."""
    c = config(steps=6, groups_per_step=4, group_size=2, max_staleness=3, max_running=4, reuse=0.5, checkpoint_every=1)
    first = Counting(c, latency=lambda: 0.02, stop_at=4)
    with pytest.raises(Boom, match="killed"):
        first.run()
    state = first.states[-1]
    spent = {t["number"] for t in state["books"]["spent"]}
    assert spent
    second = Counting(c, version=3, latency=lambda: 0.02)
    loop = second.settle()
    loop.resume(state, first.journal)
    assert set(loop.books.spent) == spent == set(loop.groups)
    second.run(loop)
    again = Counter(n for batch in second.trained for n in batch if n in spent)
    assert len(again) >= 2 and set(again.values()) == {1}
    samples = {s.rollout for _, step, _ in second.stepped for s in step}
    assert {f"s/{n}/{i}" for n in again for i in (0, 1)} <= samples


PAST = [
    rollout("s/0/1"),
    rollout("s/1/0", score=None),
    rollout("s/3/0.1", versions=(1, 1)),
    rollout("s/3/1", versions=(1, 1)),
]


def test_a_half_journalled_group_is_completed() -> None:
    parts = Counting(config(steps=2, max_staleness=2))
    loop = parts.settle()
    loop.resume({"finished": [], "accepted": 0}, PAST)
    parts.run(loop)
    assert {i for i in parts.asked if int(i.split("/")[1]) < 4} == {
        *("s/0/0", "s/1/0.1", "s/1/1", "s/2/0", "s/2/1"),  # .1: the journal has an s/1/0 already, which failed
    }
    assert sorted(n for batch in parts.trained for n in batch) == [0, 1, 2, 3]


def test_a_group_that_comes_in_another_size_keeps_the_one_that_it_began_with() -> None:
    """The source, which plans anew, gives the same task to a smaller group. Of eight rollouts four are there."""
    task = replace(TASK, rollouts=8)
    there = [replace(rollout(f"s/0/{i}"), task=task) for i in (0, 5, 6, 7)]
    parts = Counting(config(steps=1, groups_per_step=1, max_staleness=1, max_running=1))
    loop = parts.settle()
    loop.source = Source(lambda number: replace(parts.task(number), rollouts=5))
    loop.resume({"finished": [], "accepted": 0}, there)
    left, done = list[int](), loop.books.rollout_done

    def count(number: int) -> None:
        done(number)
        left.append(loop.books.running[number].running)

    loop.books.rollout_done = count  # pyright: ignore[reportAttributeAccessIssue]
    parts.run(loop)
    assert left[:4] == [3, 2, 1, 0] and min(left) == 0
    assert parts.credited[0] == [f"s/0/{i}" for i in range(8)]


def test_in_synchronous_mode_a_batch_is_taken_whole_or_sampled_again() -> None:
    """Groups 0 and 1 are one batch and lack three; 2 and 3 are one and lack two; of 4 and 5 everything is there."""
    parts = Counting(config(steps=3, max_staleness=0))
    loop = parts.settle()
    whole = [rollout(f"s/{n}/{i}", versions=(2, 2)) for n in (4, 5) for i in (0, 1)]
    loop.resume({"finished": [], "accepted": 0}, [*PAST, *whole])
    parts.run(loop)
    assert sorted(parts.asked) == [f"s/{n}/{i}" for n in range(4) for i in (0, 1)]
    assert parts.trained == [[0, 1], [2, 3], [4, 5]]


def test_a_place_that_was_filled_twice_counts_once() -> None:
    """After two kills the journal may hold two attempts at one place; the later one is what the later life used."""
    parts = Counting(config(steps=1, groups_per_step=1, max_staleness=1, max_running=1))
    loop = parts.settle()
    loop.resume({"finished": [], "accepted": 0}, [rollout("s/0/0.1"), rollout("s/0/1"), rollout("s/0/0")])
    parts.run(loop)
    assert parts.credited[0] == ["s/0/0", "s/0/1"]


def test_a_run_that_is_done_does_nothing() -> None:
    parts = Counting(config(), version=4)
    loop = parts.settle()
    loop.resume({"finished": list(range(8)), "accepted": 8}, [])
    parts.run(loop)
    assert parts.asked == [] and parts.stepped == []


# Rollouts that may be too old


def test_rollouts_for_which_the_next_batches_have_no_room_are_sampled_again() -> None:
    """K = 2, B = 1, version 4: of version 2 and of version 3 one group each can be trained in time, not two."""
    c = config(steps=8, groups_per_step=1, group_size=2, max_staleness=2, max_running=3, wait_s=5.0)
    parts = Counting(c, version=4, latency=lambda: 0.02)
    loop = parts.settle()
    old = [rollout(f"s/{n}/{i}", versions=(3, 3)) for n in (5, 6) for i in (0, 1)]
    loop.resume({"finished": [0, 1, 2, 3], "accepted": 4}, [rollout("s/4/0", versions=(2, 2)), *old])
    parts.run(loop)
    assert parts.trained == [[4], [5], [6], [7]]
    assert max(x["staleness_max"] for x in parts.logged) == 2
    assert loop._counts["stale"] == loop._counts["evicted"] == 0
    assert {"s/6/0.1", "s/6/1.1"} <= set(parts.asked) and not {"s/4/0.1", "s/5/0.1", "s/5/1.1"} & set(parts.asked)


@pytest.mark.parametrize("stragglers", ["drain", "evict"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("b", [1, 2])
def test_after_an_outage_more_groups_of_the_first_version_are_there_than_can_be_trained(
    stragglers: str, k: int, b: int
) -> None:
    """Of every group one rollout came, until the breaker ended the run. All of them would fit on version 0."""
    c = config(
        steps=8, groups_per_step=b, group_size=4, attempts=1, max_invalid_groups=12, max_staleness=k, max_running=3,
        stragglers=stragglers, wait_s=5.0,
    )  # fmt: skip
    first = Counting(c, fails=lambda i: not i.endswith("/0"), latency=lambda: 0.001)
    with pytest.raises(RuntimeError, match="in a row"):
        first.run()
    second = Counting(c, latency=lambda: 0.002, step_s=lambda: 0.003)
    loop = second.settle()
    loop.resume({"finished": [], "accepted": 0}, first.journal)
    assert len(loop.kept) > (k + 1) * b
    second.run(loop)
    assert loop._counts["stale"] == 0 and (stragglers == "evict" or loop._counts["evicted"] == 0)
    assert max(x["staleness_max"] for x in second.logged) <= k
    trained = [n for batch in second.trained for n in batch]
    assert len(trained) == len(set(trained)) == 8 * b


def test_what_was_given_up_does_not_come_back_with_a_group_that_is_trained_once_more() -> None:
    """Group 0 was evicted and sampled anew on version 4, where its first place came to nothing."""
    c = config(steps=7, groups_per_step=2, group_size=2, max_staleness=2, max_running=3, stragglers="evict", reuse=0.5)
    parts = Counting(c, version=5, latency=lambda: 0.002)
    given_up, invalid = rollout("s/0/0", versions=(0, 0)), rollout("s/0/0.1", versions=(4, 4), score=None)
    journal: list[Rollout] = [given_up, invalid, rollout("s/0/1.1", versions=(4, 4))]
    spent = [{"number": 0, "world": "toy", "version": 4, "pinned": 4, "running": 0}]
    state: dict[str, Any] = {
        "finished": list(range(10)), "accepted": 10, "books": {"trained": {}, "useful": {}, "spent": spent},
        "source": {"told": 0}, "tasks": {}, "seen": [], "counts": {},
    }  # fmt: skip
    loop = parts.settle()
    loop.resume(state, journal)
    parts.run(loop)
    assert parts.trained[0] == [0, 10]
    assert [s.rollout for _, samples, _ in parts.stepped for s in samples if s.rollout.startswith("s/0/")] == [
        "s/0/1.1"
    ]
    assert max(x["staleness_max"] for x in parts.logged) <= 2
