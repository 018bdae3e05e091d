"""The model every expert starts from: a tokenizer made from the worlds' text and SFT on their demonstrations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from envs.episode import transcript
from experts.config import ColdStartConfig
from posttrain.chat import Chat, tool_line
from posttrain.protocols import World
from posttrain.types import Message, Task, Tool

Demonstration = tuple[Task, tuple[Tool, ...], list[Message]]


async def demonstrations(worlds: Mapping[str, World], config: ColdStartConfig, seed: int) -> list[Demonstration]:
    """Conversations of all worlds by share, in a fixed order."""
    out: list[Demonstration] = []
    weights = {name: config.shares.get(name, 1.0) for name in sorted(worlds)}
    for name, weight in weights.items():
        world = worlds[name]
        for task in world.tasks("demo", math.ceil(config.demonstrations * weight / sum(weights.values())), seed):
            session = await world.open(task)
            tools = session.tools
            await session.close()
            out.append((task, tools, await world.demonstrate(task, Random(f"{seed}/{task.id}"))))
    Random(seed).shuffle(out)
    return out


def texts(demos: list[Demonstration]) -> list[str]:
    """What a tokenizer is trained on: everything that is said, tools included."""
    return [
        transcript([*task.prompt, *rest]) + "\n" + "\n".join(tool_line(t) for t in tools) for task, tools, rest in demos
    ]


def dataset(demos: list[Demonstration], chat: Chat, config: ColdStartConfig, seed: int) -> Dataset:
    """Token ids, and labels that are -100 wherever the assistant did not speak, in the order of training.

    Every batch is a random mixture of the worlds; inside a batch, micro-batches hold similar lengths, so that little
    is padded."""
    rows: list[tuple[list[int], list[int]]] = []
    for task, tools, rest in demos:
        segments = chat.segments(task.prompt, rest, tools, task.thinking)
        ids = [i for s in segments for i in s.ids]
        rows.append((ids, [i if m else -100 for s in segments for i, m in zip(s.ids, s.sampled, strict=True)]))
    rng, pool, ordered = Random(seed), [], []
    for _ in range(config.steps):
        if len(pool) < config.batch_size:
            pool += rng.sample(rows, len(rows))
        batch, pool = pool[: config.batch_size], pool[config.batch_size :]
        ordered += sorted(batch, key=lambda row: len(row[0]))
    return Dataset.from_dict({"input_ids": [r[0] for r in ordered], "labels": [r[1] for r in ordered]})


class _Report(TrainerCallback):
    def __init__(self, on_step: Callable[[int], None]) -> None:
        self._on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_step(state.global_step)


def _optimizer(model: PreTrainedModel, config: ColdStartConfig) -> torch.optim.Optimizer:
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = math.prod(f for pattern, f in config.lr_scales.items() if re.search(pattern, name))
        groups.setdefault(factor, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": config.lr * factor} for factor, parameters in groups.items()],
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: Dataset,
    config: ColdStartConfig,
    folder: Path,
    seed: int,
    on_step: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Train ``model`` in place; checkpoints in ``folder`` let it go on after a kill. Returns the log."""
    torch.set_num_threads(config.threads)
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // config.micro_batches,
        gradient_accumulation_steps=config.micro_batches,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        gradient_checkpointing=config.gradient_checkpointing,
        max_length=None,
        train_sampling_strategy="sequential",
        logging_steps=10,
        save_steps=config.checkpoint_every,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=0,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[_Report(on_step)],
        optimizers=(_optimizer(model, config), None),
    )
    trainer.remove_callback(PrinterCallback)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return [dict(entry) for entry in trainer.state.log_history if "loss" in entry]
