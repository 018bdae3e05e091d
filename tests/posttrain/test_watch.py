"""Rules on the numbers of a run: what violates them, since when, and what a checkpoint must hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config import dump, load
from posttrain.errors import ConfigError, UserError
from posttrain.watch import Alarm, Watch
from posttrain.watch_settings import RULES, Rule, WatchConfig

OFF: dict[str, Rule | None] = dict.fromkeys(RULES)


def watch(memory: int = 20, **rules: Rule) -> Watch:
    """These rules and no others."""
    return Watch(WatchConfig(rules={**OFF, **rules}, memory=memory))


def run(watched: Watch, metric: str, values: list[float], start: int = 1) -> list[Alarm]:
    return [a for i, v in enumerate(values) for a in watched.see(start + i, {metric: v})]


def alarmed(watched: Watch, metric: str, values: list[float]) -> list[int]:
    return [a.version for a in run(watched, metric, values)]


# Kinds of rules


def test_bounds() -> None:
    values = [0.5, 0.6, 0.5, 0.4, 0.5]
    assert alarmed(watch(r=Rule(metric="reward", above=0.5)), "reward", values) == [2]
    assert alarmed(watch(r=Rule(metric="reward", below=0.5)), "reward", values) == [4]


def test_patience_counts_steps_in_a_row() -> None:
    rule = Rule(metric="ess_tokens", below=0.2, over=3, do="pause")
    found = run(watch(r=rule), "ess_tokens", [0.1, 0.1, 0.3, 0.1, 0.1, 0.15, 0.1, 0.3, 0.1])
    assert [(a.version, a.steps, a.new) for a in found] == [(6, 3, True), (7, 4, False)]
    assert found[0] == Alarm(
        rule="r", do="pause", version=6, value=0.15, bound=0.2, steps=3, new=True,
        text="ess_tokens is 0.15, below 0.2, for 3 steps",
    )  # fmt: skip


def test_a_rule_holds_from_its_version_on() -> None:
    rule = Rule(metric="truncated", above=0.5, over=2, after=4)
    assert alarmed(watch(r=rule), "truncated", [1.0] * 6) == [5, 6]


def test_a_rise_is_held_against_the_moving_average() -> None:
    """Five values of mean 2 make the average; 20 is ten times that, and 20.1 is above."""
    rule = Rule(metric="grad_norm", rises_by=10.0)
    assert alarmed(watch(r=rule), "grad_norm", [1, 3, 2, 1, 3, 20.0]) == []
    (alarm,) = run(watch(r=rule), "grad_norm", [1, 3, 2, 1, 3, 20.1])
    assert (alarm.version, alarm.value, alarm.bound) == (6, 20.1, 20.0)
    assert alarm.text == "grad_norm is 20.1, above 10 times its moving average, 2"
    assert alarmed(watch(r=rule), "grad_norm", [1, 1, 1, 1, 1000]) == [], "four values make no average"


def test_what_violates_a_rule_does_not_move_its_average() -> None:
    """Or else a second outburst would hide behind the first."""
    rule = Rule(metric="grad_norm", rises_by=10.0)
    assert alarmed(watch(r=rule), "grad_norm", [1.0] * 5 + [1000, 1, 11, 1, 11]) == [6, 8, 10]


def test_steps_without_trained_tokens_do_not_lower_an_average() -> None:
    rule = Rule(metric="grad_norm", rises_by=10.0)
    assert alarmed(watch(r=rule), "grad_norm", [1.0] * 5 + [0.0] * 30 + [11.0]) == [36]


def test_the_average_forgets() -> None:
    """With a memory of five values the average of 1, 1, 1, 1, 1, 2, 2 is 1 + 1/5 + 4/25 = 1.36."""
    watched = watch(memory=5, r=Rule(metric="reward", rises_by=2.0))
    (alarm,) = run(watched, "reward", [1.0] * 5 + [2, 2, 3])
    assert alarm.bound == pytest.approx(2 * 1.36)


def test_a_slow_fall_is_held_against_the_start() -> None:
    """Halved every ten steps, entropy is below a tenth of its start at step 37; its moving average goes with it."""
    values = [0.5 ** (t / 10) for t in range(60)]
    start = sum(values[:5]) / 5
    first = next(t for t, v in enumerate(values) if v < start / 10) + 1
    assert first == 37
    rule = Rule(metric="entropy", falls_by=10.0, of="start", over=3)
    found = run(watch(r=rule), "entropy", values)
    assert [a.version for a in found] == list(range(first + 2, 61))
    assert found[0].text == (
        f"entropy is {values[38]:.4g}, below the mean of its first values, {start:.4g}, divided by 10, for 3 steps"
    )
    assert alarmed(watch(r=Rule(metric="entropy", falls_by=10.0)), "entropy", values) == []


def test_what_is_no_number_violates_every_kind() -> None:
    for rule in (Rule(metric="reward", above=9.0), Rule(metric="reward", below=-9.0)):
        assert alarmed(watch(r=rule), "reward", [math.nan]) == [1]
    for rule in (Rule(metric="reward", rises_by=9.0), Rule(metric="reward", falls_by=9.0)):
        assert alarmed(watch(r=rule), "reward", [1.0] * 5 + [math.nan, 1.0]) == [6]
    assert alarmed(watch(r=Rule(metric="reward", rises_by=9.0)), "reward", [1.0] * 5 + [math.inf, 1.0]) == [6]


def test_a_missing_value_changes_nothing() -> None:
    watched = watch(r=Rule(metric="entropy", below=1.0, over=2))
    steps = [{"entropy": 0.5}, {"reward": 1.0}, {"entropy": 0.5}, {"reward": 1.0}]
    found = [a.version for i, stats in enumerate(steps) for a in watched.see(i + 1, stats)]
    assert found == [3] and not watched.well


def test_counts_that_are_not_logged_are_zero() -> None:
    watched = watch(r=Rule(metric="stop/loop", above=3.0, over=2))
    steps = [{"stop/loop": 4.0}, {"reward": 1.0}, {"stop/loop": 4.0}, {"stop/loop": 4.0}]
    assert [a.version for i, stats in enumerate(steps) for a in watched.see(i + 1, stats)] == [4]


def test_all_is_well_only_while_nothing_is_violated() -> None:
    watched = watch(a=Rule(metric="reward", below=0.5, over=9), b=Rule(metric="entropy", below=0.5))
    seen: list[bool] = []
    for version, stats in enumerate([{"reward": 1.0}, {"reward": 0.1}, {"entropy": 1.0}, {"reward": 1.0}]):
        watched.see(version, {"reward": 1.0, "entropy": 1.0, **stats} if version == 0 else stats)
        seen.append(watched.well)
    assert seen == [True, False, False, True], "before an alarm, too, and by a value, not by the lack of one"


def test_a_warning_that_stands_does_not_keep_checkpoints_from_being_good() -> None:
    for do, expected in (("warn", [True, False, False, True, True]), ("pause", [True, False, False, False, True])):
        watched = watch(r=Rule.model_validate({"metric": "reward", "below": 0.5, "over": 2, "do": do}))
        assert [(watched.see(i, {"reward": v}), watched.well)[1] for i, v in enumerate([1.0, 0, 0, 0, 1])] == expected


# Checkpoints


RELATIVE = Rule(metric="reward", falls_by=2.0, over=2)


@pytest.mark.parametrize("cut", range(12))
def test_a_restored_watch_goes_on_as_it_would_have(cut: int) -> None:
    values = [1, 1.5, 1, 2, 1, 0.4, 0.4, 0.4, 1.0, 0.3, 0.2, 1.0]
    rises = Rule(metric="reward", rises_by=1.4, of="start")
    whole, first, second = (watch(r=RELATIVE, s=rises) for _ in range(3))
    expected = run(whole, "reward", values)
    assert [(a.rule, a.version) for a in expected] == [("r", 7), ("r", 8), ("r", 11)]
    begun = run(first, "reward", values[:cut])
    second.restore(json.loads(json.dumps(first.state())))
    assert begun + run(second, "reward", values[cut:], cut + 1) == expected
    assert second.state() == whole.state()


def test_rules_that_came_or_changed_start_over() -> None:
    old = watch(a=RELATIVE, b=RELATIVE, c=RELATIVE)
    run(old, "reward", [4.0] * 5 + [1.0])
    new = watch(a=RELATIVE, b=Rule(metric="outcome", falls_by=2.0), d=RELATIVE)
    new.restore(old.state())
    state = new.state()
    assert {n: s["track"]["count"] for n, s in state.items()} == {"a": 5, "b": 0, "d": 0}
    assert state["a"]["track"]["violated"] == 1


def test_starting_over_makes_a_new_measure() -> None:
    watched = watch(r=Rule(metric="reward", falls_by=2.0, do="pause"))
    assert alarmed(watched, "reward", [1.0] * 5 + [0.4]) == [6]
    watched.start_over("r")
    assert [a.version for a in run(watched, "reward", [0.4] * 8 + [0.1], 7)] == [15]


# Names


def test_a_metric_that_this_stage_does_not_log_is_refused_at_the_first_trained_step() -> None:
    config = WatchConfig(rules={"mine": Rule(metric="reward/lenght", below=0.5)})
    stats = {"tokens": 0.0, "reward": 1.0}
    watched = Watch(config, "experts.agent.watch")
    assert watched.see(1, stats) == []
    with pytest.raises(UserError) as error:
        watched.see(2, {**stats, "tokens": 9.0, "reward/length": 1.0})
    assert str(error.value) == (
        "experts.agent.watch.rules.mine.metric: this stage logs no `reward/lenght`; the nearest is `reward/length`"
    )
    # The default on `gated` is for fusion, which has it; a rule of one's own must be about something.
    with pytest.raises(
        UserError, match=r"rules.mine.metric: this stage logs no `gated`; choose one of: grad_norm, rew"
    ):
        Watch(WatchConfig(rules={"mine": Rule(metric="gated", above=0.3)})).see(1, {"reward": 1.0, "grad_norm": 1.0})
    assert Watch(WatchConfig()).see(1, {"reward": 1.0, "tokens": 9.0}) == []


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("entrpy", "no metric `entrpy`; the nearest is `entropy`"),
        ("stop/scord", "no metric `stop/scord`; the nearest is `stop/scored`"),
        ("time/wait", "no metric `time/wait`; the nearest is `time/wait_s`"),
        ("zzz", "no metric `zzz`; choose one of: advantage_clipped, aux_loss,"),
    ],
)
def test_a_metric_that_no_stage_logs_is_refused_with_the_config(metric: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"rules:\n  mine:\n    metric: {metric}\n    below: 1\n")
    with pytest.raises(ConfigError) as error:
        load(WatchConfig, path)
    assert f"{path}, line 3: `rules.mine.metric`: there is {message}" in str(error.value)


# Config


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{metric: reward}", "has one of above, below, rises_by, falls_by; this one has none"),
        ("{metric: reward, above: 1, rises_by: 2}", "this one has above and rises_by"),
        ("{metric: reward, above: 1, of: start}", "of: start is for rises_by and falls_by; with `above` leave it out"),
        ("{metric: reward, rises_by: 1}", "greater than 1"),
        ("{metric: reward, below: 1, do: wran}", "Did you mean 'warn'?"),
        ("{metric: reward, below: 1, ovr: 2}", "Did you mean `rules.mine.over`?"),
    ],
)
def test_a_bad_rule_is_refused(rule: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"rules: {{mine: {rule}}}\n")
    with pytest.raises(ConfigError) as error:
        load(WatchConfig, path)
    assert message in str(error.value) and "rules.mine" in str(error.value)


def test_rules_go_over_the_defaults_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("rules: {ess: {below: 0.1}, entropy: null, kl: {rises_by: 30}}\n")
    mine = "rules.mine={metric: reward, falls_by: 2, do: roll_back}"
    config = load(WatchConfig, path, ["rules.ess.do=warn", mine])
    assert {n: r for n, r in config.rules.items() if r != RULES.get(n)} == {
        "ess": Rule(metric="ess_tokens", below=0.1, over=3, do="warn"),
        "entropy": None,
        "kl": Rule(metric="kl_behaviour", rises_by=30.0, over=3),
        "mine": Rule(metric="reward", falls_by=2.0, do="roll_back"),
    }
    assert set(Watch(config).rules) == (set(RULES) | {"mine"}) - {"entropy"}
    again = tmp_path / "resolved.yaml"
    again.write_text(dump(config))
    assert load(WatchConfig, again) == config


def test_no_default_rolls_back_and_one_pauses() -> None:
    assert {n: r.do for n, r in RULES.items() if r.do != "warn"} == {"ess": "pause"}


# Properties


POSITIVE = st.floats(min_value=1.0, max_value=1.9)


@given(
    values=st.lists(POSITIVE, max_size=60),
    memory=st.integers(5, 30),
    over=st.integers(1, 4),
    of=st.sampled_from(["average", "start"]),
)
def test_values_within_a_factor_of_one_another_alarm_no_factor(
    values: list[float], memory: int, over: int, of: Any
) -> None:
    rises = Rule(metric="reward", over=over, of=of, rises_by=2.0)
    falls = Rule(metric="reward", over=over, of=of, falls_by=2.0)
    assert run(watch(memory, rises=rises, falls=falls), "reward", values) == []


@given(
    values=st.lists(st.one_of(st.none(), st.floats(-2.0, 2.0)), max_size=40),
    bound=st.floats(-1.0, 1.0),
    over=st.integers(1, 5),
    after=st.integers(0, 10),
    upper=st.booleans(),
)
def test_no_alarm_without_a_violated_rule_and_none_is_missed(
    values: list[float | None], bound: float, over: int, after: int, upper: bool
) -> None:
    """An alarm is a value whose last ``over`` predecessors, itself among them, were all judged and all bad."""
    above, below = (bound, None) if upper else (None, bound)
    rule = Rule(metric="reward", above=above, below=below, over=over, after=after)
    there = [(i + 1, v) for i, v in enumerate(values) if v is not None]
    bad = [version >= after and (v > bound if upper else v < bound) for version, v in there]
    expected = [version for i, (version, _) in enumerate(there) if i + 1 >= over and all(bad[i + 1 - over : i + 1])]
    watched = watch(r=rule)
    steps = [{"reward": v} if v is not None else {"entropy": 1.0} for v in values]
    # A first step on which the metric is missing is refused, which is not what is asked about here.
    found = [a.version for i, stats in enumerate(steps) for a in watched.see(i + 1, {"tokens": 0.0, **stats})]
    assert found == expected
