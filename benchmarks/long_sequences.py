"""Training on long sequences: ``python benchmarks/long_sequences.py [--tokens 16384] [--train]``.

First the peak memory that the log-probs of one sequence add to hidden states and head, forwards and backwards, at the
vocabulary of Qwen3: in chunks (``posttrain.logprobs``) and by the plain formula, with values and gradients compared.
The plain form wants some 28 GiB: on a CPU it takes fewer tokens (``--plain-tokens``), and its memory is scaled up.
``--train`` (a GPU) takes steps of the trainer on a random model with the shape of Qwen3-0.6B in bf16: tokens a second,
peak memory, and the share of the card's peak that ``6 N`` operations a token, and ``12 L h T / 2`` for causal
attention, come to. Exit status 1 if the chunks need more than a tenth of the plain form's memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from posttrain.logprobs import token_logprobs
from posttrain.objective_settings import DppoLoss
from posttrain.settings import TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Sample

VOCABULARY, HIDDEN = 151_936, 1024
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16, from the vendor's data sheets."""


def plain(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> Tensor:
    """Log-probs by the formula."""
    return torch.log_softmax((hidden_ND @ weight_VD.T).float(), -1).gather(1, ids_N[:, None])[:, 0]


def chunks(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> Tensor:
    """Log-probs as the trainer has them."""
    return token_logprobs(hidden_ND, weight_VD, ids_N)[0]


def _peak() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def measure(way: Callable[[Tensor, Tensor, Tensor], Tensor], given: tuple[Tensor, Tensor, Tensor]) -> tuple[float, ...]:
    """Bytes at the peak beyond what is given and the two gradients, and seconds."""
    hidden, weight, ids = given
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    if hidden.is_cuda:
        way(*(t[:64] if t is not weight else t for t in given)).sum().backward()  # what is compiled or loaded once
        hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    (way(*given) * torch.linspace(-1, 1, len(ids), device=ids.device)).sum().backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return (torch.cuda.max_memory_allocated() if hidden.is_cuda else _peak()) - before, seconds


def made(tokens: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and ids."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, device=device, dtype=dtype) * 0.02).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (tokens,), device=device)


def memory(tokens: int, plain_tokens: int, console: Console) -> bool:
    """The first table; whether the bar holds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table("dtype", "way", "tokens", "GiB", "s", title=f"log-probs, V = {VOCABULARY:,}, {device}")
    good = True
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        peaks = []
        for name, way, n in (("chunks", chunks, tokens), ("plain", plain, plain_tokens)):
            bytes_, seconds = measure(way, made(n, device, dtype))
            peaks.append(bytes_ * tokens / n if way is plain else bytes_)
            table.add_row(str(dtype).split(".")[1], name, f"{n:,}", f"{bytes_ / 2**30:.2f}", f"{seconds:.2f}")
        good &= peaks[0] <= peaks[1] / 10
        console.print(f"{dtype}: {peaks[0] / peaks[1]:.3f} of the plain form's memory (bar 0.1)")
    few = made(min(tokens, 512), device, torch.float32)
    grads = []
    for way in (chunks, plain):
        values = way(*few)
        grads.append((values, *torch.autograd.grad(values.sin().sum(), few[:2])))
    gaps = [float((a - b).detach().abs().max()) for a, b in zip(*grads, strict=True)]
    console.print(table)
    console.print(f"largest difference of values {gaps[0]:.1e}, of gradients {gaps[1]:.1e} and {gaps[2]:.1e}")
    return good


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "liger": {"liger": True},
    "recomputed": {"activations": "recompute"},
    "offloaded": {"activations": "offload"},
    "shared prompts": {"share_prompts": True},
}


def train(console: Console, ways: list[str]) -> None:
    """Steps of the trainer on the GPU, in each of ``ways``."""
    shape: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    }
    config = Qwen3Config(
        vocab_size=VOCABULARY, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=40960, **shape,
    )  # fmt: skip
    name = torch.cuda.get_device_name()
    peak = next((flops for card, flops in PEAK_FLOPS.items() if card in name), float("nan"))
    table = Table("prompt", "sampled", "rollouts", "way", "tokens/s", "sampled/s", "s a step", "MFU", "GiB", title=name)
    for prompt, sampled, rollouts in ((512, 1536, 64), (2048, 2048, 32), (2048, 14336, 8)):
        for way in ways:
            torch.manual_seed(0)
            with torch.device("cuda"):
                model = Qwen3ForCausalLM(config)
            settings = TrainerConfig(
                mixed_precision="bf16", tokens_per_micro_batch=max(32768, prompt + sampled), **WAYS[way]
            )
            trainer = Trainer(model, settings, DppoLoss(constant_length=sampled), 10)
            samples = [_sample(i, prompt, sampled) for i in range(rollouts)]
            trainer.step(samples, rollouts)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            for _ in range(3):
                trainer.step(samples, rollouts)
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - began) / 3
            length, body = prompt + sampled, sum(p.numel() for p in model.parameters())
            per_token = 6 * body + 6 * config.num_hidden_layers * config.num_attention_heads * 128 * length
            done = rollouts * length * per_token
            table.add_row(
                str(prompt), str(sampled), str(rollouts), way,
                f"{rollouts * length / seconds:,.0f}", f"{rollouts * sampled / seconds:,.0f}", f"{seconds:.2f}",
                "" if "shared" in way else f"{done / seconds / peak:.2f}",
                f"{torch.cuda.max_memory_allocated() / 2**30:.1f}",
            )  # fmt: skip
            del trainer, model
            torch.cuda.empty_cache()
    console.print(table)


def _sample(number: int, prompt: int, sampled: int) -> Sample:
    group = number // 8
    generator = torch.Generator().manual_seed(group)
    ids = torch.randint(VOCABULARY, (prompt,), generator=generator).tolist()
    generator.manual_seed(1000 + number)
    ids += torch.randint(VOCABULARY, (sampled,), generator=generator).tolist()
    mask = (False,) * prompt + (True,) * sampled
    return Sample(
        rollout=f"s/{group}/{number % 8}", domain="any", ids=tuple(ids), sampled=mask,
        logprobs=tuple(-12.0 * m for m in mask), advantages=tuple((number % 3 - 1.0) * m for m in mask),
    )  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--plain-tokens", type=int, help="of the plain form")
    parser.add_argument("--train", action="store_true", help="also steps of the trainer, on a GPU")
    parser.add_argument("--ways", default=",".join(WAYS), help="of those steps")
    options = parser.parse_args()
    console = Console(width=140)
    fits = torch.cuda.is_available()
    good = memory(options.tokens, options.plain_tokens or (options.tokens if fits else options.tokens // 16), console)
    if options.train:
        train(console, options.ways.split(","))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
