"""What drafts buy: ``python benchmarks/speculative.py [--cold-start 300] [--out runs/speculative]``.

The model of ``configs/tiny/pipeline.yaml`` with a draft block of three steps is started on what the worlds demonstrate
(its draft block learns beside it); a second call with the same ``--out`` finds it there. Then the engine's scheduler
answers the first turns of held-out tasks with 0, 1, 2 and 3 draft steps: 128 side by side, and one after the other.
Printed is how many completions are the same as without drafts (all, but for rounding), how many drafts are accepted in
a round of one request, how often the first, second and third one is, how many tokens come of one forward of the model,
and the time, the best of ``--repeat``.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from envs.worlds import make_world
from experts.demonstrations import dataset, demonstrations, encode, texts
from fusion.config import PipelineConfig
from posttrain.chat import Chat, train_tokenizer
from posttrain.config import load
from posttrain.engine.batching import Scheduler
from posttrain.engine.slots import Request
from posttrain.engine.speculative import DraftCounts
from posttrain.engine.worker import load_model
from posttrain.model import Longcat2Config, Longcat2ForCausalLM
from posttrain.optim import make_optimizer
from posttrain.settings import Longcat2Model
from posttrain.types import Sampling

STEPS = 3
SLOTS, MAX_CONTEXT = 128, 448
CHANGES = [
    f"model.settings.mtp_num_layers={STEPS}",
    "model.settings.mtp_loss_coef=0.3",
    "cold_start.demonstrations=6000",
    "cold_start.clean_steps=0",
]


@dataclass
class Run:
    """One way to answer all requests."""

    tokens: int
    forwards: int
    """Of the whole model, prefills left out, which give the first token of each request."""
    seconds: float
    counts: DraftCounts
    ids: list[tuple[int, ...]]


async def started(config: PipelineConfig, folder: Path) -> None:
    """Puts a model into ``folder`` that has learned from demonstrations, and its tokenizer."""
    c = config.cold_start
    assert c is not None and isinstance(config.model, Longcat2Model)
    worlds = {name: make_world(options, name) for name, options in config.worlds.items()}
    shown = await demonstrations(worlds, c, config.seed)
    tokenizer = train_tokenizer(texts(shown), config.model.vocab_size)
    rows = encode(shown, Chat(tokenizer))
    torch.manual_seed(config.seed)
    settings = {**config.model.settings, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = Longcat2ForCausalLM(Longcat2Config(vocab_size=config.model.vocab_size, **settings)).train()
    optimizer = make_optimizer(model.named_parameters(), c)
    schedule = get_cosine_schedule_with_warmup(optimizer, c.warmup_steps, c.steps)
    data = dataset(rows, rows, c, config.seed)
    for step in track(range(c.steps), "cold start"):
        batch: Any = data[step * c.batch_size : (step + 1) * c.batch_size]
        items = sum(label != -100 for labels in batch["labels"] for label in labels[1:])
        width = c.batch_size // c.micro_batches
        for left in range(0, c.batch_size, width):
            ids_BT, labels_BT = (
                pad_sequence([torch.tensor(row) for row in batch[key][left : left + width]], True, padding)
                for key, padding in (("input_ids", 0), ("labels", -100))
            )
            model(ids_BT, attention_mask=ids_BT != 0, labels=labels_BT, num_items_in_batch=items).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


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
    for column in ("steps", "the same", "accepted a round", "1st / 2nd / 3rd", "tokens a forward", "s", "speed"):
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
        each, decoded = sum(c.accepted) / max(c.rounds, 1), (run.tokens - len(requests)) / run.forwards
        speed = run.tokens / run.seconds / (plain.tokens / plain.seconds)
        numbers = (f"{same:.1%}", f"{each:.2f}", accepted, f"{decoded:.2f}", f"{run.seconds:.2f}", f"{speed:.2f}")
        table.add_row(str(steps), *numbers)
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
    torch.set_num_threads(args.threads)
    changes = [*CHANGES, f"cold_start.steps={args.cold_start}"]
    config, folder = load(PipelineConfig, "configs/tiny/pipeline.yaml", changes), args.out
    if not (folder / "config.json").exists():
        asyncio.run(started(config, folder))
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
