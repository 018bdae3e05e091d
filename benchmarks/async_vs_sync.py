"""Asynchronous against synchronous training: ``python benchmarks/async_vs_sync.py [--seeds 0,1,2] [--steps 12]``.

The order desk, every tool call of which takes a random time: log-normal, median 200 ms, 99th percentile 5 s, the same
draws for every mode. One cold start; then for every seed the same number of steps, synchronously (K = 0) and
asynchronously (in flight, and with pinned versions), and the held-out score of what comes out, without latency.
Printed: trained tokens a second and how much sooner the same number of tokens is trained, the share of time that the
trainer waits, the staleness of the groups, and the scores with a 95 % interval of their difference over the seeds.
Exit status 1 if asynchronous training is not 2.5 times as fast, its score falls below by more than that interval, or
the interval is wider than 0.1 to either side, of which nothing follows: more seeds or tasks are needed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import stats
from transformers import AutoTokenizer

from envs.worlds.desk import DeskConfig
from experts.config import ColdStartConfig, EvaluationConfig, ExpertConfig
from experts.credit import GroupCredit
from experts.evaluate import evaluate, held_out
from experts.rollouts import Player
from experts.tasks import TaskStream
from experts.train import Stage, run_stage
from fusion.config import PipelineConfig
from fusion.pipeline import Pipeline
from posttrain.chat import Chat
from posttrain.config import load
from posttrain.engine.start import start_engine
from posttrain.metrics import Metrics
from posttrain.protocols import Session, World
from posttrain.run import RunDir
from posttrain.settings import LoopConfig, TrainerConfig
from posttrain.types import Message, Task, ToolCall
from rewards import RewardConfig

MEDIAN_S, P99_S = 0.2, 5.0
SIGMA = math.log(P99_S / MEDIAN_S) / stats.norm.ppf(0.99)
SPEEDUP, NOISE = 2.5, 0.1
MODES: dict[str, dict[str, object]] = {
    "synchronous": {"max_staleness": 0},
    "in flight": {"max_staleness": 4, "versions": "inflight"},
    "pinned": {"max_staleness": 4, "versions": "pinned"},
}


class SlowSession:
    """A session whose tools take their time."""

    def __init__(self, session: Session, rng: Random) -> None:
        self._session, self._rng = session, rng

    @property
    def tools(self):
        """The session's own."""
        return self._session.tools

    async def call(self, call: ToolCall) -> str:
        """The session's answer, later."""
        await asyncio.sleep(MEDIAN_S * math.exp(SIGMA * self._rng.gauss(0, 1)))
        return await self._session.call(call)

    async def reply(self, message: Message) -> Message | None:
        """The session's own."""
        return await self._session.reply(message)

    async def grade(self, messages: Sequence[Message]) -> float:
        """The session's own."""
        return await self._session.grade(messages)

    async def close(self) -> None:
        """The session's own."""
        await self._session.close()


class SlowWorld:
    """A world of such sessions. What the n-th session of a task draws depends on nothing else."""

    def __init__(self, world: World) -> None:
        self._world, self._opened = world, Counter[str]()
        self.name, self.domain = world.name, world.domain

    def tasks(self, split: str, n: int, seed: int) -> list[Task]:
        """The world's own, with time for a slow tool."""
        found = self._world.tasks(split, n, seed)
        return [replace(t, limits=replace(t.limits, timeout_s=600.0)) for t in found]

    async def demonstrate(self, task: Task, rng: Random) -> list[Message]:
        """The world's own."""
        return await self._world.demonstrate(task, rng)

    async def open(self, task: Task) -> Session:
        """A slow session."""
        self._opened[task.id] += 1
        return SlowSession(await self._world.open(task), Random(f"{task.id}/{self._opened[task.id]}"))

    async def check(self) -> dict[str, float]:
        """The world's own."""
        return await self._world.check()


@dataclass(frozen=True)
class Run:
    """What one mode and seed came to."""

    times: list[float]
    """Seconds from the start to the end of every step."""
    tokens: list[float]
    """Trained up to there."""
    waited: float
    staleness: Counter[int]
    score: float

    def seconds_to(self, tokens: float) -> float:
        """Until so many tokens were trained, linear within a step."""
        before_s = before = 0.0
        for seconds, trained in zip(self.times, self.tokens, strict=True):
            if trained >= tokens:
                return before_s + (seconds - before_s) * (tokens - before) / (trained - before)
            before_s, before = seconds, trained
        return self.times[-1]


def pipeline_config(options: argparse.Namespace) -> PipelineConfig:
    """The demo's model and engine, the desk alone."""
    whole = load(PipelineConfig, "configs/tiny/pipeline.yaml")
    assert whole.cold_start is not None
    steps = {"steps": options.cold_start, "clean_steps": options.cold_start * 3 // 4, "demonstrations": 4000}
    start = ColdStartConfig(**{**whole.cold_start.model_dump(), **steps, "shares": {}})
    loop = LoopConfig(steps=options.steps, groups_per_step=8, group_size=8, max_running=40, checkpoint_every=10**6)
    expert = ExpertConfig(worlds={"desk": 1.0}, loop=loop, trainer=TrainerConfig(lr=5e-4))
    given = {"worlds": {"desk": DeskConfig()}, "cold_start": start, "experts": {"agent": expert}}
    return whole.model_copy(update={**given, "evaluation": EvaluationConfig(tasks=options.tasks)})


async def measure(mode: Mapping[str, object], seed: int, base: Path, pipeline: Pipeline, name: str) -> Run:
    """Train and judge."""
    c = pipeline.config
    expert, chat = c.experts["agent"], Chat(AutoTokenizer.from_pretrained(base))
    worlds = {n: SlowWorld(w) for n, w in pipeline.worlds.items()}
    stage = Stage(
        name=name,
        start=base,
        loop=expert.loop.model_copy(update=mode),
        trainer=expert.trainer,
        loss=expert.loss,
        engine=c.engine,
        credit=GroupCredit(expert.credit),
        player=Player(worlds, chat, expert.reward),
        source=TaskStream(worlds, expert.worlds, expert.train_tasks, seed),
        shares=expert.worlds,
        seed=seed,
    )
    folder = await run_stage(stage, pipeline.run, pipeline.metrics, pipeline.progress)
    records = [json.loads(line) for line in pipeline.run.metrics_file.read_text().splitlines()]
    records = [r for r in records if r["stage"] == name]
    parts = [[r[f"time/{p}_s"] for p in ("wait", "step", "publish")] for r in records]
    ages: Counter[int] = Counter()
    for record in records:
        ages.update({int(k.split("/")[1]): int(v) for k, v in record.items() if k.startswith("staleness/")})
    return Run(
        times=[sum(map(sum, parts[: i + 1])) for i in range(len(parts))],
        tokens=[sum(r["tokens"] for r in records[: i + 1]) for i in range(len(records))],
        waited=sum(p[0] for p in parts) / sum(map(sum, parts)),
        staleness=ages,
        score=await judge(folder, pipeline, name),
    )


async def judge(folder: Path, pipeline: Pipeline, name: str) -> float:
    """Mean outcome on held-out tasks, without latency."""
    c = pipeline.config
    player = Player(pipeline.worlds, Chat(AutoTokenizer.from_pretrained(folder)), RewardConfig())
    bar = pipeline.progress.add_task(f"{name}: held-out tasks", total=c.evaluation.tasks)
    asked = held_out(pipeline.worlds, c.evaluation, 0)
    engine = await start_engine(c.engine, folder, pipeline.run.weights("judging"))
    try:
        judged = await evaluate(
            engine, player, asked, c.evaluation, label=name, seed=0, on_done=lambda: pipeline.progress.advance(bar)
        )
    finally:
        await engine.close()
    return fmean(r.score.outcome for r in judged if r.score is not None)


def show(runs: Mapping[str, Sequence[Run]], base: float) -> bool:
    """Print the table; whether the bar holds."""
    console, good = Console(width=140), True
    table = Table(title=f"{len(runs['synchronous'])} seeds; held-out score before: {base:.3f}")
    for column in ("mode", "tokens/s", "sooner", "trainer waits", "groups by staleness", "score", "minus synchronous"):
        table.add_column(column, justify="right")
    for mode, found in runs.items():
        pairs = list(zip(found, runs["synchronous"], strict=True))
        sooner = fmean(s.seconds_to(t) / r.seconds_to(t) for r, s in pairs for t in [min(r.tokens[-1], s.tokens[-1])])
        ages = sum((r.staleness for r in found), Counter())
        differences = [r.score - s.score for r, s in pairs]
        spread = math.inf
        if len(found) > 1:
            spread = stats.sem(differences) * stats.t.ppf(0.975, len(found) - 1)
        if mode != "synchronous":
            good = good and sooner >= SPEEDUP and -fmean(differences) <= spread <= NOISE
        table.add_row(
            mode,
            f"{fmean(r.tokens[-1] / r.times[-1] for r in found):.0f}",
            f"{sooner:.2f}",
            f"{fmean(r.waited for r in found):.0%}",
            " ".join(f"{age}:{n / ages.total():.0%}" for age, n in sorted(ages.items())),
            f"{fmean(r.score for r in found):.3f}",
            f"{fmean(differences):+.3f} ± {spread:.3f}",
        )
    console.print(table)
    return good


async def run_all(options: argparse.Namespace) -> bool:
    """Everything, and whether the bar holds."""
    config = pipeline_config(options)
    runs: dict[str, list[Run]] = defaultdict(list)
    with Progress(transient=True) as progress, RunDir.open(options.out, config) as run:
        pipeline = Pipeline(config, run, progress)
        pipeline.metrics = Metrics(run.metrics_file)
        base = await pipeline.base()
        before = await judge(base, pipeline, "start")
        for seed in options.seeds:
            for mode, changes in MODES.items():
                name = f"{mode.replace(' ', '-')}-{seed}"
                runs[mode].append(await measure(changes, seed, base, pipeline, name))
                print(f"{name}: {runs[mode][-1].times[-1]:.0f} s, score {runs[mode][-1].score:.3f}", flush=True)
        pipeline.close()
    return show(runs, before)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cold-start", type=int, default=200, help="optimizer steps")
    parser.add_argument("--tasks", type=int, default=300, help="held-out tasks")
    parser.add_argument("--out", type=Path, default=Path("runs/async_vs_sync"))
    sys.exit(0 if asyncio.run(run_all(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
