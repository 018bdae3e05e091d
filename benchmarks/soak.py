"""Whether a long stage grows: ``python benchmarks/soak.py [--episodes 50000]``.

A real stage (engine process, trainer, journal, checkpoints) of a model of a few thousand weights on the world of
requests, asynchronous and pinned in turn of stages. Every so often: resident memory of the training process and of the
engine's, open file handles of both, tasks of the event loop. The first fifth is warm-up. Exit status 1 if anything is
larger at the end than the bound says.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from envs.worlds import RequestsConfig, make_world
from experts.credit import GroupCredit, GroupCreditConfig
from experts.rollouts import Player
from experts.tasks import TaskStream
from experts.train import Stage, run_stage
from posttrain.chat import Chat, train_tokenizer
from posttrain.config import Config
from posttrain.metrics import Metrics
from posttrain.model import Longcat2Config, Longcat2ForCausalLM
from posttrain.objective_settings import DppoLoss
from posttrain.run import RunDir
from posttrain.settings import LocalEngineConfig, LoopConfig, TrainerConfig
from posttrain.types import Rollout, Score
from rewards import RewardConfig

SIZE, BATCH, RUNNING = 8, 16, 24
SHAPE: dict[str, Any] = {
    "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "ffn_hidden_size": 16, "expert_ffn_hidden_size": 8,
    "n_routed_experts": 2, "zero_expert_num": 1, "moe_topk": 1, "oe_vocab_size_ratio": 2.3, "oe_neighbor_num": 2,
    "oe_split_num": 1, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
BOUNDS = {"memory, MiB": 16.0, "engine's memory, MiB": 16.0, "handles": 4, "engine's handles": 4, "tasks": 220}
"""What may be more at the end than after the warm-up. As many tasks come and go with the groups under way."""


class SoakConfig(Config):
    """The config of the run directory."""


class EvenPlayer(Player):
    """Counts the episodes and rewards even tokens, so that groups differ."""

    seen: int = 0

    def _score(self, rollout: Rollout, outcome: float) -> Score:
        self.seen += 1
        ids = [i for s in rollout.branches[0] for i, m in zip(s.ids, s.sampled, strict=True) if m]
        return replace(super()._score(rollout, outcome), value=sum(i % 2 == 0 for i in ids) / len(ids))


def measure() -> dict[str, float]:
    """What may grow."""
    gc.collect()
    me = psutil.Process()
    engines = [p for p in me.children() if p.status() != psutil.STATUS_ZOMBIE and p.num_threads() > 1]
    return {
        "memory, MiB": me.memory_info().rss / 2**20,
        "engine's memory, MiB": sum(p.memory_info().rss for p in engines) / 2**20,
        "handles": me.num_fds(),
        "engine's handles": sum(p.num_fds() for p in engines),
        "tasks": len(asyncio.all_tasks()) if _running() else 0,
    }


def _running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def make_start(folder: Path) -> None:
    """A model at random, and a tokenizer of the world's words."""
    world = make_world(RequestsConfig(), "requests")
    tokenizer = train_tokenizer([m.content for t in world.tasks("train", 200, 0) for m in t.prompt], 256)
    torch.manual_seed(0)
    Longcat2ForCausalLM(Longcat2Config(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def soak(folder: Path, episodes: int, versions: str, progress: Progress) -> list[dict[str, float]]:
    """Train for so many episodes; what was measured, twenty times."""
    from transformers import AutoTokenizer

    steps = -(-episodes // (SIZE * BATCH))
    found: list[dict[str, float]] = []
    every = max(1, steps // 20)
    worlds = {"requests": make_world(RequestsConfig(), "requests")}
    player = EvenPlayer(worlds, Chat(AutoTokenizer.from_pretrained(folder)), RewardConfig())
    stage = Stage(
        name="expert-soak",
        start=folder,
        loop=LoopConfig(
            steps=steps, groups_per_step=BATCH, group_size=SIZE, max_running=RUNNING, versions=versions,  # pyright: ignore[reportArgumentType]
            checkpoint_every=max(1, steps // 10),
        ),
        trainer=TrainerConfig(lr=1e-4),
        loss=DppoLoss(constant_length=8),
        engine=LocalEngineConfig(slots=128, max_context=96),
        credit=GroupCredit(GroupCreditConfig()),
        player=player,
        source=TaskStream(worlds, {"requests": 1.0}, 500, seed=0),
        shares={"requests": 1.0},
        seed=0,
    )  # fmt: skip

    class Watched(Metrics):
        def log(self, step: int, stage: str, values: Any) -> Any:
            if step % every == 0:
                found.append({"step": step, "episodes": player.seen, **measure()})
            return super().log(step, stage, values)

    with RunDir.open(folder / f"run-{versions}", SoakConfig()) as run:
        metrics = Watched(run.metrics_file)
        asyncio.run(run_stage(stage, run, metrics, progress))
        metrics.close()
    return found


def grown(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """How much more of each there is in the last fifth than in the second."""
    fifth = max(1, len(found) // 5)
    early, late = found[fifth : 2 * fifth], found[-fifth:]
    return {name: fmean(f[name] for f in late) - fmean(f[name] for f in early) for name in BOUNDS}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--episodes", type=int, default=50_000, help="in each of the two modes")
    parser.add_argument("--versions", default="inflight,pinned")
    options = parser.parse_args()
    failed, table = False, Table("mode", "episodes", "episodes/s", *(f"{n}: growth (bound)" for n in BOUNDS))
    with tempfile.TemporaryDirectory() as folder, Progress(transient=True) as progress:
        make_start(Path(folder))
        for versions in options.versions.split(","):
            began = time.monotonic()
            found = soak(Path(folder), options.episodes, versions, progress)
            seconds = time.monotonic() - began
            more = grown(found)
            failed |= any(more[name] > bound for name, bound in BOUNDS.items())
            cells = [f"{more[n]:+.1f} ({bound:g}) of {found[-1][n]:.0f}" for n, bound in BOUNDS.items()]
            table.add_row(versions, f"{found[-1]['episodes']:.0f}", f"{found[-1]['episodes'] / seconds:.0f}", *cells)
    Console(width=160).print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
