"""What the simulator can be told. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config import Config
from posttrain.settings import LoopConfig

_SIMULATED = {
    "steps", "groups_per_step", "group_size", "max_running", "max_staleness", "versions", "stragglers",
    "filter_silent", "reuse", "quotas", "tolerance",
}  # fmt: skip


class Constant(Config):
    """Always the same."""

    type: Literal["constant"] = "constant"
    value: Annotated[float, Field(ge=0)]


class Lognormal(Config):
    """A long tail, by two quantiles."""

    type: Literal["lognormal"] = "lognormal"
    median: Annotated[float, Field(gt=0)]
    p99: Annotated[float, Field(gt=0)]
    most: Annotated[float, Field(gt=0)] | None = None
    """Larger values are cut to this."""

    @model_validator(mode="after")
    def _tail(self) -> Lognormal:
        if self.p99 < self.median:
            raise ValueError(f"p99: is {self.p99:g}, below the median; give one of at least {self.median:g}")
        return self


class Measured(Config):
    """Any of some values, all equally likely."""

    type: Literal["measured"] = "measured"
    values: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]


class FromRun(Config):
    """What the valid rollouts in a run's journal came to, all equally likely."""

    type: Literal["run"] = "run"
    run: Path
    """Directory of the run."""
    stage: str
    """Such as ``expert-agent``: its journal is ``rollouts/STAGE.jsonl``."""
    what: Literal["seconds", "turns", "tokens"]
    """seconds: wall time of a rollout over its turns, the engine's part of it included; turns: of a rollout; tokens:
    sampled in a rollout over its turns."""
    world: str | None = None
    """Rollouts of this world only."""


Distribution = Annotated[Constant | Lognormal | Measured | FromRun, Field(discriminator="type")]


class WorldLoad(Config):
    """What the rollouts of one world ask for. A turn is what the model samples and then what the environment takes."""

    share: Annotated[float, Field(gt=0)] = 1.0
    """Of the groups, relative to the other worlds."""
    turns: Distribution = Constant(value=1.0)
    """Of a rollout; rounded, 1 at least."""
    tokens: Distribution
    """Sampled in a turn; 1 at least."""
    latency: Distribution
    """Seconds that the environment takes after a turn, the grading after the last one included."""
    prompt_tokens: Annotated[int, Field(ge=0)] = 0
    """Before the first turn."""
    answer_tokens: Annotated[int, Field(ge=0)] = 0
    """That the environment adds after a turn."""
    silent: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the groups that carry no signal: replaced with ``loop.filter_silent``."""


class EngineLoad(Config):
    """Devices that sample."""

    count: Annotated[int, Field(gt=0)]
    """Devices (or engines, each as many accelerators as it takes)."""
    capacity: Annotated[int, Field(gt=0)]
    """Requests that a device runs at once."""
    capacity_old: Annotated[int, Field(gt=0)] | None = None
    """With pinned versions: requests to which a device is filled up once its version is no longer the newest, that is
    from the first re-partition after; null: ``capacity``."""
    speed: Annotated[list[tuple[int, float]], Field(min_length=1)]
    """Pairs of requests at once and tokens a second that each of them gets, measured; linear in between."""
    prefill: Annotated[float, Field(gt=0)] = 50.0
    """Prompt tokens that cost as much as one that is sampled."""
    on_swap: Literal["keep", "recompute"] = "keep"
    """With versions in flight: what becomes of the caches under new weights. Pinned versions always keep them."""
    resident: Literal["one", "all"] = "one"
    """With pinned versions: whether a device holds one of them, and devices are shared out between versions, or all."""
    lockstep: bool = False
    """Synchronously: whether a turn is sampled only when every rollout waits for one, as ``posttrain.loop`` has
    it for runs that repeat bit for bit."""
    rebalance_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between two re-partitions of the devices that nothing else calls for."""

    @model_validator(mode="after")
    def _consistent(self) -> EngineLoad:
        loads = [n for n, _ in self.speed]
        if loads != sorted(set(loads)) or loads[0] < 1 or min(s for _, s in self.speed) <= 0:
            raise ValueError("speed: must be pairs of requests, ascending from 1 or more, and tokens a second above 0")
        if self.capacity_old is not None and self.capacity_old > self.capacity:
            raise ValueError(f"capacity_old: is above the capacity of {self.capacity}")
        return self


class TrainerLoad(Config):
    """What a step takes."""

    step_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds, whatever the batch."""
    token_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds a sampled token in the batch."""
    publish_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds until the engines have the new weights; sampling goes on."""


class SimulationConfig(Config):
    """A stage that is only planned."""

    seed: int = 0
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps before the figures begin to count."""
    loop: LoopConfig
    """The stage's own; what does not bear on time is refused."""
    engines: EngineLoad
    trainer: TrainerLoad
    worlds: Annotated[dict[str, WorldLoad], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> SimulationConfig:
        if idle := sorted(self.loop.model_fields_set - _SIMULATED):
            raise ValueError(f"loop.{idle[0]}: is not simulated; remove it")
        if self.warmup >= self.loop.steps:
            raise ValueError(f"warmup: leaves none of the {self.loop.steps} steps of loop.steps to measure")
        return self
