"""Cold start -> conversion -> experts -> fusion -> evaluation -> report. A stage whose config and inputs have not
changed is not run again; a stage that was killed goes on where it was."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from rich.progress import Progress
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from envs.worlds import make_world
from envs.worlds.verify import Verify
from experts import cold_start, conversion
from experts.config import ColdStartConfig, ExpertConfig
from experts.credit import GroupCredit
from experts.demonstrations import dataset, demonstrations, encode, texts
from experts.evaluate import evaluate, held_out, record
from experts.noise import GroupNoise
from experts.rollouts import Player
from experts.tasks import TaskStream
from experts.train import Stage, run_stage
from experts.verification import SelfVerification
from fusion.config import FusionConfig, PipelineConfig, ServedTeachers, domains_of
from fusion.credit import TeacherCredit
from fusion.memory import foretell
from fusion.report import write_report
from fusion.results import results
from fusion.served_teachers import start_teachers
from fusion.teachers import ModelTeacher
from posttrain.chat import Chat, train_tokenizer
from posttrain.config import digest
from posttrain.engine.local import LocalEngine
from posttrain.engine.start import start_engine
from posttrain.engine.vllm import VllmEngine
from posttrain.files import remove, write_json
from posttrain.fresh import at_random
from posttrain.groups import TaskSource, derive_seed
from posttrain.journal import Journal, read_journal
from posttrain.metrics import Metrics
from posttrain.model.checkpoint import load_any
from posttrain.objective_settings import DistillLoss, TopkEstimator
from posttrain.protocols import Teacher
from posttrain.run import RunDir
from posttrain.settings import LocalEngineConfig, PretrainedModel
from posttrain.threads import Beside
from posttrain.types import Weights
from rewards import RewardConfig

log = logging.getLogger(__name__)

T = TypeVar("T")
_PATIENCE_S = 60.0
"""For a step or a measure of the conversion to end, when the run is interrupted."""

Work = Callable[[bool], Coroutine[Any, Any, list[Path]]]


class Pipeline:
    """One run. ``to`` does what a stage needs and then the stage itself."""

    def __init__(self, config: PipelineConfig, run: RunDir, progress: Progress) -> None:
        self.config, self.run, self.progress = config, run, progress
        disable_progress_bar()
        self.metrics = Metrics(run.metrics_file)
        self.worlds = {name: make_world(world, name) for name, world in config.worlds.items()}
        self.domains = domains_of(config)
        self.digests: dict[str, str] = {}
        self._engine: LocalEngine | VllmEngine | None = None
        self._foretold = False

    def close(self) -> None:
        """Close what is open; idempotent."""
        self.metrics.close()

    # What each stage stands on

    def _digest(self, stage: str, *parts: object) -> str:
        self.digests[stage] = digest([stage, self.config.seed, *parts])
        return self.digests[stage]

    async def _stage(self, stage: str, key: str, work: Work) -> None:
        if self.run.done(stage, key):
            log.info("%s: done before", stage)
            return
        if not self._foretold:
            self._foretold = True
            foretell(self.config)
        resumed = self.run.begin(stage, key)
        log.info("%s: %s", stage, "going on" if resumed else "starting")
        started = time.monotonic()
        outputs = await work(resumed)
        seconds = time.monotonic() - started
        self.run.finish(stage, key, seconds, outputs)
        log.info("%s: done in %.0f s", stage, seconds)

    async def base(self) -> Path:
        """The folder of the model that everything starts from."""
        c, dense = self.config, await self._dense()
        if c.conversion is None:
            return dense
        key = self._digest("conversion", c.conversion, c.cold_start, c.worlds, self.digests["base"])
        await self._stage("conversion", key, partial(self._convert, dense))
        self.digests["base"] = key  # what stands on the base stands on the converted one
        return self.run.checkpoint("conversion")

    async def _dense(self) -> Path:
        """The folder of the model as the cold start leaves it."""
        c = self.config
        if c.cold_start is None:
            assert isinstance(c.model, PretrainedModel)  # the config refuses others
            self._digest("base", c.model)
            return c.model.path
        await self._stage("base", self._digest("base", c.model, c.cold_start, c.worlds), self._cold_start)
        return self.run.checkpoint("base")

    async def _convert(self, dense: Path, resumed: bool) -> list[Path]:
        c, folder = self.config.conversion, self.run.checkpoint("conversion")
        assert c is not None
        seed = derive_seed(self.config.seed, "conversion") % 2**32
        like = self.config.cold_start or ColdStartConfig()
        enough = min(like.demonstrations, c.held_out + conversion.steps_of(c) * c.batch_size)
        shown = await demonstrations(self.worlds, like.model_copy(update={"demonstrations": enough}), seed)
        rows = encode(shown, Chat(AutoTokenizer.from_pretrained(dense)))
        bar = self.progress.add_task("conversion", total=conversion.steps_of(c))
        self.metrics.rewind("conversion", -1)

        def report(step: int, values: Mapping[str, float]) -> None:
            self.metrics.log(step, "conversion", values)
            self.progress.update(bar, completed=step)

        await _beside(conversion.convert, dense, rows, c, folder, seed, report)
        return [folder / "config.json"]

    async def _cold_start(self, resumed: bool) -> list[Path]:
        c, folder = self.config, self.run.checkpoint("base")
        assert c.cold_start is not None
        seed = derive_seed(c.seed, "base") % 2**32
        start, work = folder / "start", folder / "work"
        data = await self._demonstrations(start, seed)
        bar = self.progress.add_task("base", total=c.cold_start.steps)
        history = await _beside(
            cold_start.train, start, data, c.cold_start, work, seed, lambda n: self.progress.update(bar, completed=n)
        )
        self.metrics.rewind("cold_start", -1)
        for entry in history:
            values = {k: float(v) for k, v in entry.items() if k not in ("step", "epoch")}
            self.metrics.log(int(entry["step"]), "cold_start", values)
        for file in (work / "model").iterdir():
            os.replace(file, folder / file.name)
        for done in (start, work):
            remove(done)
        return [folder / "config.json"]

    async def _demonstrations(self, start: Path, seed: int) -> Dataset:
        """Rows to train on; puts the untrained model and its tokenizer into ``start``."""
        c = self.config
        assert c.cold_start is not None
        good = {n: make_world(w.model_copy(update={"habit": 1.0}), n) for n, w in c.worlds.items()}
        clean = await demonstrations(good, c.cold_start, seed) if c.cold_start.clean_steps else []
        mixed = await demonstrations(self.worlds, c.cold_start, seed)
        torch.manual_seed(seed)
        if isinstance(c.model, PretrainedModel):
            tokenizer = AutoTokenizer.from_pretrained(c.model.path)
            model = load_any(c.model.path, torch.float32)
        else:
            tokenizer = train_tokenizer(texts(mixed), c.model.vocab_size)
            # The tokenizer puts its special tokens first, in this order.
            model = at_random(c.model, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
        model.save_pretrained(start)
        tokenizer.save_pretrained(start)
        chat = Chat(tokenizer)
        return dataset(encode(clean, chat), encode(mixed, chat), c.cold_start, seed)

    def _player(
        self, base: Path, reward: RewardConfig, temperature: float = 1.0, noise: GroupNoise | None = None
    ) -> Player:
        chat = Chat(AutoTokenizer.from_pretrained(base))
        return Player(self.worlds, chat, reward, temperature, self.config.context, noise)

    async def expert(self, name: str) -> Path:
        """The folder of the trained expert."""
        base = await self.base()
        return await self._by_rewards(f"expert-{name}", self.config.experts[name], base, self.digests["base"])

    async def general(self) -> Path:
        """The folder of the student after general RL."""
        assert self.config.general is not None
        student = await self.student()
        return await self._by_rewards("general", self.config.general, student, self.digests["fusion"])

    async def _by_rewards(self, stage: str, c: ExpertConfig, start: Path, below: str) -> Path:
        named = [*c.worlds, c.verification.world] if c.verification else c.worlds
        used = {world: self.config.worlds[world] for world in named}
        key = self._digest(stage, _made_from(c), used, self.config.engine, self.config.context, below)
        await self._stage(stage, key, partial(self._train, stage, c, start))
        return self.run.checkpoint(stage)

    async def _train(self, name: str, c: ExpertConfig, start: Path, resumed: bool) -> list[Path]:
        seed = derive_seed(self.config.seed, *name.split("-", 1))
        source: TaskSource = TaskStream(
            self.worlds, c.worlds, c.train_tasks, seed, curriculum=c.curriculum, group_size=c.loop.group_size
        )
        if c.verification is not None:
            judge = self.worlds[c.verification.world]
            assert isinstance(judge, Verify)  # the config refuses others
            source = SelfVerification(source, judge, c.verification, seed)
        budget = c.curriculum and c.curriculum.budget
        # Of groups of any size up to this one, the noisy share is the same on the mean.
        largest = budget.max if budget else c.loop.group_size
        stage = Stage(
            name=name,
            start=start,
            loop=c.loop,
            trainer=c.trainer,
            loss=c.loss,
            engine=self.config.engine,
            credit=GroupCredit(c.credit, seed),
            player=self._player(start, c.reward, noise=c.noise and GroupNoise(c.noise, largest, seed)),
            source=source,
            shares=c.worlds,
            oversample=c.oversample,
            judging=c.verification and c.verification.world,
            seed=seed,
            watch=c.watch,
        )
        return [await run_stage(stage, self.run, self.metrics, self.progress)]

    async def student(self) -> Path:
        """The folder of the fused student."""
        c, base = self.config.fusion, await self.base()
        teachers = {self.domains[name]: await self.expert(name) for name in self.config.experts}
        inputs = [self.digests[f"expert-{name}"] for name in self.config.experts]
        key = self._digest(
            "fusion", _made_from(c), self.config.engine, self.config.context, self.digests["base"], *inputs
        )
        await self._stage("fusion", key, partial(self._fuse, base, teachers))
        return self.run.checkpoint("fusion")

    async def _fuse(self, base: Path, teachers: Mapping[str, Path], resumed: bool) -> list[Path]:
        c, seed = self.config.fusion, derive_seed(self.config.seed, "fusion")
        shares: dict[str, float] = {}
        for name, domain in self.domains.items():
            worlds = self.config.experts[name].worlds
            weight = c.domains.get(domain, 0.0) if c.domains else 1.0
            for world, share in worlds.items():
                if weight:
                    shares[world] = weight * share / sum(worlds.values())
        top_k, always = asked_of_teachers(c.loss, base)
        async with AsyncExitStack() as stack:
            if isinstance(c.teachers, ServedTeachers):
                engine, work = c.teachers.engine, self.run.weights("teachers")
                judges: Mapping[str, Teacher] = await start_teachers(engine, base, teachers, work, stack, top_k, always)
            else:
                judges = {d: ModelTeacher(folder, top_k=top_k, always=always) for d, folder in teachers.items()}
            return await self._distil(base, judges, shares, seed)

    async def _distil(
        self, base: Path, judges: Mapping[str, Teacher], shares: Mapping[str, float], seed: int
    ) -> list[Path]:
        c = self.config.fusion
        stage = Stage(
            name="fusion",
            start=base,
            loop=c.loop,
            trainer=c.trainer,
            loss=c.loss,
            engine=self.config.engine,
            credit=TeacherCredit(judges),
            player=self._player(base, RewardConfig()),
            source=TaskStream(self.worlds, shares, c.train_tasks, seed),
            shares=shares,
            seed=seed,
            watch=c.watch,
        )
        return [await run_stage(stage, self.run, self.metrics, self.progress)]

    async def evaluation(self) -> dict[str, Any]:
        """Play the held-out tasks with every policy; write and return ``results.json``."""
        policies = {"base": await self.base()}
        policies |= {name: await self.expert(name) for name in self.config.experts}
        policies["student"] = await self.student()
        sources = {"base": "base", "student": "fusion", "general": "general"}
        sources |= {n: f"expert-{n}" for n in self.config.experts}
        if self.config.general is not None:
            policies["general"] = await self.general()
        async with AsyncExitStack() as stack:
            start = partial(self._engine_for_all, stack, policies["base"])
            for number, (label, folder) in enumerate(policies.items()):
                stage = f"evaluation-{label}"
                asked = (self.config.evaluation, self.config.worlds, self.config.context)
                key = self._digest(stage, *asked, self.digests[sources[label]])
                weights = Weights(version=number, where=str(folder))
                await self._stage(stage, key, partial(self._evaluate, stage, label, policies["base"], start, weights))
        found = results(
            {label: list(read_journal(self.run.rollouts(f"evaluation-{label}"))) for label in policies},
            self.domains,
            self.run.seconds(),
            digest(self.config),
            versions(),
        )
        write_json(self.run.results_file, found)
        write_report(self.run)
        return found

    async def _engine_for_all(self, stack: AsyncExitStack, base: Path) -> LocalEngine | VllmEngine:
        """The engine that all policies are evaluated on; started when the first of them needs it."""
        if self._engine is None:
            # What is judged has whole weights, and is not trained.
            plain = (
                {"record_choices": False}
                if isinstance(self.config.engine, LocalEngineConfig)
                else {"weights": "folder"}
            )
            config = self.config.engine.model_copy(update=plain)
            self._engine = await start_engine(config, base, self.run.weights("evaluation"))
            stack.push_async_callback(self._engine.close)
        return self._engine

    async def _evaluate(
        self,
        stage: str,
        label: str,
        base: Path,
        start: Callable[[], Coroutine[Any, Any, LocalEngine | VllmEngine]],
        weights: Weights,
        resumed: bool,
    ) -> list[Path]:
        c, journal = self.config.evaluation, self.run.rollouts(stage)
        seed = derive_seed(self.config.seed, "evaluation")
        engine = await start()
        await engine.load(weights)
        player = self._player(base, RewardConfig(), c.temperature)
        tasks = held_out(self.worlds, c, seed)
        bar = self.progress.add_task(stage, total=len(tasks))
        rollouts = await evaluate(
            engine, player, tasks, c, label=label, seed=seed, on_done=lambda: self.progress.advance(bar)
        )
        remove(journal)
        with Journal(journal) as out:
            for rollout in rollouts:
                out.write(record(rollout))
        return [journal]


async def _beside(work: Callable[..., T], *args: object) -> T:
    """``work(*args, stopped)`` in a thread; whoever interrupts the run sets ``stopped``, and waits until it ends."""
    stopped, thread = threading.Event(), Beside("stage")
    try:
        return await thread.run(work, *args, stopped, patience_s=_PATIENCE_S, stop=stopped.set)
    finally:
        thread.close()


def asked_of_teachers(loss: DistillLoss, base: Path) -> tuple[int, tuple[int, ...]]:
    """How many likely tokens the objective wants judged beside the sampled one, and which always, by the markup of the
    tokenizer in ``base``."""
    if not isinstance(loss.estimator, TopkEstimator):
        return 0, ()
    decisions = Chat(AutoTokenizer.from_pretrained(base)).decision_ids
    return loss.estimator.support, decisions if loss.estimator.decision_tokens else ()


def _made_from(config: ExpertConfig | FusionConfig) -> dict[str, Any]:
    """What a stage is made from. Its rules are none of it: they may be changed while it is paused."""
    return config.model_dump(mode="json", exclude={"watch"})


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    names = ("torch", "transformers", "trl", "peft", "accelerate", "pydantic-monty", "posttrain")
    return {"python": platform.python_version(), **{n: version(n) for n in names}}
