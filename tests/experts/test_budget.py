"""Rollouts out of a common budget: worked values, and against every possible allocation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experts.budget import allocate, gain, value
from tests.posttrain.counting import Counting, Source, config
from tests.posttrain.small import TASK

RATES = st.floats(0.0, 1.0)


@pytest.mark.parametrize(
    ("rollouts", "rate", "worth"),
    [(1, 0.3, 0.0), (2, 0.5, 0.5), (3, 0.5, 0.75), (2, 0.1, 0.18), (4, 0.9, 1 - 0.9**4 - 0.1**4), (9, 1.0, 0.0)],
)
def test_a_group_is_worth_its_chance_of_both_outcomes(rollouts: int, rate: float, worth: float) -> None:
    """Two of rate 0.1: 2 x 0.1 x 0.9."""
    assert value(rollouts, rate) == pytest.approx(worth)


@given(st.integers(1, 60), RATES)
def test_gains_are_differences_of_values_and_never_grow(rollouts: int, rate: float) -> None:
    assert gain(rollouts, rate) == pytest.approx(value(rollouts + 1, rate) - value(rollouts, rate), abs=1e-12)
    assert 0 <= gain(rollouts + 1, rate) <= gain(rollouts, rate)


@settings(max_examples=150)
@given(st.lists(RATES, min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 4), st.data())
def test_no_other_allocation_is_worth_more(rates: list[float], lowest: int, room: int, data: st.DataObject) -> None:
    highest = lowest + room
    total = data.draw(st.integers(lowest * len(rates), highest * len(rates)))
    found = allocate(rates, total, lowest, highest)
    assert sum(found) == total and all(lowest <= n <= highest for n in found)
    worth = [
        sum(value(n, p) for n, p in zip(sizes, rates, strict=True))
        for sizes in product(range(lowest, highest + 1), repeat=len(rates))
        if sum(sizes) == total
    ]
    assert sum(value(n, p) for n, p in zip(found, rates, strict=True)) == pytest.approx(max(worth), abs=1e-12)


@given(st.lists(RATES, min_size=2, max_size=8), st.data())
def test_the_order_of_the_groups_does_not_matter(rates: list[float], data: st.DataObject) -> None:
    assume(len(set(rates)) == len(rates))
    total = data.draw(st.integers(2 * len(rates), 12 * len(rates)))
    backwards = allocate(rates[::-1], total, 2, 12)[::-1]
    worth = [
        sum(value(n, p) for n, p in zip(s, rates, strict=True)) for s in (allocate(rates, total, 2, 12), backwards)
    ]
    assert worth[0] == pytest.approx(worth[1], abs=1e-12)


def test_rollouts_leave_what_is_known_for_what_is_rare() -> None:
    """From 2 on, one more is worth 0.25, 0.125, 0.0625 to rate 0.5 and 0.09, 0.0738, 0.0657 to rate 0.1. The 16th of
    rate 0.1 is worth 0.0206, the sixth of rate 0.5 0.0312, the seventh 0.0156, the eighth of rate 0.02 0.0174."""
    assert allocate([0.5, 0.1], 8, 2, 8) == [4, 4]
    assert allocate([0.5, 0.02, 1.0, 0.1], 32, 2, 16) == [6, 8, 2, 16]
    assert allocate([0.0, 1.0], 16, 2, 8) == [8, 8]
    assert allocate([0.0, 1.0, 0.0], 9, 2, 8) == [3, 3, 3], "of equal gains the smaller group is first"


@pytest.mark.parametrize(("total", "lowest", "highest"), [(3, 2, 8), (17, 2, 8), (4, 0, 8), (8, 4, 3)])
def test_what_does_not_fit_is_refused(total: int, lowest: int, highest: int) -> None:
    with pytest.raises(ValueError, match=f"{total} rollouts do not go into 2 groups of {lowest} to {highest}"):
        allocate([0.5, 0.5], total, lowest, highest)


def test_the_loop_makes_groups_of_the_size_that_their_task_says() -> None:
    sizes = {0: 1, 1: 5, 3: 4}
    for k in (0, 2):
        parts = Counting(config(steps=2, group_size=3, max_staleness=k))
        loop = parts.settle()
        loop.source = Source(lambda n: replace(TASK, rollouts=sizes.get(n)))
        parts.run(loop)
        made = Counter(int(r.group.split("/")[1]) for r in parts.journal)
        trained = sorted(n for batch in parts.trained for n in batch)
        assert {n: made[n] for n in trained} == {n: sizes.get(n, 3) for n in trained} and len(trained) == 4
        assert parts.stepped[0][2] == sum(sizes.get(n, 3) for n in parts.trained[0])
