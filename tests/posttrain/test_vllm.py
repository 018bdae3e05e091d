"""What vLLM gets wrong when it is left alone, and what becomes of a server that dies."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from posttrain.engine.vllm import VllmEngine
from posttrain.engine.vllm_server import Server
from posttrain.errors import EngineError, UserError
from posttrain.types import Completion, Sampling, Weights
from posttrain.weights import HeldOutlet
from tests.contracts.engines import needs_vllm, replayed, serve, vllm_config, with_adapter
from tests.posttrain.tiny import all_logprobs, make_ids, make_model, trainer_gap, trainer_of

pytestmark = needs_vllm

TOLERANCE = 1e-3


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def pids(engine: VllmEngine, server: int = 0) -> list[int]:
    """Of all processes of one server."""
    process = engine._replicas[server].server._process
    assert process is not None
    return [pid for pid, group in _groups() if group == process.pid]


def kill(engine: VllmEngine, server: int = 0) -> list[int]:
    """One server, at once. Returns the processes that it had."""
    found = pids(engine, server)
    for pid in found:
        with suppress(ProcessLookupError):  # ended by itself since it was listed
            os.kill(pid, signal.SIGKILL)
    return found


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied head": ("llama", {"tie_word_embeddings": True}),
    "dense": ("qwen3", {}),
    "experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    # On a CPU vLLM has latent attention of no other width than DeepSeek's.
    "latents": (
        "deepseek_v3",
        {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
        | {"n_routed_experts": 8, "n_group": 2, "first_k_dense_replace": 1},
    ),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("tied head", "folder"),
        pytest.param("dense", "folder", marks=pytest.mark.long),
        ("experts", "folder"),
        ("latents", "folder"),
        pytest.param("tied head", "send", marks=pytest.mark.long),
        pytest.param("dense", "send", marks=pytest.mark.long),
        ("experts", "send"),
        pytest.param("latents", "send", marks=pytest.mark.long),
    ],
)
def test_after_every_update_the_output_is_what_transformers_computes(name: str, way: str, tmp_path: Path) -> None:
    """A tied head and fused experts keep the first weights, or worse, if the worker does not see to them. With latent
    attention heads have the wrong positions, and experts the wrong weights, if the server is not told."""
    kind, changes = MODELS[name]
    shape = {"head_dim": 32, **changes}
    models = [make_model(kind, seed, **shape) for seed in range(3)]
    folders = [saved(m, tmp_path / str(i)) for i, m in enumerate(models)]
    prompt = make_ids(Random(0), 40)
    outlet = HeldOutlet()

    async def use(engine: VllmEngine) -> list[Completion]:
        found = [await engine.generate(prompt, Sampling(max_tokens=20, temperature=0))]
        for version in (1, 2, 3):
            where = folders[version % 3] if way == "folder" else outlet.put(trainer_of(models[version % 3]))
            await engine.load(Weights(version=version, where=where))
            found.append(await engine.generate(prompt, Sampling(max_tokens=20, temperature=0)))
        return found

    found = serve(tmp_path / "0", use, weights=way, eager=name != "latents")  # of which it must know itself
    for version, got in enumerate(found):
        best = all_logprobs(models[version % 3], (*prompt, *got.ids))[len(prompt) - 1 : -1].max(dim=-1)
        assert got.ids == tuple(best.indices.tolist())
        assert got.logprobs == pytest.approx(best.values.tolist(), abs=TOLERANCE)
        assert got.versions == (version,) * 20


def test_a_prompt_that_was_seen_under_old_weights_is_read_anew(tmp_path: Path) -> None:
    """Longer than a block of 128 tokens, so that it is in the prefix cache; also for a turn that follows."""
    models = [make_model("llama", seed, head_dim=32, max_position_embeddings=1024) for seed in range(2)]
    folders = [saved(m, tmp_path / str(i)) for i, m in enumerate(models)]
    prompt = make_ids(Random(1), 400)

    async def use(engine: VllmEngine) -> list[tuple[Completion, list[tuple[tuple[int, ...], Completion]]]]:
        async def updated(version: int) -> tuple[Completion, list[tuple[tuple[int, ...], Completion]]]:
            await engine.generate(prompt, Sampling(max_tokens=5))
            running = asyncio.create_task(engine.generate(make_ids(Random(2), 300), Sampling(max_tokens=300)))
            await engine.generate((5, 6), Sampling(max_tokens=5))  # now the long one is under way
            await engine.load(Weights(version=version, where=folders[version % 2]))
            first = await engine.generate(prompt, Sampling(max_tokens=20, seed=1))
            following = (*prompt, *first.ids, 5, 6)
            second = await engine.generate(following, Sampling(max_tokens=20, seed=2))
            return await running, [(prompt, first), (following, second)]

        return await replayed(lambda got: len({*got[0].versions}) == 2, updated)

    for version, (running, pairs) in enumerate(serve(tmp_path / "0", use, max_context=800), 1):
        count = running.versions.count(version - 1)
        assert running.versions == (version - 1,) * count + (version,) * (300 - count)
        assert all(c.versions == (version,) * 20 for _, c in pairs)
        assert trainer_gap(trainer_of(models[version % 2]), pairs) < TOLERANCE


def test_many_long_prompts_at_once_are_read_whole(tmp_path: Path) -> None:
    """More tokens than a forward may hold: on a CPU a prompt that is cut in two ends a server, if there is a seed."""
    model = make_model("llama", 0, head_dim=32, max_position_embeddings=1024)
    saved(model, tmp_path)
    prompts = [make_ids(Random(i), 700 + 7 * i) for i in range(12)]

    async def use(engine: VllmEngine) -> list[Completion]:
        asked = (engine.generate(p, Sampling(max_tokens=5, seed=i)) for i, p in enumerate(prompts))
        return await asyncio.gather(*asked)

    found = serve(tmp_path, use, max_context=1000, restarts=0)
    assert trainer_gap(trainer_of(model), list(zip(prompts, found, strict=True))) < TOLERANCE


@pytest.mark.parametrize("on_swap", ["keep", "recompute"])
def test_a_swap_keeps_the_cache_or_computes_it_anew(on_swap: str, tmp_path: Path) -> None:
    models = [make_model("llama", seed, head_dim=32) for seed in range(2)]
    folders = [saved(m, tmp_path / str(i)) for i, m in enumerate(models)]
    prompt = make_ids(Random(3), 30)

    async def use(engine: VllmEngine) -> list[Completion]:
        async def swapped(version: int) -> Completion:
            long = asyncio.create_task(engine.generate(prompt, Sampling(max_tokens=200, seed=1)))
            await engine.generate(prompt, Sampling(max_tokens=10))
            await engine.load(Weights(version=version, where=folders[version % 2]))
            return await long

        return await replayed(lambda c: 5 <= c.versions.count(c.versions[0]) <= 150, swapped)

    tries = serve(tmp_path / "0", use, on_swap=on_swap)
    for version, got in enumerate(tries, 1):
        count = got.versions.count(version - 1)
        assert got.versions == (version - 1,) * count + (version,) * (200 - count)
        if count == 200 or (on_swap == "keep" and got is not tries[-1]):
            continue  # nothing follows the swap, or it may be too little to tell, or all
        after = Completion(
            ids=got.ids[count:], logprobs=got.logprobs[count:], versions=got.versions[count:], finish="length"
        )
        gap = trainer_gap(trainer_of(models[version % 2]), [((*prompt, *got.ids[:count]), after)])
        assert gap < TOLERANCE if on_swap == "recompute" else gap > 100 * TOLERANCE


def test_a_server_that_is_killed_starts_again_with_its_weights_and_nothing_is_lost(tmp_path: Path) -> None:
    models = [make_model("llama", seed, head_dim=32) for seed in range(2)]
    folders = [saved(m, tmp_path / str(i)) for i, m in enumerate(models)]
    prompts = [make_ids(Random(i), 20 + i) for i in range(49)]

    async def use(engine: VllmEngine) -> list[Completion]:
        await engine.load(Weights(version=7, where=folders[1]))
        calls = [engine.generate(p, Sampling(max_tokens=150, seed=i)) for i, p in enumerate(prompts)]
        asked = [asyncio.create_task(call) for call in calls[:-1]]  # six times what it has slots for
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        before, under_way = kill(engine), not all(t.done() for t in asked)
        found = await asyncio.gather(*asked, calls[-1])  # the last sees that it is dead, should nobody else
        assert under_way
        assert before and not set(before) & set(pids(engine))
        assert engine._replicas[0].keeper.lives == 1
        return found

    found = serve(tmp_path / "0", use)
    assert all(c.versions == (7,) * 150 for c in found)
    assert trainer_gap(trainer_of(models[1]), list(zip(prompts, found, strict=True))) < TOLERANCE


def test_every_server_has_restarts_of_its_own(tmp_path: Path) -> None:
    saved(make_model("llama", head_dim=32), tmp_path)

    async def use(engine: VllmEngine) -> tuple[list[Completion], list[int]]:
        def ask(first: int) -> list[asyncio.Task[Completion]]:
            calls = (engine.generate((first, i), Sampling(max_tokens=200, seed=i)) for i in range(12))
            return [asyncio.create_task(call) for call in calls]

        asked = ask(5)
        await engine.generate((5, 6), Sampling(max_tokens=5))  # now they are under way
        killed = kill(engine), kill(engine, 1)
        asked += ask(6)  # to both servers, so that both are missed even if the others were through
        found = await asyncio.gather(*asked)
        assert all(killed)
        return found, [r.keeper.lives for r in engine._replicas]

    found, lives = serve(tmp_path, use, restarts=1, replicas=2)
    assert lives == [1, 1] and all(len(c.ids) == 200 for c in found)


def test_a_server_that_dies_too_often_is_an_engine_error(tmp_path: Path) -> None:
    saved(make_model("llama", head_dim=32), tmp_path)

    async def use(engine: VllmEngine) -> None:
        tokens = [5, *[200] * 100]  # some wait for seconds
        asked = [asyncio.create_task(engine.generate((5, 6), Sampling(max_tokens=most))) for most in tokens]
        await asked[0]
        assert kill(engine)
        ended = await asyncio.gather(*asked, return_exceptions=True)
        for most, end in zip(tokens, ended, strict=True):
            if isinstance(end, Completion):  # it ended before
                assert len(end.ids) == most
            else:
                with pytest.raises(EngineError, match="vLLM server 0"):
                    raise end
        assert any(isinstance(e, EngineError) for e in ended)

    serve(tmp_path, use, restarts=0)


def test_a_server_that_answers_late_while_it_starts_is_waited_for(tmp_path: Path) -> None:
    """For engine.start_s, not only as long as one answer may take; but no longer than the engine is there."""
    asked = list[asyncio.StreamWriter]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if len(asked) == 1:  # the others wait
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        asked.append(writer)

    async def scenario() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
            url = "http://{}:{}".format(*listening.sockets[0].getsockname())
            server = Server(vllm_config(servers=[url], start_s=60), tmp_path, tmp_path / "log", 0)
            await server.start()
            assert len(asked) == 2
            starting = asyncio.create_task(server.start())
            while len(asked) == 2:
                await asyncio.sleep(0.01)
            await server.close()
            with pytest.raises(EngineError, match="vLLM server 0 was closed"):
                await starting
            for writer in asked:
                writer.close()

    asyncio.run(scenario())


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    saved(make_model("llama", head_dim=32), tmp_path)

    async def use(engine: VllmEngine) -> None:
        raise AssertionError

    with pytest.raises(EngineError, match=r"(?s)ended before it served; the end of .*vllm-0\.log:.*--no-such-flag"):
        serve(tmp_path, use, args=["--no-such-flag"])


def test_without_vllm_there_is_a_cure(tmp_path: Path) -> None:
    saved(make_model("llama", head_dim=32), tmp_path)

    async def use(engine: VllmEngine) -> None:
        raise AssertionError

    with pytest.raises(UserError, match=r"engine.command: `/no/vllm` cannot be run .* scripts/install-vllm.sh"):
        serve(tmp_path, use, command=("/no/vllm",))


@pytest.mark.long
@pytest.mark.parametrize("way", ["folder", "send", "lora"])
def test_updates_under_load_neither_mix_versions_nor_leak(way: str, tmp_path: Path) -> None:
    """500 in a row; two replicas, or one with adapters, so that one version stays beside the newest."""
    begin = make_model("llama", head_dim=32)
    models = [begin, make_model("llama", 1, head_dim=32)] if way != "lora" else [with_adapter(seed) for seed in (1, 2)]
    trainers, outlet = [trainer_of(m) for m in models], HeldOutlet()
    folders = [saved(m if way != "lora" else m.adapter, tmp_path / str(i)) for i, m in enumerate(models)]
    updates = 500

    async def use(engine: VllmEngine) -> tuple[list[tuple[int, tuple[int, ...], Completion]], list[list[int]]]:
        done, kept, over = list[tuple[int, tuple[int, ...], Completion]](), list[list[int]](), asyncio.Event()

        async def ask(n: int) -> None:
            rng = Random(n)
            while not over.is_set():
                version, prompt = engine.newest, make_ids(rng, rng.randint(5, 150))
                sampling = Sampling(max_tokens=rng.randint(5, 25), seed=rng.randrange(10**6), version=version)
                try:
                    done.append((version, prompt, await engine.generate(prompt, sampling)))
                except EngineError as error:
                    assert "was dropped before" in str(error) or "is not resident" in str(error)

        async def update(version: int) -> None:
            trainers[version % 2].version = version
            where = outlet.put(trainers[version % 2]) if way == "send" else folders[version % 2]
            await engine.load(Weights(version=version, where=where), keep=[version - 1])

        # A CPU's kernels are made for every number of tokens that a forward has: some 200 MiB a server until all are.
        await update(1)
        rng = Random(0)
        for turn in range(800):  # of both replicas, or with adapters and without
            lengths, version = [rng.randint(5, 150) for _ in range(8)], turn % 2
            prompts = [make_ids(rng, n) for n in lengths]
            sampling = Sampling(max_tokens=rng.randint(5, 25), version=version)
            await asyncio.gather(*(engine.generate(prompt, sampling) for prompt in prompts))
        async with asyncio.TaskGroup() as tasks:
            for n in range(8):
                tasks.create_task(ask(n))
            for version in range(2, updates + 2):
                await update(version)
                while len(done) < version:  # adapters load sooner than a completion ends
                    await asyncio.sleep(0.002)
                servers = [r.server._process.pid for r in engine._replicas if r.server._process]
                ours = psutil.Process()
                kept.append([sum(map(_resident_mib, servers)), ours.memory_info().rss >> 20, ours.num_fds()])
            over.set()
        return done, kept

    ways: dict[str, Any] = {"replicas": 2} if way != "lora" else {"max_loras": 3, "max_lora_rank": 8}
    done, kept = serve(Path(saved(begin, tmp_path / "begin")), use, weights=way, **ways)
    at = [kept[i] for i in (99, 299, -1)]
    print(f"{len(done)} completions in {updates} updates; servers' and own MiB, own handles at 100, 300, 500: {at}")
    assert len({version for version, _, _ in done}) > updates / 4
    assert all(set(c.versions) == {version} for version, _, c in done)
    for parity, model in enumerate(models):
        mine = [(prompt, c) for version, prompt, c in done if version and version % 2 == parity]
        assert len(mine) > updates / 4
        assert trainer_gap(trainer_of(model), mine) < TOLERANCE
    for now, before, more in zip(kept[-1], kept[99], (100, 100, 10), strict=True):
        assert now < before + more


def _resident_mib(leader: int) -> int:
    """Of the server's processes together."""
    pages = 0
    for pid, group in _groups():
        with suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) if group == leader else 0
    return pages * os.sysconf("SC_PAGESIZE") // 2**20


def _groups() -> list[tuple[int, int]]:
    """All processes, and the group of each."""
    found = list[tuple[int, int]]()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                found.append((int(process.name), int((process / "stat").read_text().rpartition(")")[2].split()[2])))
    return found
