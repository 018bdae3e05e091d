"""What the stages that start a model, train an expert and evaluate can be told."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from experts.credit import GroupCreditConfig
from posttrain.config import Config
from posttrain.settings import ClippedLoss, LoopConfig, TrainerConfig
from rewards import RewardConfig


class ColdStartConfig(Config):
    """Supervised fine-tuning on what the worlds demonstrate (TRL's SFTTrainer)."""

    demonstrations: Annotated[int, Field(gt=0)] = 12000
    """Conversations made; they come round again."""
    shares: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict[str, float])
    """Name of a world to its weight among the conversations; 1 for a world that is not named."""
    steps: Annotated[int, Field(gt=0)] = 400
    """Optimizer steps."""
    clean_steps: Annotated[int, Field(ge=0)] = 0
    """The first of them, in which only good habits are shown: skill first, then the mixture of habits."""
    batch_size: Annotated[int, Field(gt=0)] = 64
    """Conversations a step."""
    micro_batches: Annotated[int, Field(gt=0)] = 4
    """Forwards a step is split into, by length; must divide ``batch_size``."""
    processes: Annotated[int, Field(gt=0)] = 1
    """Data-parallel processes; must divide ``micro_batches``."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate, decayed by a cosine."""
    lr_scales: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict[str, float])
    """Regular expression to a factor on the rate of the parameters whose name it matches."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW decay."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    threads: Annotated[int, Field(gt=0)] = 1
    """CPU threads of each process."""
    deterministic: bool = False
    """Fix the order of every sum on a GPU as well (``posttrain.determinism`` names them); slower there."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 100
    """Steps between two checkpoints."""

    @model_validator(mode="after")
    def _divides(self) -> ColdStartConfig:
        if self.batch_size % self.micro_batches:
            raise ValueError(f"micro_batches: {self.micro_batches} does not divide batch_size {self.batch_size}")
        if self.micro_batches % self.processes:
            raise ValueError(f"processes: {self.processes} does not divide micro_batches {self.micro_batches}")
        if self.clean_steps > self.steps:
            raise ValueError(f"clean_steps: {self.clean_steps} is more than steps, {self.steps}")
        return self


class ExpertConfig(Config):
    """One expert: the worlds it practises in, what counts as good, how it learns."""

    worlds: dict[str, Annotated[float, Field(gt=0)]]
    """Name of a world to its share of the tasks."""
    train_tasks: Annotated[int, Field(gt=0)] = 2000
    """Different tasks a world; they come round again."""
    reward: RewardConfig = RewardConfig()
    """Weights of the reward's parts."""
    credit: GroupCreditConfig = GroupCreditConfig()
    """How rewards become advantages."""
    loss: ClippedLoss = ClippedLoss()
    """Objective."""
    loop: LoopConfig = LoopConfig()
    """Pace."""
    trainer: TrainerConfig = TrainerConfig()
    """Steps."""


class EvaluationConfig(Config):
    """Held-out tasks."""

    tasks: Annotated[int, Field(ge=2)] = 240
    """Tasks a domain, shared equally by its worlds."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """1: the policy as it is trained."""
    transcripts: Annotated[int, Field(ge=0)] = 4
    """Conversations a world and model kept for the report."""
    concurrency: Annotated[int, Field(gt=0)] = 64
    """Episodes at once."""
