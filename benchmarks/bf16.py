"""Whether ``trainer.mixed_precision: bf16`` pays on this CPU: ``python benchmarks/bf16.py [--rounds 5]``.

In turn, on one thread, in bf16 and in float32: a product of matrices, attention there and back as torch has it, and
steps of the small model of ``against_trl.py``, plain and compiled, 64 sequences of 16 + 48 tokens. Printed are medians,
and how many times as long float32 takes."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from small_model import make_model
from torch.nn.functional import scaled_dot_product_attention

from posttrain.model.checkpoint import load_any
from posttrain.objective_settings import ClippedLoss
from posttrain.settings import TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Sample

PROMPT, SAMPLED, GROUPS, SIZE = 16, 48, 8, 8
PRECISIONS = ("bf16", "no")


def samples(seed: int) -> list[Sample]:
    """Random groups."""
    rng, found = Random(seed), list[Sample]()
    given, mask = [0.0] * PROMPT, tuple([False] * PROMPT + [True] * SAMPLED)
    for group in range(GROUPS):
        prompt = rng.choices(range(600), k=PROMPT)
        for place in range(SIZE):
            ids = tuple(prompt + rng.choices(range(600), k=SAMPLED))
            logprobs, advantages = (tuple(given + [x] * SAMPLED) for x in (-6.4, rng.gauss(0, 1)))
            found.append(
                Sample(
                    domain="any",
                    rollout=f"{group}/{place}",
                    ids=ids,
                    sampled=mask,
                    logprobs=logprobs,
                    advantages=advantages,
                )
            )
    return found


def product(dtype: torch.dtype) -> Callable[[int], Any]:
    """Of matrices as large as the small model's are."""
    a, b = torch.randn(1600, 128).to(dtype), torch.randn(128, 320).to(dtype)
    return lambda seed: [a @ b for _ in range(50)]


def attention(dtype: torch.dtype) -> Callable[[int], Any]:
    """There and back."""
    q, k, v = given = [torch.randn(32, 4, 64, 32).to(dtype).requires_grad_() for _ in range(3)]
    return lambda seed: torch.autograd.grad(scaled_dot_product_attention(q, k, v, is_causal=True).sum(), given)


def step(folder: Path, precision: Any, compiled: bool) -> Callable[[int], Any]:
    """Of a trainer."""
    config = TrainerConfig(mixed_precision=precision, compile=compiled, share_prompts=True)
    trainer = Trainer(load_any(folder, torch.float32), config, ClippedLoss(), 1000)
    return lambda seed: trainer.step(samples(seed), GROUPS * SIZE)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        dtypes = {"bf16": torch.bfloat16, "no": torch.float32}
        works: dict[tuple[str, str], Callable[[int], Any]] = {}
        for p in PRECISIONS:
            works |= {("product", p): product(dtypes[p]), ("attention", p): attention(dtypes[p])}
            works |= {("step", p): step(Path(folder), p, False), ("step, compiled", p): step(Path(folder), p, True)}
        taken: dict[tuple[str, str], list[float]] = defaultdict(list)
        for number in range(rounds + 1):
            for key, work in works.items():
                started = time.perf_counter()
                work(number)
                taken[key].append(time.perf_counter() - started)
    for name in dict.fromkeys(name for name, _ in works):
        half, whole = (statistics.median(taken[name, p][1:]) for p in PRECISIONS)
        print(f"{name}: bf16 {1e3 * half:.1f} ms, float32 {1e3 * whole:.1f} ms, ratio {whole / half:.2f}")


if __name__ == "__main__":
    main()
