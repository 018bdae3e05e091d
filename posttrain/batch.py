"""Samples packed into tensors.

Shapes: B sequences, T tokens (right-padded). Position t of a per-token tensor speaks of token t, whose log-prob comes
from the logits at t-1; position 0 is never trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    ids_BT: Tensor
    """Token ids, int64, padded at the right; a causal model needs no mask for that."""
    real_BT: Tensor
    """False on padding."""
    sampled_BT: Tensor
    """True on trained tokens."""
    behaviour_BT: Tensor
    """Log-probs of the engine that sampled."""
    advantages_BT: Tensor
    """Reward-based advantages."""
    teacher_BT: Tensor | None
    """Teacher log-probs, if a teacher gives the signal."""

    def to(self, device: torch.device) -> Batch:
        """The same batch elsewhere."""
        teacher = None if self.teacher_BT is None else self.teacher_BT.to(device)
        return Batch(
            ids_BT=self.ids_BT.to(device),
            real_BT=self.real_BT.to(device),
            sampled_BT=self.sampled_BT.to(device),
            behaviour_BT=self.behaviour_BT.to(device),
            advantages_BT=self.advantages_BT.to(device),
            teacher_BT=teacher,
        )


def pack(samples: Sequence[Sample], tokens_per_micro_batch: int) -> list[Batch]:
    """Micro-batches of at most that many padded tokens, similar lengths together. Deterministic; at least one
    sequence a micro-batch, however long."""
    order = sorted(samples, key=lambda s: (-len(s.ids), s.rollout))
    chunks: list[list[Sample]] = []
    for sample in order:
        if chunks and (len(chunks[-1]) + 1) * len(chunks[-1][0].ids) <= tokens_per_micro_batch:
            chunks[-1].append(sample)
        else:
            chunks.append([sample])
    return [_tensors(chunk) for chunk in chunks]


def _tensors(samples: Sequence[Sample]) -> Batch:
    width = max(len(s.ids) for s in samples)

    def pad(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        out = torch.zeros(len(rows), width, dtype=dtype)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row, dtype=dtype)
        return out

    sampled_BT = pad([s.sampled for s in samples], torch.bool)
    sampled_BT[:, 0] = False
    teachers = [s.teacher_logprobs for s in samples]
    return Batch(
        ids_BT=pad([s.ids for s in samples], torch.long),
        real_BT=pad([[True] * len(s.ids) for s in samples], torch.bool),
        sampled_BT=sampled_BT,
        behaviour_BT=pad([s.logprobs for s in samples], torch.float32),
        advantages_BT=pad([s.advantages for s in samples], torch.float32),
        teacher_BT=None if None in teachers else pad([t for t in teachers if t is not None], torch.float32),
    )
