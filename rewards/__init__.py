"""What is good: a finished episode in, a score with named parts out."""

from __future__ import annotations

from rewards.combine import PARTS, RewardConfig, score

__all__ = ["PARTS", "RewardConfig", "score"]
