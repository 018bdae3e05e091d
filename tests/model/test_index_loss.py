"""The indexer's loss (arXiv 2608.01662): its value, its gradient, and whom it reaches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from posttrain.model import Longcat2ForCausalLM
from posttrain.model import index_loss as module
from posttrain.model.index_loss import index_loss
from posttrain.model.indexer import IndexQueries
from posttrain.model.visibility import Visibility, from_padding
from tests.model.longcat2_tiny import LSA, MTP, tiny, tokens

B, T, HEADS, E, INDEX_HEADS, D, K = 2, 19, 3, 6, 2, 5, 7
CPU = torch.device("cpu")
LEARNING: dict[str, Any] = {**LSA, "indexer_loss_coef": 0.7}


class Case:
    """Random queries of an indexer and of two attentions that share it; a set of columns for every token."""

    def __init__(self, seed: int, sparse: bool, live: bool = False) -> None:
        g = torch.Generator().manual_seed(seed)
        self.queries = IndexQueries(
            torch.randn(B, T, INDEX_HEADS, D, generator=g).requires_grad_(),
            torch.randn(B, T, INDEX_HEADS, generator=g).requires_grad_(),
            torch.randn(B, T, D, generator=g).requires_grad_(),
        )
        self.q = [torch.randn(B, T, HEADS, E, generator=g) for _ in range(2)]
        self.kv = [torch.randn(B, T, E, generator=g) for _ in range(2)]
        real = torch.ones(B, T, dtype=torch.bool)
        if live:
            real[1, :6] = False
        self.live = real if live else None
        self.visibility = from_padding(real, T)[0] if live else Visibility.causal(T, 0, CPU)
        self.seen = self.visibility.rows(0, T).expand(B, T, T)
        self.columns = None
        if sparse:
            scores = torch.rand(B, T, T, generator=g).masked_fill(~self.seen, -1)
            best = scores.topk(K, dim=-1)
            self.columns = best.indices.masked_fill(best.values < 0, -1).to(torch.int32).sort(dim=-1).values

    def loss(self, attention: int) -> Tensor:
        return index_loss(self.queries, self.q[attention], self.kv[attention], self.columns, self.visibility, self.live)

    def plain(self, attention: int, queries: IndexQueries) -> Tensor:
        """The formula written out in float64, over all pairs."""
        support = self.seen
        if self.columns is not None:
            support = torch.zeros(B, T, T + 1, dtype=torch.bool).scatter(2, self.columns.long() % (T + 1), True)
            support = support[..., :T]  # -1 went to the last place
        logits = torch.einsum("bthe,bse->bths", self.q[attention].double(), self.kv[attention].double())
        p = logits.masked_fill(~support[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0).mean(2)
        scores = torch.einsum("bti,btis->bts", queries.w_BTI, torch.einsum("btid,bsd->btis", *queries[::2]).relu())
        log_pi = scores.masked_fill(~support, -torch.inf).log_softmax(-1)
        kl = (torch.xlogy(p, p) - p * log_pi.masked_fill(~support, 0.0)).sum(-1)
        live = torch.ones(B, T) if self.live is None else self.live
        return (kl * live).sum() / live.sum()


@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_it_is_the_formula_and_never_negative(seed: int, sparse: bool, live: bool) -> None:
    case = Case(seed, sparse, live)
    queries = IndexQueries(*(x.detach().double() for x in case.queries))
    got = case.loss(0).item()
    assert got == pytest.approx(case.plain(0, queries).item(), rel=1e-5, abs=1e-6)
    assert got >= 0


@pytest.mark.parametrize("sparse", [False, True])
def test_it_is_zero_where_the_scores_are_the_log_weights(sparse: bool) -> None:
    """One index head, a key a column (one-hot), and queries that hold log p, moved above 0 so that relu keeps them."""
    case = Case(3, sparse)
    logits = torch.einsum("bthe,bse->bths", case.q[0], case.kv[0]).masked_fill(~case.seen[:, :, None], -torch.inf)
    if case.columns is not None:
        chosen = torch.zeros(B, T, T + 1, dtype=torch.bool).scatter(2, case.columns.long() % (T + 1), True)[..., :T]
        logits = logits.masked_fill(~chosen[:, :, None], -torch.inf)
    log_p = logits.softmax(-1).mean(2).log().clamp(min=-50.0)
    queries = IndexQueries((log_p + 60.0)[:, :, None], torch.ones(B, T, 1), torch.eye(T).expand(B, T, T))
    loss = index_loss(queries, case.q[0], case.kv[0], case.columns, case.visibility, None)
    assert abs(loss.item()) < 1e-5  # log p + 60 has four decimals in float32
    moved = IndexQueries(queries.q_BTID * 1.3, queries.w_BTI, queries.k_BSD)
    assert index_loss(moved, case.q[0], case.kv[0], case.columns, case.visibility, None).item() > 0.01


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_gradient_is_that_of_the_formula_summed_over_two_attentions(sparse: bool, live: bool) -> None:
    case = Case(5, sparse, live)
    (2.5 * (case.loss(0) + case.loss(1))).backward()
    exact = IndexQueries(*(x.detach().double().requires_grad_() for x in case.queries))
    (2.5 * (case.plain(0, exact) + case.plain(1, exact))).backward()
    for got, want in zip(case.queries, exact, strict=True):
        assert got.grad is not None and want.grad is not None
        assert want.grad.abs().max() > 0.01
        assert (got.grad - want.grad).abs().max() < 1e-6


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("values", [1, 2000])
def test_the_size_of_a_chunk_does_not_matter(sparse: bool, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Case(7, sparse, live=True), Case(7, sparse, live=True)
    want = whole.loss(0)
    want.backward()
    monkeypatch.setattr(module, "_CHUNK", values)  # a token at a time, and a few
    got = parts.loss(0)
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    for a, b in zip(parts.queries, whole.queries, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).abs().max() < 1e-6


# The whole model


def learner(stage: Any = "sparse", **changes: Any) -> Longcat2ForCausalLM:
    model = tiny(seed=5, **{**LEARNING, **changes}).train()
    model.model.set_indexer_stage(stage)
    return model


def gradients(model: Longcat2ForCausalLM) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("changes", [{}, {"cli_factor": 1}, {**MTP, "mtp_loss_coef": 0.5}], ids=["cli", "own", "mtp"])
def test_it_reaches_the_indexers_alone_and_the_lm_loss_all_but_them(stage: str, changes: dict[str, Any]) -> None:
    ids = tokens(2, 40, seed=1)
    model = learner(stage, **changes)
    model(ids).index_loss.backward()
    indexers = {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert set(gradients(model)) == indexers

    model = learner(stage, **changes)
    out = model(ids, labels=ids)
    (out.loss - out.index_loss * LEARNING["indexer_loss_coef"]).backward()
    assert set(gradients(model)) == {name for name, _ in model.named_parameters()} - indexers


def test_one_backward_gives_each_its_own_gradient() -> None:
    ids = tokens(2, 40, seed=1)
    both, apart = learner(), learner()
    both(ids, labels=ids).loss.backward()
    out = apart(ids, labels=ids)
    (out.loss - out.aux_loss).backward(retain_graph=True)
    (LEARNING["indexer_loss_coef"] * out.index_loss).backward()
    got, want = gradients(both), gradients(apart)
    assert set(got) == set(want)
    assert all((got[name] - want[name]).abs().max() < 1e-6 for name in got)


def test_it_is_there_only_where_something_learns_from_it() -> None:
    ids = tokens(1, 40, seed=1)
    assert learner().eval()(ids).index_loss is None
    with torch.no_grad():
        assert learner()(ids).index_loss is None
    assert tiny(seed=5, **LSA).train()(ids).index_loss is None
    short = learner()(ids[:, :8])  # no more than the budget: over everything in sight
    assert short.index_loss.item() == pytest.approx(learner("dense")(ids[:, :8]).index_loss.item(), rel=1e-6)


def left_padded(rows: list[Tensor]) -> Callable[[Longcat2ForCausalLM], Any]:
    width = max(row.shape[1] for row in rows)
    pads = [(width - row.shape[1], 0) for row in rows]
    ids = torch.cat([torch.nn.functional.pad(r, p, value=3) for r, p in zip(rows, pads, strict=True)])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, pads, strict=True)])
    return lambda model: model(ids, attention_mask=mask)


def packed(rows: list[Tensor]) -> Callable[[Longcat2ForCausalLM], Any]:
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows]).unsqueeze(0)
    return lambda model: model(torch.cat(rows, dim=1), position_ids=positions)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("layout", [left_padded, packed])
def test_padding_and_packing_do_not_change_it(stage: str, layout: Any) -> None:
    """Rows of 20, 31 and 43 tokens, all beyond the budget, alone and together: a mean over tokens either way."""
    rows = [tokens(1, n, seed=n, low=3) for n in (20, 31, 43)]
    alone = learner(stage)
    want = torch.stack([row.shape[1] * alone(row).index_loss for row in rows]).sum() / (20 + 31 + 43)
    want.backward()
    together = learner(stage)
    got = layout(rows)(together).index_loss
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    expected = gradients(alone)
    for name, gradient in gradients(together).items():
        assert (gradient - expected[name]).abs().max() < 2e-5 * max(1.0, float(expected[name].abs().max())), name


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same(stage: str, reentrant: bool) -> None:
    ids, found = tokens(2, 30), []
    for checkpointing in (False, True):
        model = learner(stage)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        out = model(ids, labels=ids)
        out.loss.backward()
        found.append((out.index_loss.item(), gradients(model)))
    assert found[0][0] == found[1][0]
    assert set(found[0][1]) == set(found[1][1]) and any(".indexer." in name for name in found[0][1])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
