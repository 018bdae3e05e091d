"""The report's section on engine against trainer, from gaps that are counted by hand."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from fusion.mismatch import read_gaps, section
from fusion.report import write_report
from posttrain.config import Config
from posttrain.journal import Journal
from posttrain.metrics import Metrics
from posttrain.mismatch import EDGES, UNDONE, Gaps, to_record
from posttrain.run import RunDir


def write_gaps(run: RunDir, stage: str, steps: int) -> None:
    """As a stage with K = 2 would have them."""
    rng = Random(stage)
    with Journal(run.rollouts(f"{stage}.mismatch")) as journal:
        for step in range(1, steps + 1):
            ages = range(min(step, 3))
            found = {age: [10 ** rng.gauss(age - 4, 0.6) for _ in range(40)] for age in ages}
            journal.write(to_record(step, {age: gaps(*values, gated=age) for age, values in found.items()}))


def gaps(*values: float, gated: int = 0) -> Gaps:
    return Gaps.of(np.array(values), np.arange(len(values)) < gated)


class Nothing(Config):
    """The config of a run directory."""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """An expert with two steps, and a stage that was told of but has trained nothing."""
    run = RunDir.open(tmp_path / "run", Nothing())
    metrics = Metrics(run.metrics_file)
    for step, reward in ((1, 0.25), (2, 0.5)):
        metrics.log(step, "expert-agent", {"reward": reward})
    metrics.close()
    first = {0: gaps(0.002, 0.002, 0.5, 0.5, gated=1)}
    second = {UNDONE: gaps(0.3), 0: gaps(0.004, 0.004), 1: gaps(0.02, 0.2, gated=1), 4: gaps(30.0, gated=1)}
    with Journal(run.rollouts("expert-agent.mismatch")) as journal:
        journal.write(to_record(1, first))
        journal.write(to_record(2, second))
    with Journal(run.rollouts("fusion.mismatch")) as journal:
        journal.write(to_record(1, {}))
    with Journal(run.rollouts("expert-agent")) as journal:
        journal.write({"rollouts": "are not gaps"})
    return run


def shown(run: RunDir) -> dict[str, Any]:
    return section(read_gaps(run), lambda stage: "e0", lambda stage: stage.removeprefix("expert-"))


def test_a_row_a_stage_and_staleness(run: RunDir) -> None:
    assert list(read_gaps(run)) == ["expert-agent"], "fusion has trained no token"
    rows = shown(run)["rows"]
    assert [(r["staleness"], r["tokens"]) for r in rows] == [("undone", 1), ("0", 6), ("1", 2), ("4", 1)]
    assert {r["stage"] for r in rows} == {"agent"}
    assert [r["gated"] for r in rows] == pytest.approx([0, 1 / 6, 0.5, 1])
    mean, median, _, _, largest = rows[1]["gaps"]
    assert mean == pytest.approx(1.012 / 6) and largest == 0.5
    assert 0.004 / 10 ** (1 / 8) < median < 0.004 * 10 ** (1 / 8)


def test_charts_by_staleness_and_of_the_engine_alone(run: RunDir) -> None:
    fresh, by_age, gated = shown(run)["charts"]
    assert [list(line.series.points) for line in fresh.lines] == [[(1.0, pytest.approx(0.251)), (2.0, 0.004)]]
    assert [x for x, _ in by_age.lines[0].series.points] == [0, 1, 4], "what was undone is not drawn"
    assert [y for _, y in by_age.lines[0].series.points] == pytest.approx([1.012 / 6, 0.11, 30.0])
    assert gated.lines[0].last == "100%" and gated.x_name == "staleness"


def test_a_histogram_has_shares_over_powers_of_ten(run: RunDir) -> None:
    (drawn,) = shown(run)["histograms"]
    assert [line.series.name for line in drawn.lines] == ["staleness 0", "staleness 1", "staleness 4"]
    points = list(drawn.lines[0].series.points)
    assert sum(share for _, share in points) == pytest.approx(1)
    low = 10 ** (points[1][0] - 1 / 16)
    assert (points[0][1], points[1][1]) == (0, pytest.approx(1 / 3)) and low == pytest.approx(EDGES[26])
    assert points[-2][0] == pytest.approx(1 + 1 / 16) and drawn.lines[2].series.points[-2][1] == 1, "beyond 10 nats"
    assert not any(line.smooth or line.last for line in drawn.lines)
    assert [text for _, text in drawn.x_ticks] == ["0.01", "0.1", "1", "10"]
    assert "staleness 4: at most 100%, at gap in nats 11.5" in drawn.description


def test_many_stalenesses_are_thinned_out(run: RunDir) -> None:
    whole = {"expert-agent": {1: {age: gaps(0.1 * (age + 1)) for age in range(12)}}}
    (drawn,) = section(whole, lambda stage: "e0", str)["histograms"]
    assert [line.series.name for line in drawn.lines] == [f"staleness {age}" for age in (0, 3, 6, 8, 11)]


def test_the_report_shows_it(run: RunDir) -> None:
    page = write_report(run).read_text()
    assert 'id="mismatch"' in page and 'href="#mismatch"' in page
    assert "<td>undone</td><td>1</td><td>0.3</td>" in page and "a version that a kill undid" in page
    assert "<td>4</td><td>1</td><td>30</td>" in page and "<td>16.7%</td>" in page
    run.rollouts("expert-agent.mismatch").unlink()
    assert 'id="mismatch"' not in write_report(run).read_text()
