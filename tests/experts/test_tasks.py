"""Which task a group works on."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from experts.tasks import TaskStream
from posttrain.types import Task


class Named:
    """Tasks that say where they are from."""

    def __init__(self, name: str) -> None:
        self.name, self.domain = name, "agent"

    def tasks(self, split: str, n: int, seed: int) -> list[Task]:
        return [
            Task(id=f"{self.name}/{split}/{seed}/{i}", domain="agent", world=self.name, prompt=()) for i in range(n)
        ]


def stream(shares: dict[str, float], per_world: int = 50, seed: int = 3) -> TaskStream:
    worlds: Any = {name: Named(name) for name in ("a", "b", "c")}
    return TaskStream(worlds, shares, per_world, seed)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30), st.integers(0, 2**63))
def test_a_number_has_one_task_whatever_was_asked_before(numbers: list[int], seed: int) -> None:
    one, other = stream({"a": 1, "b": 2}, seed=seed), stream({"b": 2, "a": 1}, seed=seed)
    asked = {n: one.task(n, "") for n in numbers}
    assert {n: other.task(n, "") for n in reversed(numbers)} == asked


def test_another_seed_gives_other_tasks() -> None:
    one, other = stream({"a": 1, "b": 1}, seed=0), stream({"a": 1, "b": 1}, seed=1)
    drawn = [[s.task(n, "").id.split("/")[-1] for n in range(50)] for s in (one, other)]
    assert drawn[0] != drawn[1]


def test_shares_are_respected_and_only_they() -> None:
    """4,000 draws with shares 1 to 3: the standard error of the first is 0.007."""
    counts = Counter(stream({"a": 0.5, "c": 1.5}).task(n, "").world for n in range(4000))
    assert set(counts) == {"a", "c"}
    assert abs(counts["a"] / 4000 - 0.25) < 0.03


def test_tasks_are_from_the_train_split_and_all_of_them_come() -> None:
    seen = {stream({"b": 1}, per_world=5).task(n, "").id for n in range(100)}
    assert seen == {f"b/train/3/{i}" for i in range(5)}
