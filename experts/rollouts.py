"""Binds worlds, chat and rewards into the one function that the loop and evaluation call."""

from __future__ import annotations

from collections.abc import Mapping

from envs.context import ContextConfig
from envs.episode import run_episode
from experts.noise import GroupNoise
from posttrain.chat import Chat
from posttrain.protocols import Engine, World
from posttrain.types import Rollout, Score, Task
from rewards import RewardConfig, score


class Player:
    """Plays a task of any of ``worlds``. Implements ``loop.RunRollout``."""

    def __init__(
        self,
        worlds: Mapping[str, World],
        chat: Chat,
        reward: RewardConfig,
        temperature: float = 1.0,
        context: ContextConfig | None = None,
        noise: GroupNoise | None = None,
    ) -> None:
        self.worlds, self.chat, self.reward, self.temperature = worlds, chat, reward, temperature
        self.context = context or ContextConfig()
        self.noise = noise

    def _score(self, rollout: Rollout, outcome: float) -> Score:
        return score(rollout, outcome, self.reward)

    async def __call__(self, engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        return await run_episode(
            engine,
            self.worlds[task.world],
            self.chat,
            self._score,
            task,
            rollout_id=rollout_id,
            group=group,
            seed=seed,
            temperature=self.temperature,
            context=self.context,
            noise=self.noise and self.noise(rollout_id, group),
        )
