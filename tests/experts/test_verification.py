"""Self-verification: when the phase is on, what is asked, what it is worth, and that it survives a checkpoint."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from envs.worlds import RequestsConfig, make_world
from envs.worlds.base import play, say
from envs.worlds.rules import Rules, RulesConfig
from envs.worlds.verify import Verify, VerifyConfig, question
from experts.config import ExpertConfig, VerificationConfig
from experts.rollouts import Player
from experts.tasks import TaskStream
from experts.verification import SelfVerification
from fusion.config import PipelineConfig
from posttrain.journal import read_journal, rollout_from_dict
from posttrain.run import RunDir
from posttrain.types import Message, Rollout, Score, StopReason, Task
from tests.toy_stage import toy_stage, train

RULES = Rules(RulesConfig(), "rules")
VERIFY = Verify(VerifyConfig(of=RulesConfig()), "verify")
CONFIG = VerificationConfig(world="verify", share=0.5, window=4)


def source() -> SelfVerification:
    return SelfVerification(TaskStream({"rules": RULES}, {"rules": 1.0}, 50, 0), VERIFY, CONFIG, seed=1)


def answered(task: Task, texts: list[tuple[str, float]], number: int = 0) -> list[Rollout]:
    return [
        Rollout(
            id=f"s/{number}/{i}", group=f"s/{number}", task=task, branches=((),),
            messages=(*task.prompt, Message(role="assistant", content=text)), stop=StopReason.SCORED,
            score=Score(value=outcome, outcome=outcome),
        )
        for i, (text, outcome) in enumerate(texts)
    ]  # fmt: skip


def feed(s: SelfVerification, rates: list[float]) -> None:
    """Groups of four with these pass rates, quarters."""
    for number, rate in enumerate(rates):
        right = round(4 * rate)
        texts = [(f"good {number}", 1.0)] * right + [(f"bad {number}", 0.0)] * (4 - right)
        task = s._inner.task(number, "")
        s.seen(task, answered(task, texts, number))


def grade(task: Task, text: str) -> float:
    async def main() -> float:
        session = await VERIFY.open(task)
        said = await play(session, iter([say(text)]))  # pyright: ignore[reportArgumentType]  # a script without answers
        return await session.grade([*task.prompt, *said])

    return asyncio.run(main())


def test_the_phase_begins_when_the_rate_stalls_and_ends_when_it_rises() -> None:
    s = source()
    feed(s, [0.25] * 7)
    assert not s.active, "seven groups are not twice a window of four"
    feed(s, [0.25])
    assert s.active
    feed(s, [0.5] * 4)
    assert not s.active
    feed(s, [0.5] * 4)
    assert s.active
    assert not SelfVerification(s._inner, VERIFY, CONFIG.model_copy(update={"gain": -0.1}), 1).active


def test_questions_are_the_experts_own_answers_one_right_and_one_wrong_a_group() -> None:
    s = source()
    feed(s, [0.25] * 8)
    drawn = [s.task(n, "") for n in range(8, 80)]
    asked = [t for t in drawn if t.world == "verify"]
    assert len(asked) == 16, "all that eight groups gave, and no more"
    assert Counter(t.data["right"] for t in asked) == {True: 8, False: 8}
    by_id = {t.id: t for t in asked}
    inner = TaskStream({"rules": RULES}, {"rules": 1.0}, 50, 0).task(3, "")
    assert by_id["s/3/0/verify"].prompt == question(inner.prompt, "good 3")
    assert by_id["s/3/1/verify"].prompt[0].content.endswith("\nanswer bad 3\nright or wrong")
    assert {t.data["weight"] for t in asked} == {0.25}


def test_groups_that_are_all_right_or_all_wrong_give_no_question() -> None:
    s = source()
    feed(s, [0.0, 1.0] * 4)
    assert s.active
    assert all(s.task(n, "").world == "rules" for n in range(60))


def test_a_verdict_is_worth_the_pass_rate_of_the_answers_it_judges() -> None:
    s = source()
    feed(s, [0.25] * 7 + [0.75])
    s._outcomes = [1.0] * 4 + [0.5] * 4
    asked = [t for t in (s.task(n, "") for n in range(100, 200)) if t.world == "verify"]
    assert {t.data["weight"] for t in asked} == {0.25, 0.75}
    for task in asked:
        good, bad = ("right", "wrong") if task.data["right"] else ("wrong", "right")
        assert (grade(task, good), grade(task, bad), grade(task, "right wrong")) == (task.data["weight"], 0.0, 0.0)


def test_its_own_tasks_teach_the_source_nothing() -> None:
    s = source()
    feed(s, [0.25] * 8)
    before = s.state()
    task = next(t for t in (s.task(n, "") for n in range(50)) if t.world == "verify")
    middle = s.state()
    s.seen(task, answered(task, [("right", 1.0), ("wrong", 0.0)]))
    assert s.state() == middle != before


def test_a_resumed_source_goes_on_where_it_was() -> None:
    one, other = source(), source()
    feed(one, [0.5] * 9)
    other.restore(json.loads(json.dumps(one.state())))
    assert [one.task(n, "") for n in range(9, 40)] == [other.task(n, "") for n in range(9, 40)]


def test_the_split_is_the_judged_worlds() -> None:
    """No question of a held-out task, right answer included, is ever shown in training."""
    held_out = {t.prompt[0].content for t in RULES.tasks("eval", 200, 0)}
    for split in ("train", "demo"):
        shown = {t.prompt[0].content.split("\nanswer ")[0] for t in VERIFY.tasks(split, 200, 0)}
        assert len(shown) > 100 and not shown & held_out


class StalledPlayer(Player):
    """A third of every group is right, however it learns; verdicts are what they are."""

    def _score(self, rollout: Rollout, outcome: float) -> Score:
        if rollout.task.world == "requests":
            outcome = float(rollout.id.endswith("/0"))
        return Score(value=outcome, outcome=outcome)


def stalled(folder: Path, name: str, steps: tuple[int, ...]) -> tuple[RunDir, dict[str, Any]]:
    """A stage of an expert that gets no better, ended and gone on with after each of ``steps`` but the last."""
    given = {"requests": RequestsConfig(), "verify": VerifyConfig(of=RequestsConfig())}
    run: RunDir | None = None
    for last in steps:
        worlds = {n: make_world(c, n) for n, c in given.items()}
        judge = worlds["verify"]
        assert isinstance(judge, Verify)
        source = SelfVerification(TaskStream(worlds, {"requests": 1.0}, 20, 3), judge, CONFIG, 3)
        pace = {"steps": last, "max_staleness": 0, "checkpoint_every": 1}
        run = train(folder, name, toy_stage(folder, worlds, StalledPlayer, pace, source=source, judging="verify"))
    assert run is not None
    return run, torch.load(run.checkpoint("expert-toy") / "state.pt", weights_only=True)


def test_a_stage_that_stalls_judges_its_own_answers_and_a_resumed_one_the_same(tmp_path: Path) -> None:
    run, state = stalled(tmp_path, "one", (10,))
    rollouts = {r.id: r for r in map(rollout_from_dict, read_journal(run.rollouts("expert-toy")))}
    verdicts = [r for r in rollouts.values() if r.task.world == "verify"]
    assert len(verdicts) >= 9, "of 16 groups of three in the phase, half may ask"
    for rollout in verdicts:
        judged = rollouts[rollout.task.id.removesuffix("/verify")]
        assert rollout.task.data["right"] == judged.id.endswith("/0")
        assert rollout.task.data["weight"] == pytest.approx(1 / 3)
        first, answer = rollout.task.prompt[0].content, judged.messages[-1].content
        assert first.startswith(judged.task.prompt[0].content) and f"answer {answer}\n" in first
    asked = [r["step"] for r in read_journal(run.metrics_file) if "outcome/verify" in r]
    assert asked and min(asked) > 4, "twice a window of four groups, two a step, come first"
    _, other = stalled(tmp_path, "other", (6, 10))
    assert other["source"] == state["source"]
    assert all(torch.equal(other["trainer"]["model"][k], v) for k, v in state["trainer"]["model"].items())


@pytest.mark.parametrize(
    ("world", "said"),
    [
        ("nowhere", "experts.reasoning.verification.world: there is no world `nowhere`"),
        ("chains", "verification.world: `chains` is among the expert's worlds"),
        ("rules", "experts.reasoning.verification.world: `rules` is of type rules, not verify"),
    ],
)
def test_a_wrong_world_is_refused_with_the_config(world: str, said: str) -> None:
    expert = {"worlds": {"chains": 1}, "verification": {"world": world}}
    worlds = {"chains": {"type": "chains"}, "rules": {"type": "rules"}}
    given = {"model": {"type": "pretrained", "path": Path("m")}, "worlds": worlds, "experts": {"reasoning": expert}}
    with pytest.raises(ValueError, match=said):
        PipelineConfig.model_validate(given)
    assert ExpertConfig.model_validate({**expert, "worlds": {"other": 1}}).verification is not None
