"""Our loop against TRL's two GRPO trainers on a CPU: ``python benchmarks/against_trl.py [--latencies 0,0.4,1.0,tail]``.

One small random Qwen3, the same prompts, group size, completion length (the end token is one that the model cannot
sample), reward, temperature and optimizer for our loop (K = 0, asynchronous, that compiled, and that trained in bf16),
TRL's ``GRPOTrainer`` as it is, in float32 and in bf16, which is its default, and TRL's ``AsyncGRPOTrainer``, whose two
demands for CUDA are replaced (the card's peak FLOPS, flash attention) and whose rollouts are the user's business: see
``trl_worker`` for the two ways. An episode is a completion and then a wait: none, a constant, or log-normal with median
0.2 s and 99th percentile 5 s ("tail"), drawn from the group's number and the place in it. Every run has a process of
its own, and runs take turns. Printed are trained tokens a second over all steps after the warm-up, the median step,
staleness, the trainer's idle share, and groups never trained. Exit status 1 if a ratio misses its bar: without latency
3 times ``GRPOTrainer``, with one 2 times the better of TRL's two."""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from small_model import SIGNS, make_model
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl.experimental.async_grpo import async_grpo_trainer, packing
from trl.experimental.async_grpo.async_grpo_config import AsyncGRPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl_worker import Worker, varlen_attention

from experts.credit import GroupCredit, GroupCreditConfig
from posttrain.engine.local import LocalEngine
from posttrain.journal import Journal, rollout_to_dict
from posttrain.loop import Loop
from posttrain.model.checkpoint import load_any
from posttrain.objective_settings import ClippedLoss
from posttrain.protocols import Engine
from posttrain.settings import LoopConfig, TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Rollout, Sampling, Score, Segment, StopReason, Task

OURS, OURS_COMPILED, OURS_BF16, OURS_SYNC = "ours", "ours, compiled", "ours, compiled, bf16", "ours, K = 0"
TRL, TRL_BF16, TRL_ASYNC = "GRPOTrainer", "GRPOTrainer, bf16", "AsyncGRPOTrainer"
TRL_BATCHING = "AsyncGRPOTrainer, batching worker"
THREADS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys((TRL, TRL_BF16, OURS_SYNC), (1, 2)),
    **dict.fromkeys((OURS, OURS_COMPILED, OURS_BF16, TRL_ASYNC, TRL_BATCHING), (1,)),
}
"""That a computing process may have: the other ones leave a processor to their engine."""
BAR, BAR_WITH_LATENCY, RATE, BETAS = 3.0, 2.0, 1e-4, (0.9, 0.95)
TIMEOUT_S = 3600
QUIET = {"TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    trainer: str = ""
    latency: str = "0"
    threads: int = 1
    model: Path
    """Folder."""
    groups: int
    size: int
    """Rollouts of a group."""
    prompt: int
    """Tokens."""
    tokens: int
    """Of a completion."""
    steps: int
    warmup: int
    """The first of the steps, which are not measured."""
    staleness: int
    """K of both asynchronous trainers."""
    stragglers: Literal["drain", "evict"]
    """What our loop does with a group that is nearly too old and still runs."""

    def wait_s(self, group: int, place: int | str) -> float:
        """Of an episode after its completion; another attempt has another place."""
        if self.latency != "tail":
            return float(self.latency)
        # 2.326 is the standard normal's 99th percentile.
        return Random(f"{group}/{place}").lognormvariate(log(0.2), log(5 / 0.2) / 2.326)

    def text(self, group: int) -> str:
        """A group's prompt."""
        return "".join(Random(group).choices(SIGNS, k=self.prompt))

    def reward(self, ids: Sequence[int]) -> float:
        """Share of even ids: cheap, and seldom the same for a whole group."""
        return sum(i % 2 == 0 for i in ids) / len(ids)


class Step(NamedTuple):
    """An optimizer step."""

    ended: float
    tokens: float
    stale: float
    stalest: float
    idle_s: float
    """In which the trainer did not train."""
    lost: float
    """Groups, since the start."""


class Result(NamedTuple):
    """Of a run."""

    speed: float
    step_s: float
    stale: float
    stalest: float
    idle: float
    lost: float


def summarise(steps: Sequence[Step], warmup: int) -> Result:
    """What the steps after the warm-up say; the last one before them marks where their time begins."""
    first, measured = steps[warmup - 1], steps[warmup:]
    seconds = measured[-1].ended - first.ended
    return Result(
        speed=sum(s.tokens for s in measured) / seconds,
        step_s=statistics.median(b.ended - a.ended for a, b in pairwise(steps[warmup - 1 :])),
        stale=statistics.fmean(s.stale for s in measured),
        stalest=max(s.stalest for s in measured),
        idle=sum(s.idle_s for s in measured) / seconds,
        lost=measured[-1].lost - first.lost,
    )


class Play(NamedTuple):
    """Implements ``groups.RunRollout``."""

    cell: Cell

    async def __call__(self, engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        ids = task.data["ids"]
        completion = await engine.generate(ids, Sampling(max_tokens=self.cell.tokens, seed=seed))
        await asyncio.sleep(self.cell.wait_s(task.data["group"], rollout_id.rsplit("/", 1)[1]))
        branch = (Segment.given(ids), Segment.from_completion(completion))
        score = Score(value=self.cell.reward(completion.ids))
        return Rollout(
            id=rollout_id, group=group, task=task, branches=(branch,), messages=(), stop=StopReason.SCORED, score=score
        )


async def ours(cell: Cell, out: Path) -> list[Step]:
    """As ``experts.train`` does it, journal and all, without checkpoints."""
    ahead = 0 if cell.trainer == OURS_SYNC else cell.staleness
    # Without a wait it is enough to sample the next two steps' groups while the trainer is at one.
    running = cell.groups * min(ahead + 1, 3 if cell.latency == "0" else ahead + 1)
    pace: dict[str, Any] = {"max_running": running, "max_staleness": ahead, "stragglers": cell.stragglers}
    loop_config = LoopConfig(steps=cell.steps, groups_per_step=cell.groups, group_size=cell.size, **pace)
    optimizer: Any = {"lr": RATE, "betas": BETAS, "warmup_steps": 0, "decay": False}
    if cell.trainer in (OURS_COMPILED, OURS_BF16):
        # Two halves of a step side by side: what the engine leaves of its processor is not enough for threads in step.
        half = -(-cell.groups // 2) * (cell.prompt + cell.size * (cell.tokens + 1))
        optimizer |= {"compile": True, "micro_batches_at_once": 2, "tokens_per_micro_batch": half}
        optimizer["mixed_precision"] = "bf16" if cell.trainer == OURS_BF16 else "no"
    config = TrainerConfig(**optimizer, threads=cell.threads, share_prompts=True)
    loss = ClippedLoss(constant_length=cell.tokens)
    slots, context = 3 * cell.groups * cell.size, cell.prompt + cell.tokens
    places: Any = {"slots": slots, "max_context": context, "threads": cell.threads}
    engine = await LocalEngine.start(cell.model, **places, compiling=config.compile)
    trainer = Trainer(load_any(cell.model, torch.float32), config, loss, cell.steps)
    steps: list[Step] = []

    def on_step(version: int, stats: dict[str, float], batch: object) -> None:
        idle, lost = stats["time/wait_s"] + stats["time/publish_s"], stats["stale"] + stats["evicted"]
        stale = stats["staleness_mean"], stats["staleness_max"]
        steps.append(Step(time.perf_counter(), stats["tokens"], *stale, idle, lost))

    def task(number: int, world: str) -> Task:
        ids = tuple(tokenizer.encode(cell.text(number)))
        return Task(id=str(number), domain="any", world="any", prompt=(), data={"ids": ids, "group": number})

    tokenizer = AutoTokenizer.from_pretrained(cell.model)
    source: Any = SimpleNamespace(task=task, seen=lambda *_: None, state=dict, restore=lambda _: None)
    try:
        with Journal(out / "rollouts") as journal:
            written: Any = SimpleNamespace(write=lambda record: journal.write(rollout_to_dict(record)))
            loop = Loop(
                loop_config,
                name="benchmark",
                seed=0,
                engine=engine,
                trainer=trainer,
                credit=GroupCredit(GroupCreditConfig()),
                source=source,
                run_rollout=Play(cell),
                journal=written,
                on_step=on_step,
                checkpoint=lambda state: None,
            )
            await loop.run()
    finally:
        await engine.close()
        trainer.close()
    return steps


def common(cell: Cell, out: Path, on_step: OnStep) -> dict[str, Any]:
    """What both trainers are given, but model and rewards; ``args`` is still to be made a config."""
    numbers = list(range(cell.steps * cell.groups))
    args = {
        "output_dir": str(out), "use_cpu": True, "bf16": cell.trainer == TRL_BF16, "gradient_checkpointing": False,
        "per_device_train_batch_size": cell.groups * cell.size, "num_generations": cell.size,
        "max_completion_length": cell.tokens, "max_steps": cell.steps, "temperature": 1.0, "learning_rate": RATE,
        "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "weight_decay": 0.0, "lr_scheduler_type": "constant",
        "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return {
        "args": args,
        "train_dataset": Dataset.from_dict({"prompt": [cell.text(n) for n in numbers], "group": numbers}),
        "processing_class": AutoTokenizer.from_pretrained(cell.model),
        "callbacks": [on_step],
    }


class OnStep(TrainerCallback):
    """Calls after every optimizer step, and with what is logged."""

    def __init__(self, step: Callable[[], None], logged: Callable[[dict[str, float]], None] = lambda logs: None):
        self._step, self._logged = step, logged

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._logged(kwargs["logs"])


def trl_sync(cell: Cell, out: Path) -> list[Step]:
    """TRL's ``GRPOTrainer``; its episodes wait side by side, in the reward."""
    steps: list[Step] = []
    tokens, idle = 0, 0.0

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            nonlocal idle
            started = time.perf_counter()
            made = super()._generate_and_score_completions(inputs)
            idle = time.perf_counter() - started
            return made

    async def judge(completion_ids: list[list[int]], group: list[int], **_: Any) -> list[float]:
        nonlocal tokens
        tokens = sum(map(len, completion_ids))
        await asyncio.gather(*(asyncio.sleep(cell.wait_s(g, i % cell.size)) for i, g in enumerate(group)))
        return [cell.reward(ids) for ids in completion_ids]

    given = common(cell, out, OnStep(lambda: steps.append(Step(time.perf_counter(), tokens, 0, 0, idle, 0))))
    given["args"] = GRPOConfig(**given["args"], beta=0.0, scale_rewards="none", shuffle_dataset=False)
    given["reward_funcs"] = judge
    trainer = Timed(model=load_any(cell.model, torch.float32), **given)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps


def trl_async(cell: Cell, out: Path) -> list[Step]:
    """TRL's ``AsyncGRPOTrainer`` with its two demands for CUDA replaced."""
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None  # pyright: ignore[reportPrivateImportUsage]
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    ends: list[float] = []
    steps: list[Step] = []

    def logged(logs: dict[str, float]) -> None:
        if len(steps) == len(ends):  # the summary at the end
            return
        idle = logs["perf/rollout_wait_s"] + logs["perf/weight_sync_s"]
        lost = logs.get("sample/dropped_stale_total", 0.0) / cell.size + (steps[-1].lost if steps else 0.0)
        tokens, stale = logs["batch/trained_tokens_per_step"], logs["sample/staleness_mean"]
        steps.append(Step(ends[-1], tokens, stale, logs["sample/staleness_max"], idle, lost))

    given = common(cell, out, OnStep(lambda: ends.append(time.perf_counter()), logged))
    worker = Worker(cell, batching=cell.trainer == TRL_BATCHING)
    given["args"] = AsyncGRPOConfig(**given["args"], token_budget=-1, max_staleness=cell.staleness, logging_steps=1)
    given |= {"rollout_worker": worker, "weight_transfer": worker}
    trainer = async_grpo_trainer.AsyncGRPOTrainer(model=str(cell.model), **given)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps


def run_here(cell: Cell, pipe: Any) -> None:
    """The process of a run."""
    torch.set_num_threads(cell.threads)
    theirs = {TRL: trl_sync, TRL_BF16: trl_sync, TRL_ASYNC: trl_async, TRL_BATCHING: trl_async}
    play = theirs.get(cell.trainer, lambda *given: asyncio.run(ours(*given)))
    with tempfile.TemporaryDirectory() as folder:
        steps = play(cell, Path(folder))
    pipe.send(summarise(steps, cell.warmup))


def run(cell: Cell) -> Result:
    """A run in a process of its own. RuntimeError if it dies, TimeoutError if it does not end."""
    # Threads that spin while they wait would take the processor from others.
    os.environ |= {"OMP_NUM_THREADS": str(cell.threads), "OMP_WAIT_POLICY": "passive"} | QUIET
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_here, args=(cell, there))
    process.start()
    there.close()
    try:
        if here.poll(TIMEOUT_S):
            return here.recv()
        raise TimeoutError(f"{cell}: no result after {TIMEOUT_S} s")
    except EOFError as error:
        raise RuntimeError(f"{cell}: it died; its last words are above") from error
    finally:
        process.join(30)
        process.kill()


def compare(base: Cell, latencies: Sequence[str], repeat: int) -> dict[tuple[str, str], Result]:
    """Latency and trainer to the median of its runs by speed, with the threads that are best without latency."""
    found: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    threads = THREADS

    def median(latency: str, trainer: str, n: int) -> Result:
        return sorted(found[latency, trainer, n])[repeat // 2]

    for latency in dict.fromkeys(["0", *latencies]):
        for _ in range(repeat):
            for trainer, n in [(trainer, n) for trainer, tried in threads.items() for n in tried]:
                found[latency, trainer, n].append(run(replace(base, trainer=trainer, latency=latency, threads=n)))
                print(f"latency {latency}, {trainer}, threads {n}: {found[latency, trainer, n][-1]}", file=sys.stderr)
        threads = {t: (max(tried, key=lambda n, t=t: median("0", t, n)),) for t, tried in threads.items()}
    return {(latency, t): median(latency, t, n) for latency in latencies for t, (n,) in threads.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latencies", default="0,0.4,1.0,tail", help="seconds an episode, or tail")
    for name, default in (("groups", 8), ("size", 8), ("prompt", 16), ("tokens", 48), ("steps", 38), ("warmup", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--staleness", type=int, default=4, help="K of both asynchronous trainers")
    parser.add_argument("--stragglers", choices=("drain", "evict"), default="evict", help="of our loop")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, in turn")
    parser.add_argument("--no-check", action="store_true", help="exit status 0 whatever the ratios")
    options = vars(parser.parse_args())
    latencies, repeat = options.pop("latencies").split(","), options.pop("repeat")
    check = not options.pop("no_check")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        results = compare(Cell(model=Path(folder), **options), latencies, repeat)
    missed = show(results, latencies)
    sys.exit(1 if check and missed else 0)


def show(results: Mapping[tuple[str, str], Result], latencies: Sequence[str]) -> bool:
    """The table and the ratios; whether one misses its bar."""
    console, missed = Console(width=120), False
    table = Table(title="trained tokens a second")
    for name in ("latency, s", "trainer", "tokens/s", "s a step", "stale", "stalest", "waits", "lost groups"):
        table.add_column(name, justify="left" if name == "trainer" else "right")
    for (latency, trainer), r in results.items():
        numbers = (f"{r.speed:.0f}", f"{r.step_s:.3f}", f"{r.stale:.2f}", f"{r.stalest:.0f}", f"{r.idle:.0%}")
        table.add_row(latency, trainer, *numbers, f"{r.lost:.0f}")
    console.print(table)
    for latency in latencies:
        peers = (TRL, TRL_BF16) if latency == "0" else (TRL, TRL_BF16, TRL_ASYNC)
        best = max(peers, key=lambda t: results[latency, t].speed)
        mine = max((OURS, OURS_COMPILED, OURS_BF16, OURS_SYNC), key=lambda t: results[latency, t].speed)
        ratio = results[latency, mine].speed / results[latency, best].speed
        bar = BAR if latency == "0" else BAR_WITH_LATENCY
        missed |= ratio < bar
        batching = results[latency, mine].speed / results[latency, TRL_BATCHING].speed
        console.print(f"latency {latency}: {mine} / {best} = {ratio:.2f} (bar {bar:g})")
        console.print(f"latency {latency}: {mine} / {TRL_BATCHING} = {batching:.2f}")
    return missed


if __name__ == "__main__":
    main()
