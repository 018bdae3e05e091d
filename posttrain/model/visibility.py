"""Which cached columns each current token sees, and where columns stand in their sequence.

Legend: B batch (or 1 where all rows agree), T current tokens, t a chunk of them, S cached columns.

Nearly always a token sees a range of columns: ``first`` (its document's start, or the first column that is not padding)
to ``last`` (its own). Only holes, or a mask that the caller made, need ``allowed``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Visibility:
    """See the module."""

    first_BT: Tensor
    """int64, first column of the token's own sequence."""
    last_BT: Tensor
    """int64, its own column."""
    columns: int
    """S."""
    allowed_BTS: Tensor | None = None
    """Bool, narrower than the range; None: the range."""
    rank_BS: Tensor | None = None
    """int64 [B, S], position of each column in its sequence, where that is not ``column - first``."""

    @classmethod
    def causal(cls, tokens: int, past: int, device: torch.device) -> "Visibility":
        """One document in every row, ``past`` columns before the current tokens."""
        last_T = torch.arange(past, past + tokens, device=device).unsqueeze(0)
        return cls(torch.zeros_like(last_T), last_T, past + tokens)

    def end(self, start: int, stop: int) -> int:
        """Columns that the tokens ``start..stop`` can see at the most."""
        return self.columns if self.allowed_BTS is not None else int(self.last_BT[:, start:stop].max()) + 1

    def rows(self, start: int, stop: int) -> Tensor:
        """Bool [B, t, ``end(start, stop)``]: what the tokens ``start..stop`` see."""
        if self.allowed_BTS is not None:
            return self.allowed_BTS[:, start:stop]
        columns = torch.arange(self.end(start, stop), device=self.last_BT.device)
        first, last = self.first_BT[:, start:stop, None], self.last_BT[:, start:stop, None]
        return (columns >= first) & (columns <= last)

    def own_rank_BT(self) -> Tensor:
        """Position of each current token in its sequence, int64 [B, T]."""
        if self.allowed_BTS is None:
            return self.last_BT - self.first_BT
        if self.rank_BS is None:
            return self.last_BT
        batch = max(len(self.rank_BS), len(self.last_BT))
        return self.rank_BS.expand(batch, -1).gather(1, self.last_BT.expand(batch, -1))

    def columns_of(self, rank_BTK: Tensor) -> Tensor:
        """Columns, int64 [B, T, K], of positions in each token's sequence; -1 where it has none, or does not see it."""
        own_BT1 = self.own_rank_BT().unsqueeze(-1)
        hidden_BTK = (rank_BTK < 0) | (rank_BTK > own_BT1)
        if self.allowed_BTS is None:
            return (rank_BTK + self.first_BT.unsqueeze(-1)).masked_fill(hidden_BTK, -1)
        rank_BTK = rank_BTK.masked_fill(hidden_BTK, 0)
        column_BTK = rank_BTK
        if self.rank_BS is not None:
            # A padding column has the rank of the real one before it: the first column of a rank is the real one.
            ranks_BS = torch.arange(self.columns, device=rank_BTK.device).repeat(len(self.rank_BS), 1)
            table_BS = torch.searchsorted(self.rank_BS.contiguous(), ranks_BS).clamp(max=self.columns - 1)
            batch = max(len(table_BS), len(rank_BTK))
            column_BTK = table_BS.expand(batch, -1).gather(1, rank_BTK.expand(batch, -1, -1).flatten(1))
            column_BTK = column_BTK.view(batch, *rank_BTK.shape[1:])
        allowed_BTS = self.allowed_BTS.expand(len(column_BTK), column_BTK.shape[1], -1)
        return column_BTK.masked_fill(hidden_BTK | ~allowed_BTS.gather(2, column_BTK), -1)

    def force_and_hide(self, scores_BtS: Tensor, start: int, stop: int, sinks: int, local: int) -> None:
        """Overwrites scores of ``end(start, stop)`` columns in place: +inf for the first ``sinks`` and last ``local``
        tokens of what is seen (SI, arXiv 2608.01662), -inf for what is not seen."""
        first, last = self.first_BT[:, start:stop, None], self.last_BT[:, start:stop, None]
        columns = torch.arange(scores_BtS.shape[-1], device=scores_BtS.device)
        if self.allowed_BTS is not None:
            ranks = columns if self.rank_BS is None else self.rank_BS[:, None]
            own = self.own_rank_BT()[:, start:stop, None]
            scores_BtS.masked_fill_((ranks < sinks) | (ranks > own - local), torch.inf)
            scores_BtS.masked_fill_(~self.rows(start, stop), -torch.inf)
            return
        # Only the two ends need looking at: what lies between them is seen, and not forced.
        head = min(int(first.max()) + sinks, len(columns))
        tail = max(int(last.min()) - local + 1, 0)
        scores_BtS[..., :head].masked_fill_(columns[:head] < first + sinks, torch.inf)
        scores_BtS[..., tail:].masked_fill_(columns[tail:] > last - local, torch.inf)
        scores_BtS[..., :head].masked_fill_(columns[:head] < first, -torch.inf)
        scores_BtS[..., tail:].masked_fill_(columns[tail:] > last, -torch.inf)


def from_padding(real_BS: Tensor, tokens: int) -> tuple[Visibility, Tensor]:
    """Rows with padding, the current tokens at the end; also the current tokens' positions, int64 [B, T]."""
    columns = real_BS.shape[1]
    rank_BS = real_BS.cumsum(dim=1) - 1
    last_T = torch.arange(columns - tokens, columns, device=real_BS.device)
    first_B = real_BS.to(torch.uint8).argmax(dim=1)
    starts_B = (real_BS[:, 1:] & ~real_BS[:, :-1]).sum(dim=1) + real_BS[:, 0]
    last_BT = last_T.unsqueeze(0).expand(len(real_BS), -1)
    first_BT = first_B.unsqueeze(1).expand(-1, tokens)
    position_BT = rank_BS[:, -tokens:].clamp(min=0)
    if not (starts_B > 1).any():
        return Visibility(first_BT, last_BT, columns), position_BT
    allowed = (torch.arange(columns, device=real_BS.device) <= last_T.unsqueeze(1)) & real_BS.unsqueeze(1)
    return Visibility(first_BT, last_BT, columns, allowed, rank_BS), position_BT


def from_documents(position_ids_BT: Tensor) -> Visibility | None:
    """Several documents in one uncached row, told by positions that restart; None if there is one document only."""
    restarts = position_ids_BT.diff(dim=1) != 1
    if not restarts.any():
        return None
    tokens = position_ids_BT.shape[1]
    last_T = torch.arange(tokens, device=position_ids_BT.device)
    starts_BT = torch.nn.functional.pad(restarts, (1, 0), value=True)
    first_BT = torch.where(starts_BT, last_T, 0).cummax(dim=1).values
    return Visibility(first_BT, last_T.unsqueeze(0), tokens)


def from_mask(mask_B1TS: Tensor, position_ids_BT: Tensor, slots: bool) -> Visibility:
    """A 4-D mask, bool or additive. With ``slots`` column and position are one; without a cache the columns are the
    current tokens."""
    mask_BTS = mask_B1TS[:, 0]
    allowed_BTS = mask_BTS if mask_BTS.dtype == torch.bool else mask_BTS >= 0
    if slots:
        return Visibility(torch.zeros_like(position_ids_BT), position_ids_BT, mask_BTS.shape[-1], allowed_BTS)
    last_T = torch.arange(mask_BTS.shape[1], device=mask_BTS.device).unsqueeze(0)
    return Visibility(torch.zeros_like(last_T), last_T, mask_BTS.shape[-1], allowed_BTS, position_ids_BT)
