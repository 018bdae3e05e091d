"""A whole stage of training by two processes: it ends, and goes on after either of them was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from posttrain.errors import RankError
from posttrain.journal import read_journal
from posttrain.protocols import World
from posttrain.settings import DdpConfig, FsdpConfig, TrainerConfig
from tests.test_faults import finish, start, write_config
from tests.toy_stage import Hook, HookedWorld, check_books, fine, records, toy_stage, train, weights

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def run_toy(folder: Path, name: str, hook: Hook):
    """Synchronous, so that it repeats bit for bit."""
    worlds: dict[str, World] = {"requests": HookedWorld(hook, 120.0)}
    parallel = FsdpConfig(type="fsdp", processes=2, timeout_s=120)
    trainer = TrainerConfig(lr=1e-3, warmup_steps=0, decay=False, parallel=parallel)
    return train(folder, name, toy_stage(folder, worlds, loop={"max_staleness": 0}, trainer=trainer))


def test_a_rank_that_is_killed_ends_the_stage_and_it_goes_on(tmp_path: Path) -> None:
    calm = run_toy(tmp_path, "calm", fine)

    async def deadly(where: str, count: int) -> None:
        if where == "grade" and count == 20:  # of 36; the fourth step
            (rank,) = (p for p in multiprocessing.active_children() if p.name == "rank1")
            assert rank.pid is not None
            os.kill(rank.pid, signal.SIGKILL)

    with pytest.raises(RankError, match="rank 1 of the trainer was killed by SIGKILL during step"):
        run_toy(tmp_path, "killed", deadly)
    assert not multiprocessing.active_children()
    run = run_toy(tmp_path, "killed", fine)
    check_books(run)
    assert [r["tokens"] for r in records(run)] == [r["tokens"] for r in records(calm)]
    ours, undisturbed = weights(run), weights(calm)
    assert all(torch.equal(ours[name], undisturbed[name]) for name in undisturbed)


def test_a_killed_run_leaves_no_rank_behind_and_goes_on(tmp_path: Path) -> None:
    path, out, steps = write_config(tmp_path, max_staleness=2), tmp_path / "run", 40
    config = yaml.safe_load(path.read_text())
    parallel = DdpConfig(type="ddp", processes=2, timeout_s=120)
    config["experts"]["interaction"]["trainer"] = {"parallel": parallel.model_dump()}
    config["experts"]["interaction"]["loop"]["steps"] = steps  # far from over when its first checkpoint is seen
    path.write_text(yaml.safe_dump(config))
    process = start(path, out)
    until = time.monotonic() + 240
    while not (out / "checkpoints/expert-interaction/state.pt").exists():
        assert process.poll() is None and time.monotonic() < until, out.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.1)
    others = psutil.Process(process.pid).children(recursive=True)
    assert sum("spawn_main" in command_of(p) for p in others) == 2, "the engine and rank 1"
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    _, left = psutil.wait_procs(others, 20)
    assert left == []
    finish(path, out)
    trained = list(read_journal(out / "rollouts/expert-interaction.trained.jsonl"))
    assert [t["version"] for t in trained] == list(range(1, steps + 1))


def command_of(process: psutil.Process) -> str:
    """Empty if it has ended since it was listed."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""
