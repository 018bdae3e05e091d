"""Our client against vLLM's own: ``python benchmarks/vllm_client.py [--rounds 3]`` (needs ``scripts/install-vllm.sh``).

One ``vllm serve`` with a small random Qwen3 on the CPU (or on the GPU, with --gpu), the same number of requests of the
same lengths, the same number of them at once, in turn: ``vllm bench serve`` streams text, as it does for everybody, and
the engine of this project sends token ids and takes back ids, log-probs and versions. Printed: sampled tokens a second
of both, and the ratio of their medians (bar: 0.9). A request of vLLM's client asks for what every one of ours needs, a
seed and the log-probs of what was sampled; the ratio to plain ones, without either, is printed beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from posttrain.chat import train_tokenizer
from posttrain.engine.vllm import VllmEngine
from posttrain.engine.vllm_server import NAME, Server
from posttrain.settings import VllmEngineConfig
from posttrain.types import Sampling

BAR = 0.9


class WithTokenizer(Server):
    """A server that takes text too, since vLLM's client sends nothing else."""

    def arguments(self, port: int) -> list[str]:
        return [a for a in super().arguments(port) if a != "--skip-tokenizer-init"]


def make_model(folder: Path, large: bool) -> None:
    text = [" ".join(Random(i).choices("abcdefghijklmnop", k=40)) for i in range(50)]
    tokenizer = train_tokenizer(text, 256)
    size: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    }
    small: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        **(size if large else small),
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def theirs(command: str, url: str, folder: Path, options: argparse.Namespace, seed: int, plain: bool) -> float:
    """Sampled tokens a second by ``vllm bench serve``; ``plain``: without seeds and log-probs."""
    result = folder / f"theirs-{seed}-{plain}.json"
    port = url.rsplit(":", 1)[1]
    lengths = ["--random-input-len", str(options.prompt), "--random-output-len", str(options.tokens)]
    ask = [command, "bench", "serve", "--backend", "vllm", "--host", "127.0.0.1", "--port", port]
    ask += ["--model", str(folder), "--served-model-name", NAME, "--dataset-name", "random", *lengths]
    ask += ["--num-prompts", str(options.requests), "--max-concurrency", str(options.concurrency), "--ignore-eos"]
    if not plain:
        ask += ["--logprobs", "0", "--extra-body", json.dumps({"seed": seed, "temperature": 1.0})]
    ask += ["--seed", str(seed), "--save-result", "--result-filename", str(result), "--disable-tqdm"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(ask, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    found = json.loads(result.read_text())
    assert found["completed"] == options.requests
    return found["output_throughput"]


async def ours(engine: VllmEngine, vocabulary: int, options: argparse.Namespace, seed: int) -> float:
    """The same by the engine."""
    rng, gate = Random(seed), asyncio.Semaphore(options.concurrency)
    prompts = [tuple(rng.randrange(3, vocabulary) for _ in range(options.prompt)) for _ in range(options.requests)]

    async def one(prompt: tuple[int, ...], number: int) -> int:
        async with gate:
            return len((await engine.generate(prompt, Sampling(max_tokens=options.tokens, seed=number))).ids)

    started = time.perf_counter()
    tokens = sum(await asyncio.gather(*(one(p, i) for i, p in enumerate(prompts))))
    return tokens / (time.perf_counter() - started)


async def compare(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    given: dict[str, Any] = {"slots": options.concurrency, "max_context": 2048, "command": (options.vllm,)}
    if options.gpu:
        given |= {"dtype": "bfloat16"}
    else:
        given |= {"dtype": "float32", "threads": 1, "eager": True, "kv_cache_gib": 1.0}
    config = VllmEngineConfig(type="vllm", **given)
    server = WithTokenizer(config, folder, folder / "server.log", 0)
    found: dict[str, list[float]] = {"theirs": [], "ours": [], "plain": []}
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    try:
        await server.start()
        engine = await VllmEngine.start(config.model_copy(update={"servers": [server.url]}), folder, folder)
        await ours(engine, vocabulary, options, seed=99)
        for seed in range(options.rounds):
            for name in ("theirs", "plain"):
                asked = options.vllm, server.url, folder, options, seed, name == "plain"
                found[name].append(await asyncio.to_thread(theirs, *asked))
            found["ours"].append(await ours(engine, vocabulary, options, seed))
            print({k: round(v[-1]) for k, v in found.items()}, file=sys.stderr, flush=True)
        await engine.close()
    finally:
        await server.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true", help="a model of 0.4 B parameters in bfloat16")
    options = parser.parse_args()
    options.vllm = str(Path(options.vllm).absolute())
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options.gpu)
        found = asyncio.run(compare(Path(folder), options))
    medians = {k: statistics.median(v) for k, v in found.items()}
    ratio = medians["ours"] / medians["theirs"]
    print(f"sampled tokens a second: ours {medians['ours']:.0f}, theirs {medians['theirs']:.0f}; ratio {ratio:.2f}")
    plain = medians["plain"]
    print(f"theirs without seeds and log-probs: {plain:.0f}; ratio {medians['ours'] / plain:.2f}")
    sys.exit(ratio < BAR)


if __name__ == "__main__":
    main()
