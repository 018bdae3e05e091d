"""Samples packed into tensors.

Shapes: B sequences, T tokens (right-padded), N trained tokens row by row, L layers, O indexers a layer, K chosen, or of
a support. Position t of a per-token tensor speaks of token t, whose log-prob comes from the logits at t-1; position 0
is never trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from posttrain.model.layer import LayerReplay
from posttrain.prompts import Prompts, shared, stack, without
from posttrain.types import Choices, Sample, Support

_BY_TOKEN = ("support_NK", "support_teacher_NK")
"""Fields that have a row for every trained token."""


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
    versions_BT: Tensor
    """Policy versions that sampled, int32; of no meaning where nothing is trained."""
    teacher_BT: Tensor | None
    """Teacher log-probs, if a teacher gives the signal."""
    support_NK: Tensor | None = None
    """Ids of other tokens that the teacher judged, int64, -1 for none; if it did."""
    support_teacher_NK: Tensor | None = None
    """Teacher log-probs of these."""
    slots_BTLK: Tensor | None = None
    """Recorded MoE slots of every layer, int32, -1 where there is no record; only on demand."""
    columns_BTLOK: Tensor | None = None
    """Recorded columns of every layer's indexers, int32, -1 where there is none; only on demand."""

    prompts: Prompts | None = None
    """What the sequences continue, if they share it; the tensors above then begin with its last token."""

    def to(self, device: torch.device) -> Batch:
        """The same batch elsewhere."""
        moved = {f.name: t.to(device) for f in fields(self) if (t := getattr(self, f.name)) is not None}
        return replace(self, **moved)

    @property
    def judged_ids(self) -> Tensor:
        """Token ids whose log-probs a step asks of the policy: the trained ones, ``[N]``, and where there is a support
        its own after them, ``[N, 1 + K]``, with the trained one again where a row is filled up."""
        ids_N = self.ids_BT[:, 1:][self.sampled_BT[:, 1:]]
        if self.support_NK is None:
            return ids_N
        return torch.cat([ids_N[:, None], torch.where(self.support_NK < 0, ids_N[:, None], self.support_NK)], 1)

    @property
    def replay(self) -> list[LayerReplay] | None:
        """What each layer shall choose; None: the model chooses."""
        if self.slots_BTLK is None:
            return None
        slots = self.slots_BTLK.unbind(2)
        columns = [None] * len(slots) if self.columns_BTLOK is None else self.columns_BTLOK.unbind(2)
        return [LayerReplay(s, c) for s, c in zip(slots, columns, strict=True)]

    def idle(self) -> Batch:
        """The same forward, which trains nothing and counts for nothing."""
        none = {f: None if t is None else t[:0] for f in _BY_TOKEN for t in (getattr(self, f),)}
        nothing = torch.zeros_like(self.real_BT)
        return replace(self, sampled_BT=nothing, real_BT=nothing, **none)


def pack(
    samples: Sequence[Sample],
    tokens_per_micro_batch: int,
    choices: bool = False,
    share: bool = False,
    packed: bool = False,
) -> list[Batch]:
    """Micro-batches of at most that many padded tokens, similar lengths together. Deterministic; at least one
    sequence a micro-batch, however long. ``choices``: with what the model chose, which every sample must have.
    ``share``: what samples begin with is in ``prompts``, if that saves something. ``packed``: padding costs nothing."""
    if share and (groups := shared(samples)):
        return _pack_groups(groups, tokens_per_micro_batch)
    chunks = _chunks(samples, tokens_per_micro_batch, packed)
    batches = [_tensors(chunk) for chunk in chunks]
    if choices:
        recorded = [
            _choices([s.choices for s in chunk if s.choices is not None], len(chunk[0].ids)) for chunk in chunks
        ]
        batches = [replace(b, slots_BTLK=s, columns_BTLOK=c) for b, (s, c) in zip(batches, recorded, strict=True)]
    return batches


def deal(
    samples: Sequence[Sample],
    tokens_per_micro_batch: int,
    rank: int,
    count: int,
    choices: bool = False,
    share: bool = False,
    packed: bool = False,
) -> list[Batch]:
    """What one of ``count`` ranks has of ``samples``, at least one, packed: similar lengths in all ranks, and as many
    micro-batches, since a forward takes all of them. The last of a rank may be idle. ``share``: for one rank."""
    if count == 1:
        return pack(samples, tokens_per_micro_batch, choices, share, packed)
    order = _order(samples)
    most = max(len(_chunks(order[r::count], tokens_per_micro_batch, packed)) for r in range(count))
    batches = pack(order[rank::count], tokens_per_micro_batch, choices, packed=packed)
    if len(batches) < most:
        (shortest,) = pack(order[-1:], tokens_per_micro_batch, choices)
        batches += [shortest.idle()] * (most - len(batches))
    return batches


def _order(samples: Sequence[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda s: (-len(s.ids), s.rollout))


def _chunks(samples: Sequence[Sample], tokens_per_micro_batch: int, packed: bool) -> list[list[Sample]]:
    chunks: list[list[Sample]] = []
    room = 0
    for sample in _order(samples):
        cost = len(sample.ids) if packed or not chunks else len(chunks[-1][0].ids)
        if cost > room:
            chunks.append([])
            cost, room = len(sample.ids), tokens_per_micro_batch
        chunks[-1].append(sample)
        room -= cost
    return chunks


def _pack_groups(groups: Mapping[tuple[int, ...], Sequence[Sample]], size: int) -> list[Batch]:
    """Whole groups together, those whose prompts are as long."""
    tails = {prompt: [without(s, len(prompt)) for s in rows] for prompt, rows in groups.items()}
    longest = {prompt: max(len(s.ids) for s in rows) for prompt, rows in tails.items()}
    chunks: list[tuple[list[tuple[int, ...]], list[Sample]]] = []
    width = 0
    for prompt in sorted(tails, key=lambda p: (-len(p), -longest[p], tails[p][0].rollout)):
        for tail in sorted(tails[prompt], key=lambda s: (-len(s.ids), s.rollout)):
            prompts, rows = chunks[-1] if chunks else (list[tuple[int, ...]](), list[Sample]())
            fits = (len(rows) + 1) * max(width, len(tail.ids)) + len({*prompts, prompt}) * len(prompt) <= size
            if not chunks or len(prompts[0]) != len(prompt) or not fits:
                chunks.append(([], []))
                (prompts, rows), width = chunks[-1], 0
            prompts.append(prompt)
            rows.append(tail)
            width = max(width, len(tail.ids))
    return [replace(_tensors(rows), prompts=stack(prompts) if prompts[0] else None) for prompts, rows in chunks]


def _tensors(samples: Sequence[Sample]) -> Batch:
    width = max(len(s.ids) for s in samples)

    def pad(rows: Sequence[Sequence[float]], dtype: type[np.generic]) -> Tensor:
        out = np.zeros((len(rows), width), dtype)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return torch.from_numpy(out)

    sampled_BT = pad([s.sampled for s in samples], np.bool_)
    sampled_BT[:, 0] = False
    versions = [(s.oldest_version,) * len(s.ids) if s.versions is None else s.versions for s in samples]
    teachers = [s.teacher_logprobs for s in samples]
    support_NK, support_teacher_NK = _support([s.teacher_support for s in samples])
    return Batch(
        ids_BT=pad([s.ids for s in samples], np.int64),
        real_BT=pad([[True] * len(s.ids) for s in samples], np.bool_),
        sampled_BT=sampled_BT,
        behaviour_BT=pad([s.logprobs for s in samples], np.float32),
        advantages_BT=pad([s.advantages for s in samples], np.float32),
        versions_BT=pad(versions, np.int32),
        teacher_BT=None if None in teachers else pad([t for t in teachers if t is not None], np.float32),
        support_NK=support_NK,
        support_teacher_NK=support_teacher_NK,
    )


def _support(supports: Sequence[Support | None]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Ids and log-probs of all rows, filled up to the widest; nothing if a sample has none."""
    found = [s for s in supports if s is not None]
    if len(found) < len(supports):
        return None, None
    width = max(s.width for s in found)

    def rows(values: Sequence[bytes], dtype: str, fill: float) -> Tensor:
        of_each = [np.frombuffer(v, dtype).reshape(-1, s.width) for v, s in zip(values, found, strict=True)]
        wide = [np.pad(v, ((0, 0), (0, width - v.shape[1])), constant_values=fill) for v in of_each]
        return torch.from_numpy(np.concatenate(wide))

    return rows([s.ids for s in found], "<i4", -1).long(), rows([s.logprobs for s in found], "<f4", 0.0)


def _choices(choices: Sequence[Choices], width: int) -> tuple[Tensor, Tensor | None]:
    """Slots and, where there are any, columns of right-padded rows."""
    slots_BTLK = torch.full((len(choices), width, *choices[0].slot_shape), -1, dtype=torch.int32)
    columns_BTLOK = torch.full((len(choices), width, *choices[0].column_shape), -1, dtype=torch.int32)
    for row, c in enumerate(choices):
        slots, columns = np.frombuffer(c.slots, "<u2"), np.frombuffer(c.columns, "<i4")
        slots_BTLK[row, : c.positions] = torch.tensor(slots.astype(np.int32)).view(-1, *c.slot_shape)
        if columns.size:
            columns_BTLOK[row, : c.positions] = torch.tensor(columns.astype(np.int32)).view(-1, *c.column_shape)
    return slots_BTLK, columns_BTLOK if columns_BTLOK.numel() else None
