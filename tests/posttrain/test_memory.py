"""Memory estimates against bytes worked out by hand, real models, optimizers and caches, and what autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from posttrain import attention, memory
from posttrain.activations import NoEstimate, kept_per_token
from posttrain.config import Config
from posttrain.engine.cache import SlotCache
from posttrain.model import Longcat2Config, Longcat2ForCausalLM
from posttrain.model.describe import count
from posttrain.objective_settings import ClippedLoss, DistillLoss, TopkEstimator
from posttrain.settings import (
    LocalEngineConfig,
    Longcat2Model,
    LoraConfig,
    MuonConfig,
    PretrainedModel,
    TrainerConfig,
    VllmEngineConfig,
)
from posttrain.trainer import Trainer
from tests.model.longcat2_tiny import LSA, MTP, NGRAM, SHAPE
from tests.posttrain.small import sample

VOCABULARY, HIDDEN, INNER, HEADS, PAIRS, SIZE = 128, 32, 48, 4, 2, 8
QWEN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": PAIRS, "head_dim": SIZE, "tie_word_embeddings": False,
}  # fmt: skip
# By hand: q 32 x 32, k and v 16 x 32 each, o 32 x 32; three maps 32 x 48; norms: two of 32, two of 8, the last of 32.
MATRICES = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48
TABLES, NORMS = 2 * 128 * 32, 2 * 32 + 2 * 8 + 32
PARAMETERS = MATRICES + TABLES + NORMS


@pytest.fixture
def qwen(tmp_path: Path) -> PretrainedModel:
    Qwen3Config(**QWEN).save_pretrained(tmp_path)
    return PretrainedModel(path=tmp_path)


def parts(spec: Any, loss: Any = None, longest: int = 16, **trainer: Any) -> dict[str, int]:
    return memory.trainer_memory(spec, TrainerConfig(**trainer), loss or ClippedLoss(), longest)


def test_a_trainer_by_hand(qwen: PretrainedModel) -> None:
    assert memory.weight_bytes(qwen) == 4 * PARAMETERS == 4 * 15_984
    found = parts(qwen, tokens_per_micro_batch=64)
    assert found["weights"] == found["gradients"] == 4 * PARAMETERS
    assert found["optimizer"] == 8 * PARAMETERS
    assert "reference" not in found and parts(qwen, ClippedLoss(kl=0.1))["reference"] == 4 * PARAMETERS
    # Norms: given and normed 32 each, and what they return: two of a layer, one at the end. Queries 32 and keys 16 are
    # normed too. Attention: q 32, k and v 16 each, out 32. SwiGLU: four of 48.
    assert found["activations"] == 64 * 4 * (3 * 96 + 2 * 48 + 2 * 32 + 2 * 16 + 4 * 48)
    # Five states a token; logits of a chunk (all 64 tokens fit) and their gradient; one gradient of the head.
    assert found["log-probs"] == 4 * (5 * 64 * 32 + 2 * 64 * 128 + 128 * 32)
    assert parts(qwen, longest=100, tokens_per_micro_batch=64)["activations"] == found["activations"] * 100 // 64
    # Liger's norms keep what they are given once, and its SwiGLU three of four.
    liger = parts(qwen, tokens_per_micro_batch=64, liger=True)
    assert liger["activations"] == 64 * 4 * (3 * 64 + 48 + 2 * 32 + 2 * 16 + 3 * 48)


def test_side_by_side_each_has_activations_and_gradients_of_its_own(qwen: PretrainedModel) -> None:
    one, three = parts(qwen), parts(qwen, micro_batches_at_once=3)
    times = {name: three[name] / size for name, size in one.items()}
    assert times == {**dict.fromkeys(one, 1), "gradients": 4, "activations": 3, "log-probs": 3}


def test_what_autocast_copies(qwen: PretrainedModel, tmp_path: Path) -> None:
    """All matrices and the head; those of one layer, where layers are computed again."""
    Qwen3Config(**{**QWEN, "num_hidden_layers": 3}).save_pretrained(tmp_path)
    layers = 2 * (3 * MATRICES + TABLES // 2)
    half: dict[str, Any] = {"mixed_precision": "bf16", "tokens_per_micro_batch": 64}
    kept = memory.kept_per_token(memory.blank(qwen).config, 2, 16, 4)
    assert parts(qwen, **half)["activations"] == 64 * kept + layers
    again = kept // 3 + 3 * 2 * HIDDEN
    assert parts(qwen, **half, activations="recompute")["activations"] == 64 * again + layers // 3


def test_servers_by_hand(qwen: PretrainedModel) -> None:
    config = VllmEngineConfig(type="vllm", kv_cache_gib=0.5, replicas=3, dtype="bfloat16")
    found = memory.served_memory(qwen, config)
    assert found == {"weights": 3 * 2 * PARAMETERS, "cache": 3 * 2**29, "programs": 3 * memory.SERVER}
    auto = config.model_copy(update={"dtype": "auto"})  # as its config says, which is float32
    assert memory.served_memory(qwen, auto)["weights"] == 3 * 4 * PARAMETERS
    with pytest.raises(NoEstimate, match="set kv_cache_gib"):
        memory.served_memory(qwen, config.model_copy(update={"kv_cache_gib": None}))


def test_muon_holds_one_moment_of_the_matrices(qwen: PretrainedModel) -> None:
    assert parts(qwen, optimizer=MuonConfig())["optimizer"] == 4 * MATRICES + 8 * (TABLES + NORMS)


def test_adapters_alone_have_gradients(qwen: PretrainedModel) -> None:
    found = parts(qwen, ClippedLoss(kl=0.1), lora=LoraConfig(rank=2), tokens_per_micro_batch=16)
    # Rank times inputs and outputs of q, k, v, o, gate, up, down.
    adapters = 2 * (64 + 2 * 48 + 64 + 3 * 80)
    assert found["adapters"] == found["gradients"] == 4 * adapters and found["optimizer"] == 8 * adapters
    assert "reference" not in found  # the base is there anyway
    few = parts(qwen, lora=LoraConfig(rank=2, targets=["q_proj"]), tokens_per_micro_batch=1, longest=1)
    assert few["gradients"] == 4 * 2 * 64
    step = found["activations"] + found["log-probs"]
    assert found.get("merged adapters", 0) == max(0, 4 * MATRICES - step)


def test_shards_are_a_part_of_all_but_the_step(qwen: PretrainedModel) -> None:
    fsdp = {"parallel": {"type": "fsdp", "processes": 4}, "tokens_per_micro_batch": 16}
    alone, rank = parts(qwen, ClippedLoss(kl=0.1), tokens_per_micro_batch=16), parts(qwen, ClippedLoss(kl=0.1), **fsdp)
    assert rank["weights"] == rank["reference"] == rank["gradients"] == PARAMETERS
    assert rank["optimizer"] == 2 * PARAMETERS
    # The layer has more weights than the head: it, the next one on its way, and a gradient.
    assert rank["gathered layers"] == 3 * 4 * (MATRICES + NORMS - 32)
    assert {k: rank[k] for k in ("activations", "log-probs")} == {k: alone[k] for k in ("activations", "log-probs")}
    host = memory.host_memory(qwen, TrainerConfig(**fsdp))  # pyright: ignore[reportArgumentType]
    assert host == {"programs of ranks": 3 * memory.TRAINING_PROGRAM, "whole weights": 4 * PARAMETERS}


def test_a_whole_model_a_rank_has_buckets_too(qwen: PretrainedModel) -> None:
    ddp = {"parallel": {"type": "ddp", "processes": 2}, "tokens_per_micro_batch": 16}
    alone, rank = parts(qwen, tokens_per_micro_batch=16), parts(qwen, **ddp)
    assert rank == {**alone, "gradients": 2 * 4 * PARAMETERS}
    config = TrainerConfig(**ddp)  # pyright: ignore[reportArgumentType]
    assert memory.host_memory(qwen, config) == {"programs of ranks": memory.TRAINING_PROGRAM}


def test_what_is_frozen_has_no_gradient(qwen: PretrainedModel) -> None:
    assert parts(qwen, freeze=["embed_tokens"])["gradients"] == 4 * (PARAMETERS - 128 * 32)


def test_a_distilled_student_needs_no_reference(qwen: PretrainedModel) -> None:
    assert "reference" not in parts(qwen, DistillLoss())


def test_a_support_is_counted_by_token(qwen: PretrainedModel) -> None:
    topk = DistillLoss(estimator=TopkEstimator(type="topk", support=10))
    assert "support" not in parts(qwen, DistillLoss())
    assert parts(qwen, topk, tokens_per_micro_batch=100)["support"] == 44 * 100 * 10


def test_an_engine_by_hand(qwen: PretrainedModel) -> None:
    config = LocalEngineConfig(slots=3, max_context=20)
    found = memory.engine_memory(qwen, config, versions=3)
    assert found["weights"] == 3 * 4 * PARAMETERS
    assert found["cache"] == 3 * 21 * 1 * 2 * PAIRS * SIZE * 4
    # 60 tokens at once: logits, some states, a mask of values and bools.
    assert found["prefill"] == 4 * (60 * 128 + 60 * (4 * 32 + 2 * 48)) + 5 * 60 * 20


class OtherEngine(Config):
    type: str = "other"


def test_another_engine_has_no_estimate(qwen: PretrainedModel) -> None:
    with pytest.raises(NoEstimate, match="other"):
        memory.engine_memory(qwen, OtherEngine(), 1)


@pytest.mark.parametrize("extra", [{}, NGRAM, LSA, MTP, {**NGRAM, **LSA, **MTP}])
def test_longcat_as_described(extra: dict[str, Any]) -> None:
    shape = {k: v for k, v in {**SHAPE, **extra}.items() if k != "vocab_size"}
    n = count(Longcat2Config(**shape, vocab_size=128))
    routers = 2 * 9  # biases, which are buffers
    weights = memory.weight_bytes(Longcat2Model(settings=shape, vocab_size=128))
    assert weights == 4 * (n.total + n.draft - routers)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradients_and_optimizer_of_a_real_trainer(optimizer: Any) -> None:
    shape = {k: v for k, v in {**SHAPE, **NGRAM}.items() if k != "vocab_size"}
    config = TrainerConfig(optimizer={"type": optimizer})  # pyright: ignore[reportArgumentType]
    trainer = Trainer(Longcat2ForCausalLM(Longcat2Config(**shape, vocab_size=128)), config, ClippedLoss(), 2)
    trainer.step([sample("s/0/0"), sample("s/0/1", advantage=-1.0, seed=1)], 2)
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if t.ndim]
    found = memory.trainer_memory(Longcat2Model(settings=shape, vocab_size=128), config, ClippedLoss(), 8)
    assert found["optimizer"] == sum(4 * t.numel() for t in states)
    trained = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert found["gradients"] == sum(4 * p.numel() for p in trained)


@pytest.mark.parametrize("extra", [{}, NGRAM, LSA])
def test_the_cache_of_a_real_engine(extra: dict[str, Any]) -> None:
    config = Longcat2Config(**{**SHAPE, **extra})
    cache = SlotCache(3, 20)
    cache.place(torch.arange(3), torch.arange(2).expand(3, 2), 2, True)
    mask = torch.zeros(3, 1, 2, 2)
    with torch.no_grad():
        Longcat2ForCausalLM(config).eval()(
            input_ids=torch.ones(3, 2, dtype=torch.long), attention_mask=mask,
            position_ids=torch.arange(2).expand(3, 2), past_key_values=cache, use_cache=True,
        )  # fmt: skip
    buffers = [t for layer in cache.layers for name in ("keys", "values") if (t := getattr(layer, name)) is not None]
    real = sum(t.numel() * t.element_size() for t in buffers)
    estimate = memory.cache_bytes(config, LocalEngineConfig(slots=3, max_context=20))
    assert estimate == real


def kept(model: torch.nn.Module, ids: torch.Tensor, half: bool) -> int:
    """Bytes that autograd keeps of a forward, weights and their copies apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(s) for p in model.parameters() for s in (p.shape, p.shape[::-1])}
    seen: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tuple(tensor.shape) not in shapes:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize(
    ("kind", "half", "attended"),
    [("qwen3", False, 4), ("qwen3", True, 4), ("qwen3", True, 2), ("longcat2", False, 4), ("longcat2", True, 4)],
)
def test_what_autograd_keeps(kind: str, half: bool, attended: int) -> None:
    torch.manual_seed(0)
    if kind == "qwen3":
        config: Any = Qwen3Config(**{**QWEN, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3})
        model = AutoModelForCausalLM.from_config(config).train()
        if half and attended == 4:
            attention.enable(model)
    else:
        config = Longcat2Config(**{**SHAPE, "num_layers": 3, "vocab_size": 128})
        model = Longcat2ForCausalLM(config).train()
    ids = torch.randint(3, 100, (4, 96))
    ratio = ids.numel() * kept_per_token(config, 2 if half else 4, 96, attended) / kept(model, ids, half)
    assert 0.8 < ratio < 1.2
