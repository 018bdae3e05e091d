"""Memory estimates against steps that were taken: ``python benchmarks/memory.py [--only NAME]``.

Every case is a process of its own on the CPU: once all is imported and a tiny trainer has stepped, it makes a model and
a trainer, takes a step on one short sequence and one on two full micro-batches, and says by how much its largest
resident size grew, by the kernel. The last cases are the local engine's scheduler with all slots filled. Each runs
twice: with an allocator that gives back at once what is freed, which shows what is live and is what
``posttrain.memory`` means to say from the shapes alone; and with glibc's defaults, which keep holes between tensors.
Exit status 1 if an estimate is more than 30 % off what is live.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TOLERANCE = 0.3
LONGCAT: dict[str, Any] = {
    "hidden_size": 256, "num_layers": 3, "num_attention_heads": 4, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16,
    "v_head_dim": 48, "q_lora_rank": 128, "kv_lora_rank": 96, "ffn_hidden_size": 768, "expert_ffn_hidden_size": 256,
    "n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 3, "routed_scaling_factor": 2.0,
    "max_position_embeddings": 2048,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
MANY: dict[str, Any] = {"tokens_per_micro_batch": 4096}
HALF: dict[str, Any] = {"tokens_per_micro_batch": 2048}
FEW: dict[str, Any] = {"tokens_per_micro_batch": 512}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "longcat2, activations": (LONGCAT, MANY, 512),
    "longcat2, weights": ({**LONGCAT, "n_routed_experts": 64, "oe_vocab_size_ratio": 20.3, "oe_neighbor_num": 3,
                           "oe_split_num": 1}, FEW, 256),
    "longcat2, muon": ({**LONGCAT, "n_routed_experts": 24}, {**FEW, "optimizer": {"type": "muon"}}, 256),
    "longcat2, sparse": ({**LONGCAT, "index_topk": 64, "index_n_heads": 4, "index_head_dim": 32,
                          "index_init_tokens": 2, "index_local_tokens": 8}, {"tokens_per_micro_batch": 2048}, 512),
    "longcat2, bf16": (LONGCAT, {**HALF, "mixed_precision": "bf16"}, 512),
    "qwen3, activations": (QWEN, MANY, 512),
    "qwen3, weights": ({**QWEN, "hidden_size": 768, "intermediate_size": 2304}, FEW, 256),
    "qwen3, bf16": (QWEN, {**HALF, "mixed_precision": "bf16"}, 512),
    "qwen3, lora": ({**QWEN, "hidden_size": 768, "intermediate_size": 2304},
                    {"tokens_per_micro_batch": 2048, "lora": {"rank": 8}}, 256),
    "engine, longcat2": (LONGCAT, {"slots": 32, "max_context": 512}, 512),
    "engine, qwen3": (QWEN, {"slots": 32, "max_context": 512}, 512),
}  # fmt: skip
"""Name to fields of the model, of the trainer or the engine, and the length of every sequence."""


def spec_of(fields: dict[str, Any], folder: Path) -> Any:
    """The model as a config names it: ours by its settings, another by a folder with its ``config.json``."""
    from transformers import Qwen3Config

    from posttrain.settings import Longcat2Model, PretrainedModel

    if "vocab_size" not in fields:
        return Longcat2Model(settings=fields, vocab_size=4096)
    Qwen3Config(**fields).save_pretrained(folder)
    return PretrainedModel(path=folder)


def estimate(name: str, folder: Path) -> dict[str, int]:
    """Parts of the trainer or of the engine, in bytes."""
    from posttrain.memory import engine_memory, trainer_memory
    from posttrain.objective_settings import ClippedLoss
    from posttrain.settings import LocalEngineConfig, TrainerConfig

    fields, settings, longest = CASES[name]
    if name.startswith("engine"):
        return engine_memory(spec_of(fields, folder), LocalEngineConfig(**settings), versions=1)
    return trainer_memory(spec_of(fields, folder), TrainerConfig(**settings), ClippedLoss(), longest)


def measure(name: str, folder: Path) -> int:
    """Bytes by which this process grew at its largest."""
    import torch

    fields, settings, longest = CASES[name]
    small = {**fields, "num_layers" if "num_layers" in fields else "num_hidden_layers": 1, "hidden_size": 64}
    if name.startswith("engine"):
        work, few = _rollouts, {**settings, "slots": 1}
    else:
        work, few = _steps, {**settings, "tokens_per_micro_batch": 64}
    work(small, few, 32, folder)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    torch.manual_seed(0)
    work(fields, settings, longest, folder)
    return _status("VmHWM") - before


def _model(spec: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.model import Longcat2Config, Longcat2ForCausalLM
    from posttrain.settings import Longcat2Model

    if isinstance(spec, Longcat2Model):
        return Longcat2ForCausalLM(Longcat2Config(**spec.settings, vocab_size=spec.vocab_size))
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec.path))


def _ids(row: int, length: int) -> tuple[int, ...]:
    return tuple((7 * row + 11 * t) % 4000 + 3 for t in range(length))


def _steps(fields: dict[str, Any], config: dict[str, Any], longest: int, folder: Path) -> None:
    """One short sequence, then two full micro-batches, so that gradients and optimizer are there beside activations."""
    from posttrain.objective_settings import ClippedLoss
    from posttrain.settings import TrainerConfig
    from posttrain.trainer import Trainer
    from posttrain.types import Sample

    settings = TrainerConfig(**config)
    trainer = Trainer(_model(spec_of(fields, folder)), settings, ClippedLoss(), 4)
    for length, count in ((32, 1), (longest, 2 * settings.tokens_per_micro_batch // longest)):
        mask = tuple(t >= length // 8 for t in range(length))
        samples = [
            Sample(
                rollout=f"s/{i}/0", domain="any", ids=_ids(i, length), sampled=mask,
                logprobs=tuple(-8.0 * m for m in mask), advantages=tuple((i % 3 - 0.9) * m for m in mask),
            )
            for i in range(count)
        ]  # fmt: skip
        trainer.step(samples, count)


def _rollouts(fields: dict[str, Any], config: dict[str, Any], longest: int, folder: Path) -> None:
    """Every slot to its end."""
    from posttrain.engine.batching import Scheduler
    from posttrain.engine.slots import Request
    from posttrain.types import Sampling

    slots = config["slots"]
    scheduler = Scheduler(_model(spec_of(fields, folder)), slots, config["max_context"])
    sampling = Sampling(max_tokens=4)
    scheduler.submit([Request(id=i, ids=_ids(i, longest - 4), sampling=sampling) for i in range(slots)])
    while scheduler.busy:
        scheduler.step()


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def _grown(name: str, environment: dict[str, str]) -> int:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, timeout=900)
    done.check_returncode()
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", choices=CASES, action="append", help="this case; repeatable")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.measure:
            print(json.dumps(measure(options.measure, Path(folder))))
            return
        console = Console(width=160)
        table = Table("case", "estimate MiB", "live MiB", "resident MiB", "estimate / live", "/ resident", "of which")
        ratios: list[float] = []
        for name in options.only or CASES:
            parts = estimate(name, Path(folder))
            total = sum(parts.values())
            live, resident = _grown(name, {"MALLOC_MMAP_THRESHOLD_": "131072"}), _grown(name, {})
            ratios.append(total / live)
            shares = ", ".join(f"{part} {size / 2**20:.0f}" for part, size in parts.items())
            mib = (f"{size / 2**20:.0f}" for size in (total, live, resident))
            table.add_row(name, *mib, f"{total / live:.2f}", f"{total / resident:.2f}", shares)
            console.print(f"{name}: {total / live:.2f} of what is live, {total / resident:.2f} of what is resident")
    console.print(table)
    sys.exit(0 if all(1 - TOLERANCE <= ratio <= 1 + TOLERANCE for ratio in ratios) else 1)


if __name__ == "__main__":
    main()
