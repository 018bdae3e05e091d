"""What LSA costs next to dense MLA: ``python benchmarks/attention.py [--lengths 2048,8192,32768] [--rounds 2]``.

One shortcut layer's two attentions with LongCat-2.0's proportions, scaled down: its 64 heads and 32 index heads, an
eighth of every width, a quarter of the budget (512 = 4 sinks + 256 local + 252 chosen). Both kinds share their
projections, so two ratios are printed: of attention itself (dense: keys and values expanded from the latents, scores,
mix; LSA: index projections, scores and choice, once for both attentions, then gather, scores, mix, and the absorbed
projections) and of the whole modules. Weights are random: what is chosen does not change the cost, but neighbouring
tokens choose unlike sets, which is the worst case for the memory. All kinds are measured in turn, ``--rounds`` times,
and the best of each counts. On CUDA (``--device cuda``) in bfloat16; ``--full``: LongCat-2.0's own sizes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from posttrain.model import Longcat2Config
from posttrain.model.attention import AttentionPlan, IndexSet, LongcatMLA
from posttrain.model.plan import ForwardShape, Ways, make_plan
from posttrain.model.rope import inverse_frequencies, rotations

SCALED: dict[str, Any] = {
    "hidden_size": 1024,
    "num_attention_heads": 64,
    "q_lora_rank": 192,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 512,
    "index_init_tokens": 4,
    "index_local_tokens": 256,
}
FULL: dict[str, Any] = {
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_init_tokens": 16,
    "index_local_tokens": 1024,
}
PAGES: dict[str, Any] = {"use_hi": True, "hi_pages": 32, "hi_min_tokens": 8192, "hi_skip_indexers": 0}
"""An eighth of the pages of 32 k tokens, as LongCat-2.0's 1,024 are of 1 M."""


class Pair:
    """Two attentions of one layer, and what they are given."""

    def __init__(
        self, fields: dict[str, Any], tokens: int, past: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = Longcat2Config(num_layers=1, max_position_embeddings=1 << 18, **fields)
        torch.manual_seed(0)
        self.modules = [LongcatMLA(self.config, half).to(device, dtype).eval() for half in (0, 1)]
        for name, module in [n for m in self.modules for n in m.named_modules()]:
            if name.endswith("weights_proj"):  # as in the whole model, which keeps it in float32
                module.float()
        self.columns, self.device = past + tokens, device
        self.x = torch.randn(1, tokens, self.config.hidden_size, device=device, dtype=dtype)
        width = self.config.num_attention_heads * self.config.v_head_dim
        self.mixed = torch.randn(1, tokens, width, device=device, dtype=dtype)
        frequencies = inverse_frequencies(self.config.qk_rope_head_dim, self.config.rope_parameters or {}).to(device)
        self.rotations = rotations(torch.arange(past, past + tokens, device=device).unsqueeze(0), frequencies)
        shape = ForwardShape(1, tokens, past, device, dtype)
        self.plan: AttentionPlan = make_plan(self.config, shape, None, None, None, Ways()).attention
        self.cache: Any = Filled(self.config, past, device, dtype) if past else None

    def shared(self) -> None:
        """The projections that both kinds of attention have."""
        for module in self.modules:
            module.queries(self.x, self.rotations)
            module.keys(self.x, self.rotations)
            module.o_proj(self.mixed)

    def parts(self) -> dict[str, Callable[[], Any]]:
        """What they do not share."""
        queries = [m.queries(self.x, self.rotations) for m in self.modules]
        keys = [m.keys(self.x, self.rotations) for m in self.modules]
        if self.cache is not None:
            keys = [tuple(part[:, 0] for part in self.cache.latents(i)) for i in (0, 1)]
        if not self.config.use_lsa:
            attend = [m._absorbed if self.plan.absorbed else m._naive for m in self.modules]
            given = [(a, q[1], q[2], k[0], k[1]) for a, q, k in zip(attend, queries, keys, strict=True)]
            return {"attend": lambda: [a(q, q_rope, k, k_rope, self.plan) for a, q, q_rope, k, k_rope in given]}
        owner = self.modules[0]

        def index() -> IndexSet:
            return owner._index(self.x, queries[0][0], self.rotations, self.plan, self.cache, None)

        columns = index().columns_BTK
        assert columns is not None
        given = [(m._sparse, q[1], q[2], k[0], k[1]) for m, q, k in zip(self.modules, queries, keys, strict=True)]
        return {
            "index": index,
            "attend": lambda: [a(q, q_rope, k, k_rope, columns) for a, q, q_rope, k, k_rope in given],
        }


class Filled:
    """A cache that holds ``past`` columns already and has room for the current token."""

    def __init__(self, config: Longcat2Config, past: int, device: torch.device, dtype: torch.dtype) -> None:
        def make(width: int) -> Tensor:
            return torch.randn(1, 1, past + 1, width, device=device, dtype=dtype)

        widths = [(config.kv_lora_rank, config.qk_rope_head_dim)] * 2
        if config.use_lsa:
            widths.append((config.index_head_dim, 0))
        self.buffers = [(make(a), make(b)) for a, b in widths]

    def latents(self, attention: int) -> tuple[Tensor, Tensor]:
        """Latents and rotary keys of one attention."""
        return self.buffers[attention]

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Writes the last column, returns all."""
        for buffer, new in zip(self.buffers[layer], (keys, values), strict=True):
            buffer[:, :, -new.shape[2] :] = new
        return self.buffers[layer]


def seconds(work: Callable[[], Any], device: torch.device, least: float = 0.3) -> float:
    """Of one call: the best of as many as it takes to fill ``least`` seconds."""
    best, spent, calls = float("inf"), 0.0, 0
    while calls == 0 or spent < least:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - started
        best, spent, calls = min(best, took), spent + took, calls + 1
    return best


def measure(
    kinds: list[dict[str, Any]], tokens: int, past: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> list[dict[str, float]]:
    """Of every kind: milliseconds of every part of a pair, of attention itself, and of the whole modules."""
    best: list[dict[str, float]] = [{} for _ in kinds]
    for _ in range(rounds):
        for found, fields in zip(best, kinds, strict=True):
            pair = Pair(fields, tokens, past, device, dtype)
            for name, work in {**pair.parts(), "shared": pair.shared}.items():
                found[name] = min(found.get(name, math.inf), seconds(work, device) * 1e3)
    for found in best:
        found["core"] = found.get("index", 0.0) + found["attend"]
        found["whole"] = found["core"] + found["shared"]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="LongCat-2.0's own sizes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lsa = FULL if options.full else SCALED
    dense = {name: value for name, value in lsa.items() if not name.startswith("index_")}
    lengths = [int(n) for n in options.lengths.split(",")]
    with torch.inference_mode():
        kinds = [dense, lsa, {**lsa, **PAGES}]
        prefill = {n: measure(kinds, n, 0, device, dtype, options.rounds) for n in lengths}
        decode = {n: measure(kinds[:2], 1, n, device, dtype, options.rounds) for n in lengths}
    show(prefill, decode)


def show(prefill: dict[int, list[dict[str, float]]], decode: dict[int, list[dict[str, float]]]) -> None:
    """The two tables."""
    console = Console(width=150)
    table = Table(title="prefill, ms (two attentions)")
    for name in ("tokens", "dense", "LSA", "LSA/dense", "indexer", "attend per 1k tokens", "modules LSA/dense"):
        table.add_column(name, justify="right")
    table.add_column("with HI: indexer", justify="right")
    table.add_column("LSA/dense", justify="right")
    for n, (dense, lsa, pages) in prefill.items():
        row = [n, *(f"{x:.4g}" for x in (dense["core"], lsa["core"])), f"{lsa['core'] / dense['core']:.3f}"]
        row += [f"{lsa['index']:.4g}", f"{lsa['attend'] / n * 1000:.3g}", f"{lsa['whole'] / dense['whole']:.3f}"]
        row += [f"{pages['index']:.4g}", f"{pages['core'] / dense['core']:.3f}"]
        table.add_row(*map(str, row))
    console.print(table)
    table = Table(title="decode, ms a token (two attentions)")
    for name in ("cached tokens", "dense", "LSA", "LSA/dense", "indexer", "attend", "modules: dense", "LSA"):
        table.add_column(name, justify="right")
    for n, (dense, lsa) in decode.items():
        row = [dense["core"], lsa["core"], lsa["core"] / dense["core"], lsa["index"], lsa["attend"]]
        row += [dense["whole"], lsa["whole"]]
        table.add_row(str(n), *(f"{x:.3f}" for x in row))
    console.print(table)


if __name__ == "__main__":
    main()
