"""Parameter counts against the published ones and against real models; what a bad config file is told."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.cli import main
from posttrain.errors import ConfigError
from posttrain.model import Longcat2Config, Longcat2ForCausalLM
from posttrain.model.config_files import official_config, read_config
from posttrain.model.describe import cache_bytes, count, short
from tests.model.longcat2_tiny import LSA, MTP, NGRAM, SHAPE, YARN

CONFIGS = Path(__file__).parents[2] / "configs/model"
MODELS = ("longcat-flash", "longcat-flash-lite", "longcat-flash-lite-sparse", "longcat-2.0")

# In millions or, where it says B, billions; digits as published or derived in the reports.
PUBLISHED: dict[str, tuple[str, str, str, str]] = {
    "mla": ("90.57", "32.70", "32.70", "111.68"),
    "dense": ("226.49", "56.62", "56.62", "301.99"),
    "routed": ("37.75", "9.437", "9.437", "50.33"),
    "router": ("4.719", "1.180", "1.180", "7.341"),
    "indexer": ("0", "0", "3.588", "7.602"),
    "layer": ("19.966B", "2.5958B", "2.5994B", "39.497B"),
    "layers": ("559.05B", "36.341B", "36.391B", "1500.89B"),
    "ngram_tables": ("0", "31.407B", "31.407B", "134.979B"),
    "ngram_projections": ("0", "9.44", "9.44", "67.1"),
    "embedding_and_head": ("1.611B", "0.805B", "0.805B", "2.684B"),
    "total": ("560.66B", "68.56B", "68.61B", "1638.6B"),
    "always_active": ("18.69B", "2.93B", "2.98B", "33.42B"),
    "per_routed_slot": ("1.057B", "0.1321B", "0.1321B", "1.9126B"),
    "active 8": ("27.15B", "3.99B", "4.04B", "48.72B"),
    "active 12": ("31.38B", "4.52B", "4.57B", "56.37B"),
}


@pytest.mark.parametrize("model", MODELS)
def test_published_counts_to_the_printed_digits(model: str) -> None:
    counts = count(read_config(CONFIGS / f"{model}.yaml"))
    for what, printed in PUBLISHED.items():
        text = printed[MODELS.index(model)]
        number = text.removesuffix("B")
        digits = len(number.partition(".")[2])
        name, _, slots = what.partition(" ")
        value = counts.active(int(slots)) if slots else getattr(counts, name)
        assert f"{value / (1e9 if 'B' in text else 1e6):.{digits}f}" == number, what


def test_draft_block_and_cache_of_longcat_2() -> None:
    config = read_config(CONFIGS / "longcat-2.0.yaml")
    counts, cache = count(config), cache_bytes(config)
    assert (short(counts.draft), short(counts.draft_embedding)) == ("555.526 M", "1.342 B")
    assert (cache.latents, cache.index_keys, cache.draft) == (576 * 2 * 76, 38 * 128 * 2, (576 + 128) * 2)
    flash = read_config(CONFIGS / "longcat-flash.yaml")
    assert (cache_bytes(flash).latents, cache_bytes(flash).index_keys, cache_bytes(flash).draft) == (64_512, 0, 0)
    assert count(flash).draft == count(flash).draft_embedding == 0


def sizes(config: Longcat2Config) -> dict[str, int]:
    """Numbers of values by weight name, of a model without memory."""
    with torch.device("meta"):
        return {name: tensor.numel() for name, tensor in Longcat2ForCausalLM(config).state_dict().items()}


def total(of: dict[str, int], beginning: str, without: str = "\0") -> int:
    return sum(n for name, n in of.items() if name.startswith(beginning) and without not in name)


def agree(config: Longcat2Config) -> None:
    """Every number of ``count`` is that of the real model."""
    n, real = count(config), sizes(config)
    layer = "model.layers.1."
    assert n.mla == total(real, f"{layer}self_attn.1.", "indexer")
    assert n.dense == total(real, f"{layer}mlps.0.")
    assert n.routed * config.n_routed_experts == total(real, f"{layer}mlp.experts.")
    assert n.router == total(real, f"{layer}mlp.router.")
    assert n.indexer == total(real, f"{layer}self_attn.0.indexer.")
    assert n.layer == total(real, layer)
    assert n.layers == total(real, "model.layers.")
    assert n.ngram_tables == total(real, "model.oe_embed_tokens")
    assert n.ngram_projections == total(real, "model.oe_embed_proj")
    assert n.embedding_and_head == total(real, "lm_head.") + total(real, "model.embed_tokens.")
    assert n.total == total(real, "", ".mtp.")
    assert n.draft == total(real, "model.mtp.")
    idle = n.ngram_tables + total(real, "model.embed_tokens.") + n.per_routed_slot * config.n_routed_experts
    assert n.always_active == n.total - idle


@pytest.mark.parametrize(
    ("lsa", "ngram", "mtp", "identity"), list(itertools.product((0, 1, 2), (False, True), (False, True), (0, 3)))
)
def test_formulas_agree_with_real_models(lsa: int, ngram: bool, mtp: bool, identity: int) -> None:
    """``lsa``: attentions that share an indexer, 0 without one."""
    parts = (LSA | {"cli_factor": lsa} if lsa else {}, NGRAM if ngram else {}, MTP if mtp else {})
    fields: dict[str, Any] = SHAPE | {"zero_expert_num": identity} | parts[0] | parts[1] | parts[2]
    agree(Longcat2Config(**fields))


@pytest.mark.parametrize("model", MODELS)
def test_formulas_agree_with_the_large_models(model: str) -> None:
    config = read_config(CONFIGS / f"{model}.yaml")
    agree(config)
    with torch.device("meta"):
        state = Longcat2ForCausalLM(config).state_dict()
    for bank in ("gate_up_proj", "down_proj"):  # identity slots have no rows
        assert len(state[f"model.layers.0.mlp.experts.{bank}"]) == config.n_routed_experts


def test_the_shipped_configs_hold_what_was_published() -> None:
    large, sparse = (read_config(CONFIGS / f"{name}.yaml") for name in ("longcat-2.0", "longcat-flash-lite-sparse"))
    lite, flash = (read_config(CONFIGS / f"{name}.yaml") for name in ("longcat-flash-lite", "longcat-flash"))
    assert (large.use_lsa, sparse.use_lsa, lite.use_lsa, flash.use_lsa) == (True, True, False, False)
    assert [c.num_ngram_tables for c in (large, sparse, lite, flash)] == [16, 12, 12, 0]
    assert (large.mtp_num_layers, large.routed_scaling_factor, flash.routed_scaling_factor) == (3, 9.0, 6.0)
    rope: Any = large.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("yarn", 1e6, 120)
    assert (flash.rope_parameters or {}) == {"rope_type": "default", "rope_theta": 1e7}


def test_an_official_config_json_says_the_same_as_the_config(tmp_path: Path) -> None:
    fields = {**SHAPE, **LSA, **NGRAM, **MTP, "rope_parameters": dict(YARN), "z_loss_coef": 1e-7, "use_hi": True}
    config = Longcat2Config(**fields, latent_norm_eps=1e-6, eos_token_id=[2, 3])
    written = official_config(config, "bfloat16")
    assert written["architectures"] == ["LongcatCausalLM"] and "model_type" not in written
    assert written["rope_scaling"]["type"] == "deepseek_yarn" and written["rope_theta"] == 10000.0
    assert "rope_parameters" not in written and "streaming_block_size" not in written
    (tmp_path / "config.json").write_text(json.dumps(written | {"auto_map": {}, "num_heads_of_somebody": 3}))
    again = read_config(tmp_path)
    assert again.dtype == torch.bfloat16
    own = Longcat2Config.__annotations__
    assert {n: getattr(again, n, 0) for n in own} == {n: getattr(config, n, 0) for n in own}
    lite = official_config(Longcat2Config(**SHAPE, **NGRAM, **MTP), "float32", "lite")
    assert lite["model_type"] == "longcat_flash_ngram" and lite["emb_neighbor_num"] == 4 and "oe_split_num" not in lite
    assert lite["mtp_num_layers"] == 3 and "index_n_heads" not in lite
    assert official_config(Longcat2Config(**SHAPE), "float32", "lite")["model_type"] == "longcat_flash"


BAD: dict[str, tuple[str, str]] = {
    "a typing error": ("hiden_size: 64", ", line 1: the field `hiden_size` is unknown. Did you mean `hidden_size`?"),
    "a stranger": ("dropout_path: 1", "the field `dropout_path` is unknown. Remove it, or give it its official name."),
    "a type": ("num_layers: many", "`num_layers` must be a whole number, it is the text 'many'. Change the value."),
    "a union": ("\noe_split_num: x", ", line 2: `oe_split_num` must be a whole number or null, it is the text 'x'."),
    "sizes": ("index_topk: 64\nmoe_topk: 3", ", line 1: index_topk=64 is smaller .*: raise index_topk or lower"),
    "rope": ("rope_scaling: 3", "`rope_scaling` must be a mapping, it is the number 3."),
    "a rope type": (
        "num_layers: 2\nrope_scaling: {type: linear}",
        ", line 2: rope type 'linear' is not implemented; use",
    ),
    "a rope value": ("rope_scaling:\n  factor: big", ", line 2: `rope_scaling.factor` must be a number above 0"),
    "theta": ("rope_theta: -1", "`rope_theta` must be a number above 0, it is the number -1."),
    "not there": (
        "attention_method: GQA",
        ', line 1: config field attention_method=\'GQA\' .*; set it to "MLA" or "LSA"',
    ),
    "family": ("model_type: llama", "model_type=llama: this is no LongCat model. Give one"),
    "nothing": ("", "the top level must be a mapping"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_file_key_and_cure_in_one_line(case: str, tmp_path: Path) -> None:
    text, told = BAD[case]
    file = tmp_path / "model.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        read_config(file)
    message = str(caught.value)
    assert message.startswith(str(file)) and "\n" not in message


def test_whole_numbers_where_only_floats_are_declared(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("rms_norm_eps: 1\nmtp_num_layers: 1\nmtp_loss_coef: 1")
    assert read_config(tmp_path / "model.yaml").rms_norm_eps == 1.0


BAD_FOLDERS: dict[str, tuple[str | None, str]] = {
    "empty": (None, "this folder holds no config.json. Give the folder of a model, or a YAML file."),
    "broken": ('{\n"a": ', "config.json, line 2: not valid JSON"),
    "a list": ("[1]", "the top level must be a JSON object, it is a list"),
    "another family": ('{"model_type": "llama"}', "model_type=llama: this is no LongCat model"),
    "nameless": ('{"hidden_size": 64}', "it has neither architectures nor model_type"),
    "FP8": (
        '{"architectures": ["LongcatCausalLM"], "quantization_config": {"quant_method": "fp8"}}',
        "`quantization_config`: quantised weights are not read. Take the bf16 checkpoint.",
    ),
    "wrong": (
        '{"architectures": ["LongcatCausalLM"], "num_layers": 0}',
        "config.json: num_layers=0 must be at least 1",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_told_the_same_way(case: str, tmp_path: Path) -> None:
    text, told = BAD_FOLDERS[case]
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def posttrain(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["posttrain", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert posttrain(monkeypatch, "model", "describe", str(CONFIGS / "longcat-2.0.yaml")) == 0
    out, err = capsys.readouterr()
    for row in ("all 38 layers", "1,638,616,807,424", "K_e = 12 (moe_topk)", "1.898 B", "87,552", "9,728"):
        assert row in out
    assert err == ""
    assert posttrain(monkeypatch, "model", "describe", str(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {tmp_path}: this folder holds no config.json") and err.count("\n") == 1
