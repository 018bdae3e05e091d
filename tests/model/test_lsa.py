"""LongCat Sparse Attention: the set of every token, and what attends to it (arXiv 2608.01662)."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from posttrain.model import Longcat2ForCausalLM
from posttrain.model.indexer import IndexQueries, index_scores
from posttrain.model.selection import select
from posttrain.model.visibility import Visibility
from tests.model.longcat2_tiny import LSA, SHAPE, SlotCache, slot_forward, tiny, tokens

TOLERANCE = 2e-5
SINKS, LOCAL, BUDGET = LSA["index_init_tokens"], LSA["index_local_tokens"], LSA["index_topk"]


def _sets(model: Longcat2ForCausalLM, ids: Tensor, **inputs: Any) -> list[Tensor]:
    """Columns [B, T, K] of each layer's one indexer."""
    with torch.no_grad():
        out = model(ids, output_choices=True, use_cache=False, **inputs)
    assert out.index_sets is not None
    return [columns[:, :, 0] for columns in out.index_sets]


def _reference_scores(model: Longcat2ForCausalLM, ids: Tensor, layer: int) -> Tensor:
    """I_{t,s} written out, in float64, from the states that enter the layer."""
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    block: Any = model.model.layers[layer]
    attention, indexer = block.self_attn[0], block.self_attn[0].indexer
    x = block.input_layernorm[0](states[layer]).double()

    def rms(v: Tensor, weight: Tensor, eps: float) -> Tensor:
        return v * (v.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()

    latent = rms(x @ attention.q_a_proj.weight.double().mT, attention.q_a_layernorm.weight, 1e-5)
    latent = latent * (SHAPE["hidden_size"] / SHAPE["q_lora_rank"]) ** 0.5
    heads, width, rope = LSA["index_n_heads"], LSA["index_head_dim"], SHAPE["qk_rope_head_dim"]
    q = (latent @ indexer.wq_b.weight.double().mT).unflatten(-1, (heads, width))
    k = rms(x @ indexer.wk.weight.double().mT, indexer.k_norm.weight, 1e-6)
    w = x @ indexer.weights_proj.weight.double().mT
    angles = torch.arange(ids.shape[1]).double()[:, None] * model.model.rotary.inv_freq.double()
    cos, sin = angles.cos(), angles.sin()

    def turn(v: Tensor, c: Tensor, s: Tensor) -> Tensor:
        a, b = v[..., 0:rope:2], v[..., 1:rope:2]
        pairs = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
        return torch.cat((pairs, v[..., rope:]), dim=-1)

    q, k = turn(q, cos[:, None], sin[:, None]), turn(k, cos, sin)
    dots = torch.einsum("btid,bsd->btis", q, k).relu()
    return torch.einsum("bti,btis->bts", w, dots) * (heads * width) ** -0.5


def test_scores_are_the_formula_and_the_set_is_the_best_of_them() -> None:
    model, ids = tiny(seed=5, **LSA), tokens(2, 50, seed=1)
    for layer, columns_BTK in enumerate(_sets(model, ids)):
        scores = _reference_scores(model, ids, layer)
        for b in range(2):
            for t in range(50):
                chosen = [c for c in columns_BTK[b, t].tolist() if c >= 0]
                forced = {s for s in range(t + 1) if s < SINKS or s > t - LOCAL}
                rest = sorted((scores[b, t, s].item() for s in range(t + 1) if s not in forced), reverse=True)
                free = sorted((scores[b, t, s].item() for s in chosen if s not in forced), reverse=True)
                assert forced <= set(chosen) and len(chosen) == len(set(chosen)) == min(t + 1, BUDGET)
                # ties make sets differ between kernels: what is compared is the scores that were chosen
                assert free == pytest.approx(rest[: len(free)], abs=1e-5)
                assert chosen == sorted(chosen)


def test_forced_then_topk_equals_the_union_form() -> None:
    scores = torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(0))  # continuous: no ties
    visibility = Visibility.causal(40, 0, scores.device)
    forced = scores.clone()
    visibility.force_and_hide(forced, 0, 40, SINKS, LOCAL)
    for t in range(40):
        row = forced[0, t].topk(min(BUDGET, t + 1)).indices.tolist()
        must = {s for s in range(t + 1) if s < SINKS or s > t - LOCAL}
        free = [s for s in scores[0, t, : t + 1].argsort(descending=True).tolist() if s not in must]
        assert set(row) == must | set(free[: max(BUDGET - len(must), 0)])


def test_sparse_equals_dense_within_the_budget_and_not_beyond() -> None:
    sparse, dense = tiny(seed=5, **LSA), tiny(seed=5)
    dense.load_state_dict({k: v for k, v in sparse.state_dict().items() if ".indexer." not in k})
    ids = tokens(2, 3 * BUDGET, seed=2)
    with torch.no_grad():
        got, want = sparse(ids, use_cache=False).logits, dense(ids, use_cache=False).logits
        short = sparse(ids[:, :BUDGET], use_cache=False).logits
    assert torch.equal(short, dense(ids[:, :BUDGET], use_cache=False).logits)  # not only close: the same path
    assert (got - want)[:, :BUDGET].abs().max() < TOLERANCE  # gathered, but everything
    assert (got - want)[:, BUDGET:].abs().max() > 0.05
    whole = tiny(seed=5, **{**LSA, "index_topk": 3 * BUDGET})
    whole.load_state_dict(sparse.state_dict())
    with torch.no_grad():
        assert (whole(ids, use_cache=False).logits - want).abs().max() < TOLERANCE


def test_raising_a_score_selects_the_column() -> None:
    generator = torch.Generator().manual_seed(3)
    queries = IndexQueries(
        torch.randn(1, 30, 2, 8, generator=generator),
        torch.rand(1, 30, 2, generator=generator),
        torch.randn(1, 30, 8, generator=generator),
    )
    config, visibility = tiny(**LSA).config, Visibility.causal(30, 0, queries.q_BTID.device)
    t = 29
    before = set(select(queries, visibility, config, 0)[0, t].tolist())
    left_out = next(s for s in range(SINKS, t - LOCAL) if s not in before)
    q, w, k = queries
    k = k.clone()
    k[0, left_out] = 10 * q[0, t].sum(0)
    raised = IndexQueries(q, w, k)
    assert index_scores(*raised)[0, t, left_out] > index_scores(*queries)[0, t, left_out]
    assert left_out in select(raised, visibility, config, 0)[0, t].tolist()


def test_reusing_attention_has_no_indexer_and_the_same_set() -> None:
    model = tiny(seed=5, **LSA)
    names = [name for name, _ in model.named_parameters() if ".indexer." in name]
    assert names and all(".self_attn.0." in name for name in names)
    own = tiny(seed=5, **{**LSA, "cli_factor": 1})
    assert sum(".indexer." in n for n, _ in own.named_parameters()) == 2 * len(names)
    ids = tokens(1, 40, seed=4)
    with torch.no_grad():
        first, second = (m(ids, output_choices=True, use_cache=False).index_sets for m in (model, own))
    assert [s.shape[2] for s in first] == [1, 1] and [s.shape[2] for s in second] == [2, 2]
    assert any(not torch.equal(s[:, :, 0], s[:, :, 1]) for s in second)


@pytest.mark.parametrize("position", [0, 20, 45])
def test_causality(position: int) -> None:
    model, ids = tiny(seed=5, **LSA), tokens(1, 50, seed=2)
    changed = ids.clone()
    changed[0, position] = (changed[0, position] + 1) % SHAPE["vocab_size"]
    with torch.no_grad():
        before, after = model(ids, use_cache=False).logits, model(changed, use_cache=False).logits
    assert torch.allclose(before[:, :position], after[:, :position], atol=1e-5)
    assert (before[:, position] - after[:, position]).abs().max() > 1e-3


MODEL = tiny(seed=5, **LSA)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=4), st.integers(0, 3), st.booleans())
def test_any_chunking_equals_the_full_forward(chunks: list[int], pad: int, from_config: bool) -> None:
    ids = tokens(2, sum(chunks), seed=sum(chunks))
    mask = torch.ones_like(ids)
    mask[0, : min(pad, chunks[0])] = 0
    cache = DynamicCache(config=MODEL.config) if from_config else DynamicCache()
    with torch.no_grad():
        full = MODEL(ids, attention_mask=mask, use_cache=False).logits
        start, pieces = 0, []
        for size in chunks:
            part = slice(start, start + size)
            pieces.append(MODEL(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache).logits)
            start += size
    assert ((torch.cat(pieces, dim=1) - full)[mask.bool()]).abs().max() < TOLERANCE * full.abs().max()
    assert {cache.get_seq_length(i) for i in range(MODEL.config.num_hidden_layers)} == {sum(chunks)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    lengths = [50, 31, 9]
    rows = [tokens(1, n, seed=n) for n in lengths]
    pads = [(50 - n, 0) if side == "left" else (0, 50 - n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, pad, value=3) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, pads, strict=True)])
    with torch.no_grad():
        got = MODEL(ids, attention_mask=mask, use_cache=False).logits
        for b, row in enumerate(rows):
            want = MODEL(row, use_cache=False).logits[0]
            assert (got[b, mask[b].bool()] - want).abs().max() < TOLERANCE * want.abs().max()


def test_padding_in_the_middle_of_a_cached_row() -> None:
    first, second = tokens(1, 20, seed=1), tokens(1, 15, seed=2)
    other = tokens(1, 43, seed=3)
    gap = other.new_full((4,), 3)
    ids = torch.stack([torch.cat([gap, first[0], gap, second[0]]), other[0]])
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[0, 24:28] = 0
    with torch.no_grad():
        cache = DynamicCache()
        MODEL(ids[:, :28], attention_mask=mask[:, :28], past_key_values=cache)
        got = MODEL(ids[:, 28:], attention_mask=mask, past_key_values=cache).logits
        want = MODEL(torch.cat([first, second], dim=1), use_cache=False).logits[0, 20:]
    assert (got[0] - want).abs().max() < TOLERANCE * want.abs().max()


def test_packed_documents_do_not_see_each_other() -> None:
    parts = [tokens(1, n, seed=n, low=3) for n in (35, 12, 40)]
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts]).unsqueeze(0)
    with torch.no_grad():
        packed = MODEL(torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
        want = torch.cat([MODEL(p, use_cache=False).logits for p in parts], dim=1)
    assert (packed - want).abs().max() < TOLERANCE * want.abs().max()


def test_slot_cache_with_rows_at_different_positions() -> None:
    lengths, steps = [5, 40, 23], 6
    rows = tokens(3, max(lengths) + steps, seed=6)
    cache = SlotCache(3, 60)
    with torch.no_grad():
        prefill = slot_forward(MODEL, cache, rows[:, : max(lengths)], torch.arange(max(lengths)).expand(3, -1))
        stepped = [[prefill[b, n - 1]] for b, n in enumerate(lengths)]
        for step in range(steps):
            positions = torch.tensor(lengths).unsqueeze(1) + step
            logits = slot_forward(MODEL, cache, rows.gather(1, positions), positions)
            for b in range(3):
                stepped[b].append(logits[b, 0])
        for b, n in enumerate(lengths):
            want = MODEL(rows[b : b + 1, : n + steps], use_cache=False).logits[0, n - 1 :]
            assert (torch.stack(stepped[b]) - want).abs().max() < TOLERANCE * want.abs().max()


def test_no_matrix_of_all_pairs_beyond_the_budget() -> None:
    """Attention gathers: the largest thing made grows with the length, not with its square."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                    Largest.elements = max(Largest.elements, tensor.numel())
            return out

    model = tiny(seed=5, **LSA, max_position_embeddings=4096)
    with torch.no_grad(), Largest():
        model(tokens(1, 3000, seed=2), use_cache=False)
    assert Largest.elements < 3000 * 3000 / 8
