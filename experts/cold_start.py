"""The model every expert starts from: TRL's SFTTrainer on demonstrations, in processes of its own.

A small model leaves most of a core's time to overhead, so on a CPU one process a core (data parallel, gloo) is nearly
twice as fast as one process with two threads.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from torch.multiprocessing.spawn import start_processes
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from experts.config import ColdStartConfig
from posttrain import determinism
from posttrain.files import remove
from posttrain.model import Longcat2ForCausalLM
from posttrain.model.checkpoint import load_any
from posttrain.optim import make_optimizer
from posttrain.ranks import die_with_parent
from posttrain.threads import Stopped

_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    start: Path
    data: Path
    folder: Path
    config: ColdStartConfig
    seed: int
    port: int


def train(
    start: Path,
    data: Dataset,
    config: ColdStartConfig,
    folder: Path,
    seed: int,
    on_step: Callable[[int], None],
    stopped: threading.Event,
) -> list[dict[str, Any]]:
    """Fine-tune the model and tokenizer in ``start`` on ``data`` into ``folder / "model"``. Returns the log.

    Checkpoints in ``folder`` let the same call go on after a kill, or after ``stopped``, which ends it by Stopped.
    Raises what a process raised."""
    rows = folder / "rows"
    remove(rows)
    disable_progress_bars()
    data.save_to_disk(rows)
    job = _Job(start=start, data=rows, folder=folder, config=config, seed=seed, port=_free_port())
    steps: Any = get_context("spawn").SimpleQueue()
    _remove_unfinished(folder)
    workers = start_processes(_work, (job, steps), config.processes, join=False, daemon=True, start_method="spawn")
    assert workers is not None
    try:
        while not workers.join(_POLL_S):
            if stopped.is_set():
                raise Stopped
            while not steps.empty():
                on_step(steps.get())
    finally:
        for process in filter(None, workers.processes):
            process.kill()  # nothing, unless this function raises
            process.join()
    return json.loads((folder / "log.json").read_text())


def _remove_unfinished(folder: Path) -> None:
    """Checkpoints that a killed run did not write to the end; the one before is removed only after that."""
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())  # written last
        except (OSError, ValueError):
            remove(checkpoint)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Report(TrainerCallback):
    def __init__(self, steps: Any) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps.put(state.global_step)


class _Sft(SFTTrainer):
    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the model came with its checkpoint's weights, and transformers does not know the names that fused
        ones have on disk."""


class _OwnLoss(_Sft):
    """Asks the model for its loss. TRL's fused head, which runs the backbone alone, leaves out what the model adds."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, *args, **kwargs)


class _RouterBiases(TrainerCallback):
    """Load control after every optimizer step, at the pace of the learning rate."""

    def __init__(self, model: Longcat2ForCausalLM) -> None:
        self._model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        self._model.model.update_router_biases(lr_scheduler.get_last_lr()[0] / lr_scheduler.base_lrs[0])


def _work(rank: int, job: _Job, steps: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is at the keyboard speaks to the parent
    die_with_parent()  # else workers of a killed run would write into the directory of the next one
    disable_progress_bar()
    # TRL sets the old name of a setting, whatever its caller says.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    c = job.config
    if c.processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": c.processes, "MASTER_PORT": job.port}
        os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
    # By the environment too: Accelerate would give every process all cores, and the processes would fight for them.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(c.threads)
    torch.set_num_threads(c.threads)
    if c.deterministic:
        determinism.enforce()
    checkpoint = get_last_checkpoint(str(job.folder))
    model = load_any(checkpoint or job.start, torch.float32)
    callbacks: list[TrainerCallback] = [_Report(steps)] if rank == 0 else []
    if isinstance(model, Longcat2ForCausalLM):
        model.freeze_idle()
        callbacks.append(_RouterBiases(model))
    kind = _OwnLoss if isinstance(model, Longcat2ForCausalLM) and model.has_aux_loss else _Sft
    trainer = kind(
        model=model,
        args=_arguments(job),
        train_dataset=load_from_disk(job.data),  # pyright: ignore[reportArgumentType]
        processing_class=AutoTokenizer.from_pretrained(job.start),
        callbacks=callbacks,
        optimizers=(make_optimizer(model.named_parameters(), c), None),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(job.folder / "model"))
    if rank == 0:
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        (job.folder / "log.json").write_text(json.dumps(log))


def _arguments(job: _Job) -> SFTConfig:
    c = job.config
    return SFTConfig(
        output_dir=str(job.folder),
        max_steps=c.steps,
        per_device_train_batch_size=c.batch_size // c.micro_batches,
        gradient_accumulation_steps=c.micro_batches // c.processes,
        warmup_steps=c.warmup_steps,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        gradient_checkpointing=c.gradient_checkpointing,
        ddp_find_unused_parameters=False,
        max_length=None,
        train_sampling_strategy="sequential",
        logging_steps=10,
        save_steps=c.checkpoint_every,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        seed=job.seed,
        data_seed=job.seed,
        dataloader_num_workers=0,
        use_cpu=not torch.cuda.is_available(),
    )
