"""Official folders: names, bits there and back, what is refused, scales folded, memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from posttrain.errors import UserError
from posttrain.model import Longcat2Config, Longcat2ForCausalLM, Longcat2Model
from posttrain.model.checkpoint import fold_scales, load, load_any, save_official, unfold_scales
from posttrain.model.config_files import NgramNames
from tests.model.longcat2_tiny import LSA, MTP, YARN, tiny, tokens

ROOT = Path(__file__).parents[2]


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def logits(model: Longcat2ForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 30)).logits


def names_in(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
        assert not names & found
        found |= names
    return found


def change(folder: Path, drop: str = "\0", **put: Tensor) -> None:
    """Rewrites the one file of a folder without the names that hold ``drop``, and with ``put`` (``__`` for dots)."""
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if drop not in name}
    tensors |= {name.replace("__", "."): tensor for name, tensor in put.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


KINDS: dict[str, tuple[NgramNames, bool, dict[str, Any]]] = {
    "LongCat-2.0": ("oe", True, {**LSA, **MTP, "rope_parameters": dict(YARN)}),
    "one indexer an attention": ("oe", True, {**LSA, "cli_factor": 1}),
    "Flash-Lite": ("lite", True, {**MTP, "rope_parameters": dict(YARN)}),
    "Flash": ("lite", False, {}),
}


@pytest.mark.parametrize("shard", [30_000, 10**9])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_bit_for_bit(kind: str, shard: int, tmp_path: Path) -> None:
    names, ngram, fields = KINDS[kind]
    model = tiny(seed=3, ngram=ngram, **fields)
    folder = tmp_path / "official"
    save_official(model, folder, shard, names)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if shard < 10**9:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
        assert set(index["weight_map"]) == names_in(folder) and set(index["weight_map"].values()) == set(files)
        assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > index["metadata"]["total_size"]
    else:
        assert files == ["model.safetensors"] and not (folder / "model.safetensors.index.json").exists()
    for again in (load(folder), Longcat2ForCausalLM.from_pretrained(folder)):
        assert same(again, model) and torch.equal(logits(again), logits(model))
        own = Longcat2Config.__annotations__
        assert {n: getattr(again.config, n, 0) for n in own} == {n: getattr(model.config, n, 0) for n in own}
        assert again.generation_config is not None and again.generation_config.eos_token_id == 2
    assert same(Longcat2Model.from_pretrained(folder), model.model)
    again.save_pretrained(tmp_path / "again")  # one family's names, whichever was read
    model.save_pretrained(tmp_path / "never read")
    assert names_in(tmp_path / "again") == names_in(tmp_path / "never read")
    assert same(load(tmp_path / "again"), model)


def test_official_names(tmp_path: Path) -> None:
    model = tiny(**LSA, **MTP)
    save_official(model, tmp_path / "oe", ngram_names="oe")
    weights = load_file(tmp_path / "oe" / "model.safetensors")
    expected = {"model.embed_tokens.weight": (61, 48), "model.mtp.embed_tokens.weight": (61, 48)}
    expected |= {"model.oe_embed_tokens5.weight": (228, 8), "model.oe_embed_proj5.weight": (48, 8)}
    expected |= {"model.layers.1.mlp.experts.5.up_proj.weight": (16, 48), "model.mtp.layers.0.eh_proj.weight": (48, 96)}
    expected |= {"model.layers.1.mlp.router.classifier.weight": (9, 48), "model.mtp.layers.0.enorm.m.weight": (48,)}
    expected |= {"model.layers.0.self_attn.0.indexer.wq_b.weight": (24, 24)}
    expected |= {"model.mtp.layers.0.self_attn.indexer.weights_proj.weight": (3, 48)}
    expected |= {"model.mtp.layers.0.transformer_layer.mlp.gate_proj.weight": (40, 48), "model.mtp.norm.weight": (48,)}
    assert {name: tuple(weights[name].shape) for name in expected} == expected
    bank: Any = model.get_submodule("model.layers.1.mlp.experts")
    assert torch.equal(weights["model.layers.1.mlp.experts.5.gate_proj.weight"], bank.gate_up_proj[5, :16])
    assert torch.equal(weights["model.layers.1.mlp.experts.5.up_proj.weight"], bank.gate_up_proj[5, 16:])
    assert torch.equal(weights["model.layers.1.mlp.experts.5.down_proj.weight"], bank.down_proj[5])
    assert torch.equal(weights["model.mtp.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert not any("experts.6." in name or "self_attn.1.indexer" in name for name in weights)
    save_official(tiny(), tmp_path / "lite", ngram_names="lite")
    lite = load_file(tmp_path / "lite" / "model.safetensors")
    ngram = {name for name in lite if "ngram" in name}
    kinds = ("embedders", "post_projs")
    assert ngram == {f"model.ngram_embeddings.{kind}.{t}.weight" for kind in kinds for t in range(6)}
    assert torch.equal(
        lite["model.ngram_embeddings.embedders.5.weight"], tiny().state_dict()["model.oe_embed_tokens5.weight"]
    )


def test_precision_is_the_folders_or_what_is_asked_for(tmp_path: Path) -> None:
    model = tiny(**LSA).bfloat16()
    save_official(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for again, dtype in ((load(tmp_path / "m"), torch.bfloat16), (load(tmp_path / "m", torch.float32), torch.float32)):
        state = again.state_dict()
        assert state["model.layers.0.mlp.experts.gate_up_proj"].dtype == again.config.dtype == dtype
        always = ("mlp.router.classifier.weight", "mlp.router.e_score_correction_bias")
        for name in (*always, "self_attn.0.indexer.weights_proj.weight"):
            assert state[f"model.layers.0.{name}"].dtype == torch.float32
        assert torch.equal(again.model.rotary.inv_freq, tiny().model.rotary.inv_freq)
        assert all(torch.equal(tensor, state[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())
    edit(tmp_path / "m", torch_dtype=None)
    assert load(tmp_path / "m").dtype == torch.bfloat16  # that of the weights


def test_the_draft_blocks_copy_of_the_embedding_must_be_one(tmp_path: Path) -> None:
    model = tiny(**MTP)
    folder = tmp_path / "m"
    save_official(model, folder)
    embedding = model.model.embed_tokens.weight.detach().clone()
    change(
        folder, model__mtp__oe_embed_tokens0__weight=torch.ones(3, 3), model__mtp__oe_embed_proj0__weight=torch.ones(3)
    )
    assert same(load(folder), model)
    embedding[-1, -1] += 1
    change(folder, model__mtp__embed_tokens__weight=embedding)
    with pytest.raises(UserError, match=r"mtp.embed_tokens.weight differs from .*; mtp_num_layers=0 reads the model"):
        load(folder)
    without = load(folder, mtp_num_layers=0)
    assert without.model.mtp is None and torch.equal(logits(without), logits(model))
    change(folder, drop="mtp.embed_tokens")
    assert same(load(folder), model)


def test_parts_that_are_switched_off_are_left_out_quietly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(**LSA, **MTP)
    save_official(model, tmp_path / "m")
    dense = load(tmp_path / "m", index_topk=0, mtp_num_layers=0)
    assert not any("indexer" in name or "mtp" in name for name in dense.state_dict())
    assert not caplog.records and capsys.readouterr() == ("", "")
    few = tokens(2, LSA["index_topk"])  # all of them are attended to
    with torch.no_grad():
        assert torch.equal(dense(few).logits, model(few).logits)


def test_a_dense_model_becomes_sparse_only_when_told_so(tmp_path: Path) -> None:
    model = tiny(seed=5)
    save_official(model, tmp_path / "m")
    for parts, told in (
        (LSA, r"8 weights are not there: .*; fresh=\('indexer',\) starts them at random, index_topk=0 does without"),
        (MTP, r"16 weights are not there: .*; fresh=\('mtp',\) starts them at random, mtp_num_layers=0 does without"),
        (LSA | MTP, r"28 weights .* fresh=\('indexer', 'mtp'\) .*, index_topk=0 and mtp_num_layers=0 does without"),
    ):
        with pytest.raises(UserError, match=told):
            load(tmp_path / "m", **parts)
    torch.manual_seed(0)
    sparse = load(tmp_path / "m", fresh=("indexer", "mtp"), **LSA, **MTP)
    state = sparse.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert abs(float(state["model.layers.1.self_attn.0.indexer.wq_b.weight"].std()) / 0.02 - 1) < 0.1
    assert torch.equal(state["model.layers.1.self_attn.0.indexer.k_norm.weight"], torch.ones(8))
    assert abs(float(state["model.mtp.layers.0.eh_proj.weight"].std()) / 0.02 - 1) < 0.1
    few = tokens(2, LSA["index_topk"])
    with torch.no_grad():
        assert torch.equal(sparse(few).logits, model(few).logits)
    assert same(load(tmp_path / "m", fresh=("indexer",)), model)  # allowed, not needed


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_official(tiny(), folder)
    good = (folder / "model.safetensors").read_bytes()

    def refused(told: str) -> None:
        with pytest.raises(UserError, match=told) as caught:
            load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        (folder / "model.safetensors").write_bytes(good)

    change(folder, drop="layers.1.mlp.experts.3.up_proj")
    refused("1 weights are not there: model.layers.1.mlp.experts.3.up_proj.weight; fetch the folder again")
    change(folder, model__layers__2__mlps__0__up_proj__weight=torch.ones(3))
    refused("no place for 1 weights: model.layers.2.mlps.0.up_proj.weight; correct config.json")
    change(folder, lm_head__weight=torch.ones(60, 48))
    refused(r"lm_head.weight has the shape \[60, 48\], by config.json it is \[61, 48\]")
    change(folder, lm_head__weight=torch.ones(61, 48).to(torch.float8_e4m3fn))
    refused("lm_head.weight is stored as F8_E4M3: quantised weights are not read; take the bf16 or float32 checkpoint")
    edit(folder, oe_vocab_size_ratio=None, oe_neighbor_num=None, oe_split_num=None)
    refused("no place for 12 weights: model.oe_embed_proj0.weight, .* and 8 more")
    edit(folder, quantization_config={"quant_method": "fp8"})
    refused("`quantization_config`: quantised weights are not read. Take the bf16 checkpoint")
    with pytest.raises(UserError, match="there is no such folder"):
        load(tmp_path / "nowhere")


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    save_official(tiny(), tmp_path / "m", 30_000)
    sorted((tmp_path / "m").glob("*.safetensors"))[2].unlink()
    with pytest.raises(UserError, match=r"model-00003-of-.*: this file of the checkpoint is not there"):
        load(tmp_path / "m")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="is in use; give a new folder"):
        save_official(tiny(), tmp_path)
    with pytest.raises(UserError, match="Flash-Lite has no place for indexers"):
        save_official(tiny(**LSA), tmp_path / "new", ngram_names="lite")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_folded_scales_are_the_same_function(tmp_path: Path) -> None:
    model = tiny(**LSA, **MTP)
    folded = fold_scales(model)
    assert not folded.config.mla_scale_q_lora and not folded.config.mla_scale_kv_lora
    assert model.config.mla_scale_q_lora and model.config.mla_scale_kv_lora
    state, other = model.state_dict(), folded.state_dict()
    for where in ("layers.1.self_attn.1", "mtp.layers.0.self_attn"):
        for norm, alpha in (("q_a_layernorm", (48 / 24) ** 0.5), ("kv_a_layernorm", (48 / 16) ** 0.5)):
            name = f"model.{where}.{norm}.weight"
            torch.testing.assert_close(other[name], state[name] * alpha)
    assert other["lm_head.weight"].data_ptr() == state["lm_head.weight"].data_ptr()
    torch.testing.assert_close(logits(folded), logits(model), atol=2e-5, rtol=0)
    torch.testing.assert_close(logits(unfold_scales(folded)), logits(model), atol=2e-5, rtol=0)
    for wrong, of in ((fold_scales, folded), (unfold_scales, model)):
        with pytest.raises(UserError, match="leave no scales to"):
            wrong(of)


@pytest.mark.parametrize("start", ["plain", "folded"])
def test_export_folds_and_unfolds_as_it_is_told(start: str, tmp_path: Path) -> None:
    model = tiny(**LSA)
    folded = fold_scales(model)
    written = {"plain": model, "folded": folded}[start]
    save_official(written, tmp_path / "folded", fold_scales=True)
    save_official(written, tmp_path / "plain")
    norm = "model.layers.0.self_attn.0.kv_a_layernorm.weight"
    for name, like in (("folded", folded), ("plain", model)):
        weights = load_file(tmp_path / name / "model.safetensors")
        torch.testing.assert_close(weights[norm], like.state_dict()[norm])
        fields = json.loads((tmp_path / name / "config.json").read_text())
        assert fields["mla_scale_q_lora"] is fields["mla_scale_kv_lora"] is (name == "plain")
        again = load(tmp_path / name)  # always as the family's configs have it
        assert again.config.mla_scale_q_lora and again.config.mla_scale_kv_lora
        torch.testing.assert_close(again.state_dict()[norm], model.state_dict()[norm])
        torch.testing.assert_close(logits(again), logits(model), atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="fold_mla_scales"):
        Longcat2ForCausalLM.from_pretrained(tmp_path / "folded")
    edit(tmp_path / "folded", fold_mla_scales=False)  # a reader that heeds the switches and knows no more
    heeds = Longcat2ForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(logits(heeds), logits(model), atol=2e-5, rtol=0)


def test_any_model_of_the_hub_loads(tmp_path: Path) -> None:
    save_official(tiny(), tmp_path / "longcat")
    assert type(load_any(tmp_path / "longcat")) is Longcat2ForCausalLM
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    assert type(load_any(tmp_path / "gpt2")) is GPT2LMHeadModel


LARGE = """
from posttrain.model import Longcat2Config, Longcat2ForCausalLM
from posttrain.model.checkpoint import load, save_official
import sys, torch
torch.set_default_dtype(torch.bfloat16)
torch.set_num_threads(1)

def kilobytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))

def write(folder):
    config = Longcat2Config(
        vocab_size=1024, hidden_size=512, num_layers=5, num_attention_heads=4, ffn_hidden_size=512, q_lora_rank=128,
        kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=64,
        zero_expert_num=16, moe_topk=4, expert_ffn_hidden_size=256, mtp_num_layers=3, index_topk=64,
        index_init_tokens=2, index_local_tokens=8, index_n_heads=4, index_head_dim=32,
        oe_vocab_size_ratio=20, oe_neighbor_num=3, oe_split_num=2,
    )
    with torch.device("meta"):
        model = Longcat2ForCausalLM(config)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.02)
    before = kilobytes("VmRSS")
    save_official(model, folder, 40_000_000)
    return before, model

def read(folder):
    before = kilobytes("VmRSS")
    return before, load(folder, torch.bfloat16)

before, model = {"write": write, "read": read}[sys.argv[1]](sys.argv[2])
size = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1024
print(size / 1024, (kilobytes("VmHWM") - before) / size)
"""


@pytest.mark.slow
def test_a_large_model_is_in_memory_once(tmp_path: Path) -> None:
    def peak(what: str) -> tuple[float, float]:
        """Megabytes of the model, and what the process took above the start at most, as a multiple of it."""
        command = [sys.executable, "-c", LARGE, what, str(tmp_path / "m")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        megabytes, multiple = map(float, done.stdout.split()[-2:])
        return megabytes, multiple

    megabytes, more = peak("write")
    assert 250 < megabytes < 400 and more < 0.2 and len(list((tmp_path / "m").glob("*.safetensors"))) > 5
    megabytes, multiple = peak("read")
    assert 250 < megabytes < 400 and 0.9 < multiple < 1.5
