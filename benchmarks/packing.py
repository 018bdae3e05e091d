"""Rows with padding against sequences end to end: ``python benchmarks/packing.py [--rounds 3] [--threads 1]``.

Lengths are log-uniform between 16 and 1,024 tokens, as where some answers are a word and some a proof; the two trainers
take the same steps in turn. On a GPU in bf16, on the shape of Qwen3-0.6B; else a small one in float32.
"""

from __future__ import annotations

import argparse
import time
from random import Random
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from posttrain.batch import pack
from posttrain.objective_settings import DppoLoss
from posttrain.settings import TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Sample

GPU = torch.cuda.is_available()
LARGE = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE = {**LARGE, "head_dim": 128, "intermediate_size": 3072} if GPU else {**SMALL, "head_dim": 32}


def made(count: int) -> list[Sample]:
    """Random tokens, all but the first trained."""
    rng, found = Random(0), list[Sample]()
    for i in range(count):
        n = int(16 * 64 ** rng.random())
        ids, mask = tuple(rng.randrange(768) for _ in range(n)), (False, *(True,) * (n - 1))
        logprobs = tuple(-6.6 * m for m in mask)
        found.append(Sample(rollout=f"{i}", domain="", ids=ids, sampled=mask, logprobs=logprobs, advantages=(1.0,) * n))
    return found


def trainer(packed: bool, size: int, threads: int) -> Trainer:
    """A fresh one."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=768, max_position_embeddings=4096, **SHAPE))  # pyright: ignore[reportArgumentType]
    config = TrainerConfig(
        tokens_per_micro_batch=size, packed=packed, threads=threads, mixed_precision="bf16" if GPU else "no"
    )
    return Trainer(model, config, DppoLoss(), 100)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    samples = made(64)
    total = sum(len(s.ids) for s in samples)
    table = Table("tokens a micro-batch", "padding", "padded, tokens/s", "end to end", "ratio")
    for size in (2048, 8192, 32768):
        padding = 1 - total / sum(b.ids_BT.numel() for b in pack(samples, size))
        pair = [trainer(packed, size, args.threads) for packed in (False, True)]
        seconds: list[list[float]] = [[], []]
        for taken in range(args.rounds + 1):
            for one, times in zip(pair, seconds, strict=True):
                start = time.perf_counter()
                one.step(samples, len(samples))
                if taken:
                    times.append(time.perf_counter() - start)
        plain, packed = (total / median(times) for times in seconds)
        table.add_row(f"{size:,}", f"{padding:.0%}", f"{plain:,.0f}", f"{packed:,.0f}", f"{packed / plain:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
