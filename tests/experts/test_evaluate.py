"""Held-out tasks, retries, and what is reported of an episode that could not be judged."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from experts.config import EvaluationConfig
from experts.evaluate import evaluate, held_out, record
from posttrain.errors import EngineError
from posttrain.types import Culprit, Failure, Rollout, Score, Task
from tests.posttrain.small import rollout


class Named:
    """Tasks that say where they are from."""

    def __init__(self, name: str, domain: str) -> None:
        self.name, self.domain = name, domain

    def tasks(self, split: str, n: int, seed: int) -> list[Task]:
        return [
            Task(id=f"{self.name}/{split}/{seed}/{i}", domain=self.domain, world=self.name, prompt=()) for i in range(n)
        ]


class Player:
    """Fails the first ``bad[task]`` times."""

    def __init__(self, bad: dict[str, int]) -> None:
        self.bad, self.calls, self.open, self.most = bad, list[tuple[str, str, int]](), 0, 0

    async def __call__(self, engine: Any, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(0.001 * (len(self.calls) % 3))
        self.open -= 1
        self.calls.append((task.id, rollout_id, seed))
        tries = sum(t == task.id for t, _, _ in self.calls)
        fine = tries > self.bad.get(task.id, 0)
        return replace(rollout("s/0/0", score=0.25 if fine else None), id=rollout_id, group=group, task=task)


TASKS = Named("a", "x").tasks("eval", 6, 0)


def run(player: Player, label: str = "base", concurrency: int = 2) -> tuple[list[Rollout], int]:
    done: list[None] = []
    config, ticks = EvaluationConfig(tasks=6, concurrency=concurrency), done.append
    player_: Any = player
    engine: Any = None
    found = evaluate(engine, player_, TASKS, config, label=label, seed=4, on_done=lambda: ticks(None))
    return asyncio.run(found), len(done)


def test_one_rollout_a_task_in_their_order() -> None:
    player = Player({})
    rollouts, ticks = run(player)
    assert [r.task for r in rollouts] == TASKS
    assert ticks == 6 and len(player.calls) == 6 and player.most == 2


def test_invalid_ones_are_tried_again_then_reported_as_none() -> None:
    player = Player({TASKS[1].id: 2, TASKS[4].id: 99})
    rollouts, ticks = run(player)
    tries = [sum(t == task.id for t, _, _ in player.calls) for task in TASKS]
    assert tries == [1, 3, 1, 1, 3, 1] and ticks == 6
    outcomes = [record(r)["outcome"] for r in rollouts]
    assert outcomes == [0.25, 0.25, 0.25, 0.25, None, 0.25]
    assert len({s for _, _, s in player.calls}) == 10, "every attempt draws other numbers"


def test_every_policy_draws_the_same_numbers_on_a_task() -> None:
    one, other = Player({}), Player({})
    run(one, "base")
    run(other, "student", concurrency=6)
    assert {t: s for t, _, s in one.calls} == {t: s for t, _, s in other.calls}
    assert {i for _, i, _ in one.calls} == {f"base/{t.id}/0" for t in TASKS}


@pytest.mark.parametrize(
    ("score", "outcome"),
    [(Score(value=0.9, outcome=1.0), 1.0), (Score(value=0.2, outcome=0.0), 0.0), (Score(value=0, valid=False), None)],
)
def test_outcomes_are_counted_not_shaped_values_and_invalid_is_never_zero(score: Score, outcome: float | None) -> None:
    assert record(replace(rollout("s/0/0"), score=score))["outcome"] == outcome


def test_a_record_by_hand() -> None:
    assert record(rollout("s/0/0", values=(5, 6, 7), versions=(0, 0, 0), score=1.0)) == {
        "task": "t", "domain": "agent", "world": "toy", "difficulty": 0.0, "outcome": 1.0, "tokens": 3,
        "stop": "scored", "sandbox": "", "parse_errors": 0, "text": "",
    }  # fmt: skip


def test_a_domain_s_tasks_are_shared_equally_by_its_worlds() -> None:
    worlds: Any = {n: Named(n, d) for n, d in (("b", "y"), ("c", "x"), ("a", "x"))}
    tasks = held_out(worlds, EvaluationConfig(tasks=4), 8)
    assert [t.id for t in tasks] == [
        "a/eval/8/0", "a/eval/8/1", "c/eval/8/0", "c/eval/8/1", *(f"b/eval/8/{i}" for i in range(4))
    ]  # fmt: skip
    assert tasks == held_out(dict(reversed(worlds.items())), EvaluationConfig(tasks=4), 8)


def test_a_dead_engine_ends_the_evaluation_and_is_no_outcome() -> None:
    class Dead(Player):
        async def __call__(self, engine: Any, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
            found = await super().__call__(engine, task, rollout_id, group, seed)
            return found if found.valid else replace(found, error=Failure(culprit=Culprit.ENGINE, message="it died"))

    player = Dead({TASKS[2].id: 99})
    with pytest.raises(EngineError, match=f"^base/{TASKS[2].id}/0: it died$"):
        run(player)
    assert sum(t == TASKS[2].id for t, _, _ in player.calls) == 3
