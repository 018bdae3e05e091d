"""All that chooses what is trained on, at once, in a real stage that is killed and goes on: the books stay true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts.config import ExpertConfig
from experts.credit import TRUNCATED, GroupCredit
from experts.tasks import TaskStream
from posttrain.groups import place_of
from posttrain.journal import read_journal
from posttrain.protocols import Engine, World
from posttrain.run import RunDir
from posttrain.types import Rollout, Sample, Score, StopReason, Task
from tests.posttrain import small
from tests.toy_stage import EvenPlayer, Hook, HookedWorld, fine, records, rollouts, toy_stage, train

STEPS, BATCH, CAP, K = 10, 2, 4, 2
CONFIG = ExpertConfig.model_validate(
    {
        "worlds": {"requests": 1.0},
        "curriculum": {"repeat": 0.0, "budget": {"min": 2, "max": 5, "pool": 6}},
        "credit": {"truncated": "mask", "token_cap": CAP},
        "loss": {"type": "dppo", "constant_length": 8},
        "loop": {
            "steps": STEPS, "groups_per_step": BATCH, "group_size": 3, "max_running": 2, "max_staleness": K,
            "reuse": 0.5, "filter_silent": True, "quotas": True, "checkpoint_every": 2, "wait_s": 60.0,
        },
    }
)  # fmt: skip


class Killed(BaseException):
    """Nothing of an episode, so nobody takes it for a failure of one."""


def solvable(task: Task) -> bool:
    """Half of them."""
    return int(task.id.rsplit("/", 1)[1]) % 2 == 0


class CutPlayer(EvenPlayer):
    """A toy's rollouts are nearly all cut short and never right: here some are, by the tokens that they have, and half
    of the tasks can be solved."""

    async def __call__(self, engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        made = await super().__call__(engine, task, rollout_id, group, seed)
        cut = made.valid and sum(i for s in made.branches[0] for i in s.ids) % 3 == 0
        return replace(made, stop=StopReason.CONTEXT_OVERFLOW if cut else StopReason.SCORED) if made.valid else made

    def _score(self, rollout: Rollout, outcome: float) -> Score:
        scored = super()._score(rollout, outcome)
        return replace(scored, outcome=float(scored.value >= 0.5 and solvable(rollout.task)))


def play(folder: Path, hook: Hook, credited: list[Sample]) -> RunDir:
    """Train to the end; ``credited`` gets every sample."""
    worlds: dict[str, World] = {"requests": HookedWorld(hook, 60.0)}
    credit = GroupCredit(CONFIG.credit, seed=3)

    def note(group: Sequence[Rollout]) -> list[Sample]:
        found = credit(group)
        credited.extend(found)
        return found

    pace, size = CONFIG.loop.model_dump(), CONFIG.loop.group_size
    source = TaskStream(worlds, CONFIG.worlds, 6, seed=3, curriculum=CONFIG.curriculum, group_size=size)
    for task in worlds["requests"].tasks("train", 6, 3):  # it begins with a past, or all groups would be of one size
        source.seen(task, [small.rollout(score=0.0), small.rollout(score=float(solvable(task)))])
    stage = toy_stage(folder, worlds, CutPlayer, pace, loss=CONFIG.loss, credit=note, source=source)
    return train(folder, "run", stage)


@pytest.mark.slow
def test_everything_that_chooses_at_once_keeps_the_books_through_a_kill(tmp_path: Path) -> None:
    trained_file = tmp_path / "run" / "rollouts" / "expert-toy.trained.jsonl"
    credited = list[Sample]()

    async def deadly(where: str, count: int) -> None:
        """After a step of which there is no checkpoint."""
        if where == "grade" and trained_file.exists() and len(list(read_journal(trained_file))) in (3, 5):
            raise Killed

    with pytest.raises(Killed):
        play(tmp_path, deadly, credited)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "expert-toy" / "state.pt", weights_only=True)
    version = saved["trainer"]["version"]
    assert 2 <= version < STEPS
    before = {r["step"]: r for r in read_journal(tmp_path / "run" / "metrics.jsonl")}
    run = play(tmp_path, fine, credited)

    trained, there = list(read_journal(run.rollouts("expert-toy.trained"))), rollouts(run)
    assert [t["version"] for t in trained] == [r["step"] for r in records(run)] == list(range(1, STEPS + 1))
    assert all(r == before[r["step"]] for r in records(run) if r["step"] <= version), "what was saved is as it was"

    # Reuse: half of a batch at most, every group once more at most.
    assert {len(t["groups"]) for t in trained} == {BATCH}
    times = Counter(n for t in trained for n in t["groups"])
    seen, again = set[int](), list[int]()
    for t in trained:
        again.append(len(seen & {*t["groups"]}))
        seen |= {*t["groups"]}
    assert max(times.values()) == 2 and max(again) == BATCH // 2
    assert max(r["staleness_max"] for r in records(run)) <= K

    # Nothing was trained that is not written down; every group has one task and as many rollouts as that says.
    valid = {r.id: r for r in there if r.valid}
    tasks = {n: {(r.task.id, r.task.rollouts) for r in there if place_of(r)[0] == n} for n in seen}
    assert all(len(found) == 1 for found in tasks.values())
    sizes = {n: size for n, [(_, size)] in tasks.items()}
    for t in trained:
        assert {*t["rollouts"]} <= valid.keys() and len({*t["rollouts"]}) == len(t["rollouts"])
        assert Counter(place_of(valid[i])[0] for i in t["rollouts"]) == {n: sizes[n] for n in t["groups"]}
    assert set(sizes.values()) <= {2, 3, 4, 5} and len(set(sizes.values())) > 1

    # What was cut short is masked, the rest is capped, and groups of which nothing is left are replaced.
    assert credited and all(sum(s.sampled) <= CAP for s in credited)
    assert {s.rollout for s in credited} <= {r.id for r in there if r.stop not in TRUNCATED}
    assert any(valid[i].stop in TRUNCATED for t in trained for i in t["rollouts"])
    with_signal = {int(s.rollout.split("/")[1]) for s in credited}
    assert seen <= with_signal and records(run)[-1]["filtered"] > 0
    assert {place_of(r)[0] for r in there} - with_signal
