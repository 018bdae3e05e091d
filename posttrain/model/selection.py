"""From scores to sets: SI (forced sink and local tokens inside the budget) and HI (pages before tokens).

Legend: B batch, T current tokens, t a chunk of them, S cached columns, I index heads, D = index_head_dim,
K = index_topk, P pages, M = hi_pages.
Source: LongCat Sparse Attention, arXiv 2608.01662.
"""

import torch
from torch import Tensor

from posttrain.model.config import Longcat2Config
from posttrain.model.indexer import IndexQueries, index_scores
from posttrain.model.visibility import Visibility

_GROUPS = 8
"""``best_columns`` looks at the best of so many scores before it looks at each."""


@torch.no_grad()
def select(queries: IndexQueries, visibility: Visibility, config: Longcat2Config, owner: int) -> Tensor:
    """The set S_t of every current token: int32 columns [B, T, min(K, S)], ascending, -1 where fewer are seen.

    The first ``index_init_tokens`` and last ``index_local_tokens`` of what is seen are in it, the rest are the best by
    score; of several scores of exactly 0 (relu makes many) the last columns', in whatever layout. ``owner`` is the
    number of the indexer: with HI the first few keep to this flat form.
    """
    batch, tokens = queries.q_BTID.shape[:2]
    budget = min(config.index_topk or 0, visibility.columns)
    chosen_BTK = torch.full((batch, tokens, budget), -1, dtype=torch.int32, device=queries.q_BTID.device)
    flat = tokens
    if config.use_hi and owner >= config.hi_skip_indexers:
        flat = _flat_tokens(visibility, config)
        for b in range(batch if flat < tokens else 0):
            chosen_BTK[b, flat:] = _select_by_pages(IndexQueries(*(x[b] for x in queries)), flat, visibility, config)
    step = 64 if chosen_BTK.device.type == "cpu" else 1024
    for start in range(0, flat, step):
        stop = min(start + step, flat)
        end = visibility.end(start, stop)
        scores_BtS = index_scores(queries.q_BTID[:, start:stop], queries.w_BTI[:, start:stop], queries.k_BSD[:, :end])
        scores_BtS += zeros_in_order(end, scores_BtS.device)
        visibility.force_and_hide(scores_BtS, start, stop, config.index_init_tokens, config.index_local_tokens)
        columns_BtK = best_columns(scores_BtS, min(budget, end))
        chosen_BTK[:, start:stop, budget - columns_BtK.shape[-1] :] = columns_BtK
    return chosen_BTK


def zeros_in_order(columns: int, device: torch.device) -> Tensor:
    """What, added to scores [..., S], puts those that are exactly 0 in the order of their columns. Far below any other
    score, which it leaves as it is."""
    return torch.arange(1, columns + 1, device=device) * 1e-30


def best_columns(scores: Tensor, count: int) -> Tensor:
    """Columns of the ``count`` largest of the last axis, int32, ascending; -1 in place of those that are -inf.

    The largest lie in the ``count`` strided groups with the largest maxima, so most scores are looked at once: on a CPU
    half the time of ``topk`` over 32 k scores.
    """
    groups = scores.shape[-1] // _GROUPS
    columns = None
    if scores.device.type == "cpu" and groups > 2 * count:
        head = scores[..., : groups * _GROUPS].unflatten(-1, (_GROUPS, groups))
        members = head.amax(dim=-2).topk(count, sorted=False).indices
        steps = torch.arange(0, groups * _GROUPS, groups, device=scores.device)
        rest = torch.arange(groups * _GROUPS, scores.shape[-1], device=scores.device)
        columns = (members.unsqueeze(-2) + steps.unsqueeze(-1)).flatten(-2)
        columns = torch.cat((columns, rest.expand(*columns.shape[:-1], -1)), dim=-1)
        scores = scores.gather(-1, columns)
    best = scores.topk(count, dim=-1, sorted=False)
    chosen = best.indices if columns is None else columns.gather(-1, best.indices)
    return chosen.to(torch.int32).masked_fill_(best.values == -torch.inf, -1).sort(dim=-1).values


def _flat_tokens(visibility: Visibility, config: Longcat2Config) -> int:
    """How many of the current tokens are too early for pages: those that see fewer than ``hi_min_tokens`` columns. All
    are, in a single step of decoding and in rows that do not start at the first column."""
    tokens = visibility.last_BT.shape[1]
    if tokens == 1 or visibility.allowed_BTS is not None or bool(visibility.first_BT.any()):
        return tokens
    return int((visibility.last_BT[0] + 1 < max(config.hi_min_tokens, config.index_topk or 0)).sum())


def _select_by_pages(queries: IndexQueries, start: int, visibility: Visibility, config: Longcat2Config) -> Tensor:
    """HI, for one row: int32 columns [T - start, K] of the tokens from ``start`` on, ascending.

    A page's score is that of its sub-blocks' mean keys, summed; the best M pages are scored token by token. The page a
    token is in has keys that it must not see, so it is taken without a score.
    """
    q_TID, w_TI, k_SD = queries
    page, block, tokens = config.hi_page_size, config.hi_block_size, q_TID.shape[0]
    whole = k_SD.shape[0] // page
    means_nD = k_SD[: whole * page].float().unflatten(0, (-1, block)).mean(dim=1)
    out = []
    step = 512
    for left in range(start, tokens, step):
        rows = slice(left, min(left + step, tokens))
        last_t = visibility.last_BT[0, rows]
        pages = int(last_t[-1]) // page + 1
        scores_tn = index_scores(q_TID[None, rows], w_TI[None, rows], means_nD[None, : pages * page // block])[0]
        score_tP = scores_tn.new_full((len(last_t), pages), -torch.inf)
        score_tP[:, : scores_tn.shape[1] // (page // block)] = scores_tn.unflatten(1, (-1, page // block)).sum(dim=-1)
        own_t1 = (last_t // page).unsqueeze(1)
        numbers_P = torch.arange(pages, device=last_t.device)
        score_tP += zeros_in_order(pages, last_t.device)
        score_tP.masked_fill_(numbers_P > own_t1, -torch.inf).masked_fill_(numbers_P == own_t1, torch.inf)
        taken_tM = best_columns(score_tP, min(config.hi_pages, pages))
        out.append(_best_in_pages(q_TID[rows], w_TI[rows], k_SD, last_t, taken_tM, config))
    return torch.cat(out)


def _best_in_pages(
    q_tID: Tensor, w_tI: Tensor, k_SD: Tensor, last_t: Tensor, taken_tM: Tensor, config: Longcat2Config
) -> Tensor:
    """Exact scores inside the pages of each token, then SI and the budget as ever; int32 [t, K]."""
    page, sinks, local = config.hi_page_size, config.index_init_tokens, config.index_local_tokens
    count, device = taken_tM.shape[1], last_t.device
    score_tMp = q_tID.new_full((*taken_tM.shape, page), -torch.inf, dtype=torch.float32)
    order_S = zeros_in_order(k_SD.shape[0], device)
    # By page, not by token: all tokens that took a page meet its keys in one matrix product.
    for number in taken_tM.unique().tolist():
        if number < 0:
            continue
        token, place = (taken_tM == number).nonzero(as_tuple=True)
        columns = slice(number * page, min((number + 1) * page, k_SD.shape[0]))
        scores = index_scores(q_tID[None, token], w_tI[None, token], k_SD[None, columns])[0] + order_S[columns]
        score_tMp[token, place, : scores.shape[1]] = scores
    column_tMp = taken_tM.unsqueeze(-1) * page + torch.arange(page, device=device)
    last_t11 = last_t[:, None, None]
    # The forced tokens come by themselves, whatever pages they are in.
    score_tMp.masked_fill_((column_tMp < sinks) | (column_tMp > last_t11 - local), -torch.inf)
    free = min((config.index_topk or 0) - sinks - local, count * page)
    places = best_columns(score_tMp.flatten(1), free).long()
    dynamic = column_tMp.flatten(1).gather(1, places.clamp(min=0)).masked_fill_(places < 0, -1).to(torch.int32)
    first = torch.arange(sinks, device=device, dtype=torch.int32).expand(len(last_t), -1)
    recent = last_t.unsqueeze(1) - torch.arange(local - 1, -1, -1, device=device)
    return torch.cat((first, dynamic, recent.to(torch.int32)), dim=1).sort(dim=1).values
