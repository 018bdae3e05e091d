"""Servers that die at the worst moment: the real engine class, and servers that only keep books of what they get."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from posttrain.engine.vllm import VllmEngine
from posttrain.engine.vllm_server import NAME, Refused, ServerGone
from posttrain.errors import EngineError
from posttrain.settings import VllmEngineConfig
from posttrain.types import Completion, Sampling, Weights

Way = Literal["lora", "folder"]


@dataclass
class Books:
    """What a server does with what is posted to it. ``before`` is awaited first, with the path and the body."""

    config: VllmEngineConfig
    name: str = "vLLM server 0"
    number: int = 0
    alive: bool = False
    starts: int = 0
    weights: str = "base"
    version: str = "default"
    adapters: dict[str, str] = field(default_factory=dict[str, str])
    running: asyncio.Event = field(default_factory=asyncio.Event)
    log: list[str] = field(default_factory=list[str])
    sampled_by: list[str] = field(default_factory=list[str])
    loading: int = 0
    before: Callable[[str, dict[str, Any]], Coroutine[Any, Any, None]] | None = None

    async def start(self) -> None:
        self.alive, self.starts, self.weights, self.version = True, self.starts + 1, "base", "default"
        self.adapters, self.loading = {}, 0
        self.running.set()

    async def kill(self) -> None:
        self.alive = False

    close = kill

    async def well(self) -> bool:
        return self.alive

    async def post(self, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        life = self.starts
        path = path.split("?")[0]
        self.log.append(path)
        if self.before is not None:
            await self.before(path, body or {})
        if not self.alive or life != self.starts:
            raise ServerGone("it died")
        if path == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = body["lora_path"]
        elif path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
        elif path == "/pause":
            self.running.clear()
        elif path == "/resume":
            self.running.set()
        elif path == "/collective_rpc":
            self.weights = body["kwargs"]["folder"]
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/inference/v1/generate":
            await self.running.wait()
            return self._sampled(body["model"])
        return {}

    def _sampled(self, model: str) -> Any:
        if model != NAME and model not in self.adapters:
            raise Refused(f"no model {model}")
        self.sampled_by.append(self.weights if model == NAME else self.adapters[model])
        span = {"start": 0, "end": 1, "version": self.version}
        logprobs = {"content": [{"logprob": -1.0}]}
        return {
            "choices": [{"token_ids": [5], "weight_versions": [span], "logprobs": logprobs, "finish_reason": "stop"}]
        }


async def begun(way: Way, folder: Path) -> tuple[VllmEngine, Books]:
    """With version 2 as its newest."""
    (folder / "config.json").write_text('{"vocab_size": 8}')
    engine = VllmEngine(VllmEngineConfig(type="vllm", weights=way, timeout_s=20), folder, folder)
    server = Books(engine.config)
    engine._replicas[0].keeper.server = engine._replicas[0].sender._server = server  # pyright: ignore[reportAttributeAccessIssue]
    await engine._begin(0)
    for version in (1, 2):
        await engine.load(Weights(version=version, where=f"/v{version}"))
    return engine, server


def ask(engine: VllmEngine) -> asyncio.Task[Completion]:
    return asyncio.create_task(engine.generate((1, 2), Sampling(max_tokens=1)))


class Gate:
    """Holds what is posted to ``path`` while it is shut, until it is opened."""

    def __init__(self, path: str) -> None:
        self.path, self.shut = path, False
        self.reached, self.opened = asyncio.Event(), asyncio.Event()

    async def __call__(self, path: str, body: dict[str, Any]) -> None:
        if self.shut and path == self.path:
            self.reached.set()
            await self.opened.wait()


LOADS = {"lora": "/v1/load_lora_adapter", "folder": "/collective_rpc"}


@pytest.mark.parametrize("way", ["lora", "folder"])
def test_a_restart_that_is_given_up_half_way_is_made_by_who_waits_next(way: Way, tmp_path: Path) -> None:
    """Whoever found the server dead is cancelled while the new one takes its weights: nobody may be served by what it
    started with, nor find it paused for ever."""

    async def run() -> None:
        engine, server = await begun(way, tmp_path)
        server.before = gate = Gate(LOADS[way])
        gate.shut, server.alive = True, False
        first = ask(engine)
        await gate.reached.wait()
        second = ask(engine)
        await asyncio.sleep(0)
        first.cancel()
        gate.shut = False
        found = await second
        assert (await asyncio.gather(first, return_exceptions=True))[0].__class__ is asyncio.CancelledError
        assert found.versions == (2,) and server.sampled_by == ["/v2"]
        assert engine._replicas[0].keeper.deaths == 1, "that somebody gave up is no death"

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("way", ["lora", "folder"])
def test_a_restart_that_fails_half_way_leaves_no_server_that_is_taken_for_well(way: Way, tmp_path: Path) -> None:
    async def run() -> None:
        engine, server = await begun(way, tmp_path)

        async def refuse(path: str, body: dict[str, Any]) -> None:
            if path == LOADS[way]:
                raise Refused("no room")

        server.before, server.alive = refuse, False
        with pytest.raises(EngineError, match="no room"):
            await ask(engine)
        assert not server.alive
        server.before = None
        assert (await ask(engine)).versions == (2,) and server.sampled_by == ["/v2"]

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("way", ["lora", "folder"])
def test_new_weights_wait_for_a_restart_that_puts_old_ones_in(way: Way, tmp_path: Path) -> None:
    """Else the two mix, and the first one's resume lets requests run while the second one's weights are pushed."""

    async def run() -> None:
        engine, server = await begun(way, tmp_path)
        server.before = gate = Gate(LOADS[way])
        gate.shut, server.alive = True, False
        asked = ask(engine)
        await gate.reached.wait()
        loading = asyncio.create_task(engine.load(Weights(version=3, where="/v3"), keep=[2] if way == "lora" else []))
        for _ in range(20):
            await asyncio.sleep(0)
        assert server.log.count(LOADS[way]) == 3, "version 3 is not on its way yet"
        gate.opened.set()
        await asyncio.gather(asked, loading)
        assert (await ask(engine)).versions == (3,) and server.sampled_by[-1] == "/v3"
        assert server.starts == 2
        if way == "folder":
            last = [p for p in server.log if p in ("/pause", "/collective_rpc", "/resume")][-6:]
            assert last == ["/pause", "/collective_rpc", "/resume"] * 2
        else:
            assert sorted(server.adapters.values()) == ["/v2", "/v3"]

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_server_that_somebody_else_started_anew_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        engine, server = await begun("folder", tmp_path)
        assert (await ask(engine)).versions == (2,)
        await server.start()
        with pytest.raises(EngineError, match="vLLM server 0 serves version 'default'"):
            await ask(engine)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_a_server_that_is_well_does_not_answer_is_asked_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for as long as the request may take, and not as fast as it can be refused; its words are told."""
    pauses, sleep = list[float](), asyncio.sleep

    async def short(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    async def run() -> None:
        engine, server = await begun("folder", tmp_path)

        async def fail(path: str, body: dict[str, Any]) -> None:
            if path == "/inference/v1/generate":
                raise ServerGone("it answered with 500: cannot do that")

        server.before = fail
        monkeypatch.setattr(asyncio, "sleep", short)
        with pytest.raises(EngineError, match=r"500: cannot do that; it says that it is well, but not so 3 times"):
            await ask(engine)
        assert server.log.count("/inference/v1/generate") == 3 and pauses == [1, 2]
        assert server.starts == 1 and engine._replicas[0].keeper.deaths == 0

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_start_in_which_a_server_goes_is_an_error_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')

    async def gone(self: VllmEngine, replica: object) -> None:
        raise ServerGone("it answered /collective_rpc with 500")

    monkeypatch.setattr(VllmEngine, "_begin", gone)
    with pytest.raises(EngineError, match="with 500"):
        asyncio.run(VllmEngine.start(VllmEngineConfig(type="vllm"), tmp_path, tmp_path))
