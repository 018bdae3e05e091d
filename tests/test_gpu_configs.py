"""The configs for GPUs: on a CPU, with another model and engine and less of everything; and what they would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from experts.config import ExpertConfig
from fusion.config import PipelineConfig
from fusion.memory import plans
from fusion.preflight import preflight
from posttrain.config import load
from posttrain.engine.vllm_server import serve_arguments
from posttrain.errors import ConfigError
from posttrain.journal import read_journal, rollout_from_dict
from posttrain.settings import PretrainedModel, VllmEngineConfig
from posttrain.types import StopReason
from tests.posttrain.qwen import save_qwen
from tests.test_pretrained import carried_out

ROOT = Path(__file__).parents[1]
GPU = ROOT / "configs/gpu"
WORLDS = {"code", "work", "search", "chains", "rules", "facts", "requests"}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
every = pytest.mark.parametrize("name", sorted(p.stem for p in GPU.glob("*.yaml")))


def config_of(name: str, *overrides: str) -> PipelineConfig:
    return load(PipelineConfig, GPU / f"{name}.yaml", overrides)


@every
def test_it_is_a_config_for_gpus(name: str) -> None:
    config = config_of(name)
    assert config.cold_start is None and config.model.type == "pretrained" and set(config.worlds) == WORLDS
    assert config.engine.type == "vllm" and config.fusion.teachers.type == "served"
    assert {w.type: getattr(w, "sandbox", None) and w.sandbox.type for w in config.worlds.values()}["code"] == "docker"  # type: ignore[union-attr]
    for stage in (*config.experts.values(), config.fusion):
        assert stage.trainer.mixed_precision == "bf16" and stage.trainer.activations == "recompute"
        assert stage.trainer.tokens_per_micro_batch >= config.engine.max_context
        assert (stage.trainer.lora is None) == (config.engine.weights != "lora")
        assert (stage.trainer.parallel.type == "fsdp") == (name == "qwen3-node") == (config.engine.weights == "send")
        assert not isinstance(stage, ExpertConfig) or stage.loss.type == "dppo"


def test_a_server_starts_beside_the_trainer() -> None:
    """vLLM wants a share of the GPU to be free, by default most of it, even if it is told the size of its cache."""
    engine = config_of("qwen3").engine
    assert isinstance(engine, VllmEngineConfig)
    said = serve_arguments(engine, Path("model"), 1)
    assert said[said.index("--kv-cache-memory-bytes") + 1] == str(20 * 2**30)
    assert said[said.index("--gpu-memory-utilization") + 1] == "0.05"
    for alone in ({"threads": 1}, {"kv_cache_gib": None}):
        assert "--gpu-memory-utilization" not in serve_arguments(engine.model_copy(update=alone), Path("model"), 1)


@every
def test_a_model_that_is_not_there_comes_with_the_command(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    alone = config_of(name).model_copy(update={"worlds": {}})
    with pytest.raises(ConfigError) as caught:
        preflight(GPU / f"{name}.yaml", alone)
    assert "model.path: models/Qwen3-" in str(caught.value) and "hf download" in str(caught.value)


@every
@pytest.mark.slow
def test_it_fits_80_gb_by_estimate(name: str, tmp_path: Path) -> None:
    model = config_of(name).model
    assert isinstance(model, PretrainedModel)
    folder = model.path
    shape = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    tied = "8B" not in folder.name
    AutoConfig.for_model(
        "qwen3", dtype="bfloat16", tie_word_embeddings=tied, **shape, **SHAPES[folder.name]
    ).save_pretrained(tmp_path)
    found = {p.stage: p.needs(on_gpu=True)[0] / 2**30 for p in plans(config_of(name, f"model.path={tmp_path}"))}
    print(name, {stage: round(size, 1) for stage, size in found.items()})
    assert set(found) == {"experts.agent", "experts.reasoning", "experts.interaction", "fusion"}
    assert min(found.values()) > 30 and max(found.values()) < 72


SMALL = (
    "engine={type: local, slots: 8, max_context: 4096}",
    "worlds.code.sandbox={type: monty}",
    "fusion.teachers={type: model}",
    "fusion.loop.steps=1",
    "fusion.loop.groups_per_step=2",
    "fusion.train_tasks=4",
    "evaluation.tasks=3",
    *(f"worlds.{world}.max_tokens=8" for world in sorted(WORLDS)),
    "worlds.search.pages=200",
    *(
        f"{stage}.trainer.{change}"
        for stage in ("experts.agent", "experts.reasoning", "experts.interaction", "fusion")
        for change in ('mixed_precision="no"', "tokens_per_micro_batch=4096")
    ),
    *(
        f"experts.{expert}.{change}"
        for expert in ("agent", "reasoning", "interaction")
        for change in ("train_tasks=6", "loop.steps=1", "loop.groups_per_step=2", "loop.group_size=2",
                       "loop.filter_silent=false", "credit.truncated=keep")
    ),
)  # fmt: skip
"""A model at random never ends a turn and is never right, so that such groups must do."""


@pytest.mark.parametrize(
    "name", ["qwen3", *(pytest.param(n, marks=pytest.mark.long) for n in ("qwen3-lora", "qwen3-8b-lora", "qwen3-node"))]
)
@pytest.mark.slow
def test_it_runs_on_a_cpu(name: str, tmp_path: Path) -> None:
    """The first from end to end, the others, which differ in their weights alone, as far as the first expert."""
    save_qwen(tmp_path / "model", tie_word_embeddings="8b" not in name)
    two = ["experts.agent.trainer.parallel={type: fsdp, processes: 2, devices: [0, 1]}"] if name == "qwen3-node" else []
    config = config_of(name, *SMALL, *two, f"model.path={tmp_path / 'model'}")
    preflight(GPU / f"{name}.yaml", config)
    whole = name == "qwen3"
    run, found = carried_out(config, tmp_path / "run", lambda p: p.evaluation() if whole else p.expert("agent"))
    trained = config.experts if whole else ("agent",)
    played = [rollout_from_dict(r) for e in trained for r in read_journal(run.rollouts(f"expert-{e}"))]
    assert len(played) >= 4 * len(trained) and all(r.valid for r in played)
    assert {r.task.world for r in played} <= WORLDS
    assert StopReason.CONTEXT_OVERFLOW in {r.stop for r in played}
    assert all(r.task.limits.max_tokens == 8 for r in played)
    assert all(r.task.thinking == (r.task.world in ("chains", "rules")) for r in played)
    if whole:
        assert set(found["domains"]) == {"agent", "reasoning", "interaction"}
    else:
        file = "adapter/adapter_model.safetensors" if "lora" in name else "model.safetensors"
        assert (run.checkpoint("expert-agent") / file).is_file()
