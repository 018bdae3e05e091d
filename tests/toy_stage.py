"""A whole stage at toy size: a random model, the world of requests, and a hook where something may go wrong."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.progress import Progress

from envs.worlds import RequestsConfig, make_world
from experts.credit import GroupCredit, GroupCreditConfig
from experts.rollouts import Player
from experts.tasks import TaskStream
from experts.train import Stage, run_stage
from posttrain.chat import Chat
from posttrain.config import Config
from posttrain.journal import read_journal, rollout_from_dict
from posttrain.metrics import Metrics
from posttrain.objective_settings import DppoLoss
from posttrain.protocols import Session, World
from posttrain.run import RunDir
from posttrain.settings import LocalEngineConfig, LoopConfig, TrainerConfig
from posttrain.types import Message, Rollout, Task, ToolCall
from rewards import RewardConfig
from tests.posttrain.tiny import make_model, make_tokenizer

Hook = Callable[[str, int], Awaitable[None]]
"""Called with ``open``, ``reply`` or ``grade`` and how often there was one of it before."""
STEPS, BATCH, SIZE = 6, 2, 3


class Nothing(Config):
    """The config of a run directory."""


async def fine(where: str, count: int) -> None:
    """Nothing goes wrong."""


class HookedSession:
    """A session that calls the hook first."""

    def __init__(self, session: Session, hook: Callable[[str], Awaitable[None]]) -> None:
        self._session, self._hook, self.tools = session, hook, session.tools

    async def call(self, call: ToolCall) -> str:
        return await self._session.call(call)

    async def reply(self, message: Message) -> Message | None:
        await self._hook("reply")
        return await self._session.reply(message)

    async def grade(self, messages: Sequence[Message]) -> float:
        await self._hook("grade")
        return await self._session.grade(messages)

    async def close(self) -> None:
        await self._session.close()


class HookedWorld:
    """Requests, with the hook and a clock of its own."""

    name, domain = "requests", "interaction"

    def __init__(self, hook: Hook, timeout_s: float) -> None:
        self._world: World = make_world(RequestsConfig(), "requests")
        self._hook, self._timeout_s, self._counts = hook, timeout_s, Counter[str]()

    def tasks(self, split: str, n: int, seed: int) -> list[Task]:
        limits = {"timeout_s": self._timeout_s, "max_tokens": 8}
        return [replace(t, limits=replace(t.limits, **limits)) for t in self._world.tasks(split, n, seed)]

    async def demonstrate(self, task: Task, rng: Random) -> list[Message]:
        return await self._world.demonstrate(task, rng)

    async def open(self, task: Task) -> HookedSession:
        await self._call("open")
        return HookedSession(await self._world.open(task), self._call)

    async def check(self) -> dict[str, float]:
        return await self._world.check()

    async def _call(self, where: str) -> None:
        self._counts[where] += 1
        await self._hook(where, self._counts[where] - 1)


class EvenPlayer(Player):
    """Rewards even tokens, so that groups differ."""

    def _score(self, rollout: Rollout, outcome: float):
        ids = [i for s in rollout.branches[0] for i, m in zip(s.ids, s.sampled, strict=True) if m]
        scored = super()._score(rollout, outcome)
        return replace(scored, value=sum(i % 2 == 0 for i in ids) / len(ids))


def toy_stage(
    folder: Path,
    worlds: Mapping[str, World],
    player: type[Player] = EvenPlayer,
    loop: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Stage:
    """A stage on the model in ``folder/model``, made at random if it is not there, in the first of ``worlds``."""
    model = folder / "model"
    if not model.exists():
        make_model("longcat2", vocab_size=len(make_tokenizer())).save_pretrained(model)
        make_tokenizer().save_pretrained(model)
    shares = {next(iter(worlds)): 1.0}
    pace = {"steps": STEPS, "groups_per_step": BATCH, "group_size": SIZE, "checkpoint_every": 2, "wait_s": 120.0}
    given: dict[str, Any] = {
        "name": "expert-toy",
        "start": model,
        "loop": LoopConfig(**{**pace, **(loop or {})}),
        "trainer": TrainerConfig(lr=1e-3, warmup_steps=0, decay=False),
        "loss": DppoLoss(constant_length=8),
        "engine": LocalEngineConfig(slots=8, max_context=128),
        "credit": GroupCredit(GroupCreditConfig()),
        "player": player(worlds, Chat(make_tokenizer()), RewardConfig()),
        "source": TaskStream(worlds, shares, 20, seed=3),
        "shares": shares,
        "seed": 3,
    }
    return Stage(**{**given, **changes})


def train(folder: Path, name: str, stage: Stage) -> RunDir:
    """Run ``stage`` to its end in ``folder/name``; raises what it raises."""
    with RunDir.open(folder / name, Nothing()) as run:
        metrics = Metrics(run.metrics_file)
        try:
            asyncio.run(run_stage(stage, run, metrics, Progress(disable=True)))
        finally:
            metrics.close()
    return run


def run_toy(folder: Path, name: str = "run", hook: Hook = fine, timeout_s: float = 60.0, **loop: Any) -> RunDir:
    """Train with ``hook``. ``restarts`` is the engine's."""
    engine = LocalEngineConfig(slots=8, max_context=128, restarts=loop.pop("restarts", 3))
    pace = {"max_running": 4, "max_staleness": 2, "wait_s": 60.0, "retry_s": 0.05, **loop}
    worlds: dict[str, World] = {"requests": HookedWorld(hook, timeout_s)}
    return train(folder, name, toy_stage(folder, worlds, loop=pace, engine=engine))


def records(run: RunDir) -> list[dict[str, Any]]:
    """The metrics of its steps."""
    return list(read_journal(run.metrics_file))


def rollouts(run: RunDir) -> list[Rollout]:
    """All that were written down."""
    return [rollout_from_dict(r) for r in read_journal(run.rollouts("expert-toy"))]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    """What it ended with."""
    return torch.load(run.checkpoint("expert-toy") / "state.pt", weights_only=True)["trainer"]["model"]


def check_books(run: RunDir, steps: int = STEPS, batch: int = BATCH) -> None:
    """Every step was taken once, on groups of its own, from rollouts that were written down and are valid."""
    trained = list(read_journal(run.rollouts("expert-toy.trained")))
    assert [t["version"] for t in trained] == list(range(1, steps + 1))
    numbers = Counter(n for t in trained for n in t["groups"])
    assert set(numbers.values()) == {1} and numbers.total() == steps * batch
    valid = {r.id for r in rollouts(run) if r.valid}
    assert {i for t in trained for i in t["rollouts"]} <= valid
