"""Hashed n-gram ids (over-encoding) of the input embedding.

Legend: B batch, T current tokens, S history columns, n = oe_neighbor_num (context length), G number of tables.
Source: N-gram embedding report arXiv 2601.21204, Eq. 1-3; boundary rules as in the released engines: the look-back
stops before the sequence start and at an EOS token (a *current* EOS still looks back over its own segment).
"""

import torch
from torch import Tensor

from posttrain.model.config import Longcat2Config
from posttrain.model.visibility import Visibility

PADDING = -1
"""Stored in place of a padding token: contributes nothing and stops the look-back."""


def table_rows(config: Longcat2Config) -> list[int]:
    """Rows of each table: M_t = int(ratio * vocab_size) + 2 * t + 1."""
    base = int((config.oe_vocab_size_ratio or 0) * config.vocab_size)
    return [base + 2 * t + 1 for t in range(config.num_ngram_tables)]


class NgramHasher:
    """Maps token contexts to table rows. Table t = (n - 2) * K + k hashes n-grams of order n."""

    def __init__(self, config: Longcat2Config) -> None:
        self.context = config.oe_neighbor_num or 1
        self.eos_ids = config.eos_token_ids
        self._rows = table_rows(config)
        orders = [t // (config.oe_split_num or 1) + 2 for t in range(len(self._rows))]
        self._powers = [
            [pow(config.vocab_size, j, m) if j < order else 0 for m, order in zip(self._rows, orders, strict=True)]
            for j in range(self.context)
        ]
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def ids(self, context_BTn: Tensor) -> Tensor:
        """Rows to read, int64 [B, T, G].

        Args:
            context_BTn: int64 token ids, entry j is the token j steps back (0 the current one), PADDING where none.
        """
        powers_nG, rows_G = self._constants_on(context_BTn.device)
        stops_BTn = context_BTn < 0
        for eos in self.eos_ids:
            stops_BTn = stops_BTn | (context_BTn == eos)
        open_BTn = (~stops_BTn[..., 1:]).cumprod(dim=-1)  # nothing between the current token and j stops the look-back
        kept_BTn = torch.cat((context_BTn[..., :1].clamp(min=0), context_BTn[..., 1:] * open_BTn), dim=-1)
        return (kept_BTn.unsqueeze(-1) * powers_nG).sum(dim=-2) % rows_G

    def contexts(self, history_BS: Tensor, visibility: Visibility) -> Tensor:
        """Contexts [B, T, n] of the current tokens, for ``ids``, from the token ids of all columns."""
        steps_n = torch.arange(self.context, device=history_BS.device)
        columns_BTn = visibility.columns_of(visibility.own_rank_BT().unsqueeze(-1) - steps_n)
        columns_BTn = columns_BTn.expand(len(history_BS), -1, -1)
        picked = history_BS.gather(1, columns_BTn.clamp(min=0).flatten(1)).view_as(columns_BTn)
        return picked.masked_fill(columns_BTn < 0, PADDING)

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants:
            powers = torch.tensor(self._powers, dtype=torch.int64, device=device)
            self._constants[device] = powers, torch.tensor(self._rows, dtype=torch.int64, device=device)
        return self._constants[device]
