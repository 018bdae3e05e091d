"""Our model against transformers' LongcatFlashForCausalLM with the same weights (n-gram off)."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LongcatFlashConfig, LongcatFlashForCausalLM

from posttrain.model import Longcat2ForCausalLM
from tests.model.longcat2_tiny import SHAPE, YARN, tiny, tokens

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
TOLERANCE = 1e-5


def _pair(rope: dict) -> tuple[Longcat2ForCausalLM, LongcatFlashForCausalLM]:
    ours = tiny(seed=1, ngram=False, rope_parameters=dict(rope), latent_norm_eps=1e-6)
    fields = {**SHAPE, "head_dim": SHAPE["qk_rope_head_dim"], "attn_implementation": "eager"}
    reference_config = LongcatFlashConfig(**fields, rope_parameters=dict(rope))
    theirs = LongcatFlashForCausalLM(reference_config).eval()
    state = dict(ours.state_dict())
    for name in [name for name in state if name.endswith("gate_up_proj")]:
        state[name] = torch.cat([state[name], torch.zeros(SHAPE["zero_expert_num"], *state[name].shape[1:])])
    assert theirs.load_state_dict(state, strict=True)
    return ours, theirs


def _worst(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value when that exceeds 1."""
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1))


@pytest.mark.parametrize("rope", [PLAIN, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("path", ["naive", "absorbed"])
def test_logits_and_hidden_states(rope: dict, path: str) -> None:
    ours, theirs = _pair(rope)
    ours.set_attention_path(path)  # type: ignore[arg-type]
    ids = tokens(3, 23)
    with torch.no_grad():
        got, want = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
    assert want.logits.abs().max() > 1  # the comparison is not between zeros
    assert _worst(got.logits, want.logits) < TOLERANCE
    assert len(got.hidden_states) == len(want.hidden_states) == SHAPE["num_layers"] + 1
    for mine, reference in zip(got.hidden_states, want.hidden_states, strict=True):
        assert _worst(mine, reference) < TOLERANCE


@pytest.mark.parametrize("rope", [PLAIN, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("path", ["naive", "absorbed"])
def test_loss_gradients_of_every_parameter(rope: dict, path: str) -> None:
    ours, theirs = _pair(rope)
    ours.set_attention_path(path)  # type: ignore[arg-type]
    ids = tokens(3, 23, seed=5)
    losses = [model(ids, labels=ids).loss for model in (ours, theirs)]
    assert abs(float((losses[0] - losses[1]).detach())) < TOLERANCE
    for loss in losses:
        loss.backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        want = reference[name].grad
        assert parameter.grad is not None and want is not None, name
        assert _worst(parameter.grad, want[: parameter.shape[0]]) < TOLERANCE, name
        assert want.abs().max() > 1e-6, name
    assert not any("correction_bias" in name for name, _ in ours.named_parameters())


def test_left_padding_and_cached_decoding() -> None:
    ours, theirs = _pair(YARN)
    ids = tokens(2, 12, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        caches = [DynamicCache(), DynamicCache()]
        for columns in (slice(0, 9), slice(9, 10), slice(10, 12)):
            step = {"input_ids": ids[:, columns], "attention_mask": mask[:, : columns.stop]}
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, columns]
            got = ours(**step, past_key_values=caches[0]).logits
            want = theirs(**step, position_ids=positions, past_key_values=caches[1]).logits
            real = mask[:, columns].bool()
            assert _worst(got[real], want[real]) < TOLERANCE


def test_identity_scaling_is_visible() -> None:
    scaled, theirs = _pair(PLAIN)
    unscaled = tiny(seed=1, ngram=False, rope_parameters=dict(PLAIN), scale_identity_experts=False)
    ids = tokens(2, 9)
    with torch.no_grad():
        want = theirs(ids).logits
        assert _worst(scaled(ids).logits, want) < TOLERANCE
        assert _worst(unscaled(ids).logits, want) > 0.1


def test_latent_norm_eps_is_used() -> None:
    model = tiny(latent_norm_eps=1e-6)
    attention = model.model.layers[0].self_attn[0]  # type: ignore[union-attr,index]
    assert attention.q_a_layernorm.eps == attention.kv_a_layernorm.eps == 1e-6  # type: ignore[union-attr]
    assert model.model.norm.eps == 1e-5
