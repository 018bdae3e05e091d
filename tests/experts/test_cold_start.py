"""The cold start: what it minimises, and that a killed one ends where an undisturbed one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from experts.cold_start import train
from experts.config import ColdStartConfig
from posttrain.threads import Stopped
from tests.model.longcat2_tiny import LSA, MTP, tiny
from tests.posttrain.tiny import make_tokenizer

PARTS: dict[str, Any] = {
    **MTP,
    **LSA,
    "mtp_loss_coef": 0.3,
    "indexer_loss_coef": 0.5,
    "z_loss_coef": 0.01,
    "moe_target_topk": 3,
    "router_aux_loss_coef": 0.2,
    "router_bias_update_rate": 0.01,
}
NEVER = threading.Event()
PROCESSES = pytest.mark.parametrize("processes", [1, 2])


def ignore(step: int) -> None:
    """Where nobody watches."""


def make(folder: Path, **changes: Any) -> Any:
    tokenizer = make_tokenizer()
    model = tiny(seed=5, vocab_size=len(tokenizer) + (-len(tokenizer)) % 8, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def rows(count: int, length: int = 24) -> Dataset:
    rng = Random(0)
    ids = [[rng.randrange(3, 60) for _ in range(length)] for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 4 + row[4:] for row in ids]})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def without_clocks(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in log]


class Killed(Exception):
    """What ``on_step`` raises."""


@pytest.mark.slow
@PROCESSES
def test_a_killed_cold_start_ends_where_an_undisturbed_one_does(processes: int, tmp_path: Path) -> None:
    """Weights, router biases and log, bit for bit; also past a checkpoint that the kill left half written."""
    make(tmp_path / "start", **PARTS)
    steps = 60
    config = ColdStartConfig(
        steps=steps, batch_size=4, micro_batches=2, processes=processes, warmup_steps=5, checkpoint_every=10, lr=0.01
    )
    data = rows(4 * steps)
    whole = train(tmp_path / "start", data, config, tmp_path / "whole", 3, ignore, NEVER)
    folder = tmp_path / "killed"

    def kill(step: int) -> None:
        if (folder / "checkpoint-10" / "trainer_state.json").exists():
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "start", data, config, folder, 3, kill, NEVER)
    reached = max(int(c.name.split("-")[1]) for c in folder.glob("checkpoint-*"))
    assert 10 <= reached < steps and not (folder / "model").exists()
    half = folder / f"checkpoint-{reached + 10}"
    half.mkdir(exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")
    (half / "trainer_state.json").unlink(missing_ok=True)
    seen: list[int] = []
    resumed = train(tmp_path / "start", data, config, folder, 3, seen.append, NEVER)
    assert seen and min(seen) > 10
    mine, theirs = weights(folder / "model"), weights(tmp_path / "whole" / "model")
    assert mine.keys() == theirs.keys() and len(mine) > 50
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert without_clocks(resumed) == without_clocks(whole)
    before = weights(tmp_path / "start")
    assert any(not torch.equal(before[n], mine[n]) for n in mine if "correction_bias" in n)


@pytest.mark.slow
@PROCESSES
def test_the_losses_of_all_parts_are_minimised(processes: int, tmp_path: Path) -> None:
    """The logged loss is the model's own, auxiliary parts and all, and the parts' weights move."""
    model = make(tmp_path / "start", **PARTS).train()
    still = ColdStartConfig(
        steps=10, batch_size=4, micro_batches=4, processes=processes, warmup_steps=0, lr=1e-12, clean_steps=0
    )
    data = rows(40)
    with torch.enable_grad():
        found = [
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
            for ids, labels in zip(data["input_ids"], data["labels"], strict=True)
        ]
    whole = sum(out.loss.item() for out in found) / len(found)
    added = sum(out.aux_loss.item() for out in found) / len(found)
    assert added > 0.1  # an order above the tolerance
    [entry] = train(tmp_path / "start", data, still, tmp_path / "still", 3, ignore, NEVER)
    assert entry["loss"] == pytest.approx(whole, rel=2e-3)
    moving = still.model_copy(update={"lr": 0.01})
    train(tmp_path / "start", data, moving, tmp_path / "moved", 3, ignore, NEVER)
    before, after = weights(tmp_path / "start"), weights(tmp_path / "moved" / "model")
    for part in ("mtp", ".indexer.", "router.classifier"):
        names = [n for n in before if part in n and "correction_bias" not in n]
        assert names and all(not torch.equal(before[n], after[n]) for n in names), part


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    make(tmp_path / "start")
    config = ColdStartConfig(steps=2, batch_size=2, micro_batches=1)
    with pytest.raises(Exception, match=r"(?s)Process 0 terminated.*KeyError"):
        train(
            tmp_path / "start",
            Dataset.from_dict({"no_such_column": [1, 2]}),
            config,
            tmp_path / "run",
            3,
            ignore,
            NEVER,
        )
    assert not (tmp_path / "run" / "model").exists()


def test_one_that_is_stopped_leaves_no_process_behind(tmp_path: Path) -> None:
    make(tmp_path / "start")
    config = ColdStartConfig(steps=10_000, batch_size=2, micro_batches=1, warmup_steps=5)
    stopped, before = threading.Event(), workers_of(os.getpid())
    with pytest.raises(Stopped):
        train(tmp_path / "start", rows(20_000), config, tmp_path / "run", 3, lambda step: stopped.set(), stopped)
    assert workers_of(os.getpid()) == before and not (tmp_path / "run" / "model").exists()


def workers_of(pid: int) -> list[psutil.Process]:
    """Its children that multiprocessing started."""
    found = list[psutil.Process]()
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("keyboard", [False, True])
def test_an_interrupted_run_ends_at_once(keyboard: bool, tmp_path: Path) -> None:
    """By a signal to the process, and as a keyboard does it, to all of its group."""
    less = ["--set", "cold_start.steps=2000", "--set", "cold_start.checkpoint_every=5"]
    command = [sys.executable, "-m", "posttrain.cli", "run", "configs/tiny/smoke.yaml", "--out", str(tmp_path / "run")]
    run = subprocess.Popen(
        [*command, *less],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell has what it starts in the background ignore it, and whoever comes after does so too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    folder, deadline = tmp_path / "run" / "checkpoints" / "base" / "work", time.monotonic() + 400
    try:
        while not list(folder.glob("checkpoint-*/trainer_state.json")):
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers, began = workers_of(run.pid), time.monotonic()
        assert workers
        (os.killpg if keyboard else os.kill)(run.pid, signal.SIGINT)
        said, _ = run.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert time.monotonic() - began < 20 and run.returncode not in (0, -signal.SIGKILL)
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)
    assert "spawn_main" not in said and "ProcessExitedException" not in said, said
