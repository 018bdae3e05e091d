"""Requests that nobody waits for any more, and what a model's makers recommend for those that somebody does."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from posttrain.engine.vllm import VllmEngine
from posttrain.errors import EngineError
from posttrain.types import Completion, Sampling, Weights
from tests.contracts.engines import needs_vllm, serve
from tests.posttrain.tiny import make_ids, make_model, trainer_gap, trainer_of

pytestmark = needs_vllm

LONG: dict[str, Any] = {"head_dim": 32, "max_position_embeddings": 4096}
COUNT, TOKENS = 4, 3000


async def metric(engine: VllmEngine, name: str) -> float:
    """Of its only server."""
    text = await engine._replicas[0].server.get("/metrics")
    return sum(map(float, re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)))


async def until(engine: VllmEngine, running: int) -> None:
    deadline = time.monotonic() + 120
    while await metric(engine, "num_requests_running") != running:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", ["cancelled", "dropped"])
def test_what_nobody_waits_for_is_not_sampled_to_its_end(how: str, tmp_path: Path) -> None:
    for seed in range(2):
        make_model("llama", seed, **LONG).save_pretrained(tmp_path / str(seed))

    async def use(engine: VllmEngine) -> float:
        asked = [
            asyncio.create_task(engine.generate((5, 6, n), Sampling(max_tokens=TOKENS, seed=n, version=0)))
            for n in range(COUNT)
        ]
        await until(engine, COUNT)
        if how == "cancelled":
            for task in asked:
                task.cancel()
        else:
            await engine.load(Weights(version=1, where=str(tmp_path / "1")))
        ended = await asyncio.gather(*asked, return_exceptions=True)
        wanted = asyncio.CancelledError if how == "cancelled" else EngineError
        assert [type(e) for e in ended] == [wanted] * COUNT
        await until(engine, 0)
        return await metric(engine, "generation_tokens_total")

    made = serve(tmp_path / "0", use, max_context=4000)
    assert 0 < made < COUNT * TOKENS / 2


def test_a_model_s_own_settings_for_sampling_are_not_the_policy_s(tmp_path: Path) -> None:
    """The route for ids does not look at them (0.32), whatever ``--generation-config`` says; should it ever."""
    model = make_model("llama", head_dim=32)
    model.save_pretrained(tmp_path)
    advice = {"do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 0.2, "repetition_penalty": 1.3}
    (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    prompt = make_ids(Random(0), 20)

    async def use(engine: VllmEngine) -> Completion:
        return await engine.generate(prompt, Sampling(max_tokens=40, seed=3))

    found = serve(tmp_path, use)
    assert trainer_gap(trainer_of(model), [(prompt, found)]) < 1e-3
    assert sum(found.logprobs) < -40, "of all tokens, not of the likeliest"
