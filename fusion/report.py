"""``report.html``: one file that shows a run to a person, whatever stages exist. Reads the run directory alone.

What models wrote is hostile: the template escapes everything, and the page's own policy lets no script run but ours
(by its hash) and nothing be loaded from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fusion.charts import Chart, Series, chart, number
from fusion.mismatch import Steps, read_gaps, section
from fusion.results import BASE, GENERAL, NOT_EXPERTS, STUDENT, verdict
from fusion.transcripts import tasks_to_read
from posttrain.files import write_text
from posttrain.journal import read_journal
from posttrain.run import RunDir

_TEMPLATES = Path(__file__).parent / "templates"
_EVALUATION = "evaluation-"
_EXPERT = "expert-"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""What is no character of an HTML text, and what turns the direction of the text after it."""
_DASHES = ("", "7 4", "1 4.5", "9 3 1 3")
"""Of the worlds of one expert."""
_LEVELS = 3
"""The fewest difficulties that make a curve."""

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything the report reads."""

    name: str
    config: dict[str, Any]
    steps: dict[str, list[Record]]
    """Metrics of every stage, in the order the stages began."""
    seconds: dict[str, float]
    """Wall clock of every finished stage, that of all evaluations together."""
    results: dict[str, Any] | None
    evaluation: dict[str, list[Record]]
    """Records of every evaluated policy: base, experts, student."""
    alarms: dict[str, list[Record]]
    """Where rules were violated, of every stage that had any."""
    gaps: dict[str, Steps]
    """Between engine and trainer, of every stage that counted them."""

    @property
    def experts(self) -> list[str]:
        """Names, in the order of the config; of what ran, if the config does not say."""
        ran = [s.removeprefix(_EXPERT) for s in self.steps if s.startswith(_EXPERT)]
        evaluated = [p for p in self.evaluation if p not in NOT_EXPERTS]
        return list(dict.fromkeys([*(self.config.get("experts") or {}), *ran, *evaluated]))

    @property
    def policies(self) -> list[str]:
        """All that may have a colour."""
        return [BASE, *self.experts, STUDENT, *([GENERAL] if GENERAL in self.evaluation else [])]

    def color(self, name: str) -> str:
        """Colour of a policy or a stage."""
        name = {"fusion": STUDENT, "cold_start": BASE}.get(name, name).removeprefix(_EXPERT)
        if name in (BASE, STUDENT):
            return name
        return f"e{self.experts.index(name) % 5}" if name in self.experts else "other"

    def line(self, stage: str, key: str, name: str = "", color: str = "", dash: str = "") -> Series:
        """A metric over the steps of a stage."""
        points = [(float(r["step"]), float(r[key])) for r in self.steps.get(stage, ()) if r.get(key) is not None]
        return Series(name=name or _plain(stage), color=color or self.color(stage), points=points, dash=dash)


def write_report(run: RunDir) -> Path:
    """Build ``report.html`` in the run directory from what is there, and return its path."""
    found = read(run)
    script = (_TEMPLATES / "page.js").read_text()
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "duration": duration, "number": number, "plain": _plain}
    page = environment.get_template("report.html.jinja").render(
        found=found,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        config=found.config,
        results=found.results,
        best=_best_single(found.results),
        verdict=[line.split(": ", 1) for line in verdict(found.results)] if found.results else [],
        learning=_learning(found),
        fusion=_fusion(found),
        health=_health(found),
        loops=_loops(found),
        mismatch=section({s: found.gaps[s] for s in found.steps if s in found.gaps}, found.color, _plain),
        tokens=_tokens(found),
        stops=_stops(found),
        reading=_reading(found),
    )
    write_text(run.report_file, _CONTROL.sub("\N{REPLACEMENT CHARACTER}", page))
    return run.report_file


def read(run: RunDir) -> Findings:
    """What there is of a run."""
    steps: dict[str, list[Record]] = {}
    for record in read_journal(run.metrics_file):
        steps.setdefault(record["stage"], []).append(record)
    config = yaml.safe_load(run.config_file.read_text()) if run.config_file.exists() else {}
    evaluation: dict[str, list[Record]] = {}
    for path in sorted((run.path / "rollouts").glob(f"{_EVALUATION}*.jsonl")):
        records: list[Record] = [*read_journal(path)]
        if records:
            evaluation[path.stem.removeprefix(_EVALUATION)] = records
    seconds: dict[str, float] = {}
    for stage, s in run.seconds().items():
        name = "evaluation" if stage.startswith(_EVALUATION) else stage
        seconds[name] = seconds.get(name, 0.0) + s
    alarms: dict[str, list[Record]] = {}
    for path in sorted((run.path / "checkpoints").glob("*/alarms.jsonl")):
        alarms[path.parent.name] = [*read_journal(path)]
    return Findings(
        name=run.path.resolve().name,
        config=config or {},
        steps=steps,
        seconds=seconds,
        results=json.loads(run.results_file.read_text()) if run.results_file.exists() else None,
        evaluation=evaluation,
        alarms={stage: records for stage, records in alarms.items() if records},
        gaps=read_gaps(run),
    )


def _rl(found: Findings) -> list[str]:
    """Stages that the loop ran."""
    return [s for s, records in found.steps.items() if any("reward" in r or "staleness_mean" in r for r in records)]


def _some(charts: Iterable[Chart | None]) -> list[Chart]:
    return [c for c in charts if c is not None]


def _worlds(found: Findings, stage: str) -> list[Series]:
    """Share solved in every world of a stage: the colour is its expert's, the dash tells the expert's worlds apart."""
    expert_of = {w: e for e, c in (found.config.get("experts") or {}).items() for w in c["worlds"]}
    prefix = "outcome/"
    worlds = sorted(
        {k.removeprefix(prefix) for r in found.steps[stage] for k in r if k.startswith(prefix)},
        key=lambda w: (expert_of.get(w, ""), w),
    )
    drawn: Counter[str] = Counter()
    out: list[Series] = []
    for world in worlds:
        color = found.color(stage if stage.startswith(_EXPERT) else expert_of.get(world, ""))
        out.append(found.line(stage, prefix + world, world, color, _DASHES[drawn[color] % len(_DASHES)]))
        drawn[color] += 1
    return out


def _learning(found: Findings) -> list[Chart]:
    """Rewards of all experts, then each expert's worlds."""
    stages = [s for s in found.steps if s.startswith(_EXPERT)]
    rewards = chart(
        "Reward",
        [found.line(s, "reward") for s in stages],
        y_range=(0, 1),
        note="mean of the step's rollouts",
        wide=True,
    )
    each = [
        chart(f"{_plain(s)}: solved, by world", _worlds(found, s), y_range=(0, 1), percent=True, wide=True)
        for s in stages
    ]
    return _some([rewards, *each])


def _fusion(found: Findings) -> list[Chart]:
    stages = [s for s in found.steps if any("kl_teacher" in r for r in found.steps[s])]
    out: list[Chart | None] = []
    for s in stages:
        kl = found.line(s, "kl_teacher", "student")
        out.append(chart("Distance to the teachers", [kl], note="KL a token (sampled), in nats"))
        out.append(chart("Student: solved, by world", _worlds(found, s), y_range=(0, 1), percent=True))
        lost = [
            found.line(s, "gated", "gated (engine and trainer disagree)", "e0"),
            found.line(s, "advantage_clipped", "advantage clipped", "e1", _DASHES[1]),
        ]
        out.append(chart("Tokens with a cut signal", lost, percent=True, note="share of trained tokens"))
    return _some(out)


def _health(found: Findings) -> list[Chart]:
    """Small multiples, every stage a line."""
    stages = _rl(found)

    def over(key: str) -> list[Series]:
        return [found.line(s, key) for s in stages]

    shares = [
        Series(
            name=_plain(s),
            color=found.color(s),
            points=[(float(r["step"]), w) for r in found.steps[s] if (w := _wait_share(r)) is not None],
        )
        for s in stages
    ]
    cold = [found.line("cold_start", "loss", "loss")]
    accuracy = [found.line("cold_start", "mean_token_accuracy", "accuracy", "e0")]
    return _some(
        [
            chart("Entropy", over("entropy"), note="nats a token"),
            chart("Engine against trainer", over("gap_abs"), note="|log-prob now − when sampled|, staleness included"),
            chart("KL to the sampling policy", over("kl_behaviour"), note="nats a token; grows with staleness"),
            chart("Effective sample size", over("ess_tokens"), percent=True, note="of the importance weights"),
            chart("Staleness", over("staleness_mean"), note="mean versions behind"),
            chart("Trainer waits for rollouts", shares, percent=True, y_range=(0, 1), note="share of the step"),
            chart("Answer length", over("sampled_tokens"), note="sampled tokens an episode"),
            chart("Repetition", over("repetition"), percent=True, note="share of calls or phrases said before"),
            chart("Malformed calls", over("parse_errors"), note="parse errors an episode"),
            chart("Gradient norm", over("grad_norm"), note="before clipping"),
            chart("Groups without signal", over("silent_groups"), percent=True, note="all rewards equal"),
            chart("Cold start: loss", cold),
            chart("Cold start: next token right", accuracy, percent=True, y_range=(0, 1)),
        ]
    )


def _wait_share(record: Record) -> float | None:
    times = [record.get(f"time/{k}_s") for k in ("wait", "step", "publish")]
    present = [t for t in times if t is not None]
    return present[0] / sum(present) if len(present) == 3 and sum(present) > 0 else None


def _loops(found: Findings) -> list[dict[str, Any]]:
    """A row of the table on asynchrony for every stage of RL."""
    rows: list[dict[str, Any]] = []
    for stage in _rl(found):
        records = found.steps[stage]

        def column(key: str, records: Sequence[Record] = records) -> list[float]:
            return [float(r[key]) for r in records if r.get(key) is not None]

        times = {k: sum(column(f"time/{k}_s")) for k in ("wait", "step", "publish")}
        rows.append(
            {
                "stage": _plain(stage),
                "color": found.color(stage),
                "steps": int(records[-1]["step"]),
                "rollouts": int(sum(column("rollouts"))),
                "invalid": int(sum(column("invalid"))),
                "staleness": _mean(column("staleness_mean")),
                "staleness_max": max(column("staleness_max"), default=None),
                "dropped_stale": _growth(column("dropped_stale")),
                "dropped_invalid": _growth(column("dropped_invalid")),
                "wait": times["wait"] / sum(times.values()) if sum(times.values()) else None,
                "step_s": _mean(column("time/step_s")),
                "publish_s": _mean(column("time/publish_s")),
            }
        )
    return rows


def _growth(counts: Sequence[float]) -> int:
    """What a counter counted; after a resume it starts again at 0."""
    return int(sum(b - a if b >= a else b for a, b in zip([0.0, *counts], counts, strict=False)))


def _tokens(found: Findings) -> list[dict[str, Any]]:
    """Tokens and success by difficulty, a pair of charts for every world that has one; reasoning first."""
    records = found.evaluation.get(BASE) or next(iter(found.evaluation.values()), [])
    worlds = {r["world"]: r["domain"] for r in records}
    out: list[dict[str, Any]] = []
    for world, domain in sorted(worlds.items(), key=lambda item: (item[1] != "reasoning", item)):
        sizes = Counter(r["difficulty"] for r in records if r["world"] == world)
        if len(sizes) < _LEVELS:
            continue
        teacher = _teacher(found, domain)
        policies = [p for p in (BASE, teacher, STUDENT, GENERAL) if p in found.evaluation]
        tokens, solved = (
            [
                Series(name=p, color=found.color(p), points=_by_difficulty(found.evaluation[p], world, key))
                for p in policies
            ]
            for key in ("tokens", "outcome")
        )
        few, many = min(sizes.values()), max(sizes.values())
        note = f"{few} tasks a level" if few == many else f"{few} to {many} tasks a level"
        pair = [
            chart("Tokens spent", tokens, x_name="difficulty", dots=True, wide=True, note=f"mean; {note}"),
            chart("Solved", solved, x_name="difficulty", dots=True, wide=True, percent=True, y_range=(0, 1)),
        ]
        out.append({"world": world, "domain": domain, "charts": _some(pair)})
    return out


def _teacher(found: Findings, domain: str) -> str:
    known = ((found.results or {}).get("domains") or {}).get(domain)
    return (known["teacher"] if known else None) or domain


def _reading(found: Findings) -> list[dict[str, Any]]:
    domains = {r["domain"] for records in found.evaluation.values() for r in records}
    count = (found.config.get("evaluation") or {}).get("transcripts", 4)
    return tasks_to_read(found.evaluation, {d: _teacher(found, d) for d in domains}, count)


def _by_difficulty(records: Sequence[Record], world: str, key: str) -> list[tuple[float, float]]:
    levels: dict[float, list[float]] = defaultdict(list)
    for r in records:
        if r["world"] == world and r["outcome"] is not None:
            levels[float(r["difficulty"])].append(float(r[key]))
    return [(level, sum(v) / len(v)) for level, v in sorted(levels.items())]


def _stops(found: Findings) -> dict[str, Any]:
    """How held-out episodes ended, and how those of training did: shares, a row a policy and a row a stage."""
    rows: list[tuple[str, str, Counter[str], float | None]] = []
    for policy in [p for p in found.policies if p in found.evaluation]:
        records = found.evaluation[policy]
        errors = _mean([float(r["parse_errors"]) for r in records])
        rows.append((policy, found.color(policy), Counter(r["stop"] for r in records), errors))
    for stage in _rl(found):
        counts: Counter[str] = Counter()
        for r in found.steps[stage]:
            counts.update({k.removeprefix("stop/"): v for k, v in r.items() if k.startswith("stop/") and v})
        errors = _mean([float(r["parse_errors"]) for r in found.steps[stage] if r.get("parse_errors") is not None])
        rows.append((f"{_plain(stage)}, training", found.color(stage), counts, errors))
    reasons = sorted({k for _, _, c, _ in rows for k in c}, key=lambda k: (k != "scored", k))
    return {
        "reasons": reasons,
        "rows": [
            {
                "name": name,
                "color": color,
                "n": int(counts.total()),
                "shares": [counts[k] / counts.total() for k in reasons],
                "parse_errors": errors,
            }
            for name, color, counts, errors in rows
            if counts
        ],
    }


def _best_single(results: Mapping[str, Any] | None) -> tuple[str, float] | None:
    """The expert that is best on the whole, with its mean over domains."""
    means = results["mean_over_domains"] if results else {}
    singles = [(p, m) for p, m in means.items() if p not in NOT_EXPERTS and m is not None]
    return max(singles, key=lambda item: item[1], default=None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def duration(seconds: float) -> str:
    """``93.4`` -> ``1 min 33 s``."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _plain(name: str) -> str:
    """A stage or stop reason as people say it."""
    return name.removeprefix(_EXPERT).replace("_", " ")


__all__ = ["Findings", "duration", "read", "write_report"]
