"""What is trained of a model, by the settings of its trainer, and what a model does not let be done with it."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedModel

from posttrain import attention, packing
from posttrain.errors import UserError
from posttrain.model import Longcat2ForCausalLM
from posttrain.settings import FsdpConfig, TrainerConfig


def trainable(model: PreTrainedModel, config: TrainerConfig, device: str) -> nn.Module:
    """``model``, in place, with gradients for what is trained alone; in new adapters if the config has them.
    ``device``: type of the one that it is trained on."""
    model.train()
    if config.liger:
        use_liger(model, device)
    if config.packed:
        packing.enable(model)
    elif config.mixed_precision == "bf16" and device == "cpu":
        attention.enable(model)
    if isinstance(model, Longcat2ForCausalLM):
        model.freeze_idle()
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in config.freeze):
            parameter.requires_grad_(False)
    if config.lora is None:
        return model
    import peft

    spec = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # pyright: ignore[reportArgumentType]  # peft takes floats too
        target_modules=config.lora.targets,
        lora_dropout=0.0,
    )
    return peft.get_peft_model(model, spec)  # pyright: ignore[reportArgumentType]


def compile_layers(model: PreTrainedModel, key: str) -> None:
    """As ``key`` of the config says. Raises UserError for a model that cannot be compiled."""
    if isinstance(model, Longcat2ForCausalLM):
        raise UserError(f"{key}: models of type longcat2 choose experts and columns as they go: set it to false")
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(f"{key}: torch finds no C++ compiler to do it with: install g++, or set it to false") from None
    # In place, so that names of weights stay. Not the head, which token_logprobs applies in chunks.
    model.base_model.compile(dynamic=True)


def use_liger(model: PreTrainedModel, device: str) -> None:
    """Have Liger compute norms and gated units of ``model``, in place. Not its rotations, which it replaces for every
    model of the process and which keep nothing, nor its loss: ``token_logprobs`` wants states, and is as sparing.

    Raises UserError for a model that it does not know, and where its kernels cannot run."""
    off = "set trainer.liger to false"
    # Triton's interpreter, which the tests use, takes a CPU too, and seconds a layer.
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"trainer.liger: its kernels are for GPUs, and this trains on the CPU: {off}")
    if find_spec("liger_kernel") is None:
        raise UserError(f"trainer.liger: the package liger-kernel is not there: pip install liger-kernel, or {off}")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN
    from transformers.integrations.liger import apply_liger_kernel

    if (kind := model.config.model_type) not in KNOWN:
        raise UserError(f"trainer.liger: it has no kernels for models of type {kind}: {off}")
    # Beside this model's own layers it replaces the classes in transformers, from which the engine makes its models.
    module = vars(sys.modules[type(model).__module__])
    before = dict(module)
    left_out = dict.fromkeys(("rope", "cross_entropy", "fused_linear_cross_entropy"), False)
    apply_liger_kernel(model, {"rms_norm": True, "swiglu": True, "geglu": True, **left_out})
    module.update(before)


def refuse_side_by_side(model: PreTrainedModel, device: str) -> None:
    """Raises UserError for a model, or a type of device, whose micro-batches cannot be computed at the same time."""
    if isinstance(model, Longcat2ForCausalLM):
        raise UserError(
            "trainer.micro_batches_at_once: models of type longcat2 count what their routers choose as they go: set it "
            "to 1"
        )
    if device != "cpu":
        raise UserError(f"trainer.micro_batches_at_once: is for CPUs, and this trains on {device}: set it to 1")


def keep_memory() -> None:
    """Have this process keep what a step frees for the next one, where the C library is glibc.

    By default it gives large blocks back to the kernel at once, and has several heaps, one for each of the threads that
    steps are taken in: the next step finds all of its memory new, and a twentieth of its time goes into page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # From malloc.h: M_MMAP_THRESHOLD (larger blocks would leave holes in the heap), M_TRIM_THRESHOLD, M_ARENA_MAX.
    for name, value in ((-3, 1 << 25), (-1, 1 << 30), (-8, 1)):
        mallopt(name, value)


def refuse_parts(model: PreTrainedModel, config: TrainerConfig) -> None:
    """Raises UserError for a model that several processes cannot train as the config says."""
    half = config.mixed_precision == "bf16" and isinstance(config.parallel, FsdpConfig)
    if half and isinstance(model, Longcat2ForCausalLM):
        raise UserError(
            "trainer.mixed_precision: with trainer.parallel.type fsdp all of a model computes in bf16, and routers of "
            "type longcat2 must not: set it to no, or parallel.type to ddp"
        )


__all__ = ["compile_layers", "keep_memory", "refuse_parts", "refuse_side_by_side", "trainable", "use_liger"]
