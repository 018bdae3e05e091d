"""Geometry of the report's line charts: numbers in, what the template draws as SVG out. Knows nothing of runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
_HEIGHT = 210
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line."""

    name: str
    """What the legend says."""
    color: str
    """Name of a colour of the style sheet."""
    points: Sequence[tuple[float, float]]
    """x and y, by rising x."""
    dash: str = ""
    """``stroke-dasharray``: tells lines of one colour apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A series in coordinates of the drawing."""

    series: Series
    path: str
    """Every point."""
    smooth: str
    """Running mean; empty if there are too few points for one."""
    dots: list[tuple[float, float]]
    last: str
    """Last value of what is drawn thick, formatted; empty for a histogram."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What the template needs."""

    title: str
    note: str
    description: str
    x_name: str
    width: int
    height: int
    plot: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    hover: dict[str, Any]
    """For the script: ``x`` labels, ``px`` positions, ``rows`` of name, color, ``v`` texts and ``py`` positions."""


def chart(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    x_name: str = "step",
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    dots: bool = False,
    wide: bool = False,
    powers: bool = False,
) -> Chart | None:
    """A line chart, y from 0 unless ``y_range`` says otherwise; None if no series has a point. ``powers``: x are powers
    of ten, and the points those of a histogram, which has neither a running mean nor a last value."""
    series = [s for s in series if s.points]
    if not series:
        return None
    xs = sorted({x for s in series for x, _ in s.points})
    ys = [y for s in series for _, y in s.points]
    low, high = y_range or (min(0.0, *ys), max(0.0, *ys))
    y_values = ticks(low, high, 4)
    frame = _Frame(
        width=540 if wide else 360,
        x=(xs[0], xs[-1]) if len(xs) > 1 else (xs[0] - 1, xs[0] + 1),
        y=y_range or (y_values[0], y_values[-1]),
        pad=14 if dots else 0,
    )
    first, last = frame.x
    x_values = xs if dots else [t for t in ticks(first, last, 5) if first <= t <= last and t == int(t)]
    at = [(s, dict(s.points)) for s in series]

    def words(x: float) -> str:
        return number(10.0**x) if powers else f"{x:g}"

    rows = [
        {
            "name": s.name,
            "color": s.color,
            "v": [number(d[x], percent) if x in d else None for x in xs],
            "py": [frame.py(d[x]) if x in d else None for x in xs],
        }
        for s, d in at
    ]
    return Chart(
        title=title,
        note=note,
        description="; ".join((_peak if powers else _story)(s, x_name, percent, words) for s in series),
        x_name=x_name,
        width=frame.width,
        height=_HEIGHT,
        plot=(_LEFT, _TOP, frame.width - _RIGHT, _HEIGHT - _BOTTOM),
        x_ticks=[(frame.px(x), words(x)) for x in x_values],
        y_ticks=[(frame.py(y), number(y, percent)) for y in y_values],
        lines=[_line(frame, s, dots, percent, powers) for s in series],
        hover={"x": [f"{x_name} {words(x)}" for x in xs], "px": [frame.px(x) for x in xs], "rows": rows},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Where numbers lie in the drawing."""

    width: int
    x: tuple[float, float]
    y: tuple[float, float]
    pad: float
    """Room left and right of the first and the last x."""

    def px(self, x: float) -> float:
        room = self.width - _RIGHT - _LEFT - 2 * self.pad
        return round(_LEFT + self.pad + (x - self.x[0]) / (self.x[1] - self.x[0]) * room, 1)

    def py(self, y: float) -> float:
        low, high = self.y
        return round(_HEIGHT - _BOTTOM - (min(max(y, low), high) - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP), 1)


def _line(frame: _Frame, series: Series, dots: bool, percent: bool, powers: bool) -> Line:
    points = series.points
    window = 0 if dots or powers else len(points) // 10
    means = running_mean([y for _, y in points], window) if window >= 2 else []
    smooth = [(x, m) for (x, _), m in zip(points, means, strict=False)]
    places = [(frame.px(x), frame.py(y)) for x, y in points]
    return Line(
        series=series,
        path=_path(places),
        smooth=_path([(frame.px(x), frame.py(y)) for x, y in smooth]),
        dots=places if dots or len(points) == 1 else [],
        last="" if powers else number((smooth or points)[-1][1], percent),
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round values that cover ``low`` to ``high``."""
    span = high - low
    if span <= 0:
        return [low, low + 1.0]
    rough = span / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * 0.999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if step > 1e-9 else i * step for i in range(start, end + 1)]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred, over what there is of the window at both ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def number(value: float, percent: bool = False) -> str:
    """For people: three digits, thousands apart, small ones as powers of ten."""
    if percent:
        return f"{100 * value:.3g}%"
    size = abs(value)
    if size and size < 1e-3:
        power = math.floor(math.log10(size) + 1e-9)
        return f"{value / 10.0**power:.2g}×10{str(power).translate(_SUPERSCRIPTS)}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.3g}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points) if points else ""


def _story(series: Series, x_name: str, percent: bool, words: Callable[[float], str]) -> str:
    (x0, y0), (x1, y1) = series.points[0], series.points[-1]
    return (
        f"{series.name}: {number(y0, percent)} at {x_name} {words(x0)}, {number(y1, percent)} at {x_name} {words(x1)}"
    )


def _peak(series: Series, x_name: str, percent: bool, words: Callable[[float], str]) -> str:
    x, y = max(series.points, key=lambda point: point[1])
    return f"{series.name}: at most {number(y, percent)}, at {x_name} {words(x)}"


__all__ = ["Chart", "Series", "chart", "number", "running_mean", "ticks"]
