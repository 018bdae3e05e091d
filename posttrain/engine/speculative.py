"""Speculative decoding with the model's own draft block (``posttrain.model.mtp``).

A round: the draft block proposes up to ``steps`` tokens a row, one forward of the whole model gives the policy's logits
after each of them, and the policy draws its own tokens from these. A draft stands while it is the token that was drawn.
Both draw by the inverse of their distribution's cumulative sum at the number that belongs to that token of the
request, so what is sampled is what would have been sampled without drafts; the draft decides only how fast.

The draft's key of column i is made of the model's state at i and token i + 1. Keys made of the draft's own states are
good for one round: the next one starts by making those of the accepted columns from the model's states, which a slot
keeps until then.

Shapes: B rows, T tokens a row, H hidden, V vocabulary, K columns attended to, N rows that are drawn for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain.engine.cache import SlotCache
from posttrain.engine.sampling import draw
from posttrain.engine.slots import Slot, lay_out


@dataclass(slots=True, kw_only=True)
class DraftCounts:
    """What came of drafts since the engine started. A round is one row in one verification."""

    rounds: int = 0
    tokens: int = 0
    """Tokens that the rounds sampled: those accepted, and the policy's own at the end."""
    proposed: list[int] = field(default_factory=list[int])
    """How often there was a first, second, ... draft."""
    accepted: list[int] = field(default_factory=list[int])
    """How often it became a token."""

    def since(self, earlier: DraftCounts) -> dict[str, float]:
        """Rates over the rounds after ``earlier``, by the names of metrics; empty if there were none."""
        rounds = self.rounds - earlier.rounds
        if not rounds:
            return {}
        before = [(p, a) for p, a in zip(earlier.proposed, earlier.accepted, strict=True)]
        before += [(0, 0)] * (len(self.proposed) - len(before))
        rates = {"draft/tokens_per_round": (self.tokens - earlier.tokens) / rounds}
        for place, (proposed, accepted) in enumerate(before):
            count = self.proposed[place] - proposed
            rates[f"draft/accepted_{place + 1}"] = (self.accepted[place] - accepted) / count if count else 0.0
        return rates


class Drafter:
    """Proposes tokens, and keeps the draft block's part of the cache. Raises ValueError for a model without one.
    ``model`` is the version that serves the slots."""

    def __init__(self, config: Any, cache: SlotCache, steps: int) -> None:
        there = getattr(config, "mtp_num_layers", None) or 0
        if steps > there:
            raise ValueError(
                f"engine.draft_steps: {steps}, but this model drafts {there} tokens at the most (its mtp_num_layers): "
                f"set engine.draft_steps to {there}, or train a model with a larger mtp_num_layers"
            )
        self.cache, self.steps = cache, steps
        self.counts = DraftCounts(proposed=[0] * steps, accepted=[0] * steps)

    def room(self, slot: Slot) -> int:
        """Drafts worth making for a slot; the last token of a request is the policy's own."""
        return min(self.steps, slot.room - 1) if slot.request is not None else 0

    def prefill(self, model: Any, slots: Sequence[Slot], states: Sequence[Tensor], ends: Sequence[int]) -> None:
        """Draft keys of what the model has just read of each slot, up to column ``end``, whose key needs the next token
        and waits. ``states`` [n, H] are those of the columns before it that are new."""
        known = [torch.cat((slot.states, new)) for slot, new in zip(slots, states, strict=True)]
        for slot, state_nH in zip(slots, known, strict=True):
            slot.states = state_nH[-1:].clone()  # not a view, which would keep them all
        starts = [end - len(state) for end, state in zip(ends, known, strict=True)]
        tokens = [slot.context[start + 1 : end] for slot, start, end in zip(slots, starts, ends, strict=True)]
        if not any(tokens):
            return
        rows = lay_out(self.cache, slots, tokens, starts, max(ends))
        hidden_BTH = pad_sequence(known, batch_first=True)[:, : rows.ids_BT.shape[1]]
        model.draft(hidden_BTH, rows.ids_BT, rows.mask_B1TS, rows.positions_BT, self.cache)

    def propose(self, model: Any, slots: Sequence[Slot]) -> list[list[int]]:
        """Drafts for each slot, none where there is no room."""
        counts, drafts = [self.room(s) for s in slots], [list[int]() for _ in slots]
        if not any(counts):
            return drafts
        # All steps see as many columns as the verification: they must be sparse, or dense, all of them.
        end = max(len(s.context) + n for s, n in zip(slots, counts, strict=True) if s.request is not None)
        tokens = [s.context[-len(s.states) :] if n else [] for s, n in zip(slots, counts, strict=True)]
        starts = [len(s.context) - 1 - len(t) for s, t in zip(slots, tokens, strict=True)]
        hidden_BTH, columns_BTK = self._take_states(slots, counts), None
        every_B = torch.arange(len(slots))
        for step in range(max(counts)):
            rows = lay_out(self.cache, slots, tokens, starts, end)
            logits_BTV, drafted = model.draft(
                hidden_BTH, rows.ids_BT, rows.mask_B1TS, rows.positions_BT, self.cache, columns_BTK
            )
            asked = [row for row, n in enumerate(counts) if n > step]
            logits_NV = logits_BTV[asked, rows.last_B[asked]].float()
            token_N, _ = draw(logits_NV, [slots[row] for row in asked], [step] * len(asked))
            for row, token in zip(asked, token_N.tolist(), strict=True):
                drafts[row].append(token)
            hidden_BTH = drafted.hidden_BTH[every_B, rows.last_B][:, None]
            tokens = [d[step:] if n > step + 1 else [] for d, n in zip(drafts, counts, strict=True)]
            starts = [len(s.context) - 1 + step for s in slots]
            if drafted.columns_BTK is not None:  # the first step's set, and the columns drafted since
                own = [start if t else -1 for start, t in zip(starts, tokens, strict=True)]
                own_B11 = torch.tensor(own, dtype=drafted.columns_BTK.dtype)[:, None, None]
                columns_BTK = torch.cat((drafted.columns_BTK[every_B, rows.last_B][:, None], own_B11), dim=-1)
        return drafts

    @staticmethod
    def _take_states(slots: Sequence[Slot], counts: Sequence[int]) -> Tensor:
        """The states that wait in the slots, [B, T, H], anything in idle rows."""
        states = [slot.states if n else None for slot, n in zip(slots, counts, strict=True)]
        some = next(s for s in states if s is not None)
        for slot, n in zip(slots, counts, strict=True):
            if n:
                slot.states = slot.states[:0]
        return pad_sequence([some[:1] if s is None else s for s in states], batch_first=True)

    def judged(self, slot: Slot, drafts: Sequence[int], states_TH: Tensor, tokens: Sequence[int]) -> None:
        """The policy drew ``tokens`` on ``drafts``; ``states_TH`` are its states at the columns that it read."""
        slot.states = torch.cat((slot.states, states_TH[: len(tokens)]))
        if drafts:
            self.counts.rounds += 1
            self.counts.tokens += len(tokens)
        for place, draft in enumerate(drafts):
            self.counts.proposed[place] += 1
            self.counts.accepted[place] += tokens[place : place + 1] == [draft]
