"""What a trainer and an engine will take of memory, before either is started: shapes of a model without memory, and
formulas. ``benchmarks/memory.py`` holds them against steps that were taken.

Everything is in bytes, a mapping of parts each. It is what is live at the largest moment. Left out: the programs' own
code (on a GPU the context of CUDA, about half a GiB), samples, and the holes that an allocator keeps between tensors:
glibc's made a trainer up to a fifth larger on a CPU, and with adapters, whose maps make three tensors for one, nearly
twice as large (``MALLOC_MMAP_THRESHOLD_=131072`` in the environment gives them back).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.activations import FLOAT, NoEstimate, kept_per_token
from posttrain.objective_settings import DistillLoss, LossConfig, TopkEstimator
from posttrain.settings import (
    AloneConfig,
    DdpConfig,
    FsdpConfig,
    LocalEngineConfig,
    ModelConfig,
    MuonConfig,
    PretrainedModel,
    TrainerConfig,
    VllmEngineConfig,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFILL_TOKENS = 8192
"""Of a forward of the local engine; a teacher's are as many."""
_PER_JUDGED = 44
"""Bytes of a token of a support: its id twice, both policies' log-probs, what the loss makes of them, gradients."""
TRAINING_PROGRAM, ENGINE_PROGRAM = 600 << 20, 450 << 20
"""Resident size of the two processes before there is a model, measured with torch for CPUs."""
SERVER = 4 << 30
"""What a vLLM server may take beside weights and cache: CUDA's context and graphs, adapters, activations and logits of
a forward. Not measured by us."""


def blank(spec: ModelConfig) -> PreTrainedModel:
    """The model on torch's meta device: every shape, no memory. Raises NoEstimate if it cannot be made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.fresh import at_random
    from posttrain.model import Longcat2ForCausalLM
    from posttrain.model.checkpoint import is_longcat
    from posttrain.model.config_files import read_config, read_layer

    with torch.device("meta"):
        if not isinstance(spec, PretrainedModel):
            return at_random(spec)
        if not (spec.path / "config.json").is_file():
            raise NoEstimate(f"{spec.path} holds no config.json")
        if is_longcat(read_layer(spec.path).data):
            return Longcat2ForCausalLM(read_config(spec.path))
        try:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec.path))
        except (OSError, ValueError, ImportError) as error:
            raise NoEstimate(f"{spec.path}: {error}") from None


def weight_bytes(spec: ModelConfig) -> int:
    """Of one copy in float32, which is how trainer, local engine and teachers hold a model."""
    return _size(blank(spec))


def trainer_memory(
    spec: ModelConfig, config: TrainerConfig, loss: LossConfig, longest: int, device: str = "cpu"
) -> dict[str, int]:
    """The largest moment of a step, all on ``device``, for sequences of at most ``longest`` tokens; of one rank where
    there are several. Raises NoEstimate."""
    from posttrain.logprobs import plain_head, rows_of_chunk
    from posttrain.model import Longcat2ForCausalLM

    model: Any = blank(spec)
    if isinstance(model, Longcat2ForCausalLM):
        model.freeze_idle()
    tokens, width = max(config.tokens_per_micro_batch, longest), 2 if config.mixed_precision == "bf16" else FLOAT
    weights, head = _size(model), plain_head(model)
    parts = {"weights": weights}
    if config.lora is None and not isinstance(loss, DistillLoss) and loss.kl:
        parts["reference"] = weights
    kept = kept_per_token(model.config, width, longest, FLOAT if device == "cpu" else width, config.liger)
    if config.activations != "keep":
        text = model.config.get_text_config()
        layers = text.num_hidden_layers
        kept = kept // layers + (layers * width * text.hidden_size if config.activations == "recompute" else 0)
    activations = tokens * kept
    if width < FLOAT and not isinstance(config.parallel, FsdpConfig):
        # The copies that autocast makes: each lives as long as what the backward needs of its layer.
        at_once = 1 if config.activations == "keep" else model.config.get_text_config().num_hidden_layers
        activations += width * _linear_values(model) // at_once
    vocabulary, hidden = _head_shape(model)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in config.freeze):
            parameter.requires_grad_(False)
    if config.lora is not None:
        import peft

        lora = peft.LoraConfig(r=config.lora.rank, target_modules=config.lora.targets)
        model = peft.get_peft_model(model, lora, low_cpu_mem_usage=True)
        parts["adapters"] = _size(model) - weights
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = sum(p.numel() for p in trained.values())
    parts |= {"gradients": FLOAT * values, "optimizer": optimizer_bytes(trained, config)}
    parts["activations"] = activations
    if head is None:
        parts["log-probs"] = FLOAT * 4 * tokens * vocabulary
    else:
        rows = rows_of_chunk(device, vocabulary, hidden)
        copies = head.weight.requires_grad * (1 + tied)
        parts["log-probs"] = _head_bytes(tokens, vocabulary, hidden, copies, rows)
    if isinstance(loss, DistillLoss) and isinstance(loss.estimator, TopkEstimator):
        parts["support"] = _PER_JUDGED * tokens * loss.estimator.support
    if (side_by_side := config.micro_batches_at_once) > 1:
        parts |= {name: side_by_side * parts[name] for name in ("activations", "log-probs", "support") if name in parts}
        parts["gradients"] *= 1 + side_by_side  # their sum, and what each adds to it
    step = parts["activations"] + parts["log-probs"] + parts.get("support", 0)
    if isinstance(config.parallel, FsdpConfig):
        return parts | _in_parts(parts, config.parallel, max(_layer_size(model), FLOAT * vocabulary * hidden))
    if isinstance(config.parallel, DdpConfig):
        parts["gradients"] *= 2  # and the buckets in which they are summed
    merged = FLOAT * _adapted_values(model) if config.lora is not None else 0
    if merged > step:  # while weights are published nothing else of a step is there
        parts["merged adapters"] = merged - step
    return parts


def _in_parts(parts: Mapping[str, int], parallel: FsdpConfig, unit: int) -> dict[str, int]:
    """What is another for a rank that has parts; ``unit`` are the bytes of the largest layer, or of the head."""
    in_parts = ("weights", "reference", "adapters", "gradients", "optimizer")
    shares = {part: -(-size // parallel.processes) for part, size in parts.items() if part in in_parts}
    # One layer in use and the next one on its way, and the gradient of one.
    return {**shares, "gathered layers": 3 * unit}


def host_memory(spec: ModelConfig, config: TrainerConfig) -> dict[str, int]:
    """What a trainer has beside what ``trainer_memory`` says, never on a GPU. Raises NoEstimate."""
    if isinstance(config.parallel, AloneConfig):
        return {}
    followers = {"programs of ranks": (config.parallel.processes - 1) * TRAINING_PROGRAM}
    # Rank 0 reads all weights from a copy that is whole.
    return followers | ({"whole weights": weight_bytes(spec)} if isinstance(config.parallel, FsdpConfig) else {})


def optimizer_bytes(trained: Mapping[str, Any], config: TrainerConfig) -> int:
    """States of parameters by name: two moments of AdamW's, one of Muon's."""
    from posttrain.optim import hidden_matrices

    muon = config.optimizer if isinstance(config.optimizer, MuonConfig) else None
    single = sum(p.numel() for name, p in trained.items() if muon and hidden_matrices(name, p, muon))
    return FLOAT * (2 * sum(p.numel() for p in trained.values()) - single)


def engine_memory(spec: ModelConfig, config: Any, versions: int) -> dict[str, int]:
    """Of the engine's process that serves ``versions`` versions side by side, when all its slots are full.

    Raises NoEstimate for an engine of another type than local."""
    if not isinstance(config, LocalEngineConfig):
        raise NoEstimate(f"an engine of type {config.type} plans its memory itself")
    model = blank(spec)
    tokens = min(max(_PREFILL_TOKENS, config.max_context), config.slots * config.max_context)
    parts = {"weights": versions * _size(model), "cache": cache_bytes(model.config, config)}
    if config.record_choices:
        parts["choices"] = _choices(model.config, config)
    text: Any = model.config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    mask = tokens * config.max_context  # a value and a bool each
    logits = tokens * text.vocab_size  # a prefill has those of every position
    parts["prefill"] = FLOAT * (logits + tokens * (4 * text.hidden_size + 2 * inner) + mask) + mask
    return parts


def served_memory(spec: ModelConfig, config: VllmEngineConfig) -> dict[str, int]:
    """Of all servers that vLLM starts for ``config``. Raises NoEstimate if it is not told how much it may take."""
    if config.kv_cache_gib is None:
        raise NoEstimate("vllm takes most of what it finds; set kv_cache_gib")
    model = blank(spec)
    named = config.dtype if config.dtype != "auto" else str(model.config.dtype).removeprefix("torch.")
    width = 2 if named in ("bfloat16", "float16") else FLOAT
    one = {"weights": _size(model) // FLOAT * width, "cache": int(config.kv_cache_gib * 2**30), "programs": SERVER}
    return {part: config.replicas * size for part, size in one.items()}


def cache_bytes(model_config: Any, config: LocalEngineConfig) -> int:
    """All slots at their longest, in float32, and the column for padding."""
    places = config.slots * (config.max_context + 1)
    if model_config.model_type == "longcat2":
        from posttrain.model.describe import cache_bytes as of_longcat

        half = of_longcat(model_config)
        history = 16 if model_config.use_ngram else 0  # token ids, int64, twice
        return places * (2 * (half.latents + half.index_keys + half.draft) + history)
    text = model_config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return places * text.num_hidden_layers * 2 * heads * size * FLOAT


def teacher_memory(spec: ModelConfig, count: int) -> dict[str, int]:
    """Of ``count`` teachers in the training process, whatever its device: one of them reads at a time."""
    model = blank(spec)
    vocabulary, _ = _head_shape(model)
    return {"teachers": count * _size(model), "teachers' logits": FLOAT * 2 * _PREFILL_TOKENS * vocabulary}


def _choices(model_config: Any, config: LocalEngineConfig) -> int:
    if model_config.model_type != "longcat2":
        return 0  # the engine refuses it
    columns = 2 // model_config.cli_factor * model_config.index_topk * 4 if model_config.use_lsa else 0
    return config.slots * (config.max_context + 1) * model_config.num_layers * (2 * model_config.moe_topk + columns)


def _head_bytes(tokens: int, vocabulary: int, hidden: int, gradients: int, rows: int) -> int:
    """States at the head: of all tokens, of the trained ones, and their gradients; a chunk of logits and of their
    gradient; ``gradients`` of the head's weight that are not yet added to those that are there."""
    logits = min(rows, tokens) * vocabulary
    return FLOAT * (5 * tokens * hidden + 2 * logits + gradients * vocabulary * hidden)


def _head_shape(model: Any) -> tuple[int, int]:
    head = model.get_output_embeddings()
    if head is None:
        raise NoEstimate(f"a model of type {model.config.model_type} has no head")
    return head.weight.shape


def _size(model: Any) -> int:
    return FLOAT * sum(p.numel() for p in model.parameters())


def _layer_size(model: Any) -> int:
    """Of the largest of the layers that are gathered one by one."""
    names = getattr(model, "_no_split_modules", None) or ()
    return max((_size(m) for m in model.modules() if type(m).__name__ in names), default=_size(model))


def _linear_values(model: Any) -> int:
    from torch import nn

    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def _adapted_values(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(".base_layer.weight"))


__all__ = [
    "ENGINE_PROGRAM",
    "SERVER",
    "TRAINING_PROGRAM",
    "NoEstimate",
    "blank",
    "cache_bytes",
    "engine_memory",
    "host_memory",
    "optimizer_bytes",
    "served_memory",
    "teacher_memory",
    "trainer_memory",
    "weight_bytes",
]
