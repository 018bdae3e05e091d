"""The tiny cold start with AdamW and with Muon: ``python benchmarks/muon.py [--steps 200] [--matrix-lr 0.003,0.006]``.

The same untrained model, the same rows in the same order (skill alone, so that the loss means the same at every step)
and the same schedule, in one process with one thread. Printed: the loss at checkpoints, each a mean over ten steps; how
many steps a run took to AdamW's final loss; and what a run cost, start of the process included. ``--matrix-lr`` names
the rates that Muon is tried with; left out, the one of AdamW. ``--set KEY=VALUE`` goes on top of the config.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experts import cold_start
from experts.config import ColdStartConfig
from fusion.config import PipelineConfig
from fusion.pipeline import Pipeline
from posttrain.config import load
from posttrain.run import RunDir
from posttrain.settings import MuonConfig


@dataclass(frozen=True)
class Run:
    losses: dict[int, float]
    """Step to the mean loss of the ten steps up to it."""
    wall_s: float
    """By the clock."""
    cpu_s: float
    """Of the processor, which other work on the machine disturbs less."""


def learn(start: Path, rows: Dataset, config: ColdStartConfig, folder: Path, seed: int) -> Run:
    """One cold start from ``start`` in a fresh ``folder``."""
    wall, cpu = time.monotonic(), children_s()
    log = cold_start.train(start, rows, config, folder, seed, lambda _: None, threading.Event())
    losses = {int(entry["step"]): float(entry["loss"]) for entry in log}
    return Run(losses, time.monotonic() - wall, children_s() - cpu)


def children_s() -> float:
    """Processor seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(config: PipelineConfig, rates: list[float | None], folder: Path) -> dict[str, Run]:
    """Both optimizers on the same rows; Muon once a rate."""
    assert config.cold_start is not None
    run = RunDir.open(folder / "run", config)
    with Progress(disable=True) as progress:
        pipeline = Pipeline(config, run, progress)
        rows = asyncio.run(pipeline._demonstrations(folder / "start", config.seed))
        pipeline.close()
    run.close()
    trials = {"adamw": config.cold_start}
    for rate in rates:
        muon = MuonConfig(matrix_lr=rate)
        trials["muon" if rate is None else f"muon {rate:g}"] = config.cold_start.model_copy(update={"optimizer": muon})
    return {name: learn(folder / "start", rows, trial, folder / name, config.seed) for name, trial in trials.items()}


def show(runs: Mapping[str, Run]) -> None:
    """One row a checkpoint, then the steps to AdamW's final loss and the costs."""
    adamw = runs["adamw"]
    steps = sorted(adamw.losses)
    table = Table("step", *runs)
    for step in sorted({*steps[1 :: max(1, len(steps) // 10)], steps[-1]}):
        table.add_row(str(step), *(f"{run.losses[step]:.4f}" for run in runs.values()))
    table.add_section()
    goal = adamw.losses[steps[-1]]
    reached = [next((s for s, loss in run.losses.items() if loss <= goal), None) for run in runs.values()]
    table.add_row(f"steps to {goal:.4f}", *(str(s or "not reached") for s in reached))
    table.add_row("wall s", *(f"{r.wall_s:.0f} ({r.wall_s / adamw.wall_s:.2f}x)" for r in runs.values()))
    table.add_row("cpu s", *(f"{r.cpu_s:.0f} ({r.cpu_s / adamw.cpu_s:.2f}x)" for r in runs.values()))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/tiny/pipeline.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--matrix-lr", default="", help="rates of Muon's matrices, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    sets = {"steps": options.steps, "clean_steps": options.steps, "processes": 1, "threads": 1}
    overrides = [f"cold_start.{key}={value}" for key, value in sets.items()]
    config = load(PipelineConfig, options.config, [*overrides, *options.set])
    rates: list[float | None] = [float(rate) for rate in options.matrix_lr.split(",") if rate]
    with tempfile.TemporaryDirectory() as folder:
        show(compare(config, rates or [None], Path(folder)))


if __name__ == "__main__":  # the processes of the cold start import this file
    main()
