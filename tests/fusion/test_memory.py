"""What stages need together, what does not fit and which keys lower it, and the line that a run logs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fusion import memory
from fusion.config import PipelineConfig
from fusion.memory import Room, plans, problems
from posttrain.config import load
from posttrain.machine import memory_here

ROOT = Path(__file__).parents[2]
GIB = 2**30


def config(*overrides: str) -> PipelineConfig:
    return load(PipelineConfig, ROOT / "configs/tiny/pipeline.yaml", list(overrides))


def test_every_stage_of_training_has_a_plan() -> None:
    names = [plan.stage for plan in plans(config())]
    assert names == ["cold_start", "experts.agent", "experts.reasoning", "experts.interaction", "fusion"]


def test_pinned_versions_are_all_resident() -> None:
    inflight, pinned = config(), config("experts.agent.loop.versions=pinned", "experts.agent.loop.max_staleness=3")
    one, four = (next(p for p in plans(c) if p.stage == "experts.agent") for c in (inflight, pinned))
    assert four.host["engine's weights"] == 4 * one.host["engine's weights"] == 4 * one.trainer["weights"]
    assert one.shared == one.trainer["weights"]


def test_fusion_has_its_teachers() -> None:
    fusion = plans(config())[-1]
    assert fusion.host["teachers"] == 3 * fusion.trainer["weights"]
    assert fusion.host["teachers' logits"] == 4 * 2 * 8192 * 680


def test_servers_share_the_trainers_gpu_unless_they_have_devices() -> None:
    served = "{type: vllm, kv_cache_gib: 2, dtype: bfloat16, weights: folder, replicas: 3, threads: null}"
    vllm = load(
        PipelineConfig,
        ROOT / "configs/tiny/vllm.yaml",
        ["engine={type: vllm, kv_cache_gib: 2, threads: null}", f"fusion.teachers={{type: served, engine: {served}}}"],
    )
    agent, fusion = (p for p in plans(vllm) if p.stage in ("experts.agent", "fusion"))
    assert agent.trainer["engine's weights"] == agent.trainer["weights"] and agent.trainer["engine's cache"] == 2 * GIB
    assert fusion.trainer["teachers' weights"] == 3 * fusion.trainer["weights"] // 2
    assert fusion.trainer["teachers' cache"] == 6 * GIB and "teachers" not in fusion.host
    assert agent.shared == 0 and agent.note == "" and set(agent.host) == {"programs"}
    [told] = problems(fusion, Room(host=64 * GIB, gpu=8 * GIB))
    assert told.endswith("lower fusion.teachers.engine.kv_cache_gib, engine.kv_cache_gib")

    open_end = vllm.engine.model_copy(update={"kv_cache_gib": None})
    unknown = next(p for p in plans(vllm.model_copy(update={"engine": open_end})) if p.stage == "experts.agent")
    assert "engine: no estimate is made here (vllm takes most of what it finds; set kv_cache_gib)" in unknown.note


def test_servers_on_devices_of_their_own_are_counted_there() -> None:
    """By hand: a layer has queries, keys, values and outputs of 96 x (128 + 64 + 64 + 128), three maps 96 x 256 and
    norms 2 x 96 and 2 x 32; there are four, an embedding 680 x 96 and the last norm."""
    parameters = 4 * (96 * 384 + 3 * 96 * 256 + 256) + 680 * 96 + 96
    student = "{type: vllm, threads: null, kv_cache_gib: 2, dtype: float32, replicas: 2, devices: ['4', '5']}"
    teachers = "{type: vllm, threads: null, kv_cache_gib: 1, dtype: bfloat16, replicas: 3, devices: ['5', '6', '0']}"
    given = [f"engine={student}", f"fusion.teachers={{type: served, engine: {teachers}}}"]
    given.append("experts.agent.trainer.parallel={type: fsdp, processes: 4}")
    found = plans(load(PipelineConfig, ROOT / "configs/tiny/vllm.yaml", given))
    agent, fusion = (p for p in found if p.stage in ("experts.agent", "fusion"))
    one, other = 4 * parameters + (2 + 4) * GIB, 2 * parameters + (1 + 4) * GIB
    assert {device: sum(parts.values()) for device, parts in agent.apart.items()} == {"4": one, "5": one}
    on = {device: sum(parts.values()) for device, parts in fusion.apart.items()}
    assert on == {"4": one, "5": one + other, "6": other}, "device 0 is the trainer's"
    assert fusion.trainer["teachers' cache"] == GIB and "engine's cache" not in fusion.trainer
    assert agent.note == fusion.note == ""
    ranks = 4 * sum(agent.trainer.values())
    assert agent.needs(False)[1] == agent.needs(True)[1] + ranks + 2 * one, "without GPUs all is the machine's"
    assert "on device 4, 5 6.00 GiB (engine's weights 2 MiB, engine's cache 2.00 GiB, " in agent.text(True)
    assert list(fusion.to_dict()["apart"]) == ["4", "5", "6"] and "apart" not in plans(config())[-1].to_dict()

    [told] = problems(fusion, Room(host=64 * GIB, gpu=10 * GIB))
    assert told.startswith("fusion needs about 11.00 GiB of the memory of device 5, and there are 10.00 GiB: lower ")
    assert told.endswith("lower engine.kv_cache_gib, fusion.teachers.engine.kv_cache_gib")
    [told] = problems(agent, Room(host=64 * GIB, gpu=5 * GIB))
    assert "of the memory of device 4, 5, and" in told
    assert problems(fusion, Room(host=64 * GIB, gpu=12 * GIB)) == []


def test_servers_with_threads_are_the_cpus() -> None:
    """Whatever GPUs there are. By hand: a quarter of a GiB for the cache of each of five, three of them teachers."""
    given = ["engine={type: vllm, replicas: 2}", "fusion.teachers={type: served, engine: {type: vllm, replicas: 3}}"]
    both = load(
        PipelineConfig, ROOT / "configs/tiny/vllm.yaml", [*given, "fusion.teachers.engine.devices=['1','2','3']"]
    )
    fusion = plans(both)[-1]
    assert not any("engine" in part or "teachers" in part for part in fusion.trainer) and fusion.apart == {}
    assert fusion.host["engine's cache"] == GIB // 2 and fusion.host["teachers' cache"] == 3 * GIB // 4
    assert fusion.host["teachers' programs"] == 3 * 768 * 2**20
    assert fusion.host["teachers' weights"] == 3 * fusion.trainer["weights"]


def test_what_does_not_fit_is_named_with_its_keys() -> None:
    agent = plans(config("experts.agent.trainer.tokens_per_micro_batch=4000000", "engine.slots=4096"))[1]
    [told] = problems(agent, Room(host=8 * GIB))
    assert told.startswith("experts.agent needs about ") and "there are 8.00 GiB: lower " in told
    first, *rest = told.rpartition("lower ")[2].split(", ")
    assert first == "experts.agent.trainer.tokens_per_micro_batch" and rest == []
    # On a GPU the trainer is not the machine's, and the machine is told of the engine's slots.
    told = problems(agent, Room(host=2 * GIB, gpu=80 * GIB))
    assert [" of memory," in t or " of the GPU's memory," in t for t in told] == [True, True]
    assert "engine.slots" in told[0] and "tokens_per_micro_batch" not in told[0]
    assert "tokens_per_micro_batch" in told[1] and "engine.slots" not in told[1]
    assert problems(agent, Room(host=4096 * GIB)) == []
    assert "/dev/shm" in problems(agent, Room(host=4096 * GIB, shared=1 << 20))[0]


def test_a_run_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fusion.memory"):
        memory.foretell(config())
    [record] = caplog.records
    assert record.levelno == logging.INFO and "memory: cold_start needs most" in record.getMessage()


def test_a_run_that_will_not_fit_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tokens = memory_here()[0] // 1000  # each takes far more than a kilobyte
    with caplog.at_level(logging.INFO, logger="fusion.memory"):
        memory.foretell(config(f"fusion.trainer.tokens_per_micro_batch={tokens}"))
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1 and "fusion.trainer.tokens_per_micro_batch" in told[0]
