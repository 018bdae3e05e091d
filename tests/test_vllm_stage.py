"""A whole stage of training on vLLM, undisturbed, and with its servers killed."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from posttrain.protocols import World
from posttrain.settings import AloneConfig, FsdpConfig, LoraConfig, TrainerConfig
from tests.contracts.engines import needs_vllm, vllm_config
from tests.posttrain.tiny import make_model, make_tokenizer
from tests.toy_stage import HookedWorld, check_books, records, rollouts, toy_stage, train

pytestmark = [*needs_vllm, pytest.mark.faults]


def kill_servers() -> int:
    """All vLLM servers of this process, with what they started. Returns how many processes that were."""
    killed = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended by itself since it was listed, or a zombie
            if "vllm" in " ".join(process.cmdline()).lower():
                process.kill()
                killed += 1
    return killed


@pytest.mark.parametrize("way", ["in flight", "in flight from parts", "pinned", "pinned adapters"])
def test_a_killed_server_is_replaced_and_nothing_is_lost_or_trained_twice(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama", head_dim=32, vocab_size=len(make_tokenizer()))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    killed = list[int]()

    async def deadly(where: str, count: int) -> None:
        if where == "grade" and count in (8, 22):
            killed.append(kill_servers())

    worlds: dict[str, World] = {"requests": HookedWorld(deadly, 300.0)}
    pace = {"max_running": 4, "max_staleness": 1, "wait_s": 300.0, "retry_s": 0.05}
    pace["versions"] = "inflight" if "in flight" in way else "pinned"
    lora = LoraConfig(rank=4) if "adapters" in way else None
    # As configs/gpu/qwen3-node.yaml: ranks have a group of their own beside the one in which weights travel.
    parallel = FsdpConfig(type="fsdp", processes=2, timeout_s=120) if "parts" in way else AloneConfig()
    trainer = TrainerConfig(lr=1e-3, warmup_steps=0, decay=False, lora=lora, parallel=parallel)
    weights = "send" if "in flight" in way else "lora" if "adapters" in way else "folder"
    engine = vllm_config(max_context=128, weights=weights, replicas=2 if way == "pinned" else 1, max_loras=2)
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path, "run", toy_stage(tmp_path, worlds, loop=pace, engine=engine, trainer=trainer))
    assert len(killed) == 2 and min(killed) > 0
    assert "It starts again, and what it was asked is asked again" in caplog.text
    check_books(run)
    assert all(r.valid for r in rollouts(run)), "no rollout failed: the engine asked again"
    if "pinned" in way:
        assert all(len({v for s in r.branches[0] for v in s.versions if v >= 0}) == 1 for r in rollouts(run))
    assert max(r["gap_abs"] for r in records(run)) < 0.5
