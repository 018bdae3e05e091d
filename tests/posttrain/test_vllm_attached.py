"""Servers that were there before the engine, and stay."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from random import Random
from typing import Any

from posttrain.engine.vllm import VllmEngine
from posttrain.engine.vllm_server import Server
from posttrain.types import Completion, Sampling, Weights
from tests.contracts.engines import model_of, needs_vllm, vllm_config
from tests.posttrain.tiny import make_ids, make_model, trainer_gap, trainer_of

pytestmark = needs_vllm

LONG: dict[str, Any] = {"head_dim": 32, "max_position_embeddings": 1024}
ASKED = Sampling(max_tokens=8, seed=1)


def one_after_the_other(
    folder: Path, uses: Sequence[tuple[Path, Callable[[VllmEngine], Coroutine[Any, Any, Completion]]]], **changes: Any
) -> list[Completion]:
    """An engine for each of ``uses``, with the model that it shall serve, on one server that has that of ``folder``."""

    async def scenario() -> list[Completion]:
        config = vllm_config(**changes)
        server, found = Server(config, folder, folder / "work" / "server.log", 0), list[Completion]()
        try:
            await server.start()
            for start, use in uses:
                attached = config.model_copy(update={"servers": (server.url,)})
                engine = await VllmEngine.start(attached, start, folder / "work")
                try:
                    found.append(await use(engine))
                finally:
                    await engine.close()
                assert await server.well(), "it is not the engine's to end"
        finally:
            await server.close()
        return found

    return asyncio.run(scenario())


def test_what_one_engine_had_read_the_next_one_reads_anew(tmp_path: Path) -> None:
    """Versions begin at 0 again, with other weights."""
    models = [make_model("llama", seed, **LONG) for seed in range(2)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
    prompt = make_ids(Random(0), 400)

    async def use(engine: VllmEngine) -> Completion:
        return await engine.generate(prompt, ASKED)

    uses = [(tmp_path / str(n), use) for n in (0, 1, 0)]
    found = one_after_the_other(tmp_path / "0", uses, max_context=600)
    for n, completion in zip((0, 1, 0), found, strict=True):
        assert completion.versions == (0,) * 8
        assert trainer_gap(trainer_of(models[n]), [(prompt, completion)]) < 1e-3


def test_adapters_of_one_engine_are_not_those_of_the_next(tmp_path: Path) -> None:
    """Though both call theirs version 1, and one server has room for no more."""
    models: list[Any] = [model_of("llama-32-lora", seed) for seed in (3, 4)]
    model_of("llama-32-lora").save_pretrained(tmp_path / "base")
    prompt = make_ids(Random(0), 40)

    def using(n: int) -> Callable[[VllmEngine], Coroutine[Any, Any, Completion]]:
        models[n].adapter.save_pretrained(tmp_path / f"adapter-{n}")

        async def use(engine: VllmEngine) -> Completion:
            await engine.load(Weights(version=1, where=str(tmp_path / f"adapter-{n}")))
            return await engine.generate(prompt, ASKED)

        return use

    uses = [(tmp_path / "base", using(n)) for n in (0, 1)]
    found = one_after_the_other(tmp_path / "base", uses, weights="lora", max_loras=1)
    for model, completion in zip(models, found, strict=True):
        assert completion.versions == (1,) * 8
        assert trainer_gap(trainer_of(model), [(prompt, completion)]) < 1e-3
