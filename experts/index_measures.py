"""What the indexers of a model make of its attention, on rows that pass through it.

Legend: B batch, T tokens, S columns, K chosen columns, E latent and rotary width.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from posttrain.model.attention import AttentionPlan, LongcatMLA
from posttrain.model.index_loss import index_loss
from posttrain.model.indexer import IndexQueries
from posttrain.model.model import Longcat2Model
from posttrain.model.selection import select
from posttrain.model.sparse import support_probs


class IndexMeasures:
    """Watches every attention of the backbone while it is open. Makes matrices of T x S: for rows of modest length.

    Meaningful where attention is dense, since hidden states then do not depend on the indexers.
    """

    def __init__(self, model: Longcat2Model) -> None:
        self.config = model.config
        self._attentions = [module for module in model.layers.modules() if isinstance(module, LongcatMLA)]
        self._queries: IndexQueries | None = None
        self._sums: defaultdict[str, float] = defaultdict(float)

    def __enter__(self) -> IndexMeasures:
        self._handles = [a.register_forward_hook(self._look) for a in self._attentions]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def values(self) -> dict[str, float]:
        """``kl/I``: of indexer I, nats a token, summed over the attentions it serves. ``mass``: share of the attention
        that the chosen sets hold, mean over attentions and over tokens that see more than ``index_topk``;
        ``mass_best``: what sets chosen by the attention itself would hold. No masses if no token sees as much."""
        s, tokens = self._sums, self._sums["tokens"] / len(self._attentions)
        kl = {name: s[name] / tokens for name in sorted(s) if name.startswith("kl/")}
        return kl | {name: s[name] / s["choosing"] for name in ("mass", "mass_best") if s["choosing"]}

    @torch.no_grad()
    def _look(self, attention: LongcatMLA, inputs: Any, output: Any) -> None:
        x_BTH, rotations_BTP, plan = inputs[:3]
        c_q_BTQ, q_nope, q_rope = attention.queries(x_BTH, rotations_BTP)
        if self.config.owns_indexer(attention.attention_id):
            indexer = attention.indexer
            k_BSD = indexer.keys(x_BTH, rotations_BTP, None, None)
            self._queries = indexer.queries(x_BTH, c_q_BTQ, rotations_BTP, k_BSD)
        q_BThE = attention.latent_queries(q_nope, q_rope)
        kv_BSE = torch.cat(attention.keys(x_BTH, rotations_BTP), dim=-1)
        self._add(attention.attention_id // self.config.cli_factor, q_BThE, kv_BSE, plan)

    def _add(self, owner: int, q_BThE: torch.Tensor, kv_BSE: torch.Tensor, plan: AttentionPlan) -> None:
        c, sums, visibility = self.config, self._sums, plan.visibility
        assert self._queries is not None  # the first attention owns an indexer
        batch, tokens = q_BThE.shape[:2]
        live_BT = torch.ones(batch, tokens, dtype=torch.bool, device=q_BThE.device) if plan.live is None else plan.live
        count = int(live_BT.sum())
        sums["tokens"] += count
        sums[f"kl/{owner}"] += count * float(index_loss(self._queries, q_BThE, kv_BSE, None, visibility, plan.live))
        seen_BTS = visibility.rows(0, tokens).expand(batch, -1, -1)
        choosing_BT = live_BT & (seen_BTS.sum(dim=-1) > (c.index_topk or 0))
        if not choosing_BT.any():
            return
        every_BTS = torch.arange(seen_BTS.shape[-1], device=seen_BTS.device).where(seen_BTS, -1)
        p_BTS = support_probs(q_BThE, kv_BSE, every_BTS)
        chosen_BTK = select(self._queries, visibility, c, owner).long()
        held_BT = p_BTS.gather(2, chosen_BTK.clamp(min=0)).masked_fill(chosen_BTK < 0, 0.0).sum(dim=-1)
        forced_BTS = p_BTS.clone()
        visibility.force_and_hide(forced_BTS, 0, tokens, c.index_init_tokens, c.index_local_tokens)
        best_BTK = forced_BTS.topk(chosen_BTK.shape[-1], dim=-1).indices
        sums["choosing"] += int(choosing_BT.sum())
        sums["mass"] += float(held_BT[choosing_BT].sum())
        sums["mass_best"] += float(p_BTS.gather(2, best_BTK).sum(dim=-1)[choosing_BT].sum())
