"""The draft block: what a step reads, sees and predicts; its loss; training equals drafting."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.model.longcat2_tiny import LSA, MTP, SHAPE, SlotCache, tiny, tokens

STEPS = MTP["mtp_num_layers"]
CASES = [pytest.param({}, id="dense"), pytest.param(LSA, id="lsa")]


def _unrolled(model: Any, ids: Tensor, **inputs: Any) -> list[Tensor]:
    """Logits of every step at every base, as training computes them."""
    with torch.no_grad():
        out = model.model(ids, use_cache=False, **inputs)
        rotary, plan = model.model.rotary, out.plan
        embedded = model.model.embed_tokens(ids)
        states, _ = model.model.mtp.unroll(
            out.last_hidden_state, embedded, lambda by: rotary(plan.position_ids + by), plan.attention
        )
        return [model.lm_head(state) for state in states]


def _mask(columns: int, positions: Tensor) -> Tensor:
    return (torch.arange(columns) <= positions.unsqueeze(-1)).unsqueeze(1)


def _drafted(model: Any, ids: Tensor, base: int) -> tuple[list[Tensor], list[Any]]:
    """Logits of the steps at ``base``, and their index sets, as a draft over a slot cache computes them: the tokens
    after the base are fed as if they had been drafted."""
    batch, columns = ids.shape[0], ids.shape[1] + STEPS
    cache: Any = SlotCache(batch, columns)
    with torch.no_grad():
        positions = torch.arange(base + 1).expand(batch, -1)
        cache.position_ids = positions
        hidden = model(
            ids[:, : base + 1], attention_mask=_mask(columns, positions), position_ids=positions, past_key_values=cache
        ).last_hidden_state
        logits, drafted = model.draft(hidden, ids[:, 1 : base + 2], _mask(columns, positions), positions, cache)
        found, sets = [logits[:, -1]], [drafted.columns_BTK]
        state, chosen = drafted.hidden_BTH[:, -1:], drafted.columns_BTK
        chosen = None if chosen is None else chosen[:, -1:]
        for step in range(1, STEPS):
            positions = torch.full((batch, 1), base + step)
            cache.position_ids = positions
            if chosen is not None:
                chosen = torch.cat((chosen, positions.unsqueeze(-1).to(chosen.dtype)), dim=-1)
            logits, drafted = model.draft(
                state, ids[:, base + step + 1, None], _mask(columns, positions), positions, cache, chosen
            )
            state = drafted.hidden_BTH
            found.append(logits[:, -1])
            sets.append(drafted.columns_BTK)
    return found, sets


@pytest.mark.parametrize("switches", CASES)
@pytest.mark.parametrize("base", [3, 25])
def test_training_computes_what_a_draft_computes(switches: dict[str, Any], base: int) -> None:
    model, ids = tiny(seed=8, **MTP, **switches), tokens(2, 40, seed=3)
    want = _unrolled(model, ids)
    got, sets = _drafted(model, ids, base)
    for step in range(STEPS):
        assert (got[step] - want[step][:, base]).abs().max() < 2e-5 * want[step].abs().max()
    if switches:  # one index set serves all steps, with the columns drafted since
        first = sets[0][:, -1].tolist()
        for step in range(1, STEPS):
            assert [row[: len(first[0])] for row in sets[step][:, 0].tolist()] == first
            assert sets[step][:, 0, len(first[0]) :].tolist() == [list(range(base + 1, base + step + 1))] * 2


def test_a_step_sees_nothing_after_the_tokens_it_was_given() -> None:
    model, ids = tiny(seed=8, **MTP, **LSA), tokens(1, 40, seed=3)
    changed = ids.clone()
    changed[0, 30] = (changed[0, 30] + 1) % SHAPE["vocab_size"]
    for step, (a, b) in enumerate(zip(_unrolled(model, ids), _unrolled(model, changed), strict=True), start=1):
        assert torch.allclose(a[:, : 30 - step], b[:, : 30 - step], atol=1e-5)
        assert (a[:, 30 - step] - b[:, 30 - step]).abs().max() > 1e-3  # step k at base i reads token i + k


def test_loss_is_the_mean_over_steps_of_the_shifted_cross_entropy() -> None:
    model, ids = tiny(seed=8, **MTP, mtp_loss_coef=0.3).train(), tokens(2, 12, seed=3)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    want = 0.0
    for step, logits in enumerate(_unrolled(model, ids), start=1):
        target = labels[:, step + 1 :]
        want += float(cross_entropy(logits[:, : -step - 1][target != -100], target[target != -100])) / STEPS
    plain = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert abs(float(out.mtp_loss) - want) < 1e-5
    assert abs(float(out.loss) - float(plain) - 0.3 * want) < 1e-5


def test_batch_of_micro_batches_weighs_like_one_batch() -> None:
    model = tiny(seed=8, ngram=False, **MTP, **LSA, mtp_loss_coef=0.3).train()
    ids = tokens(2, 30, seed=3)
    items = torch.tensor(2 * 29)
    with torch.enable_grad():
        whole = model(ids, labels=ids, num_items_in_batch=items).loss
        parts = [model(row, labels=row, num_items_in_batch=items).loss for row in ids.split(1)]
    assert abs(float(whole - sum(parts))) < 1e-5


def test_packed_documents_do_not_predict_each_other() -> None:
    model = tiny(seed=8, **MTP, mtp_loss_coef=1.0).train()
    rows = [tokens(1, n, seed=n, low=3) for n in (9, 14)]
    positions = torch.cat([torch.arange(r.shape[1]) for r in rows]).unsqueeze(0)
    ids = torch.cat(rows, dim=1)
    packed = model(ids, labels=ids, position_ids=positions).mtp_loss
    counts = [[row.shape[1] - step - 1 for row in rows] for step in range(1, STEPS + 1)]
    want = 0.0
    for step, (a, b) in enumerate(counts, start=1):
        for row, count in zip(rows, (a, b), strict=True):
            logits = _unrolled(model, row)[step - 1][:, : -step - 1].flatten(0, 1)
            want += float(cross_entropy(logits, row[0, step + 1 :])) * count / (a + b) / STEPS
    assert abs(float(packed) - want) < 1e-5


def test_without_labels_the_draft_learns_alone() -> None:
    model, ids = tiny(seed=8, **MTP, mtp_loss_coef=1.0).train(), tokens(2, 12, seed=3)
    model(ids).aux_loss.backward()
    for name, parameter in model.named_parameters():
        touched = parameter.grad is not None and bool(parameter.grad.any())
        assert touched == (".mtp." in name), name


def test_idle_parts_are_frozen() -> None:
    model = tiny(**MTP, **LSA)
    model.freeze_idle()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".mtp." in name or ".indexer." in name}
    indexers = tiny(**MTP, **LSA, indexer_loss_coef=0.1).train()
    indexers.freeze_idle()
    indexers(tokens(2, 30, seed=1)).aux_loss.backward()
    learned = {name for name, p in indexers.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {name for name, _ in indexers.named_parameters() if ".indexer." in name}
    assert any(".mtp." in name for name in learned)
    learning = tiny(**MTP, **LSA, mtp_loss_coef=0.1, indexer_loss_coef=0.1)
    learning.freeze_idle()
    assert all(p.requires_grad for p in learning.parameters())


def test_memorises_and_not_with_labels_moved_by_one() -> None:
    """Step k predicts token i + k + 1: on a memorised sequence its loss is near 0, one place further it is not."""
    torch.manual_seed(0)
    model = tiny(seed=8, **MTP, mtp_loss_coef=1.0).train()
    ids = tokens(2, 16, seed=3, low=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for step, logits in enumerate(_unrolled(model, ids), start=1):
        right = cross_entropy(logits[:, : -step - 1].flatten(0, 1), ids[:, step + 1 :].flatten())
        moved = cross_entropy(logits[:, : -step - 2].flatten(0, 1), ids[:, step + 2 :].flatten())
        assert right < 0.1 and moved > math.log(SHAPE["vocab_size"]) / 2


def test_a_model_without_a_draft_block_says_so() -> None:
    model: Any = tiny()
    with pytest.raises(ValueError, match="mtp_num_layers is 0: this model has no draft block"):
        model.draft(torch.zeros(1, 1, 48), tokens(1, 1), _mask(4, torch.zeros(1, 1)), torch.zeros(1, 1), None)
