"""How values reduce over a step, and what a resumed stage forgets."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from posttrain.metrics import Last, Max, Mean, Metrics, Sum


def test_values_reduce_by_their_type(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.add(
        "rl", {"reward": Mean(1.0, 3), "tokens": Sum(10), "longest": Max(7), "lr": Last(0.1), "none": Mean.of([])}
    )
    metrics.add("other", {"tokens": Sum(99)})
    out = metrics.log(
        1, "rl", {"reward": Mean(0.0), "tokens": Sum(5), "longest": Max(3), "lr": 0.2, "bad": float("nan")}
    )
    assert out == {"reward": 0.75, "tokens": 15, "longest": 7, "lr": 0.2, "none": None, "bad": None}
    assert metrics.log(2, "rl", {"tokens": Sum(1)}) == {"tokens": 1}
    (first, second) = metrics.records("rl")
    assert abs(first.pop("time") - time.time()) < 60
    assert first == {"stage": "rl", "step": 1, **out}
    assert second["tokens"] == 1
    assert Mean.of([1, 2, 6]) == Mean(3.0, 3)
    with pytest.raises(ValueError, match="cannot be called 'step'"):
        metrics.log(3, "rl", {"step": 1.0})
    metrics.add("rl", {"x": Sum(1)})
    with pytest.raises(TypeError, match="'x' is a Sum and now a Mean"):
        metrics.add("rl", {"x": Mean(1)})


def test_rewind_drops_the_steps_that_will_be_repeated(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m.jsonl")
    for step in range(1, 5):
        metrics.log(step, "a", {"x": step})
        metrics.log(step, "b", {"x": step})
    metrics.add("a", {"x": 99.0})
    metrics.close()
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"stage": "a", "st')
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.rewind("a", 2)
    metrics.log(3, "a", {"x": 30})
    assert [(r["step"], r["x"]) for r in metrics.records("a")] == [(1, 1), (2, 2), (3, 30)]
    assert [r["step"] for r in metrics.records("b")] == [1, 2, 3, 4]
    metrics.rewind("b", -1)
    assert metrics.records("b") == []
    assert len(metrics.records()) == 3


def test_metrics_from_many_threads(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m.jsonl")
    work = [threading.Thread(target=lambda: [metrics.add("s", {"n": Sum(1)}) for _ in range(500)]) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert metrics.log(0, "s", {}) == {"n": 2000}
