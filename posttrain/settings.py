"""What the spine can be told. Imports no torch, so that a config is checked in well under a second."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config import Config


class Longcat2Model(Config):
    """A LongCat-2.0-architecture model, started at random."""

    type: Literal["longcat2"] = "longcat2"
    settings: dict[str, Any]
    """Fields of ``posttrain.model.Longcat2Config``, by their official names."""
    vocab_size: Annotated[int, Field(ge=128)] = 768
    """Size of the tokenizer that is trained on the worlds' own text."""


class PretrainedModel(Config):
    """Any causal LM in a Hugging Face folder whose tokenizer knows LongCat's markup, or ChatML with Qwen3's tokens for
    thinking and tools (``posttrain.markup``). The tokenizer decides, its chat template is not looked at."""

    type: Literal["pretrained"] = "pretrained"
    path: Path
    """Folder with config, weights and tokenizer; the embedding may have more rows than the tokenizer has tokens."""


class RandomModel(Config):
    """A causal LM of any architecture of transformers, started at random. Its markup is LongCat's."""

    type: Literal["random"]
    architecture: str
    """Its ``model_type``, for example qwen3."""
    settings: dict[str, Any]
    """Fields of its config."""
    vocab_size: Annotated[int, Field(ge=128)] = 768
    """Size of the tokenizer that is trained on the worlds' own text."""


ModelConfig = Annotated[Longcat2Model | PretrainedModel | RandomModel, Field(discriminator="type")]


class LocalEngineConfig(Config):
    """A process on this machine."""

    type: Literal["local"] = "local"
    slots: Annotated[int, Field(gt=0)] = 64
    """Requests in one forward."""
    max_context: Annotated[int, Field(gt=0)] = 512
    """Tokens a conversation may hold."""
    threads: Annotated[int, Field(gt=0)] = 1
    """CPU threads of the process."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Bound on the wait for any answer, in seconds."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often a stage of training may start a new engine because the one before failed."""
    draft_steps: Annotated[int, Field(ge=0)] = 0
    """Tokens that the model's draft block proposes at once, at most its ``mtp_num_layers``: for speed, with the same
    tokens in the end."""
    record_choices: bool = False
    """Completions carry what the model chose at every position, for ``trainer.replay_choices``."""
    on_swap: Literal["keep", "recompute"] = "keep"
    """When new weights come, running requests that are not pinned to a version keep the cache that older ones computed,
    or have it computed anew, so that the next log-prob is the new policy's given the whole context."""
    compile: bool = False
    """Fuse the operations of forwards that read one token of each of several requests (torch.compile). The start then
    takes a minute or two. For models of transformers with full attention."""


class VllmEngineConfig(Config):
    """``vllm serve``, in processes of its own or somewhere else."""

    type: Literal["vllm"]
    command: tuple[str, ...] = (".venv-vllm/bin/vllm",)
    """What starts vLLM; ``scripts/install-vllm.sh`` puts it where this looks."""
    servers: list[str] = Field(default_factory=list[str])
    """Addresses of servers that run already, started as docs/vllm.md says; empty: start ``replicas`` here."""
    replicas: Annotated[int, Field(gt=0)] = 1
    """Servers with the whole model each."""
    devices: list[str] = Field(default_factory=list[str])
    """CUDA_VISIBLE_DEVICES of each replica; empty: all of them see all."""
    slots: Annotated[int, Field(gt=0)] = 64
    """Requests in one forward of a replica."""
    max_context: Annotated[int, Field(gt=0)] = 512
    """Tokens a conversation may hold."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations; auto: as the model's config says. Without AVX-512 a CPU is fastest in float32."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory for keys and values; null: vLLM takes most of the GPU."""
    threads: Annotated[int, Field(gt=0)] | None = None
    """CPU threads of a server on a CPU; null: on a GPU."""
    eager: bool = False
    """Without compilation and CUDA graphs: starts sooner, samples slower on a GPU."""
    weights: Literal["folder", "send", "lora"] = "folder"
    """How new versions come. folder: in full, through a folder that the servers can read too. send: in full, from the
    trainer's process, by NCCL if it and the servers have GPUs of their own, else by gloo. lora: as adapters, of which
    several are served side by side (needs ``trainer.lora``)."""
    max_loras: Annotated[int, Field(gt=0)] = 4
    """Adapters served side by side."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 16
    """At least ``trainer.lora.rank``."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Modules that adapters may have something for: all that ``trainer.lora.targets`` comes to."""
    max_logprobs: Annotated[int, Field(ge=0)] = 64
    """Most likely tokens that a score may be asked for."""
    on_swap: Literal["keep", "recompute"] = "keep"
    """See ``LocalEngineConfig``."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Bound on the wait for any answer, in seconds."""
    start_s: Annotated[float, Field(gt=0)] = 900.0
    """Bound on the start of a server, in seconds."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often a server may be started anew because it died, and then how often a stage may start a new engine."""
    args: list[str] = Field(default_factory=list[str])
    """More arguments of ``vllm serve``."""
    env: dict[str, str] = Field(default_factory=dict[str, str])
    """More environment variables of the servers."""

    @model_validator(mode="after")
    def _a_device_each(self) -> VllmEngineConfig:
        if self.devices and len(self.devices) != self.replicas:
            raise ValueError(f"devices: {len(self.devices)} entries for {self.replicas} replicas; give one a replica")
        return self


EngineConfig = Annotated[LocalEngineConfig | VllmEngineConfig, Field(discriminator="type")]


class LoraConfig(Config):
    """Low-rank adapters instead of full weights (peft)."""

    rank: Annotated[int, Field(gt=0)] = 16
    """Inner dimension."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale times rank."""
    targets: list[str] | str = "all-linear"
    """Names of the modules that get an adapter, as peft reads them."""


class AdamWConfig(Config):
    """AdamW for everything."""

    type: Literal["adamw"] = "adamw"


class MuonConfig(Config):
    """Muon for the hidden matrices, AdamW for the rest.

    An update is scaled to the root mean square that AdamW's has (Moonlight, arXiv 2502.16982, section 2.2), so rate and
    decay of AdamW suit it. Adapters are refused: Muon bounds the spectral norm of the change of a matrix, and what an
    adapter changes is the product of two, which orthogonal steps of each do not bound.
    """

    type: Literal["muon"] = "muon"
    matrix_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the matrices; null: ``lr``."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Of the gradient, Nesterov's."""
    ns_steps: Annotated[int, Field(gt=0, lt=100)] = 5
    """Newton-Schulz iterations that make an update orthogonal."""
    exclude: tuple[str, ...] = ("embed_tokens", "wte", "wpe", "lm_head", "router", r"gate\.weight")
    """Regular expressions; matrices whose name matches one are AdamW's too: embeddings, heads, routers."""


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="type")]


class AloneConfig(Config):
    """One process, which is the one that runs the loop."""

    type: Literal["none"] = "none"


class _Processes(Config):
    """Processes of this machine that train one model together. The first is the one that runs the loop."""

    processes: Annotated[int, Field(ge=2)]
    """Ranks: one a GPU, or on a machine without GPUs one a few cores (see ``threads``)."""
    devices: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list[int])
    """Number of each rank's GPU, of those that the command sees; empty: rank i has GPU i."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Bound on a step of all ranks, and on everything else that they do together, in seconds."""

    @model_validator(mode="after")
    def _a_device_each(self) -> _Processes:
        if self.devices and (len(self.devices) != self.processes or len(set(self.devices)) != self.processes):
            raise ValueError(f"devices: {self.devices} for {self.processes} processes; give each one of its own")
        return self


class DdpConfig(_Processes):
    """A whole model in every rank; gradients are averaged (DDP)."""

    type: Literal["ddp"]


class FsdpConfig(_Processes):
    """Weights, gradients and moments in equal parts, a part in every rank (FSDP2)."""

    type: Literal["fsdp"]


ParallelConfig = Annotated[AloneConfig | DdpConfig | FsdpConfig, Field(discriminator="type")]


class OptimizerSettings(Config):
    """What every training says of its optimizer."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    lr_scales: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict[str, float])
    """Regular expression to a factor on the rate of the parameters whose name it matches."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay, on matrices."""
    optimizer: OptimizerConfig = AdamWConfig()
    """What makes an update of a gradient."""


class TrainerConfig(OptimizerSettings):
    """How a step is taken."""

    warmup_steps: Annotated[int, Field(ge=0)] = 5
    """Optimizer steps over which the rate rises from 0."""
    decay: bool = True
    """Whether the rate falls linearly to a tenth over the stage."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    updates_per_batch: Annotated[int, Field(gt=0)] = 1
    """Optimizer steps a batch of rollouts is split into."""
    tokens_per_micro_batch: Annotated[int, Field(gt=0)] = 4096
    """Tokens a forward holds, padding counted where there is any."""
    share_prompts: bool = False
    """Forward what the rollouts of a group begin with once for all of them, where the model's only memory of a token is
    its keys and values. The gradient is the same up to rounding. Pays on a CPU; on a GPU only where prompts are as
    long as what is sampled or longer (``benchmarks/long_sequences.py``), since attention then needs a mask."""
    packed: bool = False
    """Forward sequences end to end in one row, without padding, attention within each. For models of transformers with
    full attention; on a GPU with ``mixed_precision`` bf16, since the kernel needs half precision. Pays where lengths
    differ much."""
    activations: Literal["keep", "recompute", "offload"] = "keep"
    """What the gradient needs of a forward is kept; or what enters a layer is, and the rest is computed again; or that
    too is put into the host's memory meanwhile. For sequences that do not fit otherwise."""
    compile: bool = False
    """Fuse the model's operations (torch.compile, for any shapes). The first steps then take a minute or two; what it
    saves of every later one: ``benchmarks/long_sequences.py``. For models of transformers."""
    liger: bool = False
    """On a GPU: norms and gated units of a model of transformers by Liger's kernels, which keep less for the gradient
    and need no compilation. Also with several processes, where ``compile`` is refused."""
    freeze: list[str] = Field(default_factory=list[str])
    """Regular expressions; parameters whose name matches one are not trained."""
    lora: LoraConfig | None = None
    """Adapters instead of full weights."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of the forward; weights and log-probs stay in float32."""
    threads: Annotated[int, Field(gt=0)] = 1
    """CPU threads of the training process."""
    micro_batches_at_once: Annotated[int, Field(gt=0)] = 1
    """On a CPU: as many are computed side by side, by so many threads each, with the same sums in the end. Better than
    ``threads`` where an engine is on the same cores. A step needs as many: see ``tokens_per_micro_batch``."""
    replay_choices: bool = False
    """Use the MoE slots and attended columns that the engine chose when it sampled (``engine.record_choices``)."""
    deterministic: bool = False
    """Fix the order of every sum on a GPU as well (``posttrain.determinism`` names them); slower there."""
    parallel: ParallelConfig = AloneConfig()
    """Processes that train one model together."""

    @model_validator(mode="after")
    def _one_layout(self) -> TrainerConfig:
        if self.packed and self.share_prompts:
            raise ValueError("packed: with share_prompts sequences have a row each; set one of the two to false")
        return self

    @model_validator(mode="after")
    def _fused_once(self) -> TrainerConfig:
        if self.liger and self.compile:
            raise ValueError("liger: compile fuses the same operations; set one of the two to false")
        return self

    @model_validator(mode="after")
    def _one_by_one(self) -> TrainerConfig:
        if self.micro_batches_at_once > 1 and self.lora is not None:
            raise ValueError("micro_batches_at_once: adapters change a layer while it runs; set it to 1")
        return self

    @model_validator(mode="after")
    def _whole_matrices(self) -> TrainerConfig:
        if self.lora is not None and isinstance(self.optimizer, MuonConfig):
            raise ValueError("optimizer: muon is for whole matrices; with lora use type: adamw")
        if isinstance(self.parallel, FsdpConfig) and isinstance(self.optimizer, MuonConfig):
            raise ValueError(
                "optimizer: muon is for whole matrices, and parallel.type fsdp has them in parts; use type: adamw, or "
                "parallel.type ddp"
            )
        return self

    @model_validator(mode="after")
    def _for_one_process(self) -> TrainerConfig:
        if not isinstance(self.parallel, AloneConfig):
            for key in ("compile", "share_prompts"):
                if getattr(self, key):
                    raise ValueError(f"{key}: is for one process; set it to false, or parallel.type to none")
            if self.micro_batches_at_once > 1:
                raise ValueError("micro_batches_at_once: is for one process; set it to 1, or parallel.type to none")
        return self


class LoopConfig(Config):
    """The pace of a stage."""

    steps: Annotated[int, Field(gt=0)] = 40
    """Policy versions to make."""
    groups_per_step: Annotated[int, Field(gt=0)] = 16
    """B: groups a step trains on."""
    group_size: Annotated[int, Field(gt=0)] = 8
    """G: rollouts of one prompt."""
    max_running: Annotated[int, Field(gt=0)] = 16
    """Groups under way at once; the smallest that keeps the trainer busy is best."""
    max_staleness: Annotated[int, Field(ge=0)] = 2
    """K: versions between the oldest token of a rollout and the weights it trains. 0: synchronous, deterministic."""
    versions: Literal["inflight", "pinned"] = "inflight"
    """inflight: running rollouts go on under new weights, from one token to the next. pinned: a rollout ends under the
    version that it began with, and up to K + 1 versions are served side by side."""
    stragglers: Literal["drain", "evict"] = "drain"
    """A group that could not be trained later while it is still running: drain waits for it, so that nothing is lost;
    evict gives it up and starts it anew."""
    filter_silent: bool = False
    """Replace groups whose rollouts all scored the same: they carry no signal."""
    reuse: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a batch that may be groups of earlier batches, trained once more while they are not too old."""
    quotas: bool = False
    """Keep the worlds' shares in what is trained, not only in what is started."""
    tolerance: Annotated[float, Field(ge=0)] = 0.5
    """With quotas: how much more than its share of a batch a world may have."""
    attempts: Annotated[int, Field(gt=0)] = 3
    """Tries for a rollout that infrastructure broke."""
    retry_s: Annotated[float, Field(ge=0)] = 1.0
    """Seconds before the second of them, twice as many before each later one: what broke may come back."""
    max_invalid_groups: Annotated[int, Field(gt=0)] = 8
    """Worthless groups in a row after which the run stops."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 5
    """Versions between two checkpoints."""
    wait_s: Annotated[float, Field(gt=0)] = 1200.0
    """Bound on every wait in which nothing moves, in seconds: more than a step, an episode, ``engine.timeout_s``."""

    @model_validator(mode="after")
    def _has_earlier_batches(self) -> LoopConfig:
        if self.reuse and not self.max_staleness:
            raise ValueError("reuse: with max_staleness 0 groups of earlier batches are too old; set it to 0")
        return self
