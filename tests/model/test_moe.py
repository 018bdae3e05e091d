"""Router and MoE properties (LongCat-Flash report section 2.1)."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.model import Longcat2Config
from posttrain.model.moe import LongcatMoE
from tests.model.longcat2_tiny import SHAPE, randomise, tiny

N, Z, K, GAMMA = (SHAPE[key] for key in ("n_routed_experts", "zero_expert_num", "moe_topk", "routed_scaling_factor"))


def _moe(**changes: object) -> LongcatMoE:
    moe = LongcatMoE(Longcat2Config(**{**SHAPE, **changes}))
    randomise(moe, seed=7)
    return moe


def _states(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(seed))


def _reference(moe: LongcatMoE, x: Tensor, identity_gamma: float = GAMMA) -> Tensor:
    """The definition, token by token, in float64."""
    bank, router = moe.experts, moe.router
    width = SHAPE["expert_ffn_hidden_size"]
    rows = []
    for token in x.double():
        scores = (router.classifier.weight.double() @ token).softmax(0)
        chosen = (scores + router.e_score_correction_bias.double()).topk(K).indices
        total = torch.zeros_like(token)
        for slot in chosen.tolist():
            if slot >= N:
                total = total + identity_gamma * scores[slot] * token
                continue
            gate_up = bank.gate_up_proj[slot].double() @ token
            inner = torch.nn.functional.silu(gate_up[:width]) * gate_up[width:]
            total = total + GAMMA * scores[slot] * (bank.down_proj[slot].double() @ inner)
        rows.append(total)
    return torch.stack(rows)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5))
def test_moe_equals_the_definition(rows: int, seed: int) -> None:
    x = _states(rows, seed)
    for scaled, identity_gamma in ((True, GAMMA), (False, 1.0)):
        moe = _moe(scale_identity_experts=scaled)
        with torch.no_grad():
            got, want = moe(x.unsqueeze(0)).out_BTH[0], _reference(moe, x, identity_gamma)
        assert (got - want).abs().max() < 1e-5


def test_gradients_equal_the_definition() -> None:
    moe, x = _moe(), _states(17).requires_grad_()
    parameters = [x, *moe.parameters()]
    mine = torch.autograd.grad(moe(x.unsqueeze(0)).out_BTH.square().sum(), parameters)
    reference = torch.autograd.grad(_reference(moe, x).square().sum(), parameters)
    for a, b in zip(mine, reference, strict=True):
        assert (a - b).abs().max() < 1e-4 * max(1.0, float(b.abs().max()))


def test_adding_a_constant_to_all_biases_changes_nothing() -> None:
    moe, x = _moe(), _states(50)
    with torch.no_grad():
        before = moe(x.unsqueeze(0)).out_BTH
        moe.router.e_score_correction_bias += 0.25
        assert (moe(x.unsqueeze(0)).out_BTH - before).abs().max() < 1e-6


def test_a_bias_changes_selection_but_not_weights() -> None:
    moe, x = _moe(), _states(50)
    with torch.no_grad():
        scores, _, slots = moe.router(x)
        moe.router.e_score_correction_bias[3] += 10
        new_scores, weights, new_slots = moe.router(x)
    assert torch.equal(scores, new_scores)
    assert (new_slots == 3).any(dim=1).all() and not (slots == 3).any(dim=1).all()
    assert torch.equal(weights, GAMMA * scores.gather(1, new_slots))


def test_identity_only_tokens_are_scaled_copies() -> None:
    moe, x = _moe(moe_topk=Z), _states(20)
    with torch.no_grad():
        moe.router.e_score_correction_bias[N:] += 10
        scores, _, slots = moe.router(x)
        assert (slots >= N).all()
        got = moe(x.unsqueeze(0)).out_BTH[0]
        want = GAMMA * scores[:, N:].sum(dim=1, keepdim=True) * x
    assert (got - want).abs().max() < 1e-6
    x.requires_grad_()
    moe(x.unsqueeze(0)).out_BTH.sum().backward()  # an empty routed batch still gives (zero) gradients
    assert float(moe.experts.gate_up_proj.grad.abs().max()) == 0  # type: ignore[union-attr]


def test_router_without_identity_slots() -> None:
    moe, x = _moe(zero_expert_num=0), _states(9)
    with torch.no_grad():
        assert (moe(x.unsqueeze(0)).out_BTH[0] - _reference(moe, x)).abs().max() < 1e-5


def test_router_stays_in_float32_in_a_bf16_model() -> None:
    model: Any = tiny()
    model.to(torch.bfloat16)
    router = model.model.layers[0].mlp.router
    scores, weights, _ = router(_states(5).bfloat16())
    assert scores.dtype == weights.dtype == torch.float32
    assert model(torch.arange(12).view(2, 6)).logits.dtype == torch.bfloat16


def test_only_the_chosen_weights_get_gradients() -> None:
    moe, x = _moe(moe_topk=1), _states(30)
    with torch.no_grad():
        moe.router.e_score_correction_bias[2] += 10
    moe(x.unsqueeze(0)).out_BTH.sum().backward()
    touched = moe.experts.down_proj.grad.abs().amax(dim=(1, 2)) > 0  # type: ignore[union-attr]
    assert touched.tolist() == [index == 2 for index in range(N)]


@pytest.mark.parametrize("flag", ["mla_scale_q_lora", "mla_scale_kv_lora"])
def test_alpha_flags_equal_folded_norm_weights(flag: str) -> None:
    rank, norm = ("q_lora_rank", "q_a_layernorm") if "q_lora" in flag else ("kv_lora_rank", "kv_a_layernorm")
    ids = torch.arange(20).view(2, 10)
    scaled, folded = tiny(seed=5), tiny(seed=5, **{flag: False})
    with torch.no_grad():
        want, unfolded = scaled(ids).logits, folded(ids).logits
        for name, parameter in folded.named_parameters():
            if norm in name:
                parameter *= (SHAPE["hidden_size"] / SHAPE[rank]) ** 0.5
        assert (folded(ids).logits - want).abs().max() < 1e-5
    assert (unfolded - want).abs().max() > 1e-2
