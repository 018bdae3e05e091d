"""Rules at work in a real stage whose reward breaks on purpose: it warns, pauses, rolls back, and knows an end of it.

Synchronous mode, so that what a stage ends with can be compared bit for bit."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from envs.worlds import RequestsConfig, make_world
from experts.credit import GroupCredit, GroupCreditConfig
from experts.rollouts import Player
from experts.train import Stage, rolled_back
from fusion.report import write_report
from posttrain.errors import UserError
from posttrain.files import save_state
from posttrain.journal import read_journal
from posttrain.run import RunDir
from posttrain.settings import TrainerConfig
from posttrain.types import Rollout, Sample, Score
from posttrain.watch import Paused, Watch
from posttrain.watch_settings import RULES, Rule, WatchConfig
from tests.toy_stage import toy_stage, train

STEPS, BATCH, SIZE = 12, 2, 3
BROKEN = range(12, 20)
"""Groups whose reward is turned over: those of steps 7 to 10, if all goes on."""
PACE: dict[str, Any] = {"max_staleness": 0, "checkpoint_every": 2, "wait_s": 120.0}
ROOT = Path(__file__).parents[2]


class BreakingPlayer(Player):
    """Rewards even tokens; in broken groups odd ones, and little."""

    broken: range = BROKEN

    def _score(self, rollout: Rollout, outcome: float) -> Score:
        ids = [i for s in rollout.branches[0] for i, m in zip(s.ids, s.sampled, strict=True) if m]
        even = sum(i % 2 == 0 for i in ids) / len(ids)
        number = int(rollout.group.rsplit("/", 1)[1])
        return Score(value=0.1 * (1 - even) if number in self.broken else 0.5 + even / 2)


def rule(do: str) -> Rule:
    return Rule.model_validate({"metric": "reward", "falls_by": 2.0, "over": 2, "do": do})


@dataclass
class Bench:
    """A model, and run directories in which it is trained."""

    folder: Path

    def stage(self, watch: WatchConfig, steps: int = STEPS, broken: range = BROKEN, **loop: Any) -> Stage:
        worlds = {"requests": make_world(RequestsConfig(), "requests")}
        pace = {"steps": steps, **PACE, **loop}
        trainer = TrainerConfig(lr=1e-2, warmup_steps=0, decay=False)
        stage = toy_stage(self.folder, worlds, BreakingPlayer, pace, trainer=trainer, watch=watch)
        assert isinstance(stage.player, BreakingPlayer)
        stage.player.broken = broken
        return stage

    def run(self, name: str, stage: Stage) -> RunDir:
        handler = logging.FileHandler((self.folder / name).with_suffix(".log"))
        logging.getLogger("experts.train").addHandler(handler)
        try:
            return train(self.folder, name, stage)
        finally:
            logging.getLogger("experts.train").removeHandler(handler)
            handler.close()


def log_of(run: RunDir) -> str:
    return run.path.with_suffix(".log").read_text()


def records(run: RunDir) -> list[dict[str, Any]]:
    return list(read_journal(run.metrics_file))


def alarms(run: RunDir) -> list[dict[str, Any]]:
    return list(read_journal(run.checkpoint("expert-toy") / "alarms.jsonl"))


def state(run: RunDir) -> dict[str, Any]:
    return torch.load(run.checkpoint("expert-toy") / "state.pt", weights_only=True)


def trained(run: RunDir) -> dict[int, list[int]]:
    return {r["version"]: r["groups"] for r in read_journal(run.rollouts("expert-toy.trained"))}


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {k for k in a if not torch.equal(a[k], b[k])}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("watch"))


@pytest.fixture(scope="module")
def warned(bench: Bench) -> RunDir:
    return bench.run("warned", bench.stage(WatchConfig(rules={"mine": rule("warn")})))


def test_a_warning_is_in_metrics_log_and_record_and_changes_nothing(warned: RunDir) -> None:
    assert [r["step"] for r in records(warned)] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records(warned) if r.get("alarm/mine")] == [8, 9, 10]
    assert all(0.5 <= r["reward"] <= 1 for r in records(warned) if r["step"] not in range(7, 11))
    assert all(0 <= r["reward"] <= 0.1 for r in records(warned) if r["step"] in range(7, 11))
    (alarm,) = [a for a in alarms(warned) if a["rule"] == "mine"]
    assert (alarm["version"], alarm["do"], alarm["roll_backs"]) == (8, "warn", 0)
    assert alarm["text"].endswith("divided by 2, for 2 steps")
    said = [line for line in log_of(warned).splitlines() if "rule mine" in line]
    assert said == [f"expert-toy: at version 8 by the rule mine: {alarm['text']}"], "once, though it holds for three"
    assert state(warned)["finished"] == list(range(STEPS * BATCH))
    assert not (warned.checkpoint("expert-toy") / "good.pt").exists(), "no rule rolls back"
    assert not warned.waits_file.exists(), "it has ended, and nobody waits"


def test_every_metric_of_a_stage_can_be_watched(warned: RunDir) -> None:
    names = {n for r in records(warned) for n in r} - {"stage", "step", "time", "alarm/mine"}
    assert {"truncated", "repetition", "parse_failures", "staleness_short", "staleness_long", "ess_tokens"} <= names
    names -= {f"alarm/{r}" for r in RULES}
    assert [Rule(metric=n, above=1.0).metric for n in sorted(names)] == sorted(names)


def test_every_default_rule_has_its_metric(warned: RunDir) -> None:
    """At every step: a rule whose metric is absent holds in silence. The default objective has a ``token_band``."""
    logged = set.intersection(*(set(r) for r in records(warned)))
    assert {n: r.metric for n, r in RULES.items() if r.metric not in logged} == {}


def long_rollouts_alarmed(staleness: Sequence[float]) -> list[int]:
    """Versions at which the default rules warn of them."""
    watched = Watch(WatchConfig())
    seen = [
        a for i, s in enumerate(staleness) for a in watched.see(i + 1, {"staleness_long": s, "staleness_short": 0.1})
    ]
    assert {(a.rule, a.do) for a in seen} <= {("staleness", "warn")}
    return [a.version for a in seen]


def test_long_rollouts_that_are_trained_late_are_warned_of() -> None:
    """Half a version late at first, then at the bound of K = 4, while the shorter ones are as they were."""
    assert long_rollouts_alarmed([0.5] * 10 + [2.1] * 4 + [0.5, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]) == [20, 21]


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_climb_to_the_bound_is_no_alarm(k: int, every: int) -> None:
    """Nothing is older than the run: a bounded stage climbs to K at most a version a step, or slower, and stays."""
    climb = [float(min(k, version // every)) for version in range(200)]
    assert long_rollouts_alarmed(climb) == [] == long_rollouts_alarmed([0.0, 0.4, 1.2, 0.7, 0.8, *climb])


def test_the_report_lists_alarms(warned: RunDir) -> None:
    page = write_report(warned).read_text()
    (mine,) = [a for a in alarms(warned) if a["rule"] == "mine"]
    assert f'<b>toy</b>, version 8: {mine["text"]} <span class="soft">mine, warned</span></li>' in page
    assert page.count('<li class="c-e0"><i class="dot"></i><b>toy</b>, version') == len(alarms(warned))
    (warned.checkpoint("expert-toy") / "alarms.jsonl").rename(warned.path / "kept")
    assert 'id="alarms"' not in write_report(warned).read_text()
    (warned.path / "kept").rename(warned.checkpoint("expert-toy") / "alarms.jsonl")


@pytest.mark.slow
def test_a_pause_is_an_end_with_a_checkpoint_and_the_same_command_goes_on(warned: RunDir, bench: Bench) -> None:
    stage = bench.stage(WatchConfig(rules={"mine": rule("pause")}))
    with pytest.raises(Paused) as paused:
        bench.run("paused", stage)
    text = str(paused.value)
    assert text.startswith("expert-toy: paused at version 8 by the rule mine: reward is 0.0")
    assert "The same command goes on" in text and "--set experts.toy.watch.rules.mine.do=warn" in text
    run = RunDir(bench.folder / "paused")
    assert state(run)["trainer"]["version"] == 8
    run = bench.run("paused", bench.stage(stage.watch))
    assert [r["step"] for r in records(run)] == list(range(1, STEPS + 1))
    assert [(a["rule"], a["version"]) for a in alarms(run) if a["do"] == "pause"] == [("mine", 8)]
    assert differing(state(run)["trainer"]["model"], state(warned)["trainer"]["model"]) == set()


@pytest.mark.slow
def test_a_roll_back_ends_with_the_good_weights_and_goes_on(bench: Bench) -> None:
    """Version 8 is the second bad one, so back to 6, which is good; groups 16 to 19 are as bad, so back once more; then
    20 and so on. The same weights, bit for bit, come of a run that is taken from its version 6 to 20 by hand."""
    run = bench.run("rolled", bench.stage(WatchConfig(rules={"mine": rule("roll_back")})))
    assert [line for line in log_of(run).splitlines() if "rolled back" in line] == [
        "expert-toy: rolled back from version 8 to 6 by the rule mine"
    ] * 2
    assert [(a["rule"], a["version"], a["roll_backs"]) for a in alarms(run) if a["do"] == "roll_back"] == [
        ("mine", 8, 0),
        ("mine", 8, 1),
    ]
    assert [r["step"] for r in records(run)] == list(range(1, STEPS + 1))
    assert [r["lr"] for r in records(run)] == pytest.approx([1e-2] * 6 + [2.5e-3] * 6)
    assert [r.get("roll_backs") for r in records(run)] == [None] * 6 + [2.0] * 6
    assert trained(run) == {v: [2 * v - 2, 2 * v - 1] if v <= 6 else [2 * v + 6, 2 * v + 7] for v in range(1, 13)}
    assert state(run)["finished"] == list(range(32))
    assert all(r["reward"] >= 0.5 for r in records(run))

    # A life in which no rule rolls back takes the good checkpoint away: it grows old, and is none for a later life.
    good = run.checkpoint("expert-toy") / "good.pt"
    assert good.exists()
    bench.run("rolled", bench.stage(WatchConfig()))
    assert not good.exists()

    by_hand = bench.run("by_hand", bench.stage(WatchConfig(), steps=6))
    save_state(rolled_back(state(by_hand), BROKEN, 2, 0.5), by_hand.checkpoint("expert-toy") / "state.pt")
    bench.run("by_hand", bench.stage(WatchConfig()))
    assert differing(state(run)["trainer"]["model"], state(by_hand)["trainer"]["model"]) == set()


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_ends_the_stage_or_is_rolled_back(bench: Bench) -> None:
    """Group 8, of step 5, has an advantage that is no number. The checkpoint of version 4 is the good one."""

    def credit(group: Sequence[Rollout]) -> list[Sample]:
        samples = GroupCredit(GroupCreditConfig())(group)
        if not group[0].group.endswith("/8"):
            return samples
        return [replace(s, advantages=tuple(a * math.nan for a in s.advantages)) for s in samples]

    def stage(watch: WatchConfig) -> Stage:
        return replace(bench.stage(watch, broken=range(0)), credit=credit)

    with pytest.raises(FloatingPointError, match=r"nan at version 4: lower trainer\.lr"):
        bench.run("not_finite", stage(WatchConfig()))
    back = WatchConfig.model_validate({"rules": {"gradient": {"do": "roll_back"}}})
    run = bench.run("not_finite_back", stage(back))
    (alarm,) = [a for a in alarms(run) if a["rule"] == "gradient"]
    assert (alarm["version"], alarm["text"]) == (5, "gradient norm is nan at version 4: lower trainer.lr")
    assert trained(run) == {v: [2 * v - 2, 2 * v - 1] if v <= 4 else [2 * v, 2 * v + 1] for v in range(1, STEPS + 1)}
    assert state(run)["roll_backs"] == 1


@pytest.mark.slow
def test_an_asynchronous_stage_rolls_back_as_well(bench: Bench) -> None:
    """One rule alone: at this rate the default ones warn of rollouts that a busy machine makes stale, and what they
    warn of is no good checkpoint. The broken groups come late enough for the rule to have a mean, which goes to the
    good checkpoint. A batch may mix a broken group with another, which comes to the rule's bound; below 0.3, which is
    below half of any mean there is here, no two steps in a row are left to stand."""
    config = WatchConfig(rules={**dict.fromkeys(RULES), "mine": rule("roll_back")}, max_roll_backs=4)
    steps = STEPS + 4
    run = bench.run("async", bench.stage(config, steps, broken=range(16, 26), max_staleness=2, max_running=4))
    rewards = [r["reward"] for r in records(run)]
    assert len(rewards) == steps and 1 <= state(run)["roll_backs"] <= 4
    assert {a["rule"] for a in alarms(run)} == {"mine"}
    assert all(a > 0.3 or b > 0.3 for a, b in pairwise(rewards))
    numbers = [n for groups in trained(run).values() for n in groups]
    assert len(set(numbers)) == steps * BATCH and set(numbers) <= set(state(run)["finished"])


@pytest.mark.slow
def test_roll_backs_come_to_an_end(bench: Bench) -> None:
    config = WatchConfig(rules={"mine": rule("roll_back")}, max_roll_backs=1)
    with pytest.raises(UserError) as ended:
        bench.run("ended", bench.stage(config, broken=range(12, 1000)))
    text = str(ended.value)
    assert text.startswith("expert-toy: the rule mine wants a roll back at version 8: reward is 0.0")
    assert "There were 1, which is all there may be (experts.toy.watch.max_roll_backs)" in text
    assert "Lower experts.toy.trainer.lr" in text and not isinstance(ended.value, Paused)
    run = RunDir(bench.folder / "ended")
    assert state(run)["trainer"]["version"] == 6 and state(run)["finished"] == list(range(16))


def test_a_rolled_back_checkpoint_leaves_groups_out_and_slows_down() -> None:
    """Two roll backs at once of a checkpoint that has seen one: a rate of a quarter."""
    group = {"lr": 0.4, "initial_lr": 0.8, "betas": (0.9, 0.95)}
    good = {
        "finished": [0, 1],
        "accepted": 2,
        "tasks": {"2": "a", "3": "b", "9": "c"},
        "roll_backs": 1,
        "watch": {"mine": 1},
        "trainer": {
            "version": 1,
            "model": "weights",
            "optimizer": {"state": "moments", "param_groups": [group]},
            "schedule": {"base_lrs": [0.8], "_last_lr": [0.4], "last_epoch": 1},
        },
    }
    before = json.dumps(good)
    found = rolled_back(good, {2, 3, 4}, 3, 0.5)
    assert found["finished"] == [0, 1, 2, 3, 4] and found["accepted"] == 2 and found["roll_backs"] == 3
    assert found["tasks"] == {"9": "c"} and found["watch"] == {"mine": 1}
    assert found["trainer"] == {
        "version": 1,
        "model": "weights",
        "optimizer": {"state": "moments", "param_groups": [{"lr": 0.1, "initial_lr": 0.2, "betas": (0.9, 0.95)}]},
        "schedule": {"base_lrs": [0.2], "_last_lr": [0.1], "last_epoch": 1},
    }
    assert json.dumps(good) == before


SCRIPT = """
import sys
from pathlib import Path
from posttrain import cli
from posttrain.watch_settings import WatchConfig
from tests.experts.test_watch import Bench, Rule

@cli.app.command()
def toy(folder: Path) -> None:
    bench = Bench(folder)
    tired = Rule(metric="reward", above=0.0, over=2, do="pause")
    bench.run("run", bench.stage(WatchConfig(rules={"tired": tired}), steps=3))

cli.main()
"""


@pytest.mark.slow
def test_the_command_line_ends_with_status_three(tmp_path: Path) -> None:
    """Twice: by the rule at version 2, and then at the end, since the rule measures anew and no two steps are left."""

    def again() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, "toy", str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)

    first = again()
    assert first.returncode == 3, first.stderr[-2000:]
    said = first.stderr.splitlines()[-1]
    assert said.startswith("expert-toy: paused at version 2 by the rule tired: reward is 0.")
    assert "Traceback" not in first.stderr and "error:" not in first.stderr
    second = again()
    assert (second.returncode, second.stdout) == (0, ""), second.stderr[-2000:]
