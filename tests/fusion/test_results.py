"""Figures worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fusion.results import results, table, verdict, wilson

Outcomes = Sequence[float | None]


def records(by_domain: Mapping[str, Outcomes]) -> list[dict[str, Any]]:
    return [
        {"task": f"{d}/{i}", "domain": d, "world": f"{d}-world", "outcome": o}
        for d, outcomes in by_domain.items()
        for i, o in enumerate(outcomes)
    ]


def made(policies: Mapping[str, Mapping[str, Outcomes]], experts: Mapping[str, str]) -> dict[str, Any]:
    rows = {p: records(d) for p, d in policies.items()}
    return results(rows, experts, {"fusion": 2.5}, "abc", {"torch": "2"}, resamples=2000)


def ones(solved: int, of: int) -> list[float]:
    return [1.0] * solved + [0.0] * (of - solved)


@pytest.fixture
def good() -> dict[str, Any]:
    """Two domains of 200: base 0.2; own expert 0.8, the other's 0.25; student 0.77 and 0.71."""
    return made(
        {
            "base": {"a": ones(40, 200), "b": ones(40, 200)},
            "x": {"a": ones(160, 200), "b": ones(50, 200)},
            "y": {"a": ones(50, 200), "b": ones(160, 200)},
            "student": {"a": ones(154, 200), "b": ones(142, 200)},
        },
        {"x": "a", "y": "b"},
    )


def test_shape_is_the_one_of_the_issue(good: dict[str, Any]) -> None:
    json.dumps(good, allow_nan=False)
    assert {"domains", "wall_s", "config_sha256", "versions", "mean_over_domains"} == set(good)
    a = good["domains"]["a"]
    assert (a["n"], a["base"], a["experts"], a["student"]) == (200, 0.2, {"x": 0.8, "y": 0.25}, 0.77)
    assert a["teacher"] == "x" and good["wall_s"] == {"fusion": 2.5}
    assert a["worlds"] == {"a-world": {"n": 200, "base": 0.2, "x": 0.8, "y": 0.25, "student": 0.77}}
    assert a["recovery"] == pytest.approx(0.57 / 0.6)
    assert good["mean_over_domains"] == pytest.approx({"base": 0.2, "x": 0.525, "y": 0.525, "student": 0.74})


def test_general_rl_is_a_column_of_its_own_and_no_expert() -> None:
    """It is reported beside the student; the bars are about the fusion and do not look at it."""
    policies = {p: {"a": ones(n, 200)} for p, n in {"base": 40, "x": 160, "student": 150, "general": 170}.items()}
    found, without = made(policies, {"x": "a"}), made({p: d for p, d in policies.items() if p != "general"}, {"x": "a"})
    assert found["domains"]["a"]["general"] == 0.85 and found["mean_over_domains"]["general"] == 0.85
    assert found["domains"]["a"]["experts"] == {"x": 0.8}
    assert found["domains"]["a"]["recovery"] == without["domains"]["a"]["recovery"]
    assert verdict(found) == verdict(without)
    console = Console(width=160, record=True)
    console.print(table(found))
    shown = console.export_text()
    assert "general RL" in shown and "0.850 (0.79..0.89)" in shown


def test_wilson_by_hand() -> None:
    # z = 1.959964: centre (8 + z^2/2) / (10 + z^2) = 0.71674, half width z sqrt(1.6 + z^2/4) / (10 + z^2) = 0.22659
    assert wilson(np.array(ones(8, 10))) == pytest.approx([0.490162, 0.943318], abs=1e-6)
    # 0 of 10: [0, z^2 / (10 + z^2)]
    assert wilson(np.array(ones(0, 10))) == pytest.approx([0.0, 0.277533], abs=1e-6)
    assert wilson(np.array([0.5, 0.5])) == wilson(np.array([1.0, 0.0]))
    assert wilson(np.array([])) is None


def test_tasks_are_paired_and_what_was_not_judged_is_left_out_of_all() -> None:
    found = made(
        {
            "base": {"a": [0.0, None, 0.0, 1.0]},
            "x": {"a": [1.0, 1.0, 1.0, 1.0]},
            "student": {"a": [1.0, 1.0, None, 1.0]},
        },
        {"x": "a"},
    )["domains"]["a"]
    assert (found["n"], found["left_out"]) == (2, 2)
    assert found["invalid"] == {"base": 1, "x": 0, "student": 1}
    assert (found["base"], found["experts"]["x"], found["student"], found["recovery"]) == (0.5, 1.0, 1.0, 1.0)


def test_order_of_the_records_does_not_matter(good: dict[str, Any]) -> None:
    rows = {p: records({"a": o}) for p, o in {"base": ones(1, 4), "x": ones(3, 4), "student": ones(2, 4)}.items()}
    first = results(rows, {"x": "a"}, {}, "", {})
    rows["x"] = rows["x"][::-1]
    assert results(rows, {"x": "a"}, {}, "", {}) == first


def test_the_bootstrap_is_paired_and_repeats() -> None:
    # Student and expert solve the same tasks: every resample says 1. Unpaired, the interval would be wide.
    alike = {"base": {"a": ones(8, 40)}, "x": {"a": ones(30, 40)}, "student": {"a": ones(30, 40)}}
    found = made(alike, {"x": "a"})["domains"]["a"]
    assert found["recovery_ci95"] == [1.0, 1.0]
    # Half of the gain over tasks that base never solves: student's share of the expert's n solved is binomial.
    half = {"base": {"a": ones(0, 400)}, "x": {"a": ones(400, 400)}, "student": {"a": ones(200, 400)}}
    low, high = made(half, {"x": "a"})["domains"]["a"]["recovery_ci95"]
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)
    assert made(half, {"x": "a"}) == made(half, {"x": "a"})


def test_no_gain_no_recovery() -> None:
    found = made(
        {p: {"a": ones(5, 20)} for p in ("base", "x", "student")},
        {"x": "a"},
    )["domains"]["a"]
    assert found["recovery"] is None and found["recovery_ci95"] is None
    assert "not above base" in found["recovery_reason"]


def test_doubtful_gain_has_no_interval() -> None:
    found = made({"base": {"a": ones(5, 20)}, "x": {"a": ones(6, 20)}, "student": {"a": ones(6, 20)}}, {"x": "a"})
    assert found["domains"]["a"]["recovery"] == pytest.approx(1.0)
    assert found["domains"]["a"]["recovery_ci95"] is None
    json.dumps(found, allow_nan=False)


def test_domain_without_teacher_or_judgement() -> None:
    policies = {
        "base": {"a": [None, None], "b": ones(1, 4)},
        "x": {"a": [1.0, 1.0], "b": ones(1, 4)},
        "student": {"a": [1.0, 1.0], "b": ones(1, 4)},
    }
    found = made(policies, {"x": "a"})
    assert found["domains"]["a"]["base"] is None and found["domains"]["a"]["n"] == 0
    assert found["domains"]["b"]["teacher"] is None
    assert "no expert" in found["domains"]["b"]["recovery_reason"]
    assert found["mean_over_domains"]["base"] is None
    assert any(line.startswith("fails: a: recovery -") for line in verdict(found))
    Console(quiet=True).print(table(found))


def test_policies_must_have_had_the_same_tasks() -> None:
    with pytest.raises(ValueError, match="not asked the same tasks"):
        made({"base": {"a": [0.0]}, "x": {"a": [1.0]}, "student": {"a": [1.0, 1.0]}}, {"x": "a"})
    with pytest.raises(ValueError, match="student was not evaluated"):
        made({"base": {"a": [0.0]}, "x": {"a": [1.0]}}, {"x": "a"})
    with pytest.raises(ValueError, match="more than one record"):
        rows = {p: records({"a": [1.0]}) for p in ("base", "x", "student")}
        results(rows | {"x": rows["x"] * 2}, {"x": "a"}, {}, "", {})


def test_verdict(good: dict[str, Any]) -> None:
    lines = verdict(good)
    assert len(lines) == 8 and all(line.startswith("holds: ") for line in lines)
    low = {p: {"a": ones(n, 30)} for p, n in {"base": 10, "x": 15, "student": 14}.items()}
    lines = verdict(made(low, {"x": "a"}))
    assert [line.split(": ")[0] for line in lines] == ["fails"] * 4
    assert "intervals overlap" in lines[1]


def test_table(good: dict[str, Any]) -> None:
    console = Console(width=140, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(good))
    text = console.export_text()
    assert "0.770 (0.71..0.82)" in text and "y 0.250" in text and "0.950 (" in text
    assert "x 0.525, y 0.525" in text and "0.740" in text
