"""From evaluated episodes to the numbers of ``results.json``, the table of the terminal and the bars that hold.

Beside what the file must have, a domain has

- ``ci95``      Wilson interval of every score, by policy
- ``worlds``    ``{WORLD: {"n": int, POLICY: score}}``
- ``invalid``   episodes that could not be judged, by policy; ``left_out``: tasks left out because of them
- ``recovery_reason``  why ``recovery`` or its interval is null, where it is

- ``general``   score after the general RL that followed the fusion, where the config has it

and the file has ``mean_over_domains``, ``{POLICY: mean of its domain scores}``, every domain counting the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

BASE, STUDENT, GENERAL = "base", "student", "general"
NOT_EXPERTS = (BASE, STUDENT, GENERAL)

GAIN_BAR = 0.15
"""An expert's least gain over base on its own domain."""
RECOVERY_BAR = 0.85
"""The student's least recovery."""
TASKS_BAR = 200
"""The fewest held-out tasks a domain on which the bars mean something."""

_ROUNDING = 1e-9
"""Floating point must not decide: 0.51 / 0.6 is not quite 0.85."""

Record = Mapping[str, Any]


def results(
    records: Mapping[str, Sequence[Record]],
    experts: Mapping[str, str],
    wall_s: Mapping[str, float],
    config_sha256: str,
    versions: Mapping[str, str],
    *,
    resamples: int = 5000,
    seed: int = 0,
) -> dict[str, Any]:
    """What ``results.json`` holds.

    ``records``: policy (``base``, every expert, ``student``, perhaps ``general``) to its records of
    ``experts.evaluate.record``. ``experts``: expert to the domain it teaches. A task that could not be judged under any
    one policy is left out of all of them. Raises ValueError if the policies were not asked the same tasks.
    """
    policies = [BASE, *experts, STUDENT, *([GENERAL] if GENERAL in records else [])]
    if len(set(policies)) != len(policies) or len(set(experts.values())) != len(experts):
        raise ValueError(f"policies and taught domains must be distinct: {policies}, {list(experts.values())}")
    outcomes = {p: _outcomes(p, records) for p in policies}
    tasks = list(outcomes[BASE])
    for policy in policies:
        if differing := set(tasks) ^ set(outcomes[policy]):
            raise ValueError(f"{policy} and {BASE} were not asked the same tasks, for example {min(differing)}")
    teachers = {domain: expert for expert, domain in experts.items()}
    domains: dict[str, Any] = {}
    for domain in dict.fromkeys(d for d, _, _ in tasks):
        own = [t for t in tasks if t[0] == domain]
        table = {p: [outcomes[p][t] for t in own] for p in policies}
        domains[domain] = _domain(table, [w for _, w, _ in own], teachers.get(domain), resamples, seed)
    return {
        "domains": domains,
        "mean_over_domains": {p: _mean([_score(d, p) for d in domains.values()]) for p in policies},
        "wall_s": dict(wall_s),
        "config_sha256": config_sha256,
        "versions": dict(versions),
    }


def _outcomes(policy: str, records: Mapping[str, Sequence[Record]]) -> dict[tuple[str, str, str], float | None]:
    if policy not in records:
        raise ValueError(f"{policy} was not evaluated; there are {', '.join(records)}")
    out = {(r["domain"], r["world"], r["task"]): r["outcome"] for r in records[policy]}
    if len(out) != len(records[policy]):
        raise ValueError(f"{policy} has more than one record of a task")
    return out


def _domain(
    table: Mapping[str, Sequence[float | None]], worlds: Sequence[str], teacher: str | None, resamples: int, seed: int
) -> dict[str, Any]:
    """One domain; ``table`` holds an outcome or None by policy and task, ``worlds`` the world of every task."""
    kept = [i for i, row in enumerate(zip(*table.values(), strict=True)) if None not in row]
    values = {p: np.array([column[i] for i in kept], dtype=float) for p, column in table.items()}
    where = np.array([worlds[i] for i in kept])
    scores = {p: _mean(v.tolist()) for p, v in values.items()}
    by_world = {
        world: {"n": int((where == world).sum()), **{p: float(v[where == world].mean()) for p, v in values.items()}}
        for world in dict.fromkeys(where.tolist())
    }
    return {
        "n": len(kept),
        "base": scores[BASE],
        "experts": {p: s for p, s in scores.items() if p not in NOT_EXPERTS},
        "student": scores[STUDENT],
        **({"general": scores[GENERAL]} if GENERAL in scores else {}),
        "teacher": teacher,
        **_recovery(values, teacher, resamples, seed),
        "ci95": {p: wilson(v) for p, v in values.items()},
        "worlds": by_world,
        "invalid": {p: sum(v is None for v in column) for p, column in table.items()},
        "left_out": len(worlds) - len(kept),
    }


def wilson(outcomes: np.ndarray) -> list[float] | None:
    """95 % interval of the share of solved tasks; None without any.

    Partial credit is rounded in sum: the interval is then wider than it need be, never narrower.
    """
    if not len(outcomes):
        return None
    interval = stats.binomtest(round(float(outcomes.sum())), len(outcomes)).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def _recovery(values: Mapping[str, np.ndarray], teacher: str | None, resamples: int, seed: int) -> dict[str, Any]:
    """``(student - base) / (expert - base)`` and its paired percentile bootstrap over tasks.

    A ratio over a gain that may well be 0 has no interval worth printing: it is null if the expert fails to beat base
    in more than one resample in forty, the tail that a 95 % interval cuts off at either side.
    """

    def none(reason: str, value: float | None = None) -> dict[str, Any]:
        return {"recovery": value, "recovery_ci95": None, "recovery_reason": reason}

    if teacher is None:
        return none("no expert teaches this domain")
    columns = (values[BASE], values[teacher], values[STUDENT])
    if not len(columns[0]):
        return none("no task could be judged under every policy")
    base, expert, student = (float(c.mean()) for c in columns)
    if expert <= base:
        return none(f"the expert ({expert:.3f}) is not above base ({base:.3f}): there is nothing to recover")
    point = (student - base) / (expert - base)
    if len(columns[0]) < 2:
        return none("one task has no interval", point)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of scipy's own interval, which NaN spoils
        ratios = stats.bootstrap(
            columns,
            _ratio,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=resamples,
            batch=1000,
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    defined = ratios[~np.isnan(ratios)]
    if len(defined) < len(ratios) * (1 - 1 / 40):
        return none("the expert is not clearly above base: the ratio has no interval", point)
    low, high = np.percentile(defined, [2.5, 97.5])
    return {"recovery": point, "recovery_ci95": [float(low), float(high)]}


def _ratio(base: np.ndarray, expert: np.ndarray, student: np.ndarray, axis: int = -1) -> np.ndarray:
    """Recovery along ``axis``; NaN where the expert is not above base."""
    start, gain = base.mean(axis=axis), expert.mean(axis=axis) - base.mean(axis=axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gain > _ROUNDING, (student.mean(axis=axis) - start) / gain, np.nan)


def _mean(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None


def _score(domain: Mapping[str, Any], policy: str) -> float | None:
    return domain[policy] if policy in NOT_EXPERTS else domain["experts"][policy]


def table(results: Mapping[str, Any]) -> Table:
    """For the terminal: one row a domain, one for the mean over domains."""
    out = Table(title="Held-out tasks, share solved (95 % interval)")
    out.add_column("domain")
    general = GENERAL in results["mean_over_domains"]
    for name in (
        "n",
        "base",
        "own expert",
        "other experts",
        "student",
        "recovery",
        *(["general RL"] if general else []),
    ):
        out.add_column(name, justify="right")
    own: list[float | None] = []
    for name, domain in results["domains"].items():
        teacher = domain["teacher"]
        own.append(domain["experts"].get(teacher))
        others = ", ".join(f"{e} {_figure(s)}" for e, s in domain["experts"].items() if e != teacher)
        out.add_row(
            name,
            str(domain["n"]),
            _with_interval(domain, BASE),
            _with_interval(domain, teacher) if teacher else "-",
            others or "-",
            _with_interval(domain, STUDENT),
            _figure(domain["recovery"]) + _interval(domain["recovery_ci95"]),
            *([_with_interval(domain, GENERAL)] if general else []),
        )
    means = results["mean_over_domains"]
    singles = ", ".join(f"{e} {_figure(s)}" for e, s in means.items() if e not in NOT_EXPERTS)
    out.add_section()
    last = [_figure(means[STUDENT]), "", *([_figure(means[GENERAL])] if general else [])]
    out.add_row("mean", "", _figure(means[BASE]), _figure(_mean(own)), singles or "-", *last)
    return out


def verdict(results: Mapping[str, Any]) -> list[str]:
    """One line a bar of issue 2, beginning ``holds: `` or ``fails: ``."""
    lines: list[str] = []

    def bar(holds: bool, text: str) -> None:
        lines.append(f"{'holds' if holds else 'fails'}: {text}")

    for name, domain in results["domains"].items():
        bar(domain["n"] >= TASKS_BAR, f"{name}: {domain['n']} held-out tasks (at least {TASKS_BAR})")
        teacher, ci = domain["teacher"], domain["ci95"]
        if teacher is not None and domain["n"]:
            gain = domain["experts"][teacher] - domain["base"]
            apart = ci[BASE][1] < ci[teacher][0]
            bar(
                gain >= GAIN_BAR - _ROUNDING and apart,
                f"{name}: expert {_with_interval(domain, teacher)} beats base {_with_interval(domain, BASE)} by "
                f"{gain:.3f} (at least {GAIN_BAR:.2f}), intervals {'apart' if apart else 'overlap'}",
            )
        recovery, why = domain["recovery"], domain.get("recovery_reason")
        bar(
            recovery is not None and recovery >= RECOVERY_BAR - _ROUNDING,
            f"{name}: recovery {_figure(recovery)}{_interval(domain['recovery_ci95'])} (at least {RECOVERY_BAR:.2f})"
            + (f"; {why}" if why else ""),
        )
    means = results["mean_over_domains"]
    student = means[STUDENT]
    for policy in (p for p in means if p not in NOT_EXPERTS):
        above = student is not None and means[policy] is not None and student > means[policy]
        bar(above, f"mean over domains: student {_figure(student)} beats expert {policy} {_figure(means[policy])}")
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f" ({bounds[0]:.2f}..{bounds[1]:.2f})"


def _with_interval(domain: Mapping[str, Any], policy: str) -> str:
    return _figure(_score(domain, policy)) + _interval(domain["ci95"][policy])


__all__ = ["BASE", "GENERAL", "NOT_EXPERTS", "STUDENT", "results", "table", "verdict", "wilson"]
