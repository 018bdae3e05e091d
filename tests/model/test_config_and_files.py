"""Refused configs, the two spellings of fields, and checkpoints with official names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from posttrain.model import Longcat2Config, Longcat2ForCausalLM, Longcat2Model
from posttrain.model.rope import inverse_frequencies, softmax_scale
from tests.model.longcat2_tiny import LSA, NGRAM, SHAPE, YARN, randomise, tiny, tokens


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"index_topk": 1000}, "index_topk=1000 is smaller than the forced part.*16 \\+ 1024: raise index_topk"),
        ({"index_topk": 2048, "index_head_dim": 2}, "index_head_dim=2 must be at least qk_rope_head_dim=4"),
        ({"index_topk": 2048, "cli_factor": 3}, "cli_factor=3 must be 1 or 2"),
        ({"index_topk": 2048, "index_k_norm_type": "layer"}, 'index_k_norm_type.*set it to "rms"'),
        ({"index_topk": 2048, "use_hi": True, "hi_pages": 8}, "hi_pages=8 pages of 128 hold 1024.*raise hi_pages"),
        ({"index_topk": 2048, "use_hi": True, "hi_block_size": 5}, "multiple of hi_block_size=5"),
        ({"use_hi": True}, "use_hi=True needs LSA: set index_topk"),
        ({"index_topk": 2048, "streaming_attentions": [1]}, "streaming_attentions and index_topk"),
        ({"streaming_attentions": [4]}, "there is no attention 4; ids run from 0 to 3"),
        ({"mtp_num_layers": -1}, "mtp_num_layers=-1"),
        ({"mtp_num_layers": 3, "mtp_disable_over_tokenizer": False}, "mtp_disable_over_tokenizer"),
        ({"mtp_num_layers": 3, "mtp_replicate_modules": False}, "mtp_replicate_modules"),
        ({"mtp_num_layers": 3, "num_nextn_predict_layers": 2}, "mtp_num_layers=3 and num_nextn_predict_layers=2"),
        ({"mtp_loss_coef": 0.1}, "mtp_loss_coef=0.1 needs mtp_num_layers"),
        ({"indexer_loss_coef": 0.1}, "indexer_loss_coef=0.1 needs index_topk"),
        ({"router_bias_update_rate": 0.1}, "router_bias_update_rate=0.1 needs moe_target_topk"),
        ({"moe_target_topk": 5}, "moe_target_topk=5 must be above 0 and at most moe_topk=4"),
        ({"moe_target_topk": 3, "zero_expert_num": 0}, "needs identity slots: set zero_expert_num"),
        ({"router_balance_groups": 4}, "router_balance_groups=4 must divide n_routed_experts=6"),
        ({"attention_method": "LSA"}, "attention_method"),
        ({"attention_method": "GQA"}, "attention_method"),
        ({"zero_expert_type": "zero"}, "zero_expert_type"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"router_bias": True}, "router_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"moe_topk": 10}, "moe_topk=10"),
        ({"hidden_size": 44}, "hidden_size=44"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim"),
        ({"num_hidden_layers": 7}, "num_hidden_layers"),
        ({**NGRAM, "oe_split_num": 7}, "hidden_size=48 is not divisible by the number of n-gram tables 21"),
        ({**NGRAM, "emb_neighbor_num": 3}, "oe_neighbor_num=4 and emb_neighbor_num=3"),
        ({"oe_vocab_size_ratio": 3.5, "oe_neighbor_num": 3}, "oe_split_num"),
        ({"oe_neighbor_num": 3}, "oe_vocab_size_ratio"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": 0.5}}, "mscale_all_dim"),
        ({"rope_scaling": {**YARN, "attention_factor": 1.2}}, "attention_factor"),
        ({"rope_theta": 7.0, "rope_parameters": dict(YARN)}, "rope_theta"),
    ],
)
def test_refused_configs_name_the_field(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Longcat2Config(**{**SHAPE, **fields})


def test_off_values_of_unimplemented_fields_are_accepted() -> None:
    off = {"index_topk": 0, "mtp_num_layers": 0, "attention_method": "MLA", "use_mla": 1, "router_bias": False}
    Longcat2Config(**SHAPE, **off)


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, None),
        (LSA, 14),
        ({"streaming_attentions": [1], "streaming_block_size": 4}, 32),
        ({"streaming_attentions": [], "streaming_block_size": 4}, None),
    ],
)
def test_sparse_attention_sees_everything_up_to_its_budget(fields: dict[str, Any], context: int | None) -> None:
    """And not of one token more."""
    model = tiny(0, **fields)
    assert model.config.dense_context == context
    if context is None:
        return
    dense = tiny(0)
    dense.load_state_dict(model.state_dict(), strict=False)
    for length, same in ((context, True), (context + 1, False)):
        ids = tokens(1, length, low=3)
        with torch.no_grad():
            gap = (model(ids).logits - dense(ids).logits).abs().max().item()
        assert (gap < 1e-5) is same, (length, gap)


def test_both_ngram_spellings_give_one_config() -> None:
    names = {"oe_vocab_size_ratio": "ngram_vocab_size_ratio", "oe_neighbor_num": "emb_neighbor_num"}
    names["oe_split_num"] = "emb_split_num"
    official, lite = (
        Longcat2Config(**SHAPE, **NGRAM),
        Longcat2Config(**SHAPE, **{names[key]: value for key, value in NGRAM.items()}),
    )
    assert official.to_dict() == lite.to_dict()
    assert lite.num_ngram_tables == 6 and lite.use_ngram
    assert lite.num_hidden_layers == 5 and Longcat2Config(**SHAPE).num_hidden_layers == 4


def test_old_rope_fields_and_deepseek_yarn() -> None:
    scaling = {"type": "deepseek_yarn", "factor": 120, "original_max_position_embeddings": 8192}
    fields: dict[str, Any] = {"rope_theta": 1e6, "rope_scaling": scaling}
    config = Longcat2Config(**fields)
    rope = config.rope_parameters or {}
    assert rope == {**YARN, "rope_theta": 1e6, "factor": 120, "original_max_position_embeddings": 8192}
    assert abs(softmax_scale(192, rope) - 0.15781) < 1e-5
    assert abs(softmax_scale(192, {"rope_type": "default"}) - 0.072169) < 1e-6
    frequencies = inverse_frequencies(64, rope)
    plain = inverse_frequencies(64, {"rope_type": "default", "rope_theta": 1e6})
    assert torch.equal(frequencies[:9], plain[:9])  # up to lo = 8: original
    assert torch.allclose(frequencies[17:], plain[17:] / 120)  # from hi = 17: interpolated
    assert (frequencies[9:17] < plain[9:17]).all() and (frequencies[9:17] > plain[9:17] / 120).all()


def test_checkpoint_round_trip_is_bit_for_bit_with_official_names(tmp_path: Path) -> None:
    model = tiny(seed=11, rope_parameters=dict(YARN))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        gate_up = torch.cat([file.get_tensor(f"model.layers.1.mlp.experts.5.{p}_proj.weight") for p in ("gate", "up")])
        down = file.get_tensor("model.layers.1.mlp.experts.5.down_proj.weight")
    bank = model.model.layers[1].mlp.experts  # type: ignore[union-attr,index]
    assert torch.equal(gate_up, bank.gate_up_proj[5]) and torch.equal(down, bank.down_proj[5])  # type: ignore[index]
    assert names == _official_names()
    ids = tokens(2, 9)
    for again in (Longcat2ForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(again) is Longcat2ForCausalLM
        assert _fields(again.config) == _fields(model.config)
        state, again_state = model.state_dict(), again.state_dict()
        assert state.keys() == again_state.keys()
        assert all(torch.equal(state[name], again_state[name]) for name in state)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, again.eval()(ids).logits)
    again.save_pretrained(tmp_path / "second")  # a loaded model saves the same names
    with safe_open(tmp_path / "second" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names


def _fields(config: Longcat2Config) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "dtype")}


def _official_names() -> set[str]:
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names |= {f"model.oe_embed_{kind}{t}.weight" for kind in ("tokens", "proj") for t in range(6)}
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    for i in range(SHAPE["num_layers"]):
        layer = f"model.layers.{i}"
        for half in (0, 1):
            names |= {f"{layer}.{norm}.{half}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
            names |= {f"{layer}.self_attn.{half}.{part}.weight" for part in attention}
            names |= {f"{layer}.mlps.{half}.{part}_proj.weight" for part in ("gate", "up", "down")}
        names |= {f"{layer}.mlp.router.classifier.weight", f"{layer}.mlp.router.e_score_correction_bias"}
        for e in range(SHAPE["n_routed_experts"]):
            names |= {f"{layer}.mlp.experts.{e}.{part}_proj.weight" for part in ("gate", "up", "down")}
    return names


def test_bf16_checkpoint_keeps_the_router_in_float32(tmp_path: Path) -> None:
    tiny(seed=11).save_pretrained(tmp_path)
    model = Longcat2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    state = model.state_dict()
    assert state["model.layers.0.mlp.router.classifier.weight"].dtype == torch.float32
    assert state["model.layers.0.mlp.router.e_score_correction_bias"].dtype == torch.float32
    assert state["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    assert torch.isfinite(model(tokens(2, 9)).logits).all()


def test_auto_classes_and_saved_config(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is Longcat2Config
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "longcat2" and saved["oe_neighbor_num"] == 4
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is Longcat2Model
    ids = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(base.eval()(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_sharded_save(tmp_path: Path) -> None:
    model = tiny(seed=12)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = Longcat2ForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_fresh_initialisation() -> None:
    torch.manual_seed(0)
    model = Longcat2ForCausalLM(Longcat2Config(**{**SHAPE, **NGRAM}, initializer_range=0.05))
    state = model.state_dict()
    assert torch.equal(state["model.norm.weight"], torch.ones(SHAPE["hidden_size"]))
    assert not state["model.layers.0.mlp.router.e_score_correction_bias"].any()
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.self_attn.0.q_b_proj.weight"):
        assert abs(float(state[name].std()) / 0.05 - 1) < 0.1
    assert abs(float(state["model.embed_tokens.weight"].std()) / (0.05 * 7) - 1) < 0.1
    assert abs(float(state["model.oe_embed_tokens2.weight"].std()) / (0.05 * 7 / 20) - 1) < 0.1
    assert abs(float(state["model.oe_embed_proj2.weight"].std()) / 8**-0.5 - 1) < 0.1


def test_randomise_leaves_nothing_at_its_default() -> None:
    model = Longcat2ForCausalLM(Longcat2Config(**SHAPE, **NGRAM))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randomise(model)
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
