"""The report on a made-up run, as hostile and as partial as runs are."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest

from experts.config import ExpertConfig
from fusion.charts import Series as Line
from fusion.charts import chart, number, running_mean, ticks
from fusion.config import PipelineConfig
from fusion.report import duration, read, write_report
from fusion.results import results
from fusion.transcripts import tasks_to_read, turns
from posttrain.files import write_json
from posttrain.journal import Journal
from posttrain.metrics import Metrics
from posttrain.run import RunDir
from posttrain.settings import Longcat2Model
from tests.fusion.test_mismatch import write_gaps

HOSTILE = "</pre></script><script>alert('owned')</script><img src=x onerror=alert(1)>\u202egnp\x1b[31m"
WORLDS = {"agent": ("code", "desk"), "reasoning": ("chains",), "interaction": ("facts", "requests", "rules")}
EXPERTS = {name: name for name in WORLDS}


def config() -> PipelineConfig:
    return PipelineConfig.model_validate(
        {
            "model": Longcat2Model(settings={"hidden_size": 96, "num_layers": 2}),
            "worlds": {w: {"type": w} for worlds in WORLDS.values() for w in worlds},
            "experts": {e: ExpertConfig(worlds=dict.fromkeys(WORLDS[e], 1.0)) for e in EXPERTS},
        }
    )


def chance(policy: str, domain: str, difficulty: float) -> float:
    """How likely a policy solves a task."""
    skill = {"base": 0.35, "student": 0.84}.get(policy, 0.88 if policy == domain else 0.38)
    return max(0.02, skill - 0.07 * (difficulty - 2)) if domain == "reasoning" else skill


def conversation(world: str, number: int, solved: bool, rng: Random) -> str:
    """As ``envs.episode.transcript`` writes it."""
    if world == "desk":
        start = "[user] move the order of ada to rome\n"
        find = "[calls] find(customer='ada')\n[tool] order opal item lamp city oslo\n"
        move = "[calls] move(order='opal', city='rome')\n[tool] ok\n[assistant] done"
        return start + (find + move if solved else "[calls] find()\n[tool] error: missing customer\n[assistant] sorry")
    if world == "code":
        start = "[system] write solve\n[user] sum the even numbers of a list\n"
        body = "sum(x for x in xs if x % 2 == 0)" if solved else "sum(xs)"
        said = "[tool] 3 of 3 passed\n[assistant] done" if solved else f"[tool] error: {HOSTILE}\n[assistant] done"
        return start + f"[calls] run(code='def solve(xs):\\n    return {body}')\n" + said
    start = f"[system] follow the arrows\n[user] ash>fig elm>ash oak>elm;oak{number % 5 + 1}\n"
    words = ["oak", "elm", "ash", "fig", "yew", "box"][: number % 5 + (2 if solved else 1)]
    return start + f"[thinks] {'1'.join(words)}\n[assistant] {words[-1] if rng.random() < 0.97 else HOSTILE}"


def records(policy: str, tasks: int = 60) -> Iterator[dict[str, Any]]:
    for domain, worlds in WORLDS.items():
        for i in range(tasks * len(worlds)):
            world, rng = worlds[i % len(worlds)], Random(f"{domain}/{i}")
            luck, rng = rng.random(), Random(f"{policy}/{domain}/{i}")
            difficulty = float(rng.randint(1, 1) if domain == "interaction" else i // len(worlds) % 5 + 1)
            luck = 0.6 * luck + 0.4 * rng.random()
            solved = luck < chance(policy, domain, difficulty)
            broken = policy == "base" and i == 7
            length = 9 + (7 * difficulty if domain == "reasoning" and (solved or policy != "base") else 6)
            yield {
                "task": f"{world}/eval/{i}",
                "domain": domain,
                "world": world,
                "difficulty": difficulty,
                "outcome": None if broken else float(solved),
                "tokens": int(length + rng.randint(0, 4)),
                "stop": "infrastructure" if broken else "scored" if solved or i % 4 else "context_overflow",
                "parse_errors": int(not solved and i % 6 == 0),
                "text": conversation(world, i, solved, rng),
            }


def rl_step(stage: str, step: int, rng: Random) -> dict[str, float]:
    """Figures with the names that the loop logs."""
    domain = stage.removeprefix("expert-")
    rise = 1 - math.exp(-step / 14)
    worlds = WORLDS.get(domain, tuple(w for ws in WORLDS.values() for w in ws))
    solved = {f"outcome/{w}": 0.33 + (0.5 - 0.06 * i) * rise + rng.gauss(0, 0.03) for i, w in enumerate(worlds)}
    mean = sum(solved.values()) / len(solved)
    out = {
        "reward": mean - 0.03,
        "outcome": mean,
        "entropy": 0.62 * math.exp(-step / 30) + 0.12 + rng.gauss(0, 0.01),
        "gap_abs": abs(rng.gauss(0.012, 0.002)),
        "kl_behaviour": abs(rng.gauss(4e-4, 1e-4)),
        "staleness_mean": min(step, 1.1 + rng.random()),
        "staleness_max": float(min(step, 2)),
        "dropped_stale": float(step // 25),
        "dropped_invalid": 0.0,
        "time/wait_s": 0.4 + rng.random() * 0.2,
        "time/step_s": 1.5,
        "time/publish_s": 0.03,
        "grad_norm": 0.8 + rng.random() * 0.4,
        "sampled_tokens": 16 + 8 * rise + rng.gauss(0, 0.6),
        "parse_errors": 0.2 * math.exp(-step / 10),
        "silent_groups": 0.1 + 0.3 * rise,
        "rollouts": 128.0,
        "invalid": float(step % 9 == 0),
        "stop/scored": 120.0 + 5 * rise,
        "stop/context_overflow": 8.0 - 5 * rise,
        **solved,
    }
    if stage == "fusion":
        out |= {"kl_teacher": 0.34 * math.exp(-step / 9) + 0.03, "gated": 0.004, "advantage_clipped": 0.01}
    return out


def make_run(path: Path, *, stages: int = 5, evaluated: bool = True, steps: int = 40) -> RunDir:
    """A finished run directory, or what there is of it after ``stages`` stages."""
    run = RunDir.open(path, config())
    metrics = Metrics(run.metrics_file)
    names = ["cold_start", *(f"expert-{e}" for e in EXPERTS), "fusion"][:stages]
    for name in names:
        rng = Random(name)
        for step in range(1, steps + 1):
            if name == "cold_start":
                values = {"loss": 3 * math.exp(-step / 9) + 0.4, "mean_token_accuracy": 0.9 - 0.6 * math.exp(-step / 9)}
                metrics.log(step * 10, name, values)
            else:
                metrics.log(step, name, rl_step(name, step, rng))
        if name != "cold_start":
            write_gaps(run, name, steps)
        run.finish(name, name, {"cold_start": 96.4}.get(name, 118.2))
    metrics.close()
    if evaluated:
        by_policy = {p: list(records(p)) for p in ("base", *EXPERTS, "student")}
        for policy, rows in by_policy.items():
            with Journal(run.rollouts(f"evaluation-{policy}")) as journal:
                for row in rows:
                    journal.write(row)
            run.finish(f"evaluation-{policy}", policy, 6.25)
        write_json(run.results_file, results(by_policy, EXPERTS, run.seconds(), "ab" * 32, {"torch": "2.13.0"}))
    run.close()
    return run


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids |= {v for k, v in attrs if k == "id" and v}
        if tag not in ("meta", "br", "line", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = make_run(tmp_path_factory.mktemp("run") / "demo")
    path = write_report(run)
    assert path == run.report_file
    return path.read_text()


def test_tags_are_balanced_and_every_section_is_there(report: str) -> None:
    page = Page(report)
    assert page.open == []
    assert {"results", "experts", "fusion", "tokens", "reading", "stops", "health", "mismatch"} <= page.ids


def test_nothing_is_loaded_from_anywhere(report: str) -> None:
    page = Page(report)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "xlink:href", "action", "onerror", "onload"} & set(attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"(?:https?:)?//[a-z]|@import|url\(|fetch\(|XMLHttp", report.replace("\\/", ""))


def test_what_a_model_wrote_stays_text(report: str) -> None:
    page = Page(report)
    assert report.count("&lt;script&gt;alert(") > 0
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "<img" not in report and "\u202e" not in report and "\x1b" not in report


def test_only_our_script_may_run(report: str) -> None:
    script = re.search(r"<script>(.*)</script>", report, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in report


def test_every_chart_has_words_for_those_who_do_not_see_it(report: str) -> None:
    charts = [a for tag, a in Page(report).tags if tag == "svg" and a["class"] == "chart"]
    assert len(charts) > 20
    assert all(
        a["role"] == "img" and re.search(r" at (step|difficulty|staleness|gap in nats) ", a["aria-label"] or "")
        for a in charts
    )


def test_figures_of_the_results_are_on_the_page(report: str, tmp_path: Path) -> None:
    found = read(make_run(tmp_path / "again"))
    assert found.results is not None and found.seconds["evaluation"] == 31.25 and len(found.seconds) == 6
    for domain in found.results["domains"].values():
        assert f"Recovery <b>{100 * domain['recovery']:.0f}%</b>" in report
        assert f"{domain['n']} tasks, 1 left out" in report
    assert "nan" not in report.lower().replace("nano", "")


@pytest.mark.parametrize("stages", range(5))
def test_partial_runs_show_what_there_is(tmp_path: Path, stages: int) -> None:
    report = write_report(make_run(tmp_path / "run", stages=stages, evaluated=False, steps=3)).read_text()
    page = Page(report)
    assert page.open == [] and "results" not in page.ids
    assert ("experts" in page.ids) == (stages > 1) and "fusion" not in page.ids
    assert ("mismatch" in page.ids) == (stages > 1)
    assert ("not finished" in report) == (stages > 0)


def test_evaluation_of_base_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=1, evaluated=False)
    with Journal(run.rollouts("evaluation-base")) as journal:
        for row in records("base", 6):
            journal.write(row)
    assert {"tokens", "reading", "stops"} <= Page(write_report(run).read_text()).ids


def test_results_without_a_judged_task_or_a_gain(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=1, evaluated=False)
    rows = {p: [r | {"outcome": None} for r in records("base", 5)] for p in ("base", *EXPERTS, "student")}
    for row in (r for policy in rows.values() for r in policy if r["domain"] == "agent"):
        row["outcome"] = 1.0
    write_json(run.results_file, results(rows, EXPERTS, {}, "", {}))
    report = write_report(run).read_text()
    assert report.count("No recovery") == 3 and "is not above base" in report and "no task could be judged" in report


def test_null_metrics_leave_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=0, evaluated=False)
    metrics = Metrics(run.metrics_file)
    metrics.log(1, "expert-agent", {"reward": math.nan, "entropy": 0.5})
    metrics.log(2, "expert-agent", {"reward": 0.25})
    metrics.close()
    assert read(run).line("expert-agent", "reward").points == [(2.0, 0.25)]
    assert "0.25" in write_report(run).read_text()


def test_turns() -> None:
    text = "[user] do\nit\n[thinks] well\n[calls] f(x='[user]')\n[tool] ok\n[assistant] done\n"
    expected = [("user", "do\nit"), ("thinks", "well"), ("calls", "f(x='[user]')"), ("tool", "ok")]
    assert turns(text) == [*expected, ("assistant", "done")]
    assert turns("") == []
    assert turns("[calls] run(code='a\\nb\\\\n')") == [("calls", "run(code='a\nb\\\\n')")]


def test_reading_shows_what_was_learned_and_what_was_not() -> None:
    def row(task: str, outcome: float | None) -> dict[str, Any]:
        shared = {"task": task, "domain": "d", "world": "w", "difficulty": 1.0, "tokens": 3, "stop": "scored"}
        return {**shared, "outcome": outcome, "text": f"[user] {task}\n[assistant] {outcome}"}

    outcomes = {"base": [0, 0, 0, 1, 1], "e": [1, 1, 1, 1, None], "student": [1, 1, 0, 0, 1]}
    evaluation = {p: [row(f"t{i}", o) for i, o in enumerate(column)] for p, column in outcomes.items()}
    chosen = tasks_to_read(evaluation, {"d": "e"}, 3)
    assert [(c["task"], c["kind"]) for c in chosen] == [("t0", "learned"), ("t1", "learned"), ("t2", "lost")]
    assert [s["policy"] for s in chosen[0]["sides"]] == ["base", "e", "student"]
    assert chosen[0]["given"] == [("user", "t0")] and chosen[0]["sides"][2]["turns"] == [("assistant", "1")]
    assert [c["task"] for c in tasks_to_read(evaluation, {"d": "e"}, 9)] == ["t0", "t1", "t2", "t3", "t4"]


def test_chart_geometry() -> None:
    made = chart("t", [Line(name="a", color="e0", points=[(0, 0.0), (10, 1.0)])], y_range=(0, 1), percent=True)
    assert made is not None
    left, top, right, bottom = made.plot
    assert made.lines[0].path == f"M{left},{bottom}L{right},{top}" and made.lines[0].last == "100%"
    assert [text for _, text in made.y_ticks] == ["0%", "25%", "50%", "75%", "100%"]
    assert chart("t", [Line(name="a", color="e0", points=[])]) is None
    flat = chart("t", [Line(name="a", color="e0", points=[(1, 0.0)])])
    assert flat is not None and flat.lines[0].dots


def test_ticks_means_and_words() -> None:
    assert ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(-0.1, 0.34, 4) == [-0.2, 0, 0.2, 0.4]
    assert running_mean([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]
    assert [number(v) for v in (0, 0.1234, 1234.5, 3.2e-7)] == ["0", "0.123", "1,234", "3.2×10⁻⁷"]
    assert [duration(s) for s in (0.031, 4.25, 12, 93.4, 3700)] == [
        "31 ms",
        "4.2 s",
        "12 s",
        "1 min 33 s",
        "1 h 01 min",
    ]
