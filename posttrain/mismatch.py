"""How far the trainer's log-probs are from those the engine sampled with, by the staleness of the token.

At staleness 0 both speak of the same weights, so that their gap is what engine and trainer compute differently; every
version more adds what the policy has moved. An engine that keeps the cache of older weights as new ones come has some
of that at staleness 0 as well. Imports no torch: a report reads this too.

Shapes: N trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

LOWEST, HIGHEST, A_DECADE = -6, 1, 8
"""Powers of ten between which gaps are told apart, and bins in each."""
EDGES = tuple(10.0 ** (LOWEST + i / A_DECADE) for i in range((HIGHEST - LOWEST) * A_DECADE + 1))
"""In nats. Bin 0 is what lies below the first, bin i what lies from edge i-1 to edge i, the last one what is left."""
UNDONE = -1
"""Staleness of tokens of a version that a kill undid: the run that goes on makes another version of that number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """Absolute differences of log-probs, in nats, of tokens of one staleness."""

    tokens: int
    """Trained ones."""
    gated: int
    """Those whose signal the objective took away."""
    total: float
    """Sum of the gaps."""
    largest: float
    bins: tuple[int, ...]
    """Tokens by gap, see ``EDGES``."""

    @classmethod
    def of(cls, gap_N: np.ndarray, gated_N: np.ndarray) -> Gaps:
        """Count tokens, at least one."""
        bins = np.bincount(np.searchsorted(EDGES, gap_N, side="right"), minlength=len(EDGES) + 1)
        return cls(
            tokens=len(gap_N),
            gated=int(gated_N.sum()),
            total=float(gap_N.sum(dtype=np.float64)),
            largest=float(gap_N.max()),
            bins=tuple(bins.tolist()),
        )

    def __add__(self, other: Gaps) -> Gaps:
        return Gaps(
            tokens=self.tokens + other.tokens,
            gated=self.gated + other.gated,
            total=self.total + other.total,
            largest=max(self.largest, other.largest),
            bins=tuple(a + b for a, b in zip(self.bins, other.bins, strict=True)),
        )

    @property
    def mean(self) -> float:
        """In nats."""
        return self.total / self.tokens

    @property
    def gated_share(self) -> float:
        """Of the tokens."""
        return self.gated / self.tokens

    def quantile(self, share: float) -> float:
        """The gap, in nats, that ``share`` of the tokens do not exceed; right to within a bin, a factor of 10^(1/8)."""
        rank, before = share * self.tokens, 0
        for place, count in enumerate(self.bins):
            if count and before + count >= rank:
                return self._within(place, (rank - before) / count)
            before += count
        return self.largest

    def _within(self, place: int, part: float) -> float:
        """The gap at ``part`` of the way through a bin, which is even in the logarithm unless it begins at 0."""
        low = EDGES[place - 1] if place else 0.0
        high = min((self.largest, *EDGES[place : place + 1]))
        return low * (high / low) ** part if low else high * part

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        sums = {"tokens": self.tokens, "gated": self.gated, "total": self.total, "largest": self.largest}
        return {**sums, "bins": list(self.bins)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Gaps:
        """What ``to_dict`` gave."""
        return cls(**{**record, "bins": tuple(record["bins"])})


class Mismatch:
    """Collects the tokens of one step. Nothing is computed, and no device waited for, before ``gaps``."""

    def __init__(self, version: int) -> None:
        self.version = version
        """The one being trained."""
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, log_ratio_N: Tensor, version_N: Tensor, gated_N: Tensor) -> None:
        """Tokens of a micro-batch: trainer's minus engine's log-prob, the version that sampled, whether gated."""
        self._seen.append((log_ratio_N.detach(), version_N, gated_N))

    def gaps(self) -> dict[int, Gaps]:
        """By staleness, the smallest first."""
        if not self._seen:
            return {}
        ratio_N, version_N, gated_N = (
            np.concatenate([part.cpu().numpy() for part in parts]) for parts in zip(*self._seen, strict=True)
        )
        gap_N, age_N = np.abs(ratio_N), np.maximum(self.version - version_N, UNDONE)
        return {int(age): Gaps.of(gap_N[age_N == age], gated_N[age_N == age]) for age in np.unique(age_N)}


def to_record(version: int, gaps: Mapping[int, Gaps]) -> dict[str, Any]:
    """One step, that to ``version``, as a line of a journal."""
    return {"version": version, "staleness": {str(age): g.to_dict() for age, g in gaps.items()}}


def from_record(record: Mapping[str, Any]) -> dict[int, Gaps]:
    """By staleness, what ``to_record`` was given."""
    return {int(age): Gaps.from_dict(g) for age, g in record["staleness"].items()}


def together(steps: Iterable[Mapping[int, Gaps]]) -> dict[int, Gaps]:
    """Several steps as one, by staleness, the smallest first."""
    found: dict[int, Gaps] = {}
    for step in steps:
        for age, gaps in step.items():
            found[age] = found[age] + gaps if age in found else gaps
    return dict(sorted(found.items()))


__all__ = ["A_DECADE", "EDGES", "LOWEST", "UNDONE", "Gaps", "Mismatch", "from_record", "to_record", "together"]
