"""What the stages that start a model, train an expert and evaluate can be told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from envs.noise import NoiseConfig
from experts.credit import GroupCreditConfig
from posttrain.config import Config
from posttrain.objective_settings import DppoLoss, PolicyLossConfig
from posttrain.settings import LoopConfig, OptimizerSettings, TrainerConfig
from posttrain.watch_settings import WatchConfig
from rewards import RewardConfig


class ColdStartConfig(OptimizerSettings):
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
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the rate rises."""
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


class _Conversion(Config):
    """What both ways from a dense model to a sparse one need. The rows are those of the cold start, made anew."""

    batch_size: Annotated[int, Field(gt=0)] = 64
    """Conversations a step."""
    tokens_per_micro_batch: Annotated[int, Field(gt=0)] = 4096
    """Padded tokens a forward holds."""
    held_out: Annotated[int, Field(gt=0)] = 64
    """Conversations that are not trained on: the measures are taken on them."""
    threads: Annotated[int, Field(gt=0)] = 1
    """CPU threads."""
    deterministic: bool = False
    """Fix the order of every sum on a GPU as well (``posttrain.determinism`` names them); slower there."""


class LsaConversion(_Conversion):
    """Dense attention becomes LSA (arXiv 2608.01662): fresh indexers, their dense warm-up, then the sparse stage."""

    type: Literal["lsa"] = "lsa"
    index_topk: Annotated[int, Field(gt=0)] = 2048
    """Tokens a query attends to."""
    index_init_tokens: Annotated[int, Field(ge=0)] = 16
    """The first so many of what is seen are always among them."""
    index_local_tokens: Annotated[int, Field(ge=0)] = 1024
    """And the last so many."""
    index_n_heads: Annotated[int, Field(gt=0)] = 32
    """Heads of an indexer."""
    index_head_dim: Annotated[int, Field(gt=0)] = 128
    """Their width; not below the model's ``qk_rope_head_dim``."""
    cli_factor: Literal[1, 2] = 2
    """Attentions that one indexer serves."""
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps in which attention stays dense and the indexers alone learn from it."""
    warmup_lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak rate of the indexers there."""
    sparse_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps in which attention is sparse: the model learns from the LM loss, the indexers from their own."""
    sparse_lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak rate of both there."""
    indexer_loss_coef: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the indexers' loss. The converted model keeps it: experts go on training their indexers."""

    @model_validator(mode="after")
    def _forced_fit(self) -> LsaConversion:
        forced = self.index_init_tokens + self.index_local_tokens
        if forced > self.index_topk:
            raise ValueError(
                f"index_topk: {self.index_topk} is below index_init_tokens + index_local_tokens = {forced}"
            )
        return self


class LozaConversion(_Conversion):
    """Some attentions come to see the first and the last blocks only (LoZA, arXiv 2512.23966): those that miss the rest
    least, by a calibration."""

    type: Literal["loza"] = "loza"
    streaming_block_size: Annotated[int, Field(gt=0)] = 128
    """Tokens a block."""
    streaming_sink_blocks: Annotated[int, Field(ge=0)] = 1
    """First blocks that stay in sight."""
    streaming_local_blocks: Annotated[int, Field(gt=0)] = 7
    """Last blocks, the token's own among them."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the attentions, how many stream."""
    steps: Annotated[int, Field(gt=0)] = 100
    """Steps of the calibration; the weights are frozen."""
    lr: Annotated[float, Field(gt=0)] = 0.3
    """Peak rate of the mixing scalars, by plain SGD."""
    finetune_steps: Annotated[int, Field(ge=0)] = 0
    """Steps on the LM loss once they stream."""
    finetune_lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak rate there."""


ConversionConfig = Annotated[LsaConversion | LozaConversion, Field(discriminator="type")]


class BudgetConfig(Config):
    """Groups of different sizes: rollouts go where they are likeliest to give a group right and wrong ones
    (``experts.budget``)."""

    min: Annotated[int, Field(ge=2)] = 4
    """Rollouts that every group has."""
    max: Annotated[int, Field(ge=2)] = 16
    """Rollouts that no group exceeds."""
    pool: Annotated[int, Field(ge=2)] = 16
    """Groups in a row of one world that share their rollouts, ``loop.group_size`` each on the mean."""

    @model_validator(mode="after")
    def _in_order(self) -> BudgetConfig:
        if self.min >= self.max:
            raise ValueError(f"max: {self.max} rollouts must be more than min, {self.min}")
        return self


class CurriculumConfig(Config):
    """Which task of a world is next, by its pass rate and its difficulty (``experts.tasks``)."""

    memory: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """What is left of a task's pass rate when another group of it has ended; the rest is that group's."""
    width: Annotated[float, Field(gt=0)] = 0.25
    """Standard deviation of the window over difficulty, which is in 0..1 within a world."""
    repeat: Annotated[float, Field(ge=0, le=15)] = 3.0
    """a: a task of pass rate p is given to 1 + round(a (1 - p)) groups in a row."""
    rest_after: Annotated[int, Field(gt=0)] = 2
    """Groups in a row, all right or all wrong, after which a task rests."""
    rest: Annotated[int, Field(gt=0)] = 200
    """Groups of its world for which it rests."""
    budget: BudgetConfig | None = None
    """Groups of different sizes; null: all have ``loop.group_size`` rollouts."""


class VerificationConfig(Config):
    """A phase in which a part of the groups judges the expert's own answers (``experts.verification``)."""

    world: str
    """Name of a world of type verify, which has shown the form in the cold start."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Of the groups, while the phase lasts."""
    window: Annotated[int, Field(ge=2)] = 64
    """Groups whose mean outcome is compared with that of as many before them."""
    gain: float = 0.0
    """The phase lasts while the mean outcome has not risen by more than this."""


class ExpertConfig(Config):
    """One expert: the worlds it practises in, what counts as good, how it learns."""

    worlds: dict[str, Annotated[float, Field(gt=0)]]
    """Name of a world to its share of the tasks."""
    train_tasks: Annotated[int, Field(gt=0)] = 2000
    """Different tasks a world; they come round again."""
    curriculum: CurriculumConfig | None = None
    """Which of them are next; null: any, whatever became of them before."""
    oversample: dict[str, Annotated[float, Field(ge=1, le=20)]] = Field(default_factory=dict[str, float])
    """Name of a world to the groups started for one that can be trained, to begin with; 1 for a world that is not
    named. With ``loop.quotas``, which learns it from then on."""
    verification: VerificationConfig | None = None
    """Judging its own answers while it gets no better; null: never."""
    noise: NoiseConfig | None = None
    """What makes users vague and tools fail on a part of each group; null: nothing does."""
    reward: RewardConfig = RewardConfig()
    """Weights of the reward's parts."""
    credit: GroupCreditConfig = GroupCreditConfig()
    """How rewards become advantages."""
    loss: PolicyLossConfig = DppoLoss()
    """Objective."""
    loop: LoopConfig = LoopConfig()
    """Pace."""
    trainer: TrainerConfig = TrainerConfig()
    """Steps."""
    watch: WatchConfig = WatchConfig()
    """When to warn, to pause and to roll back."""

    @model_validator(mode="after")
    def _fits(self) -> ExpertConfig:
        size, budget = self.loop.group_size, self.curriculum and self.curriculum.budget
        if budget is not None and not budget.min <= size <= budget.max:
            raise ValueError(
                f"curriculum.budget: loop.group_size is {size} and must be in {budget.min}..{budget.max}: groups have "
                "so many rollouts on the mean"
            )
        loss = self.loss
        whole = loss.type == "gspo" or loss.reduction != "constant" or loss.sequence_band or loss.sequence_cap
        if self.credit.token_cap is not None and whole:
            raise ValueError(
                "credit.token_cap: it trains on parts of responses, and this loss speaks of whole ones; set it to null "
                "or loss.reduction to constant, sequence_band and sequence_cap to null and loss.type not to gspo"
            )
        if self.verification is not None and self.verification.world in self.worlds:
            raise ValueError(
                f"verification.world: `{self.verification.world}` is among the expert's worlds, and comes beside them; "
                "take it out of one of the two"
            )
        for world in self.oversample:
            if world not in self.worlds:
                known = ", ".join(sorted(self.worlds))
                raise ValueError(f"oversample: `{world}` is not among the expert's worlds; these are: {known}")
        if self.oversample and not self.loop.quotas:
            raise ValueError("oversample: without quotas nothing asks for a world; set loop.quotas to true")
        return self


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
