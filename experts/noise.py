"""Noise on a part of each group, at a level that the outcomes raise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from envs.noise import Noise, NoiseConfig, NoiseScheduler, noise_of
from posttrain.groups import derive_seed
from posttrain.types import Rollout


class GroupNoise:
    """Says which rollouts are noisy. Its level is part of a stage's state, and changes between two steps only."""

    def __init__(self, config: NoiseConfig, group_size: int, seed: int) -> None:
        self._config, self._size, self._seed = config, group_size, seed
        self._scheduler = NoiseScheduler(config)

    @property
    def level(self) -> int:
        """Of rollouts that start now."""
        return self._scheduler.level

    def __call__(self, rollout_id: str, group: str) -> Noise | None:
        """Noise of the rollout, the same for every attempt at it; None if it is a clean one of its group."""
        index = int(rollout_id.rsplit("/", 1)[1].split(".")[0])
        return noise_of(self._config, self.level, index, self._size, derive_seed(self._seed, group))

    def update(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Take in a step's rollouts; returns what to log."""
        outcomes: dict[int, list[float]] = {}
        for rollout in rollouts:
            if rollout.score is not None and rollout.score.valid:
                outcomes.setdefault(rollout.noise, []).append(rollout.score.outcome)
        clean, noisy = outcomes.get(0, []), outcomes.get(self.level, []) if self.level else []
        stats = {"noise/level": float(self.level)}
        for name, found in (("clean", clean), ("noisy", noisy)):
            if found:
                stats[f"noise/{name}"] = sum(found) / len(found)
        self._scheduler.update(clean, noisy)
        return stats

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self._scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo ``state_dict``."""
        self._scheduler.load_state_dict(state)
