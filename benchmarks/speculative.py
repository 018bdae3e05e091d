"""What drafts buy: ``python benchmarks/speculative.py [--cold-start 300] [--out runs/speculative]``.

The model of ``configs/tiny/pipeline.yaml`` with a draft block of three steps is started on what the worlds demonstrate
(its draft block learns beside it); a second call with the same ``--out`` finds it there. Then the engine's scheduler
answers the first turns of held-out tasks with 0, 1, 2 and 3 draft steps: 128 side by side, and one after the other.
The tokens are the same in all runs (but for rounding); printed is how many come of one forward of the model, how often
the first, second and third draft is accepted, and the time next to that without drafts, the best of ``--repeat``.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer

from envs.worlds import make_world
from fusion.config import PipelineConfig
from fusion.pipeline import Pipeline
from posttrain.chat import Chat
from posttrain.config import load
from posttrain.engine.slots import Request
from posttrain.engine.speculative import DraftCounts
from posttrain.engine.worker import Scheduler, load_model
from posttrain.run import RunDir
from posttrain.types import Sampling

STEPS = 3
SLOTS, MAX_CONTEXT = 128, 448


@dataclass
class Run:
    """One way to answer all requests."""

    tokens: int
    forwards: int
    """Of the whole model, prefills left out."""
    seconds: float
    counts: DraftCounts
    ids: list[tuple[int, ...]]


async def started(out: Path, steps: int) -> tuple[PipelineConfig, Path]:
    """The config, and the folder of the model after its cold start."""
    clean = steps * 4 // 5
    changes = [
        f"model.settings.mtp_num_layers={STEPS}",
        "model.settings.mtp_loss_coef=0.3",
        f"cold_start.steps={steps}",
        f"cold_start.clean_steps={clean}",
        "cold_start.demonstrations=6000",
    ]
    config = load(PipelineConfig, "configs/tiny/pipeline.yaml", changes)
    run = RunDir.open(out, config)
    with Progress() as progress:
        pipeline = Pipeline(config, run, progress)
        folder = await pipeline.base()
        pipeline.close()
    run.close()
    return config, folder


async def prompts(config: PipelineConfig, chat: Chat, count: int) -> list[tuple[int, ...]]:
    """First turns of held-out tasks, the worlds in turn."""
    by_world: list[list[tuple[int, ...]]] = []
    for name, options in config.worlds.items():
        world, opened = make_world(options, name), list[tuple[int, ...]]()
        for task in world.tasks("eval", -(-count // len(config.worlds)), 0):
            session = await world.open(task)
            opened.append(tuple(chat.opening(task.prompt, session.tools, task.thinking)))
            await session.close()
        by_world.append(opened)
    return [ids for one_of_each in zip(*by_world, strict=True) for ids in one_of_each][:count]


def answer(scheduler: Scheduler, requests: Sequence[Request]) -> Run:
    """All at once, as far as there are slots."""
    scheduler.pending.extend(requests)
    forwards, start = 0, time.perf_counter()
    while scheduler.busy:
        scheduler.step()
        forwards += 1
    seconds = time.perf_counter() - start
    done = dict(scheduler.done)
    ids = [done[r.id].ids for r in requests]
    return Run(sum(map(len, ids)), forwards, seconds, scheduler.counts, ids)


def one_by_one(scheduler: Scheduler, requests: Sequence[Request]) -> Run:
    """Each when the one before has ended."""
    runs = [answer(scheduler, [r]) for r in requests]
    ids = [i for run in runs for i in run.ids]
    seconds = sum(r.seconds for r in runs)
    return Run(sum(r.tokens for r in runs), sum(r.forwards for r in runs), seconds, scheduler.counts, ids)


def measure(title: str, folder: Path, requests: Sequence[Request], slots: int, repeat: int) -> Table:
    """A row for every number of draft steps."""
    table = Table(title=title)
    for column in ("steps", "tokens", "the same", "tokens a forward and row", "accepted 1st / 2nd / 3rd", "s", "speed"):
        table.add_column(column, justify="right")
    model, go = load_model(str(folder)), answer if slots > 1 else one_by_one
    best: dict[int, Run] = {}
    for _ in range(repeat):  # in turn, so that what else the machine does falls on all of them
        for steps in range(STEPS + 1):
            run = go(Scheduler(model, slots, MAX_CONTEXT, draft_steps=steps), requests)
            best[steps] = min(best.get(steps, run), run, key=lambda r: r.seconds)
    plain = best[0]
    for steps, run in best.items():
        c = run.counts
        same = sum(a == b for a, b in zip(run.ids, plain.ids, strict=True)) / len(requests)
        accepted = " / ".join(f"{a / max(p, 1):.2f}" for p, a in zip(c.proposed, c.accepted, strict=True))
        each = c.tokens / c.rounds if c.rounds else 1.0
        speed = f"{run.tokens / run.seconds / (plain.tokens / plain.seconds):.2f}"
        table.add_row(str(steps), str(run.tokens), f"{same:.1%}", f"{each:.2f}", accepted, f"{run.seconds:.2f}", speed)
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cold-start", type=int, default=300, help="optimizer steps")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/speculative"))
    args = parser.parse_args()
    config, folder = asyncio.run(started(args.out, args.cold_start))
    torch.set_num_threads(args.threads)
    chat = Chat(AutoTokenizer.from_pretrained(folder))
    asked = asyncio.run(prompts(config, chat, args.requests))
    requests = [
        Request(id=i, ids=ids, sampling=Sampling(max_tokens=64, stop_ids=chat.stop_ids, seed=i))
        for i, ids in enumerate(asked)
    ]
    console = Console()
    console.print(measure(f"{len(requests)} requests in {SLOTS} slots", folder, requests, SLOTS, args.repeat))
    few = requests[: max(1, args.requests // 8)]
    console.print(measure(f"{len(few)} requests, one after the other", folder, few, 1, args.repeat))


if __name__ == "__main__":
    main()
