"""The benchmarks run, and what they print are figures. What the figures say takes longer than a test may."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_ablations(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    picture = tmp_path / "ablations.png"
    command = [sys.executable, str(ROOT / "benchmarks/ablations.py"), "--quick", "--out", str(picture)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    for arm in ("as in the demo", "none", "dense", "random indexers", "identity"):
        assert arm in run.stdout
    # An arm takes two lines of the table: steps, loss, exact answers where some were asked for, routed slots.
    lines = re.findall(r"│ +(\d+) │ +(\S+) │ +(\S*) │ +(\S+) │", run.stdout)
    figures = [[float(x) for x in line if x] for line in lines]
    assert len(figures) == 2 * 10
    assert all(steps > 0 and 0 < loss < 10 and 0 <= routed <= 2 for steps, loss, *_, routed in figures)
    assert picture.read_bytes().startswith(b"\x89PNG")
