"""What the rollouts of a step came to, as metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experts.credit import TRUNCATED
from posttrain.groups import Group
from posttrain.types import Rollout
from rewards.repetition import RepetitionPart


def batch_stats(batch: Sequence[Group], version: int) -> dict[str, float]:
    """Metrics of the groups that the step to ``version`` trained on: counts, and means over their valid rollouts."""
    rollouts = [r for g in batch for r in g.rollouts]
    valid = [r for r in rollouts if r.valid]
    repetition = RepetitionPart()
    stats: dict[str, float] = {
        "rollouts": len(rollouts),
        "invalid": len(rollouts) - len(valid),
        "parse_errors": _mean([len(r.parse_errors) for r in valid]),
        "parse_failures": sum(len(r.parse_errors) for r in valid) / max(1, sum(map(_turns, valid))),
        "tool_errors": _mean([r.tool_errors for r in valid]),
        "sampled_tokens": _mean([r.sampled_tokens for r in valid]),
        "truncated": _mean([r.stop in TRUNCATED for r in valid]),
        "repetition": _mean([1.0 - repetition(r, 0.0) for r in valid]),
        "silent_groups": _mean([not g.samples for g in batch]),
    }
    for r in rollouts:
        stats[f"stop/{r.stop}"] = stats.get(f"stop/{r.stop}", 0.0) + 1.0
    return stats | _scores(valid) | staleness_by_length(valid, version - 1)


def staleness_by_length(rollouts: Sequence[Rollout], trained: int) -> dict[str, float]:
    """Mean staleness, in versions before ``trained``, of the shorter and of the longer half; none of fewer than two."""
    sampled = [r for r in rollouts if r.oldest_version >= 0]
    ages = [trained - r.oldest_version for r in sorted(sampled, key=lambda r: (r.sampled_tokens, r.id))]
    half = len(ages) // 2
    return {"staleness_short": _mean(ages[:half]), "staleness_long": _mean(ages[half:])} if half else {}


def reading(stats: Mapping[str, float]) -> str:
    """The few numbers that a person watches."""
    kl = f" kl {stats['kl_teacher']:.3f}" if "kl_teacher" in stats else ""
    return f"reward {stats.get('reward', 0.0):.2f}{kl}"


def _scores(valid: Sequence[Rollout]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for r in valid:
        if r.score is not None:
            found.setdefault("reward", []).append(r.score.value)
            found.setdefault("outcome", []).append(r.score.outcome)
            found.setdefault(f"outcome/{r.task.world}", []).append(r.score.outcome)
            for part, value in r.score.parts.items():
                found.setdefault(f"reward/{part}", []).append(value)
    return {name: _mean(values) for name, values in found.items()}


def _turns(rollout: Rollout) -> int:
    return sum(m.role == "assistant" for m in rollout.messages[len(rollout.task.prompt) :])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
