"""The whole way, killed twice with ``kill -9`` and taken up again by the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import posttrain.model  # noqa: F401  (registers longcat2)

ROOT = Path(__file__).parent.parent
DOMAINS = {"agent", "reasoning", "interaction"}
MICRO = """
extends: {smoke}
worlds:
  judge: {{type: verify, of: {{type: chains, pairs: 5, max_hops: 4}}}}
cold_start: {{demonstrations: 300, steps: 12, clean_steps: 6, batch_size: 16, processes: 1, checkpoint_every: 3}}
experts:
  agent: {{train_tasks: 40, loop: {{steps: 24, groups_per_step: 2, group_size: 2, checkpoint_every: 2}}}}
  reasoning:
    train_tasks: 40
    verification: {{world: judge, window: 2, gain: 1}}
    loop: {{steps: 2, groups_per_step: 2, group_size: 2}}
  interaction: {{train_tasks: 40, loop: {{steps: 2, groups_per_step: 2, group_size: 2}}}}
fusion: {{train_tasks: 40, loop: {{steps: 2, groups_per_step: 4}}}}
general:
  worlds: {{chains: 1, rules: 1}}
  train_tasks: 40
  loss: {{type: clipped}}
  loop: {{steps: 2, groups_per_step: 2, group_size: 2, quotas: true}}
evaluation: {{tasks: 6}}
"""


def start(config: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "posttrain.cli", "run", str(config), "--out", str(out)]
    with open(out.parent / "output.txt", "a") as log:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, text=True, env={**os.environ, "NO_COLOR": "1"}
        )


def kill_when(config: Path, out: Path, ready: Any) -> None:
    """Start a run, ``kill -9`` its main process once ``ready()``, and wait until its children are gone too."""
    process = start(config, out)
    end = time.monotonic() + 600
    while not ready():
        assert process.poll() is None, (out.parent / "output.txt").read_text()[-3000:]
        assert time.monotonic() < end, "the run did not come to the place where it is to be killed"
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, f"left behind: {[p.cmdline() for p in alive]}"


def killed_in_the_first_stage(config: Path, folder: Path) -> Path:
    """The directory of such a run. A kill may come late, when the stage is over; then another run is killed."""
    for n in range(5):
        out = folder / f"run-{n}"
        work = out / "checkpoints/base/work"
        kill_when(config, out, lambda work=work: any(work.glob("checkpoint-*/trainer_state.json")))
        if not finished_stages(out):
            return out
    pytest.fail("the first stage was over at each of five kills")


def steps(out: Path, stage: str) -> int:
    path = out / "metrics.jsonl"
    return sum(f'"stage":"{stage}"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def ledger(out: Path) -> dict[str, Any]:
    return json.loads((out / "stages.json").read_text())


def finished_stages(out: Path) -> dict[str, Any]:
    return {k: v for k, v in ledger(out).items() if v["seconds"] is not None}


@pytest.mark.slow
def test_killed_twice_and_taken_up_again(tmp_path: Path) -> None:
    config = tmp_path / "micro.yaml"
    config.write_text(MICRO.format(smoke=ROOT / "configs/tiny/smoke.yaml"))
    out = killed_in_the_first_stage(config, tmp_path)

    kill_when(config, out, lambda: steps(out, "expert-agent") >= 3)
    finished = finished_stages(out)
    assert set(finished) == {"base"}
    resumed = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert resumed["stage"] == "cold_start"
    weights = (out / "checkpoints/base/model.safetensors").stat().st_mtime_ns
    journal = out / "rollouts/expert-agent.jsonl"
    journalled = journal.read_bytes().rpartition(b"\n")[0]
    assert journalled.count(b"\n") > 4

    assert start(config, out).wait(timeout=1200) == 0, (out.parent / "output.txt").read_text()[-3000:]
    done = ledger(out)
    assert all(v["seconds"] is not None for v in done.values())
    assert {k: done[k] for k in finished} == finished
    assert (out / "checkpoints/base/model.safetensors").stat().st_mtime_ns == weights
    assert journal.read_bytes().startswith(journalled), "a journalled rollout is gone"
    ids = [json.loads(line)["id"] for line in journal.read_text().splitlines()]
    assert len(ids) == len(set(ids)), "a journalled rollout was made again"
    assert steps(out, "expert-agent") == 24
    _results_are_whole(out)

    assert start(config, out).wait(timeout=600) == 0
    assert ledger(out) == done


def _results_are_whole(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert {"domains", "wall_s", "config_sha256", "versions"} <= set(results)
    assert set(results["domains"]) == DOMAINS
    for domain, row in results["domains"].items():
        assert {"n", "base", "experts", "student", "teacher", "recovery", "recovery_ci95"} <= set(row)
        assert row["n"] == 6 and set(row["experts"]) == DOMAINS and row["teacher"] == domain
        assert all(0 <= x <= 1 for x in (row["base"], row["student"], row["general"], *row["experts"].values()))
    page = (out / "report.html").read_text()
    assert "<html" in page and "http://" not in page and "https://" not in page
    for name in ("base", "expert-agent", "fusion", "general"):
        folder = out / "checkpoints" / name
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.vocab_size == 680 and len(AutoTokenizer.from_pretrained(folder)) <= 680
