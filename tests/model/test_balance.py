"""Load control, balance loss, z-loss, padding (LongCat-Flash report, arXiv 2509.01322, section 2.1)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.model import Longcat2Config
from posttrain.model.balance import bias_update, device_balance_loss, hidden_z_loss, slot_counts
from posttrain.model.layer import LayerReplay
from tests.model.longcat2_tiny import SHAPE, tiny, tokens

N, Z, K = (SHAPE[key] for key in ("n_routed_experts", "zero_expert_num", "moe_topk"))


def _config(**changes: Any) -> Longcat2Config:
    return Longcat2Config(**{**SHAPE, "moe_target_topk": 3, **changes})


def test_bias_update_by_hand() -> None:
    config = Longcat2Config(
        **{**SHAPE, "n_routed_experts": 2, "zero_expert_num": 1, "moe_topk": 2, "moe_target_topk": 1}
    )
    counts = torch.tensor([5.0, 1.0, 4.0])  # 5 tokens, 2 slots each; wanted: 1/4 of all routings a routed slot
    step = bias_update(counts, config, 0.1)
    assert step.tolist() == pytest.approx([0.1 * (0.25 - 0.5), 0.1 * (0.25 - 0.1), 0.0])
    assert not bias_update(torch.zeros(3), config, 0.1).any()


def test_controller_brings_the_mean_to_the_target() -> None:
    """With a stationary router the mean number of routed slots becomes K_e, and all routed slots are used alike."""
    generator = torch.Generator().manual_seed(0)
    config = _config()
    scores = (torch.randn(4000, N + Z, generator=generator) + torch.linspace(-1, 1, N + Z)).softmax(-1)
    bias = torch.zeros(N + Z)
    for step in range(600):
        slots = (scores + bias).topk(K, dim=-1).indices
        bias += bias_update(slot_counts(slots[None], None, N + Z), config, 0.3 / (1 + step / 60))
    counts = slot_counts((scores + bias).topk(K, dim=-1).indices[None], None, N + Z)
    assert abs(float(counts[:N].sum()) / 4000 - 3) < 0.03
    assert counts[:N].max() / counts[:N].min() < 1.1
    assert not bias[N:].any()


def test_balance_loss_is_one_on_target_and_counts_by_hand() -> None:
    config = _config(router_balance_groups=2)
    scores = torch.softmax(torch.randn(4, N + Z, generator=torch.Generator().manual_seed(1)), -1)
    # 4 tokens, target 3 of 4: six routings to each group of three, four to identity
    slots = torch.tensor([[0, 1, 3, 6], [2, 4, 5, 7], [0, 1, 3, 8], [2, 4, 5, 6]])
    assert float(device_balance_loss(scores, slots, None, config)) == pytest.approx(1.0, abs=1e-6)
    slots[0, 2] = 0  # one routing moves from the second group to the first
    p = scores.mean(0)
    want = 7 / 6 * p[:3].sum() + 5 / 6 * p[3:6].sum() + p[6:].sum()
    assert float(device_balance_loss(scores, slots, None, config)) == pytest.approx(float(want), abs=1e-6)


def test_balance_loss_ignores_padding_and_pushes_towards_the_empty_group() -> None:
    config = _config(router_balance_groups=2)
    logits = torch.zeros(6, N + Z, requires_grad=True)
    slots = torch.tensor([[0, 1, 2, 6]] * 6)
    live = torch.tensor([True] * 4 + [False] * 2)
    device_balance_loss(logits.softmax(-1), slots, live, config).backward()
    assert logits.grad is not None
    assert not logits.grad[4:].any()
    assert (logits.grad[:4, :3] > 0).all() and (logits.grad[:4, 3:6] < 0).all()


def test_z_loss_by_hand_and_masked() -> None:
    hidden = torch.tensor([[[1.0, -2.0], [0.0, 0.0], [3.0, 3.0]]])
    each = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 3.0]]).exp().sum(-1).log().square()
    assert float(hidden_z_loss(hidden, None)) == pytest.approx(float(each.mean()))
    live = torch.tensor([[True, True, False]])
    assert float(hidden_z_loss(hidden, live)) == pytest.approx(float(each[:2].mean()))


def _padded(model: Any) -> tuple[Tensor, Tensor]:
    ids, mask = tokens(2, 9, seed=1), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return ids, mask


def test_padding_goes_to_an_identity_slot_and_is_not_counted() -> None:
    model: Any = tiny(moe_target_topk=3, router_bias_update_rate=0.1).train()
    ids, mask = _padded(model)
    out = model(ids, attention_mask=mask, output_choices=True)
    for slots in out.slots:
        assert (slots[1, 5:] == N).all()
        assert (slots[0] < N).any() and (slots[1, :5] < N).any()
    assert model.model.load.sum(1).tolist() == [14 * K] * 2
    want = torch.stack([slot_counts(slots, mask.bool(), N + Z) for slots in out.slots])
    assert torch.equal(model.model.load, want)


def test_update_uses_and_clears_the_counts_of_a_whole_step() -> None:
    model: Any = tiny(moe_target_topk=3, router_bias_update_rate=0.1).train()
    ids, mask = _padded(model)
    before = [layer.mlp.router.e_score_correction_bias.clone() for layer in model.model.layers]
    for row, row_mask in zip(ids.split(1), mask.split(1), strict=True):  # two micro-batches of one step
        model(row, attention_mask=row_mask)
    counts = model.model.load.clone()
    model.model.update_router_biases(decay=0.5)
    assert model.model.load is None
    for layer, old, row in zip(model.model.layers, before, counts, strict=True):
        bias = layer.mlp.router.e_score_correction_bias
        assert torch.allclose(bias - old, bias_update(row, model.config, 0.05), atol=1e-7)
        assert torch.equal(bias[N:], old[N:])
    model.eval()(ids)
    assert model.model.load is None  # nothing is counted outside training


def test_gradient_checkpointing_counts_once() -> None:
    model: Any = tiny(moe_target_topk=3, router_bias_update_rate=0.1).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 9, seed=1)
    model(ids, labels=ids).loss.backward()
    assert model.model.load.sum(1).tolist() == [18 * K] * 2


def test_losses_enter_with_their_coefficients() -> None:
    coefficients: dict[str, Any] = {"router_aux_loss_coef": 0.01, "z_loss_coef": 0.002}
    model: Any = tiny(moe_target_topk=3, **coefficients).train()
    ids = tokens(2, 9, seed=1)
    out = model(ids, labels=ids)
    want = 0.01 * out.balance_loss + 0.002 * out.z_loss
    assert float(out.aux_loss) == pytest.approx(float(want), rel=1e-6)
    plain = tiny(moe_target_topk=3).train()(ids, labels=ids)
    assert plain.aux_loss is None and plain.balance_loss is None and plain.z_loss is None
    assert float(out.loss - plain.loss) == pytest.approx(float(want), rel=1e-3)
    out.aux_loss.backward()
    assert all(layer.mlp.router.classifier.weight.grad.abs().max() > 0 for layer in model.model.layers)


def test_replayed_slots_are_used_and_free_rows_choose() -> None:
    ids = tokens(1, 6, seed=1)
    model: Any = tiny(seed=2)
    with torch.no_grad():
        free = model(ids, output_choices=True, use_cache=False)
        wanted = [(slots + 1) % (N + Z) for slots in free.slots]
        for slots in wanted:
            slots[:, 4:] = -1
        got = model(ids, output_choices=True, use_cache=False, replay=[LayerReplay(slots) for slots in wanted])
        same = model(ids, use_cache=False, replay=[LayerReplay(slots) for slots in free.slots])
    for slots, want in zip(got.slots, wanted, strict=True):
        assert torch.equal(slots[:, :4], want[:, :4])
        assert (slots[:, 4:] >= 0).all()
    assert torch.equal(same.logits, free.logits)
    assert (got.logits - free.logits).abs().max() > 1e-2
