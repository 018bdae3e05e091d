"""Kills at random moments: a run always ends where it should, and nothing that was written down is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from posttrain.groups import index_of
from posttrain.journal import read_journal, rollout_from_dict
from posttrain.types import Rollout
from tests.posttrain.tiny import make_model, make_tokenizer

pytestmark = [pytest.mark.faults, pytest.mark.slow]

STEPS, BATCH, SIZE = 16, 2, 3
ROLLOUTS = STEPS * BATCH * SIZE
MARK = "POSTTRAIN_TEST_RUN"
"""In the environment of a run, which its children have too: the engine's command line says nothing of the run."""


def write_config(folder: Path, max_staleness: int, steps: int = STEPS) -> Path:
    """A tiny model at random, one world, a few steps."""
    model = folder / "model"
    make_model("longcat2", vocab_size=len(make_tokenizer())).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    loop = {
        "steps": steps, "groups_per_step": BATCH, "group_size": SIZE, "max_running": 4, "max_staleness": max_staleness,
        "checkpoint_every": 2,
    }  # fmt: skip
    config = {
        "model": {"type": "pretrained", "path": str(model)},
        "cold_start": None,
        "engine": {"type": "local", "slots": 16, "max_context": 128},
        "worlds": {"requests": {"type": "requests"}},
        "experts": {"interaction": {"worlds": {"requests": 1}, "train_tasks": 20, "loop": loop}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, out: Path, log_file: Path | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "posttrain.cli", "expert", str(config), "interaction", "--out", str(out)]
    env = {**os.environ, MARK: str(out)}
    with open(log_file or out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def finish(config: Path, out: Path) -> float:
    """Seconds that the run took from here to its end."""
    began = time.monotonic()
    process = start(config, out)
    assert process.wait(300) == 0, out.with_suffix(".log").read_text()[-3000:]
    return time.monotonic() - began


def journal_of(out: Path) -> bytes:
    """What is written down for good: the last line may be half of one."""
    journal = out / "rollouts/expert-interaction.jsonl"
    found = journal.read_bytes() if journal.exists() else b""
    return found[: found.rfind(b"\n") + 1]


def until_it_has(rollouts: int, process: subprocess.Popen[bytes], out: Path) -> None:
    """Until so many are written down, or the run has ended."""
    began = time.monotonic()
    while process.poll() is None and journal_of(out).count(b"\n") < rollouts and time.monotonic() - began < 300:
        time.sleep(0.01)


def kill_at_random(
    config: Path, out: Path, rng: random.Random, whole_s: float, times: int, seen: set[str]
) -> list[bytes]:
    """Kill up to that many times, until it ends by itself: three of four while it plays and trains, which is a small
    part of a run, the others at any moment of one that would take ``whole_s``. Returns the journal after every kill.
    ``seen`` gets what was alive when it was killed."""
    journals = list[bytes]()
    for _ in range(times):
        process = start(config, out)
        try:
            if rng.random() < 3 / 4:
                before = journal_of(out).count(b"\n")
                until_it_has(before + rng.randint(1, max(1, (ROLLOUTS - before) // 2)), process, out)
                process.wait(rng.uniform(0.0, 0.2))
            else:
                process.wait(rng.uniform(0.2, 1.0) * whole_s)
            break
        except subprocess.TimeoutExpired:
            seen |= {*alive(out)}
            # The process alone: its engine must see for itself that nobody is left.
            process.send_signal(signal.SIGKILL)
            process.wait(10)
            journals.append(journal_of(out))
    return journals


def stage(out: Path) -> tuple[dict[str, Any], list[Rollout], list[dict[str, Any]]]:
    """Last checkpoint, journal, and what was trained when."""
    state = torch.load(out / "checkpoints/expert-interaction/state.pt", weights_only=True)
    rollouts = [rollout_from_dict(r) for r in read_journal(out / "rollouts/expert-interaction.jsonl")]
    return state, rollouts, list(read_journal(out / "rollouts/expert-interaction.trained.jsonl"))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoints/expert-interaction/state.pt", weights_only=True)["trainer"]["model"]


def alive(out: Path) -> list[str]:
    """Command lines of the run's processes that are left."""
    found: list[str] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(out):
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("kills", [5, pytest.param(25, marks=pytest.mark.long)])
def test_random_kills(kills: int, max_staleness: int, tmp_path: Path) -> None:
    """Fifty in both modes, or ten. Every step is taken once, each on groups of its own, and from rollouts that are in
    the journal; synchronously the weights are those of a run that nobody disturbed, bit for bit."""
    config = write_config(tmp_path, max_staleness)
    calm, seen = tmp_path / "calm", set[str]()
    began = time.monotonic()
    undisturbed_run = start(config, calm)
    while undisturbed_run.poll() is None and time.monotonic() - began < 300:
        seen |= {*alive(calm)}
        time.sleep(0.2)
    assert undisturbed_run.wait(10) == 0, calm.with_suffix(".log").read_text()[-3000:]
    whole_s = time.monotonic() - began
    rng = random.Random(max_staleness)
    killed, runs, amid = 0, 0, 0
    while killed < kills:
        out = tmp_path / f"killed-{runs}"
        journals = kill_at_random(config, out, rng, whole_s, min(5, kills - killed), seen)
        killed += len(journals)
        runs += 1
        finish(config, out)
        amid += sum(0 < len(journal) < len(journal_of(out)) for journal in journals)
        assert all(journal_of(out).startswith(journal) for journal in journals), "a journalled rollout is gone"
        state, rollouts, trained = stage(out)
        assert [t["version"] for t in trained] == list(range(1, STEPS + 1))
        numbers = Counter(n for t in trained for n in t["groups"])
        assert set(numbers.values()) == {1} and numbers.total() == STEPS * BATCH
        assert set(numbers) <= set(state["finished"])
        # What was trained was written down first, and every record is whole and of one place.
        by_id = {r.id: r for r in rollouts}
        assert {i for t in trained for i in t["rollouts"]} <= set(by_id)
        places = Counter((r.group, index_of(r)) for r in rollouts if r.valid)
        if max_staleness:
            # A journalled rollout is used and never made a second time, unless it had grown too old to be trained.
            again = {place for place, n in places.items() if n > 1}
            used = {(by_id[i].group, index_of(by_id[i])): by_id[i] for t in trained for i in t["rollouts"]}
            for place in again & set(used):
                earlier = [r for r in rollouts if (r.group, index_of(r)) == place and r.id != used[place].id]
                assert all(r.oldest_version < used[place].oldest_version for r in earlier)
        else:
            # Cut-short batches are made again, and come out the same.
            for rollout in rollouts:
                assert rollout.branches == by_id[rollout.id].branches
            ours, undisturbed = weights(out), weights(calm)
            assert all(torch.equal(ours[k], undisturbed[k]) for k in undisturbed)
        until = time.monotonic() + 60
        while alive(out) and time.monotonic() < until:
            time.sleep(0.2)
        assert alive(out) == []
    assert amid >= kills / 5, "kills came while the run played"
    assert any("spawn_main" in line for line in seen), "who does not see an engine cannot see that none is left"
