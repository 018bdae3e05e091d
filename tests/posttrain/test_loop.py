"""The loop with a trainer and an engine that only keep count: bounds, order, errors, invalid rollouts, resume."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import EngineError
from posttrain.groups import derive_seed
from posttrain.protocols import Engine
from posttrain.types import Rollout, Sample, Task, Weights
from tests.posttrain.counting import Boom, Counting, Source, config, shakes

# Admission and staleness


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(0, 3),
    b=st.integers(1, 3),
    g=st.integers(1, 2),
    running=st.integers(1, 9),
    trainer_ms=st.integers(0, 4),
    stragglers=st.sampled_from(["drain", "evict"]),
    versions=st.sampled_from(["inflight", "pinned"]),
    reuse=st.sampled_from([0.0, 0.5]),
)
def test_staleness_and_admission_stay_in_bounds(
    seed: int, k: int, b: int, g: int, running: int, trainer_ms: int, stragglers: str, versions: str, reuse: float
) -> None:
    reuse = reuse if k else 0.0
    c = config(
        steps=7, groups_per_step=b, group_size=g, max_running=running, max_staleness=k, stragglers=stragglers,
        versions=versions, reuse=reuse,
    )  # fmt: skip
    parts = Counting(c, latency=shakes(seed, 0.002), step_s=shakes(seed + 1, trainer_ms / 1000))
    loop = parts.settle()
    plain = parts.task

    def task(number: int) -> Task:
        """Called as a group starts. Started and not dropped is running plus accepted (AReaL's formula)."""
        found = plain(number)
        alive = len(parts.started)
        assert alive <= (k + parts.version + 1) * b
        if stragglers == "drain":  # what is given up takes a moment to end
            assert parts.open <= (b if k == 0 else running) * g
        return found

    loop.source = Source(task)
    parts.run(loop)
    assert [v for v, _, _ in parts.stepped] == list(range(7))
    for version, samples, rollouts in parts.stepped:
        assert rollouts == b * g == len(samples)
        assert all(0 <= version - s.oldest_version <= k for s in samples)
    assert max(x["staleness_max"] for x in parts.logged) <= k
    numbers = Counter(n for batch in parts.trained for n in batch)
    assert numbers.total() == 7 * b and max(numbers.values()) <= (2 if reuse else 1)
    assert loop._counts["stale"] == 0 and (stragglers == "evict" or loop._counts["evicted"] == 0)
    if versions == "pinned" and k:
        assert all(len({v for s in r.branches[0] for v in s.versions if v >= 0}) == 1 for r in parts.journal)
    assert all(batch == sorted(batch) for batch in parts.trained)


def test_staleness_is_counted_to_the_version_that_is_trained() -> None:
    """B = 1, K = 2, all of one length: at a steady pace the batch of version v started at v - 2."""
    parts = Counting(config(steps=8, groups_per_step=1, max_staleness=2, max_running=3), step_s=lambda: 0.02)
    parts.run()
    assert [x["staleness_max"] for x in parts.logged] == [0, 1, 2, 2, 2, 2, 2, 2]
    assert parts.trained == [[n] for n in range(8)]


@pytest.mark.parametrize("versions", ["inflight", "pinned"])
def test_drain_waits_for_a_straggler_and_loses_nothing(versions: str) -> None:
    """K = 1: group 0 is slow. The batch of version 1 is its last chance: the trainer waits for it."""
    c = config(steps=6, groups_per_step=1, group_size=1, max_staleness=1, max_running=2, versions=versions)
    parts = Counting(c, step_s=lambda: 0.005)
    plain = parts.play

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        if rollout_id == "s/0/0":
            await asyncio.sleep(0.3)
        return await plain(engine, task, rollout_id, group, seed)

    loop = parts.settle()
    loop.run_rollout = play
    parts.run(loop)
    assert parts.trained == [[1], [0], [2], [3], [4], [5]]
    # Its first token came after the sleep: in flight that is under version 1, pinned under the one that it began with.
    assert [x["staleness_max"] for x in parts.logged][:2] == [0, int(versions == "pinned")]
    assert loop._counts["stale"] == loop._counts["evicted"] == 0


def test_pinned_rollouts_have_one_version_and_the_engine_keeps_those_that_run() -> None:
    """In random schedules every rollout is of one version; what a load keeps is what runs, at most K + 1 with it."""
    c = config(steps=12, groups_per_step=2, max_staleness=2, max_running=8, versions="pinned")
    parts = Counting(c, latency=shakes(4, 0.004), step_s=shakes(5, 0.004))
    parts.run()
    assert all(len({v for s in r.branches[0] for v in s.versions if v >= 0}) == 1 for r in parts.journal)
    assert max(x["staleness_max"] for x in parts.logged) == 2
    assert all(len(kept | {n}) <= 3 for n, kept in enumerate(parts.kept))
    assert any(len(kept) == 2 for kept in parts.kept)


def test_silent_groups_are_replaced_when_the_filter_is_on() -> None:
    """Groups with an odd number teach nothing: the batches hold the even ones, and the source hears of all."""
    c = config(steps=3, groups_per_step=2, filter_silent=True, max_staleness=0)
    parts = Counting(c)
    loop, plain = parts.settle(), parts.credit
    loop.credit = lambda group: plain(group) if int(group[0].group.split("/")[1]) % 2 == 0 else []
    parts.run(loop)
    assert parts.trained == [[0, 2], [4, 6], [8, 10]]
    assert parts.logged[-1]["filtered"] == 5
    assert isinstance(loop.source, Source)
    assert [ids[0] for ids in loop.source.told] == [f"s/{n}/0" for n in range(11)]


def test_groups_are_trained_once_more_at_the_reuse_ratio_while_they_are_young() -> None:
    """B = 4, half reused, K = 3: at most two of a batch were trained before, once, and are not too old."""
    c = config(steps=8, groups_per_step=4, group_size=1, max_staleness=3, max_running=4, reuse=0.5)
    parts = Counting(c, latency=lambda: 0.002)
    parts.run()
    first: dict[int, int] = {}
    again: list[tuple[int, int]] = []
    for step, batch in enumerate(parts.trained):
        again += [(n, step) for n in batch if n in first]
        first |= {n: step for n in batch if n not in first}
    assert [len(b) for b in parts.trained] == [4] * 8
    assert max(Counter(n for n, _ in again).values()) == 1
    assert max(Counter(step for _, step in again).values()) == 2 and len(again) >= 4
    assert max(x["staleness_max"] for x in parts.logged) <= 3


def test_with_quotas_a_slow_world_keeps_its_share() -> None:
    """``slow`` takes ten times as long and half of its groups come to nothing: it is started more often."""
    c = config(steps=40, groups_per_step=4, group_size=1, max_staleness=4, max_running=24, quotas=True, tolerance=0.5)
    parts = Counting(c, shares={"quick": 1.0, "slow": 1.0}, step_s=lambda: 0.004)
    loop, plain = parts.settle(), parts.play

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        await asyncio.sleep(0.02 if task.world == "slow" else 0.002)
        return replace(await plain(engine, task, rollout_id, group, seed), task=task)

    loop.config = loop.books.config = c.model_copy(update={"filter_silent": True})
    loop.run_rollout = play
    credit = loop.credit
    loop.credit = lambda group: (
        [] if group[0].task.world == "slow" and int(group[0].group.split("/")[1]) % 4 < 2 else credit(group)
    )
    parts.run(loop)
    assert isinstance(loop.source, Source)
    started, trained = Counter(w for _, w in loop.source.asked), loop.books.trained
    assert abs(trained["slow"] / trained.total() - 0.5) < 0.06
    assert started["slow"] > 1.5 * started["quick"]
    assert loop.books.useful["quick"] > 0.95 and loop.books.useful["slow"] < 0.8


def test_the_oldest_on_the_shelf_is_trained_first() -> None:
    """B = 1, K = 2: group 2 arrives first and is taken; while the trainer is busy 1 and then 0 arrive: 0 goes first."""
    parts = Counting(config(steps=3, groups_per_step=1, group_size=1, max_staleness=2, max_running=3))
    free = threading.Event()
    loop, plain, step = parts.settle(), parts.play, parts.step

    def blocked(samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        assert free.wait(10)
        return step(samples, num_rollouts)

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        number = int(group.rsplit("/", 1)[1])
        while number < 2 and not any(r.group == f"s/{number + 1}" for r in parts.journal):
            await asyncio.sleep(0.001)
        if number == 0:
            asyncio.get_running_loop().call_later(0.05, free.set)
        return await plain(engine, task, rollout_id, group, seed)

    loop.run_rollout, parts.step = play, blocked  # pyright: ignore[reportAttributeAccessIssue]
    parts.run(loop)
    assert parts.trained == [[2], [0], [1]]


def test_synchronous_means_nothing_runs_while_the_trainer_steps() -> None:
    parts = Counting(config(max_staleness=0, groups_per_step=3, max_running=1), latency=shakes(3, 0.003))
    step = parts.step

    def alone(samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        assert parts.open == 0
        return step(samples, num_rollouts)

    parts.step = alone  # pyright: ignore[reportAttributeAccessIssue]
    parts.run()
    assert parts.trained == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert {x["staleness_max"] for x in parts.logged} == {0}


def test_seeds_depend_on_every_part() -> None:
    seeds = {derive_seed(s, i) for s in range(20) for i in ("s/0/0", "s/0/1", "s/1/0")}
    assert len(seeds) == 60 and all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(1, "s/0/0") == derive_seed(1, "s/0/0")


# Errors


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize(
    "where", ["play", "task", "credit", "journal", "step", "publish", "load", "on_step", "checkpoint"]
)
def test_a_crash_anywhere_ends_the_run_with_that_error(where: str, k: int) -> None:
    parts = Counting(config(max_staleness=k, checkpoint_every=1), latency=shakes(0, 0.001), boom=where)
    with pytest.raises(Boom, match=where):
        parts.run()
    assert parts.open == 0


def test_a_crash_ends_the_other_rollouts_of_the_group() -> None:
    """Nothing may go on sampling or writing after ``run`` has raised."""
    parts = Counting(config(group_size=4, max_running=1), latency=lambda: 0.02)
    plain = parts.play

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        if rollout_id == "s/0/2":
            await asyncio.sleep(0.005)
            raise Boom(rollout_id)
        return await plain(engine, task, rollout_id, group, seed)

    loop = parts.settle()
    loop.run_rollout = play
    with pytest.raises(Boom, match="s/0/2"):
        parts.run(loop)
    assert parts.open == 0 and parts.journal == []


def test_what_went_wrong_first_is_told_though_a_clean_up_fails_later() -> None:
    """Else a pause or a roll back would pass for an engine that died."""
    parts = Counting(config(max_staleness=2, max_running=2), boom="on_step", latency=lambda: 0.005)
    plain = parts.play

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        try:
            return await plain(engine, task, rollout_id, group, seed)
        except asyncio.CancelledError:
            raise EngineError("the clean-up failed") from None

    loop = parts.settle()
    loop.run_rollout = play
    with pytest.raises(Boom, match="on_step"):
        parts.run(loop)


@pytest.mark.parametrize("k", [0, 2])
def test_a_wait_is_bounded_and_says_who_waits_for_what(k: int) -> None:
    parts = Counting(config(max_staleness=k, wait_s=0.1, max_running=2), latency=lambda: 60.0)
    loop = parts.settle()
    parts.load = _at_once  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TimeoutError) as caught:
        parts.run(loop)
    said = str(caught.value).splitlines()
    assert re.sub(r"waited \d+\.\d s", "waited 0.1 s", said[0]) == (
        "s: waited 0.1 s for 2 groups to train on at version 0: running groups 2, running rollouts 4, "
        "arrived groups 0, groups on the shelf 0, free slots 0; 2 waits, the longest first:"
    )
    assert sorted(line.split(" s  ")[1] for line in said[1:]) == [
        "s: collect: a finished group",
        "s: produce: an admission slot",
    ]


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize(
    ("where", "named"),
    [("step", "s: learn: a trainer step on 4 samples"), ("credit", r"s: collect: the credit of group \d")],
)
def test_a_thread_that_hangs_ends_the_run_and_is_named(where: str, named: str, k: int) -> None:
    """After one ``wait_s`` in which nothing moved; the thread has another one to come back."""
    parts = Counting(config(max_staleness=k, wait_s=0.5))
    loop, free = parts.settle(), threading.Event()

    def hang(samples: Sequence[Sample], num_rollouts: int) -> dict[str, float]:
        free.wait()
        return {}

    def brood(group: Sequence[Rollout]) -> list[Sample]:
        free.wait()
        return []

    if where == "step":
        parts.step = hang  # pyright: ignore[reportAttributeAccessIssue]
    else:
        loop.credit = brood
    began = time.monotonic()
    try:
        with pytest.raises(TimeoutError, match=rf"^s: waited \d\.\d s for .* at version 0: (?s:.*) {named}"):
            parts.run(loop)
    finally:
        free.set()
    assert 0.9 < time.monotonic() - began < 3 * 0.5 + 5.0, "a busy machine may take a while"
    assert parts.stepped == [] and parts.version == 0


def test_a_wait_in_which_groups_come_is_no_hang() -> None:
    """Five groups, one after the other, each of which takes a third of the bound: the batch takes longer than that."""
    parts = Counting(config(steps=1, groups_per_step=5, group_size=1, max_running=1, max_staleness=1, wait_s=3.0))
    loop, plain = parts.settle(), parts.play

    async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        await asyncio.sleep(1.0)
        return await plain(engine, task, rollout_id, group, seed)

    loop.run_rollout = play
    parts.run(loop)
    assert parts.logged[0]["time/wait_s"] > 4.0 and parts.trained == [[0, 1, 2, 3, 4]]


def test_rollouts_that_come_to_nothing_do_not_hold_up_the_bound() -> None:
    """All groups are silent and filtered: there will never be a batch."""
    parts = Counting(config(filter_silent=True, wait_s=0.3), latency=lambda: 0.001)
    loop = parts.settle()
    loop.credit = lambda group: []
    with pytest.raises(TimeoutError, match=r"s: waited \d\.\d s for 2 groups to train on at version 0: "):
        parts.run(loop)
    assert len(parts.journal) > 10


async def _at_once(weights: Weights, keep: Collection[int] = ()) -> None: ...


# Invalid rollouts


def test_an_invalid_rollout_is_tried_again_under_another_id_and_seed() -> None:
    parts = Counting(config(), fails=lambda i: i in ("s/1/0", "s/1/0.1"))
    parts.run()
    ids = [r.id for r in parts.journal]
    assert [i for i in ids if i.startswith("s/1/0")] == ["s/1/0", "s/1/0.1", "s/1/0.2"]
    assert sorted(next(c for c in parts.credited if "s/1/1" in c)) == ["s/1/0.2", "s/1/1"]
    assert parts.logged[-1]["retries"] == 2


def test_what_stays_invalid_is_masked_and_a_group_with_too_few_is_replaced() -> None:
    """Group 0 keeps 3 of 4; group 1 keeps 1 of 4, less than half, and group 4 takes its place in the second batch."""
    broken = ("s/0/3", "s/1/0", "s/1/1", "s/1/2")
    c = config(steps=2, group_size=4, attempts=2, max_staleness=0)
    parts = Counting(c, fails=lambda i: i.split(".")[0] in broken)
    loop = parts.run()
    assert parts.trained == [[0, 2], [3, 4]]
    assert [n for _, _, n in parts.stepped] == [7, 8]
    assert parts.credited[0] == ["s/0/0", "s/0/1", "s/0/2"]
    assert parts.logged[-1]["dropped_invalid"] == 1
    assert loop.finished == {0, 1, 2, 3, 4}
    assert len([r for r in parts.journal if not r.valid]) == 8, "each of the four was tried twice and written down"


def test_the_breaker_trips_with_the_last_message() -> None:
    parts = Counting(config(attempts=1, max_invalid_groups=3), fails=lambda i: int(i.split("/")[1]) > 2)
    with pytest.raises(RuntimeError, match=r"s: 4 groups in a row had too few valid rollouts.*the sandbox is gone"):
        parts.run()


def test_the_breaker_counts_in_a_row_only() -> None:
    parts = Counting(config(attempts=1, max_invalid_groups=1), fails=lambda i: int(i.split("/")[1]) % 2 == 1)
    parts.run()
    assert parts.logged[-1]["dropped_invalid"] >= 7
