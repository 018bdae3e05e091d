"""Teachers that vLLM serves: a server each, or adapters of one base on a single one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experts.train import ADAPTER
from fusion.teachers import pack_support
from posttrain import waits
from posttrain.engine.vllm_keeper import TRIES, Keeper, together
from posttrain.engine.vllm_server import NAME, Server
from posttrain.errors import EngineError, TeacherError, UserError
from posttrain.settings import VllmEngineConfig
from posttrain.types import Support, TeacherScores


class ServedTeacher:
    """Scores a sequence in one request, as vLLM's ``prompt_logprobs``. Implements ``protocols.Teacher``.

    ``score`` is for any thread but that of ``loop``, on which the requests are made. ``served``: the server's name for
    the weights. ``top_k``: so many of its most likely tokens, and the token ids ``always``, which the server was told
    of, are the support of its scores; 0: they have none. Log-probs are taken at temperature 1 from the token ids as
    they are. What is asked of a server that dies is asked again of the one that is started in its stead."""

    def __init__(
        self,
        keeper: Keeper,
        served: str,
        name: str,
        loop: asyncio.AbstractEventLoop,
        top_k: int = 0,
        always: Sequence[int] = (),
    ) -> None:
        self._keeper, self._served, self.name, self._loop = keeper, served, name, loop
        self._top_k, self._always = top_k, tuple(always)

    def score(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[bool]]) -> list[TeacherScores]:
        """See the protocol. Raises TeacherError if its server refuses, does not answer in time, or died more often than
        there are ``restarts``: an engine, which a stage replaces when it fails, has no part in that."""
        name, c = self._keeper.server.name, self._keeper.server.config
        bound = (c.restarts + 1) * (TRIES * c.timeout_s + c.start_s)  # every part of it is bounded by itself
        asked = asyncio.run_coroutine_threadsafe(self._all(ids, mask), self._loop)
        try:
            return asked.result(bound)
        except (EngineError, TimeoutError) as error:
            asked.cancel()
            said = str(error) or f"{name} gave no scores within {bound:g} s"
            raise TeacherError(f"{said}. The same command goes on from the last checkpoint") from None

    async def _all(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[bool]]) -> list[TeacherScores]:
        with waits.waiting(f"{self._keeper.server.name} to score {len(ids)} sequences as {self._served}"):
            return await together(self._one(i, m) for i, m in zip(ids, mask, strict=True))

    async def _one(self, ids: Sequence[int], mask: Sequence[bool]) -> TeacherScores:
        found, judged = [0.0] * len(ids), list[dict[str, Any]]()
        if any(mask[1:]):
            wanted = self._top_k + len(self._always)
            params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": wanted, "detokenize": False}
            body = {"model": self._served, "token_ids": list(ids), "sampling_params": params}
            reply = await self._keeper.ask("/inference/v1/generate", body)
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
    # A sequence that fills the context is scored too, and vLLM always samples a token after it.
    room: dict[str, Any] = {"max_context": config.max_context + 1}
    if always:
        room["max_logprobs"] = config.max_logprobs + len(always)
        room["env"] = {**config.env, "VLLM_USE_V2_MODEL_RUNNER": "0"}  # see Extension.judge_always
    config = config.model_copy(update=room)
    if config.weights == "lora":
        adapters = {domain: _adapter(folder) for domain, folder in folders.items()}
        config = config.model_copy(update={"max_loras": len(folders)})
        server = Server(config, base, work / "teachers.log", 0, "the teachers' vLLM server")
        keepers = dict.fromkeys(folders, Keeper(server, partial(_begin, server, always, adapters)))
        served = {domain: (domain, adapter) for domain, adapter in adapters.items()}
    else:
        keepers, served = dict[str, Keeper](), {domain: (NAME, folder) for domain, folder in folders.items()}
        for number, (domain, folder) in enumerate(folders.items()):
            server = Server(
                config, folder, work / f"teacher-{domain}.log", number, f"the {domain} teacher's vLLM server"
            )
            keepers[domain] = Keeper(server, partial(_begin, server, always, {}))
    different = list(dict.fromkeys(keepers.values()))
    for keeper in different:
        stack.push_async_callback(keeper.close)
    await together(keeper.start() for keeper in different)
    loop = asyncio.get_running_loop()
    return {
        domain: ServedTeacher(keepers[domain], name, _digest(folder), loop, top_k, always)
        for domain, (name, folder) in served.items()
    }


async def _begin(server: Server, always: Sequence[int], adapters: Mapping[str, Path]) -> None:
    """``adapters``: by the names under which they are served."""
    await server.start()
    if always:
        await server.post("/collective_rpc", {"method": "judge_always", "kwargs": {"ids": list(always)}})
    for name, folder in adapters.items():
        await server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})


def _adapter(folder: Path) -> Path:
    """That of an expert."""
    adapter = folder / ADAPTER
    if not adapter.is_dir():
        raise UserError(
            f"fusion.teachers.engine.weights: lora, but the expert in {folder} has no adapter: train it with "
            "trainer.lora, or set weights to folder"
        )
    return adapter


def _digest(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over the files of weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        with open(file, "rb") as source:
            digest.update(hashlib.file_digest(source, "sha256").digest())
    return digest.hexdigest()[:16]
