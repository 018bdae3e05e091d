"""Hierarchical indexing: pages before tokens (arXiv 2608.01662)."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from posttrain.model.indexer import IndexQueries, index_scores
from posttrain.model.selection import best_columns, select
from posttrain.model.visibility import Visibility
from tests.model.longcat2_tiny import LSA, tiny, tokens

PAGE, BLOCK, PAGES = 8, 2, 3
HI: dict[str, Any] = {
    **LSA,
    "use_hi": True,
    "hi_page_size": PAGE,
    "hi_block_size": BLOCK,
    "hi_pages": PAGES,
    "hi_min_tokens": 20,
    "hi_skip_indexers": 0,
}
SINKS, LOCAL, BUDGET = LSA["index_init_tokens"], LSA["index_local_tokens"], LSA["index_topk"]


def _queries(length: int, seed: int = 0) -> IndexQueries:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, length, 3, 8), (1, length, 3), (1, length, 8))
    return IndexQueries(*(torch.randn(shape, generator=generator) for shape in shapes))


def _select(queries: IndexQueries, **changes: Any) -> Tensor:
    length = queries.q_BTID.shape[1]
    config = tiny(**{**HI, **changes}).config
    return select(queries, Visibility.causal(length, 0, queries.q_BTID.device), config, 0)[0]


def test_equals_the_flat_selection_while_every_page_is_taken() -> None:
    queries = _queries(70)
    assert torch.equal(_select(queries, hi_pages=9), _select(queries, use_hi=False))
    first = PAGES * PAGE  # so far every page is taken
    assert torch.equal(_select(queries)[:first], _select(queries, use_hi=False)[:first])
    assert not torch.equal(_select(queries), _select(queries, use_hi=False))


def test_the_sets_are_the_definition() -> None:
    queries = _queries(70, seed=1)
    scores = index_scores(*queries)[0]
    q, w, k = (x[0] for x in queries)
    for t, row in enumerate(_select(queries).tolist()):
        chosen = {c for c in row if c >= 0}
        forced = {s for s in range(t + 1) if s < SINKS or s > t - LOCAL}
        assert forced <= chosen and len(chosen) == min(t + 1, BUDGET) and max(chosen) <= t
        if t + 1 < HI["hi_min_tokens"]:
            continue
        own = t // PAGE
        value = {}
        for page in range(own):  # whole pages: the sum over sub-blocks of the mean key's score
            means = k[page * PAGE : (page + 1) * PAGE].view(-1, BLOCK, 8).mean(1)
            value[page] = float((w[t, :, None] * (q[t] @ means.T).relu()).sum())
        taken = {own, *sorted(value, key=lambda p: (value[p], p))[-(PAGES - 1) :]}
        inside = [s for s in range(t + 1) if s // PAGE in taken and s not in forced]
        best = sorted((float(scores[t, s]) for s in inside), reverse=True)[: BUDGET - len(forced)]
        assert {c // PAGE for c in chosen - forced} <= taken
        assert sorted((float(scores[t, c]) for c in chosen - forced), reverse=True) == pytest.approx(best, abs=1e-5)


def test_the_first_indexers_stay_flat() -> None:
    queries, config = _queries(70), tiny(**{**HI, "hi_skip_indexers": 1}).config
    visibility = Visibility.causal(70, 0, queries.q_BTID.device)
    flat = _select(queries, use_hi=False)
    assert torch.equal(select(queries, visibility, config, 0)[0], flat)
    assert not torch.equal(select(queries, visibility, config, 1)[0], flat)


def test_future_keys_do_not_matter() -> None:
    queries = _queries(70)
    before = _select(queries)
    changed = queries.k_BSD.clone()
    changed[:, 45:] = 9.0
    after = _select(IndexQueries(queries.q_BTID, queries.w_BTI, changed))
    assert torch.equal(before[:45], after[:45]) and not torch.equal(before, after)


def test_chunked_prefill_equals_the_whole_and_a_model_runs_with_it() -> None:
    model, ids = tiny(seed=5, **HI), tokens(2, 90, seed=1)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache, pieces = DynamicCache(), []
        for left, right in ((0, 13), (13, 50), (50, 90)):
            pieces.append(model(ids[:, left:right], past_key_values=cache).logits)
        flat = tiny(seed=5, **{**HI, "use_hi": False})(ids, use_cache=False).logits
    assert (torch.cat(pieces, dim=1) - full).abs().max() < 2e-5 * full.abs().max()
    assert (full - flat)[:, :PAGES * PAGE].abs().max() < 1e-5 and (full - flat).abs().max() > 1e-3  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(0, 4), st.integers(0, 1000))
def test_best_columns_are_those_of_topk(length: int, count: int, hidden: int, seed: int) -> None:
    scores = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(seed))
    scores[..., :hidden] = -torch.inf
    count = min(count, length)
    got = best_columns(scores, count)
    want = scores.topk(count, dim=-1)
    expected = want.indices.masked_fill(want.values == -torch.inf, -1).sort(dim=-1).values
    assert got.dtype == torch.int32 and got.tolist() == expected.tolist()
