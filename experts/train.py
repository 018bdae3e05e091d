"""Builds the parts of one RL stage and runs the loop on them; fusion calls it with another credit and loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from experts.rollouts import Player
from posttrain.engine.start import start_engine
from posttrain.journal import Journal, read_journal, rollout_from_dict, rollout_to_dict
from posttrain.loop import Group, Loop
from posttrain.metrics import Metrics
from posttrain.model.checkpoint import load_any
from posttrain.protocols import Credit
from posttrain.run import RunDir
from posttrain.settings import ClippedLoss, DistillLoss, LocalEngineConfig, LoopConfig, TrainerConfig
from posttrain.trainer import Trainer, save_state
from posttrain.types import Rollout, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of training, whatever gives it credit."""

    name: str
    """Also the name of its journal, checkpoint and metrics."""
    start: Path
    """Folder of the model it starts from."""
    loop: LoopConfig
    trainer: TrainerConfig
    loss: ClippedLoss | DistillLoss
    engine: LocalEngineConfig
    credit: Credit
    player: Player
    task: Callable[[int], Task]
    """Task of a group's number."""
    seed: int


class _RolloutJournal:
    """A journal of rollouts."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def write(self, record: Rollout) -> None:
        self._journal.write(rollout_to_dict(record))


async def run_stage(stage: Stage, run: RunDir, metrics: Metrics, progress: Progress) -> Path:
    """Train, going on from the stage's last checkpoint if there is one. Returns the folder of the trained model."""
    folder, journal_path = run.checkpoint(stage.name), run.rollouts(stage.name)
    state_path = folder / "state.pt"
    torch.manual_seed(stage.seed)
    model = load_any(stage.start, torch.float32)
    trainer = Trainer(model, stage.trainer, stage.loss, stage.loop.steps)
    state = torch.load(state_path, weights_only=True) if state_path.exists() else None
    if state is not None:
        trainer.restore(state["trainer"])
        log.info("%s: resumed at version %d", stage.name, trainer.version)
    metrics.rewind(stage.name, trainer.version)
    engine = await start_engine(stage.engine, stage.start)
    bar = progress.add_task(stage.name, total=stage.loop.steps, completed=trainer.version)

    drafts, noise = engine.stats(), stage.player.noise
    if noise is not None and state is not None:
        noise.load_state_dict(state["noise"])

    def on_step(version: int, stats: dict[str, float], batch: Sequence[Group]) -> None:
        nonlocal drafts
        earlier, drafts = drafts, engine.stats()
        if noise is not None:
            stats |= noise.update([r for g in batch for r in g.rollouts])
        metrics.log(version, stage.name, stats | _batch_stats(batch) | drafts.since(earlier))
        progress.update(bar, completed=version, description=f"{stage.name} {_reading(stats, batch)}")

    try:
        with Journal(journal_path) as journal:
            loop = Loop(
                stage.loop,
                name=stage.name,
                seed=stage.seed,
                engine=engine,
                trainer=trainer,
                credit=stage.credit,
                task=stage.task,
                run_rollout=stage.player,
                journal=_RolloutJournal(journal),
                on_step=on_step,
                checkpoint=lambda s: save_state(s if noise is None else {**s, "noise": noise.state_dict()}, state_path),
            )
            journalled = [rollout_from_dict(r) for r in read_journal(journal_path)]
            loop.resume(state or {"finished": [], "accepted": 0}, journalled)
            await loop.run()
    finally:
        await engine.close()
        trainer.close()
    trainer.save(folder)
    stage.player.chat.tokenizer.save_pretrained(folder)
    return folder


def _batch_stats(batch: Sequence[Group]) -> dict[str, float]:
    rollouts = [r for g in batch for r in g.rollouts]
    valid = [r for r in rollouts if r.score is not None and r.score.valid]
    stats: dict[str, float] = {
        "rollouts": len(rollouts),
        "invalid": len(rollouts) - len(valid),
        "parse_errors": _mean([len(r.parse_errors) for r in valid]),
        "tool_errors": _mean([r.tool_errors for r in valid]),
        "sampled_tokens": _mean([r.sampled_tokens for r in valid]),
        "silent_groups": _mean([not g.samples for g in batch]),
    }
    by_key: dict[str, list[Any]] = {"reward": [], "outcome": []}
    for r in valid:
        if r.score is not None:
            by_key["reward"].append(r.score.value)
            by_key["outcome"].append(r.score.outcome)
            by_key.setdefault(f"outcome/{r.task.world}", []).append(r.score.outcome)
            for part, value in r.score.parts.items():
                by_key.setdefault(f"reward/{part}", []).append(value)
    for r in rollouts:
        stats[f"stop/{r.stop}"] = stats.get(f"stop/{r.stop}", 0.0) + 1.0
    return stats | {k: _mean(v) for k, v in by_key.items() if v}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _reading(stats: dict[str, float], batch: Sequence[Group]) -> str:
    values = [r.score.value for g in batch for r in g.rollouts if r.score is not None]
    kl = f" kl {stats['kl_teacher']:.3f}" if "kl_teacher" in stats else ""
    return f"reward {_mean(values):.2f}{kl}"
