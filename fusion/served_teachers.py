"""Teachers that vLLM serves: a server each, or adapters of one base on a single one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from experts.train import ADAPTER
from fusion.teachers import pack_support
from posttrain import waits
from posttrain.engine.vllm_server import NAME, Server, ServerGone
from posttrain.errors import EngineError, UserError, in_order
from posttrain.settings import VllmEngineConfig
from posttrain.types import Support, TeacherScores


class ServedTeacher:
    """Scores a sequence in one request, as vLLM's ``prompt_logprobs``. Implements ``protocols.Teacher``.

    ``score`` is for any thread but that of ``loop``, on which the requests are made. ``served``: the server's name for
    the weights. ``top_k``: so many of its most likely tokens, and the token ids ``always``, which the server was told
    of, are the support of its scores; 0: they have none. Log-probs are taken at temperature 1 from the token ids as
    they are."""

    def __init__(
        self,
        server: Server,
        served: str,
        name: str,
        loop: asyncio.AbstractEventLoop,
        top_k: int = 0,
        always: Sequence[int] = (),
    ) -> None:
        self._server, self._served, self.name, self._loop = server, served, name, loop
        self._top_k, self._always = top_k, tuple(always)

    def score(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[bool]]) -> list[TeacherScores]:
        """See the protocol. Raises EngineError if the server does not answer in time."""
        asked = asyncio.run_coroutine_threadsafe(self._all(ids, mask), self._loop)
        return asked.result(2 * self._server.config.timeout_s)

    async def _all(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[bool]]) -> list[TeacherScores]:
        with waits.waiting(f"the teacher {self._served} to score {len(ids)} sequences"):
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(self._one(i, m)) for i, m in zip(ids, mask, strict=True)]
        return [a.result() for a in asked]

    async def _one(self, ids: Sequence[int], mask: Sequence[bool]) -> TeacherScores:
        found, judged = [0.0] * len(ids), list[dict[str, Any]]()
        if any(mask[1:]):
            wanted = self._top_k + len(self._always)
            params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": wanted, "detokenize": False}
            body = {"model": self._served, "token_ids": list(ids), "sampling_params": params}
            try:
                reply = await self._server.post("/inference/v1/generate", body)
            except ServerGone as error:
                raise EngineError(str(error)) from None
            # An entry a token, none for the first; each has the token itself, by its id.
            for place, entry in enumerate(reply["prompt_logprobs"][1:], 1):
                if mask[place]:
                    found[place] = entry[str(ids[place])]["logprob"]
                    judged.append(entry)
        support = self._support(judged) if self._top_k else None
        return TeacherScores(logprobs=tuple(found), teacher=self.name, support=support)

    def _support(self, entries: Sequence[Mapping[str, Any]]) -> Support:
        width = self._top_k + len(self._always)
        ids_NK, logprobs_NK = np.full((len(entries), width), -1), np.zeros((len(entries), width))
        for row, entry in enumerate(entries):
            # The token itself is in it, but of a support only by its rank: which tokens are must not hang on it.
            kept = [(int(i), e) for i, e in entry.items() if e["rank"] <= self._top_k or int(i) in self._always]
            ids_NK[row, : len(kept)] = [i for i, _ in kept]
            logprobs_NK[row, : len(kept)] = [e["logprob"] for _, e in kept]
        return pack_support(ids_NK, logprobs_NK)


async def start_teachers(
    config: VllmEngineConfig,
    base: Path,
    folders: Mapping[str, Path],
    work: Path,
    stack: AsyncExitStack,
    top_k: int = 0,
    always: Sequence[int] = (),
) -> dict[str, ServedTeacher]:
    """A teacher for every domain of ``folders``, with a support as in ``ServedTeacher``; ``stack`` closes their
    servers. Raises UserError if one was not trained as an adapter and shall be served as one, or vLLM is not to be
    had, and EngineError if a server does not come up."""
    loop, found = asyncio.get_running_loop(), dict[str, ServedTeacher]()
    # A sequence that fills the context is scored too, and vLLM always samples a token after it.
    room: dict[str, Any] = {"max_context": config.max_context + 1}
    if always:
        room["max_logprobs"] = config.max_logprobs + len(always)
        room["env"] = {**config.env, "VLLM_USE_V2_MODEL_RUNNER": "0"}  # see Extension.judge_always
    config = config.model_copy(update=room)
    one = config.weights == "lora"
    if one:
        config = config.model_copy(update={"max_loras": len(folders)})
        servers = dict.fromkeys(folders, Server(config, base, work / "teachers.log", 0))
    else:
        servers = {d: Server(config, f, work / f"teacher-{d}.log", i) for i, (d, f) in enumerate(folders.items())}
    different = list(dict.fromkeys(servers.values()))
    for server in different:
        stack.push_async_callback(server.close)
    try:
        async with asyncio.TaskGroup() as tasks:
            for server in different:
                tasks.create_task(_start(server, always))
    except BaseExceptionGroup as group:
        first = in_order(group)[0]
        raise (EngineError(str(first)) if isinstance(first, ServerGone) else first) from None
    for domain, folder in folders.items():
        where = await _load_adapter(servers[domain], domain, folder) if one else folder
        name = domain if one else NAME
        found[domain] = ServedTeacher(servers[domain], name, _digest(where), loop, top_k, always)
    return found


async def _start(server: Server, always: Sequence[int]) -> None:
    await server.start()
    if always:
        await server.post("/collective_rpc", {"method": "judge_always", "kwargs": {"ids": list(always)}})


async def _load_adapter(server: Server, domain: str, folder: Path) -> Path:
    """Have an expert served under the name of its domain. Returns the folder of its adapter."""
    adapter = folder / ADAPTER
    if not adapter.is_dir():
        raise UserError(
            f"fusion.teachers.engine.weights: lora, but the expert in {folder} has no adapter: train it with "
            "trainer.lora, or set weights to folder"
        )
    await server.post("/v1/load_lora_adapter", {"lora_name": domain, "lora_path": str(adapter.resolve())})
    return adapter


def _digest(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over the files of weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        with open(file, "rb") as source:
            digest.update(hashlib.file_digest(source, "sha256").digest())
    return digest.hexdigest()[:16]
