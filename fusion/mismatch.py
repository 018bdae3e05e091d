"""The report's section on engine against trainer: rows and charts of the gaps that the steps of every stage counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fusion.charts import Chart, Series, chart
from posttrain.journal import read_journal
from posttrain.mismatch import A_DECADE, LOWEST, UNDONE, Gaps, from_record, together
from posttrain.run import RunDir

_SUFFIX = ".mismatch"
_DRAWN = 5
"""Stalenesses that a histogram shows at most: there are as many colours."""

Steps = Mapping[int, Mapping[int, Gaps]]
"""Version to staleness to gaps."""


def read_gaps(run: RunDir) -> dict[str, Steps]:
    """Of every stage that counted any, in the order of their names."""
    found: dict[str, Steps] = {}
    for path in sorted((run.path / "rollouts").glob(f"*{_SUFFIX}.jsonl")):
        steps = {r["version"]: from_record(r) for r in read_journal(path)}
        if any(steps.values()):
            found[path.stem.removesuffix(_SUFFIX)] = steps
    return found


def section(stages: Mapping[str, Steps], color: Callable[[str], str], plain: Callable[[str], str]) -> dict[str, Any]:
    """What the template shows: ``rows`` of the table, ``charts`` of all stages, ``histograms``, one a stage."""
    whole = {stage: together(steps.values()) for stage, steps in stages.items()}
    rows = [
        {
            "stage": plain(stage),
            "color": color(stage),
            "staleness": "undone" if age == UNDONE else str(age),
            "tokens": g.tokens,
            "gaps": [g.mean, *(g.quantile(share) for share in (0.5, 0.9, 0.99)), g.largest],
            "gated": g.gated_share,
        }
        for stage, ages in whole.items()
        for age, g in ages.items()
    ]

    def by_age(value: Callable[[Gaps], float]) -> list[Series]:
        points = {s: [(float(age), value(g)) for age, g in ages.items() if age != UNDONE] for s, ages in whole.items()}
        return [Series(name=plain(s), color=color(s), points=p) for s, p in points.items() if len(p) > 1]

    fresh = [
        Series(
            name=plain(s), color=color(s), points=[(float(v), ages[0].mean) for v, ages in steps.items() if 0 in ages]
        )
        for s, steps in stages.items()
    ]
    age = {"x_name": "staleness", "dots": True}
    charts = [
        chart("Gap at staleness 0", fresh, note="mean, in nats: engine against trainer, the policy the same"),
        chart("Gap by staleness", by_age(lambda g: g.mean), **age, note="mean, in nats; what is added is the policy's"),
        chart("Gated by staleness", by_age(lambda g: g.gated_share), **age, percent=True, note="share of the tokens"),
    ]
    histograms = (_histogram(f"{plain(stage)}: gaps", ages) for stage, ages in whole.items())
    return {"rows": rows, "charts": _some(charts), "histograms": _some(histograms)}


def _histogram(title: str, ages: Mapping[int, Gaps]) -> Chart | None:
    """Share of the tokens in every bin, a line a staleness, over the bins that have any and one more at both ends."""
    shown = _spread([age for age in ages if age != UNDONE])
    bins = {age: (0, *ages[age].bins, 0) for age in shown}
    used = [place for counts in bins.values() for place, count in enumerate(counts) if count]
    if not used:
        return None
    places = range(min(used) - 1, max(used) + 2)
    series = [
        Series(
            name=f"staleness {age}",
            color=f"e{i}",
            points=[(_middle(place - 1), bins[age][place] / ages[age].tokens) for place in places],
        )
        for i, age in enumerate(shown)
    ]
    note = f"share of the tokens in each of {A_DECADE} bins a decade"
    return chart(title, series, x_name="gap in nats", powers=True, percent=True, wide=True, note=note)


def _middle(place: int) -> float:
    """Of a bin, as a power of ten; the first and the last, which have one edge, are drawn as wide as the others."""
    return LOWEST + (place - 0.5) / A_DECADE


def _spread(ages: Sequence[int]) -> list[int]:
    """At most so many as there are colours, the smallest and the largest among them."""
    if len(ages) <= _DRAWN:
        return list(ages)
    return [ages[round(i * (len(ages) - 1) / (_DRAWN - 1))] for i in range(_DRAWN)]


def _some(charts: Iterable[Chart | None]) -> list[Chart]:
    return [c for c in charts if c is not None]


__all__ = ["read_gaps", "section"]
