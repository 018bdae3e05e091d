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


@pytest.mark.slow
@pytest.mark.long
def test_against_trl() -> None:
    small = "--groups 2 --size 4 --prompt 8 --tokens 8 --steps 6 --warmup 2 --latencies 0,0.1 --no-check"
    command = [sys.executable, str(ROOT / "benchmarks/against_trl.py"), *small.split()]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
    # Latency, trainer, tokens/s, seconds a step, staleness, its maximum, percent of waiting, lost groups.
    lines = re.findall(r"│ +(\S+) │ (.+?) +│ +(\d+) │ +(\S+) │ +(\S+) │ +(\d+) │ +(\d+)% │ +(\d+) │", run.stdout)
    trainers = [
        "GRPOTrainer",
        "GRPOTrainer, bf16",
        "ours, K = 0",
        "ours",
        "ours, compiled",
        "ours, compiled, bf16",
        "AsyncGRPOTrainer",
        "AsyncGRPOTrainer, batching worker",
    ]
    assert [(latency, trainer) for latency, trainer, *_ in lines] == [(at, t) for at in ("0", "0.1") for t in trainers]
    for latency, trainer, speed, step, mean, most, waits, _ in lines:
        in_turn = trainer in ("GRPOTrainer", "GRPOTrainer, bf16", "ours, K = 0")
        assert float(speed) > 0 and float(step) > float(latency) * in_turn
        assert 0 <= float(mean) <= int(most) <= (0 if in_turn else 4)
        assert 0 <= int(waits) <= 100
    assert len(re.findall(r"^latency \S+: ours.* / \w*GRPOTrainer.* = \d+\.\d\d \(bar [32]\)$", run.stdout, re.M)) == 2


@pytest.mark.slow
def test_slow_domain() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/slow_domain.py"), "--seeds", "0", "--steps", "9"]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode in (0, 1) and not run.stderr, run.stderr
    rows = re.findall(r"│ (on|off) +│ (balanced|slow) +│ (\S+) +│ (\S+) +│ (\S+) +│ (\S+) +│ +(\d+) of 12", run.stdout)
    assert [row[:2] for row in rows] == [("on", "balanced"), ("on", "slow"), ("off", "balanced"), ("off", "slow")]
    for idle, *shares in [[float(x) for x in row[2:6]] for row in rows]:
        assert 0 < idle < 1 and abs(sum(shares) - 1) < 0.01
    assert len(re.findall(r"slow over balanced, quotas (?:on|off): \d+\.\d\d", run.stdout)) == 2
    # What is slow has to be seen to be slow: its median episode is the longest of its row.
    seconds = re.findall(r"│ slow .* │ ([\d.]+), ([\d.]+), ([\d.]+) +│", run.stdout)
    assert len(seconds) == 2 and all(float(row[2]) > max(float(row[0]), float(row[1])) for row in seconds)


@pytest.mark.slow
def test_soak() -> None:
    """So short that the allocator still grows, which the benchmark's own bound on memory would not allow."""
    command = [sys.executable, str(ROOT / "benchmarks/soak.py"), "--episodes", "2600", "--versions", "pinned"]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert run.returncode in (0, 1) and "Traceback" not in run.stderr, run.stderr
    [row] = [line.split("│") for line in run.stdout.splitlines() if line.startswith("│ pinned")]
    episodes, speed, *grown = (float(cell.split()[0]) for cell in row[2:-1])
    memory, engines_memory, handles, engines_handles, tasks = grown
    assert episodes >= 2000 and speed > 0
    # A file that is just being written counts in the mean of a few measurements; one that stays open counts whole.
    assert memory < 64 and engines_memory < 64 and handles < 1 and engines_handles < 1
    assert tasks < 150  # one left of every group would be 200 more


@pytest.mark.slow
def test_long_sequences() -> None:
    """So short that the plain form's memory is not yet the larger one: exit status 1."""
    command = [sys.executable, str(ROOT / "benchmarks/long_sequences.py"), "--tokens", "64", "--plain-tokens", "64"]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert run.returncode in (0, 1) and "Traceback" not in run.stderr, run.stderr
    gaps = re.search(r"largest difference of values (\S+), of gradients (\S+) and (\S+)", run.stdout)
    assert gaps is not None and all(float(gap) < 1e-3 for gap in gaps.groups())


@pytest.mark.slow
def test_memory() -> None:
    """Exit status 1 would be an estimate that is more than 30 % off."""
    cases = ["--only", "longcat2, activations", "--only", "qwen3, weights", "--only", "engine, qwen3"]
    command = [sys.executable, str(ROOT / "benchmarks/memory.py"), *cases]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    ratios = re.findall(r"^.*: (\d\.\d\d) of what is live, \d\.\d\d of what is resident$", run.stdout, re.MULTILINE)
    assert len(ratios) == 3 and all(0.7 <= float(ratio) <= 1.3 for ratio in ratios)
