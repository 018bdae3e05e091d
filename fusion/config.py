"""The whole pipeline, from nothing to a table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from envs.context import ContextConfig
from envs.worlds import WorldConfig, make_world
from experts.config import (
    ColdStartConfig,
    ConversionConfig,
    EvaluationConfig,
    ExpertConfig,
    LozaConversion,
    LsaConversion,
)
from posttrain.config import Config
from posttrain.objective_settings import DistillLoss, TopkEstimator
from posttrain.settings import (
    EngineConfig,
    LocalEngineConfig,
    LoopConfig,
    ModelConfig,
    PretrainedModel,
    TrainerConfig,
    VllmEngineConfig,
)
from posttrain.watch_settings import WatchConfig


class ModelTeachers(Config):
    """Whole models in the training process."""

    type: Literal["model"] = "model"


class ServedTeachers(Config):
    """Servers of their own, beside the one that serves the student."""

    type: Literal["served"]
    engine: VllmEngineConfig
    """weights folder: a server a teacher, so ``replicas`` is their number. weights lora: one server, whose base is the
    model that the experts started from and whose adapters they are."""


class FusionConfig(Config):
    """Multi-teacher on-policy distillation of the experts into one student."""

    domains: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict[str, float])
    """Share of each domain's tasks; empty: equal shares."""
    train_tasks: Annotated[int, Field(gt=0)] = 2000
    """Different tasks a world; they come round again."""
    loss: DistillLoss = DistillLoss()
    """Objective."""
    teachers: Annotated[ModelTeachers | ServedTeachers, Field(discriminator="type")] = ModelTeachers()
    """Where the experts are while they teach."""
    loop: LoopConfig = LoopConfig(group_size=1, groups_per_step=128, max_running=128)
    """Pace. One rollout a prompt is enough: nothing is compared within a group."""
    trainer: TrainerConfig = TrainerConfig()
    """Steps."""
    watch: WatchConfig = WatchConfig()
    """When to warn, to pause and to roll back."""


class PipelineConfig(Config):
    """Cold start, conversion, experts, fusion, evaluation."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Everything random hangs on it."""
    model: ModelConfig
    """What is trained."""
    engine: EngineConfig = LocalEngineConfig()
    """Where rollouts are sampled."""
    worlds: dict[str, WorldConfig]
    """Name to world."""
    context: ContextConfig = ContextConfig()
    """What becomes of a conversation that grows long."""
    cold_start: ColdStartConfig | None = ColdStartConfig()
    """null: the model is used as it is."""
    conversion: ConversionConfig | None = None
    """Makes the model's attention sparse before the experts start from it; null: it stays as it is."""
    experts: Annotated[dict[str, ExpertConfig], Field(min_length=1)]
    """Name to expert; the name is the domain it will teach."""
    fusion: FusionConfig = FusionConfig()
    """Experts to student."""
    general: ExpertConfig | None = None
    """General RL: the student goes on by its own rewards, in worlds of any domain; null: the fusion is the end."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out tasks."""

    @model_validator(mode="after")
    def _names_agree(self) -> PipelineConfig:
        named = {f"experts.{expert}.worlds": list(config.worlds) for expert, config in self.experts.items()}
        if self.general is not None:
            named["general.worlds"] = list(self.general.worlds)
        if self.cold_start is not None:
            named["cold_start.shares"] = list(self.cold_start.shares)
        judging = judging_of(self)
        named |= {f"{key}.verification.world": [world] for key, world in judging.items()}
        for key, names in named.items():
            for world in names:
                if world not in self.worlds:
                    known = ", ".join(sorted(self.worlds))
                    raise ValueError(f"{key}: there is no world `{world}`; `worlds` has: {known}")
        for key, world in judging.items():
            if (kind := self.worlds[world].type) != "verify":
                raise ValueError(f"{key}.verification.world: `{world}` is of type {kind}, not verify")
        for expert in self.experts:
            if expert in ("base", "student", "general"):
                raise ValueError(f"experts.{expert}: this name is taken by another policy; choose another")
        domains = domains_of(self)
        taught = sorted(set(domains.values()))
        if len(taught) < len(domains):
            raise ValueError(f"experts: two experts share a domain, and a domain has one teacher: {domains}")
        for domain in self.fusion.domains:
            if domain not in taught:
                raise ValueError(f"fusion.domains: no expert teaches `{domain}`; taught are: {', '.join(taught)}")
        replaying = [f"experts.{e}" for e, c in self.experts.items() if c.trainer.replay_choices]
        replaying += ["general"] if self.general is not None and self.general.trainer.replay_choices else []
        replaying += ["fusion"] if self.fusion.trainer.replay_choices else []
        if replaying and not (isinstance(self.engine, LocalEngineConfig) and self.engine.record_choices):
            raise ValueError(
                f"{replaying[0]}.trainer.replay_choices: there is nothing to replay; set engine.record_choices to "
                "true, which engine.type local has"
            )
        _taught(self)
        _patient(self)
        if isinstance(self.engine, VllmEngineConfig):
            _served_by_vllm(self, self.engine)
        if self.model.type == "longcat2":
            topk = self.model.settings.get("index_topk")
            served_longcat(self, topk if isinstance(topk, int) and topk else None)
        if self.cold_start is None and self.model.type != "pretrained":
            raise ValueError("cold_start: a model that starts at random needs one; set it or use model.type pretrained")
        return self


def _taught(config: PipelineConfig) -> None:
    """Raises ValueError, with the key, for teachers that cannot be or cannot say what the objective asks of them."""
    estimator, served = config.fusion.loss.estimator, config.fusion.teachers
    support = estimator.support if isinstance(estimator, TopkEstimator) else 0
    if not isinstance(config.model, PretrainedModel) and support > config.model.vocab_size:
        raise ValueError(f"fusion.loss.estimator.support: model.vocab_size is {config.model.vocab_size}; lower it")
    if not isinstance(served, ServedTeachers):
        return
    if served.engine.servers:
        raise ValueError("fusion.teachers.engine.servers: teachers have servers of their own; leave it out")
    if served.engine.weights == "send":
        raise ValueError("fusion.teachers.engine.weights: teachers never change; use folder or lora")
    wanted = 1 if served.engine.weights == "lora" else len(config.experts)
    if served.engine.replicas != wanted:
        raise ValueError(f"fusion.teachers.engine.replicas: there is one server a teacher; set it to {wanted}")
    for expert, spec in config.experts.items() if served.engine.weights == "lora" else ():
        if spec.trainer.lora is None:
            raise ValueError(f"experts.{expert}.trainer.lora: fusion.teachers.engine.weights lora needs it")
        if spec.trainer.lora.rank > served.engine.max_lora_rank:
            raise ValueError(
                f"fusion.teachers.engine.max_lora_rank: {served.engine.max_lora_rank} is less than "
                f"experts.{expert}.trainer.lora.rank"
            )
    if support > served.engine.max_logprobs:
        raise ValueError(
            f"fusion.teachers.engine.max_logprobs: {served.engine.max_logprobs} is less than "
            f"fusion.loss.estimator.support; set it to {support}, or lower that"
        )


def _stages(config: PipelineConfig) -> dict[str, ExpertConfig | FusionConfig]:
    """Key to a stage of RL."""
    stages: dict[str, ExpertConfig | FusionConfig] = {f"experts.{name}": c for name, c in config.experts.items()}
    general = {} if config.general is None else {"general": config.general}
    return stages | {"fusion": config.fusion} | general


def _patient(config: PipelineConfig) -> None:
    """Raises ValueError, with the key, for a loop that gives up before what does not answer is replaced."""
    for key, stage in _stages(config).items():
        bounds = {"engine": config.engine.timeout_s}
        if isinstance(stage, FusionConfig) and isinstance(stage.teachers, ServedTeachers):
            bounds["fusion.teachers.engine"] = stage.teachers.engine.timeout_s
        for engine, bound in bounds.items():
            if stage.loop.wait_s <= bound:
                raise ValueError(
                    f"{key}.loop.wait_s: {stage.loop.wait_s:g} s end the stage before {engine}.timeout_s, "
                    f"{bound:g} s, tells that it does not answer; raise it, or lower that"
                )


def _served_by_vllm(config: PipelineConfig, engine: VllmEngineConfig) -> None:
    """Raises ValueError, with the key, for what vLLM cannot serve."""
    for key, stage in _stages(config).items():
        loop, lora = stage.loop, stage.trainer.lora
        if (engine.weights == "lora") != (lora is not None):
            wanted = "needs adapters: set it" if lora is None else "is for engine.weights lora: set that, or drop it"
            raise ValueError(f"{key}.trainer.lora: engine.weights {engine.weights} {wanted}")
        if lora is not None and lora.rank > engine.max_lora_rank:
            raise ValueError(f"engine.max_lora_rank: {engine.max_lora_rank} is less than {key}.trainer.lora.rank")
        versions = loop.max_staleness + 1 if loop.versions == "pinned" else 1
        room, name = (engine.max_loras, "max_loras") if lora else (len(engine.servers) or engine.replicas, "replicas")
        if versions > room:
            raise ValueError(
                f"engine.{name}: {room} cannot serve the {versions} versions of {key}.loop.versions pinned with "
                f"max_staleness {loop.max_staleness} side by side; set it to {versions}"
            )


def served_longcat(config: PipelineConfig, dense_context: int | None) -> None:
    """Raises ValueError, with the key, for what vLLM does not serve of a longcat2 (``posttrain.engine.vllm_longcat2``)
    whose attention sees everything in contexts of up to ``dense_context`` tokens; None: in all."""
    teachers, conversion = config.fusion.teachers, config.conversion
    match conversion:
        case LsaConversion():
            dense_context = conversion.index_topk
        case LozaConversion():
            blocks = conversion.streaming_sink_blocks + conversion.streaming_local_blocks
            dense_context = blocks * conversion.streaming_block_size
    asked: dict[str, tuple[EngineConfig, str, int]] = {"engine": (config.engine, "engine.type local", 0)}
    if isinstance(teachers, ServedTeachers):  # their servers sample a token after every sequence
        asked["fusion.teachers.engine"] = (teachers.engine, "fusion.teachers.type model", 1)
    for key, (engine, instead, more) in asked.items():
        if not isinstance(engine, VllmEngineConfig):
            continue
        if engine.weights == "lora":
            raise ValueError(f"{key}.weights: vllm takes no adapters for a longcat2; set it to folder")
        if not engine.eager:
            raise ValueError(f"{key}.eager: vllm cannot compile a longcat2; set it to true")
        if engine.threads is not None and engine.dtype not in ("auto", "float32"):
            raise ValueError(f"{key}.dtype: on a CPU a longcat2 is served in float32; set it to that")
        if dense_context is not None and engine.max_context + more > dense_context:
            raise ValueError(
                f"{key}.max_context: this longcat2 attends to everything in contexts of up to {dense_context} tokens "
                f"only, vllm always; set it to at most {dense_context - more}, or take {instead}"
            )


def judging_of(config: PipelineConfig) -> dict[str, str]:
    """Key of an expert, or of general RL, to the world in which it judges its own answers."""
    learners = {f"experts.{name}": c for name, c in config.experts.items()} | {"general": config.general}
    return {key: c.verification.world for key, c in learners.items() if c and c.verification}


def domains_of(config: PipelineConfig) -> dict[str, str]:
    """Expert to the domain it teaches: that of its worlds, which must agree. Raises ValueError naming the key."""
    out: dict[str, str] = {}
    for expert, spec in config.experts.items():
        found = {make_world(config.worlds[name], name).domain for name in spec.worlds}
        if len(found) != 1:
            raise ValueError(f"experts.{expert}.worlds: an expert needs worlds of one domain, not of {sorted(found)}")
        out[expert] = found.pop()
    return out
