"""Teachers that vLLM serves: a server each, or adapters of one base on a single one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from experts.train import ADAPTER
from posttrain import waits
from posttrain.engine.vllm_server import NAME, Server, ServerGone
from posttrain.errors import EngineError, UserError
from posttrain.settings import VllmEngineConfig
from posttrain.types import TeacherScores


class ServedTeacher:
    """Scores a sequence in one request, as vLLM's ``prompt_logprobs``. Implements ``protocols.Teacher``.

    ``score`` is for any thread but that of ``loop``, on which the requests are made. ``served``: the server's name for
    the weights. Log-probs are taken at temperature 1 from the token ids as they are."""

    def __init__(self, server: Server, served: str, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._server, self._served, self.name, self._loop = server, served, name, loop

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
        found = [0.0] * len(ids)
        if any(mask[1:]):
            body = {
                "model": self._served,
                "token_ids": list(ids),
                "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False},
            }
            try:
                reply = await self._server.post("/inference/v1/generate", body)
            except ServerGone as error:
                raise EngineError(str(error)) from None
            # An entry a token, none for the first; each has the token itself, by its id.
            for place, entry in enumerate(reply["prompt_logprobs"][1:], 1):
                if mask[place]:
                    found[place] = entry[str(ids[place])]["logprob"]
        return TeacherScores(logprobs=tuple(found), teacher=self.name)


async def start_teachers(
    config: VllmEngineConfig, base: Path, folders: Mapping[str, Path], work: Path, stack: AsyncExitStack
) -> dict[str, ServedTeacher]:
    """A teacher for every domain of ``folders``; ``stack`` closes their servers. Raises UserError if one was not
    trained as an adapter and shall be served as one."""
    loop, found = asyncio.get_running_loop(), dict[str, ServedTeacher]()
    # A sequence that fills the context is scored too, and vLLM always samples a token after it.
    config = config.model_copy(update={"max_context": config.max_context + 1})
    if config.weights == "lora":
        server = Server(config.model_copy(update={"max_loras": len(folders)}), base, work / "teachers.log", 0)
        stack.push_async_callback(server.close)
        await server.start()
        for domain, folder in folders.items():
            adapter = folder / ADAPTER
            if not adapter.is_dir():
                raise UserError(
                    f"fusion.teachers.engine.weights: lora, but the expert in {folder} has no adapter: train it with "
                    "trainer.lora, or set weights to folder"
                )
            body = {"lora_name": domain, "lora_path": str(adapter.resolve())}
            await server.post("/v1/load_lora_adapter", body)
            found[domain] = ServedTeacher(server, domain, _digest(adapter), loop)
        return found
    servers = {d: Server(config, f, work / f"teacher-{d}.log", i) for i, (d, f) in enumerate(folders.items())}
    for server in servers.values():
        stack.push_async_callback(server.close)
    async with asyncio.TaskGroup() as tasks:
        for server in servers.values():
            tasks.create_task(server.start())
    return {d: ServedTeacher(s, NAME, _digest(folders[d]), loop) for d, s in servers.items()}


def _digest(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over the files of weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        with open(file, "rb") as source:
            digest.update(hashlib.file_digest(source, "sha256").digest())
    return digest.hexdigest()[:16]
