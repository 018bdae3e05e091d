"""One ``vllm serve``: its process, if it is ours, and the questions that we ask it over HTTP on the loopback."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import aiohttp

from posttrain import waits
from posttrain.engine.vllm_plugin import BACKEND
from posttrain.errors import EngineError, UserError
from posttrain.settings import VllmEngineConfig

NAME = "policy"
"""Of the model as it was served at the start."""
_WORDS = 1500
"""Characters of a dead server's log that are shown."""
_CAUSE = re.compile(r"^(?:\(.+\] )?(\w+(?:Error|Exception): .+)$", re.MULTILINE)
"""The first error in a log, with what vLLM puts before its lines."""
_WELL_S = 10.0
"""For a server to say that it is well."""
_ENDS_S = 15.0
"""For a server that was asked to end."""


class ServerGone(Exception):
    """The server does not answer: it is dead, or the connection to it is."""


class Refused(EngineError):
    """The server answers that it cannot."""


class Late(EngineError):
    """The server did not answer in time."""


class Server:
    """A server that may die and be started again, which ``posttrain.engine.vllm_keeper`` sees to."""

    def __init__(self, config: VllmEngineConfig, model: Path, log: Path, number: int, name: str = "") -> None:
        self.config, self.model, self.log, self.number = config, model, log, number
        self.name = name or f"vLLM server {number}"
        """In messages."""
        self.url = config.servers[number].rstrip("/") if config.servers else ""
        self._since = 0
        self._process: asyncio.subprocess.Process | None = None
        self._http: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Returns when it answers. Raises UserError if there is no vLLM, EngineError with its last words if it ends."""
        if self._http is None:
            # A connection a request: as many wait as the server has room for and more.
            limits = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
            self._http = aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(total=None))
        if not self.config.servers:
            await self._spawn()
        with waits.waiting(f"{self.name} to start"):
            await self._healthy()

    async def _spawn(self) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.config.command, *self.arguments(port)]
        with open(self.log, "ab") as log:
            self._since = log.tell()
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_environment(self.config, self.number),
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            except OSError as error:
                raise UserError(
                    f"engine.command: `{command[0]}` cannot be run ({error.strerror}). scripts/install-vllm.sh puts "
                    "vLLM into .venv-vllm; or name another one, for example --set engine.command=[vllm]"
                ) from None

    def arguments(self, port: int) -> list[str]:
        """What follows ``vllm`` on the command line."""
        return serve_arguments(self.config, self.model, port)

    async def _healthy(self) -> None:
        deadline = time.monotonic() + self.config.start_s
        while time.monotonic() < deadline:
            if self._process is not None and self._process.returncode is not None:
                raise EngineError(f"{self.name} ended before it served; {self._last_words()}")
            with suppress(ServerGone, Late):  # a machine that is busy with the start: start_s is the bound
                await self.get("/health", timeout_s=5)
                return
            await asyncio.sleep(0.3)
        await self.kill()
        raise EngineError(
            f"{self.name} did not answer at {self.url} within {self.config.start_s:g} s (engine.start_s)"
            f"; {self._last_words()}"
        )

    async def well(self) -> bool:
        """Whether it answers that it is."""
        if self._process is not None and self._process.returncode is not None:
            return False
        with suppress(ServerGone, EngineError):
            await self.get("/health", timeout_s=_WELL_S)
            return True
        return False

    async def get(self, path: str, timeout_s: float | None = None) -> Any:
        """What it answers. Raises ServerGone if it does not, Late if not in time, Refused if it cannot."""
        return await self._ask("GET", path, None, timeout_s or self.config.timeout_s)

    async def post(self, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """The same with a body of JSON."""
        return await self._ask("POST", path, body, timeout_s or self.config.timeout_s)

    async def _ask(self, method: Literal["GET", "POST"], path: str, body: Any, timeout_s: float) -> Any:
        if self._http is None or self._http.closed:
            raise EngineError(f"{self.name} was closed")
        try:
            bound = aiohttp.ClientTimeout(total=timeout_s)
            async with self._http.request(method, self.url + path, json=body, timeout=bound) as reply:
                text = await reply.text()
                if reply.status == 200:
                    return await reply.json() if "json" in reply.content_type and text else text
        except TimeoutError:
            raise Late(f"{self.name} did not answer {path} within {timeout_s:g} s (engine.timeout_s)") from None
        except aiohttp.ClientError as error:
            raise ServerGone(f"{self.name}: {type(error).__name__} at {path}") from None
        if reply.status >= 500:  # its engine is dead, and it will not come back
            raise ServerGone(f"{self.name} answered {path} with {reply.status}: {text[:_WORDS]}")
        raise Refused(f"{self.name} refused {path} with {reply.status}: {text[:_WORDS]}")

    async def kill(self) -> None:
        """End its processes at once, if they are ours; idempotent."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def close(self) -> None:
        """End it and every connection to it; idempotent."""
        if self._http is not None:
            await self._http.close()
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _ENDS_S)
        await self.kill()

    def _last_words(self) -> str:
        if self._process is None or not self.log.exists():
            return "it was not started here"
        words = self.log.read_bytes()[self._since :].decode(errors="replace").strip()
        # The process that is left at the end says only that another one failed.
        cause = _CAUSE.search(words)
        said = f"it says `{cause[1]}`; " if cause else ""
        return f"{said}the end of {self.log}:\n{words[-_WORDS:]}"


def serve_arguments(config: VllmEngineConfig, model: Path, port: int) -> list[str]:
    """What follows ``vllm`` on the command line."""
    out = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    out += ["--dtype", config.dtype, "--max-model-len", str(config.max_context), "--max-num-seqs", str(config.slots)]
    # Tokens in, tokens out, and what the model's makers recommend for sampling is not the policy's distribution.
    out += ["--enable-scale-out", "--skip-tokenizer-init", "--generation-config", "vllm"]
    # Of the distribution that was drawn from.
    out += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", str(config.max_logprobs)]
    out += ["--worker-extension-cls", "posttrain.engine.vllm_worker.Extension", "--disable-uvicorn-access-log"]
    if config.eager:
        out += ["--enforce-eager"]
    if config.threads is not None:
        # A prompt that is read in two parts ends the server if its request has a seed: torch cannot turn the random
        # numbers of a CPU back (0.32).
        most = max(2048, config.max_context)
        out += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(most)]
    out += _of_the_family(config, model)
    if config.kv_cache_gib is not None:
        out += ["--kv-cache-memory-bytes", str(int(config.kv_cache_gib * 2**30))]
        if config.threads is None:
            # Else it does not start on a GPU of which others have more than a twelfth; by its source (0.32) nothing
            # else hangs on it when the cache has a size.
            out += ["--gpu-memory-utilization", "0.05"]
    if config.weights == "lora":
        most = ["--max-loras", str(config.max_loras), "--max-lora-rank", str(config.max_lora_rank)]
        # Without names the head may have one too, and then log-probs of a prompt end the server (0.32 on a CPU).
        out += ["--enable-lora", *most, "--max-cpu-loras", str(config.max_loras + 1)]
        out += ["--lora-target-modules", *config.lora_targets]
    if config.weights == "send":
        out += ["--weight-transfer-config", json.dumps({"backend": BACKEND})]
    return [*out, *config.args]


def _of_the_family(config: VllmEngineConfig, model: Path) -> list[str]:
    """What one family of models needs to be the same function as in transformers (0.32)."""
    file = model / "config.json"
    said: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    out = list[str]()
    if config.threads is not None and said.get("kv_lora_rank") is not None:
        # Latent attention hands over queries as [T, heads, width], of which a CPU's fused rotary op takes every head
        # for a token. It is right for [T, heads * width], and ten times faster, so others keep it.
        out += ["--compilation-config", json.dumps({"custom_ops": ["-rotary_embedding"]})]
        # Compiled, DeepSeek-V3's mixture of experts is off by tenths of a nat, with that op and without.
        out += [] if config.eager else ["--enforce-eager"]
    if said.get("model_type") == "deepseek_v3":
        # The only router that transformers has for it, and so does not write down; vLLM's would be a softmax.
        out += ["--hf-overrides", json.dumps({"scoring_func": "sigmoid", "topk_method": "noaux_tc"})]
    return out


def _environment(config: VllmEngineConfig, number: int) -> dict[str, str]:
    mine = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    mine["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if config.threads is not None:  # on a CPU: one process less, and threads that do not fight
        mine |= {"OMP_NUM_THREADS": str(config.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if config.devices:
        mine["CUDA_VISIBLE_DEVICES"] = config.devices[number]
    return {**os.environ, **mine, **config.env}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """In the child: Linux ends it when whoever started it is gone, however that ended."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


__all__ = ["NAME", "Late", "Refused", "Server", "ServerGone", "serve_arguments"]
