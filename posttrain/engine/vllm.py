"""vLLM as the engine: one or several ``vllm serve``, tokens in and out over HTTP.

What vLLM leaves to its user, and where it is seen to here:

- Weights may be changed only while generation is paused (``_switch``); pushed under a running request they end the
  server. Every token comes back with the version that sampled it, which vLLM stamps itself.
- Its prefix cache does not know of weights: every request's blocks are salted with the version that it starts from.
  A server that was there before may have served others: salts, adapters and requests have names of this engine's own.
- A server has one set of full weights. Versions side by side are adapters (``weights: lora``) on one server, or
  replicas that have not taken the newest weights yet.
- A request that must move (its server takes other weights, or its adapter goes) is aborted, and goes on elsewhere from
  the tokens that it has, if its version is still served. If its server died, a new one starts, and the request is asked
  again from its beginning.

A request goes to the replica that has read most of it, unless others have far less to do.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import secrets
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.engine.speculative import DraftCounts
from posttrain.engine.vllm_keeper import TRIES, Keeper, still_well, together
from posttrain.engine.vllm_routes import Routes
from posttrain.engine.vllm_sender import Sender
from posttrain.engine.vllm_server import NAME, Refused, Server, ServerGone
from posttrain.errors import EngineError
from posttrain.scheduler import partition
from posttrain.settings import VllmEngineConfig
from posttrain.types import Completion, Sampling, Weights
from posttrain.weights import HELD

log = logging.getLogger(__name__)

_SPILL = 8
"""More requests than another one's that a replica may have before it is too many."""


@dataclass(eq=False)
class _Replica:
    """A server, what it serves and who waits for it."""

    keeper: Keeper
    sender: Sender
    """Of weights that this process holds."""
    versions: dict[int, str]
    """Version to where it came from: what requests are sent here for. One, if weights are full."""
    adapters: set[int] = field(default_factory=set[int])
    """Those that it has as adapters."""
    full: int | None = 0
    """Version of the full weights; None: they are the base of adapters."""
    running: dict[str, int | None] = field(default_factory=dict[str, "int | None"])
    """Name of a request to the version it is pinned to."""

    @property
    def server(self) -> Server:
        """The one that is kept."""
        return self.keeper.server


@dataclass
class _Partial:
    """A completion so far."""

    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    versions: list[int] = field(default_factory=list[int])
    lost: int = 0
    """Times in a row that it was not answered by a server which says that it is well."""


class VllmEngine:
    """Implements ``protocols.Engine``. Create with ``await VllmEngine.start(...)``."""

    def __init__(self, config: VllmEngineConfig, model: Path, work: Path) -> None:
        self.config, self.newest = config, 0
        settings = json.loads((model / "config.json").read_text())
        self._vocabulary: int = settings["vocab_size"]
        self._own = secrets.token_hex(4)
        """Before all names that servers are given."""
        self._names = (f"{self._own}-r{n}" for n in itertools.count())
        self._routes = Routes[_Replica]()
        self._loading, self._sending = asyncio.Lock(), asyncio.Lock()
        self._model, self._closed = model, False
        count = len(config.servers) or config.replicas
        servers = [Server(config, model, work / f"vllm-{n}.log", n) for n in range(count)]
        keepers = [Keeper(s, partial(self._begin, n)) for n, s in enumerate(servers)]
        full = None if config.weights == "lora" else 0
        self._replicas = [_Replica(k, Sender(k.server, work), {0: str(model)}, full=full) for k in keepers]

    @classmethod
    async def start(cls, config: VllmEngineConfig, model: Path, work: Path) -> VllmEngine:
        """Start the servers of ``config``, or find those that it names, serving ``model`` as version 0; their logs are
        in ``work``. Raises UserError if vLLM is not to be had and EngineError if a server does not come up."""
        engine = cls(config, model, work)
        try:
            await together(replica.keeper.start() for replica in engine._replicas)
        except BaseException:
            await engine.close()
            raise
        return engine

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        """See the protocol. Empty with finish ``length`` if the context leaves no room. ValueError: no ids."""
        if not ids:
            raise ValueError("nothing to continue: ids is empty")
        most = min(sampling.max_tokens, self.config.max_context - len(ids))
        found, finish = _Partial(), "length"
        try:
            async with asyncio.timeout(self.config.timeout_s):
                while len(found.ids) < most:
                    finish = await self._advance(ids, sampling, most, found)
                    if finish != "abort":
                        break
        except TimeoutError:
            what = f"a completion of at most {sampling.max_tokens} tokens"
            raise EngineError(f"waited {self.config.timeout_s:g} s for {what} (engine.timeout_s)") from None
        return Completion(
            ids=tuple(found.ids),
            logprobs=tuple(found.logprobs),
            versions=tuple(found.versions),
            finish="stop" if finish == "stop" else "length",
        )

    async def _advance(self, ids: Sequence[int], sampling: Sampling, most: int, found: _Partial) -> str:
        """One request, until it ends or is moved; adds its tokens to ``found``. Returns why it ended."""
        replica = self._route(ids, sampling.version)
        if replica.keeper.reviving:
            await replica.keeper.settled()
            return self._moved(sampling.version)
        version = self.newest if sampling.version is None else sampling.version
        name, life = next(self._names), replica.keeper.lives
        replica.running[name] = sampling.version
        self._routes.note(ids, replica)
        body = {
            "request_id": name,
            "model": self._adapter(version) if self._adapted(replica, version) else NAME,
            "token_ids": [*ids, *found.ids],
            "cache_salt": f"{self._own} version {version if replica.full is None else replica.full}",
            "sampling_params": {
                "temperature": sampling.temperature,
                "max_tokens": most - len(found.ids),
                # Where it goes on is another place in the sequence of random numbers.
                "seed": (sampling.seed + len(found.ids)) % 2**63,
                "stop_token_ids": [i for i in sampling.stop_ids if 0 <= i < self._vocabulary],
                "ignore_eos": True,
                "logprobs": 0,
                "detokenize": False,
            },
        }
        try:
            reply = await replica.server.post("/inference/v1/generate", body)
        except ServerGone as error:
            await replica.keeper.revive(life, error)
            found.lost = found.lost + 1 if replica.keeper.lives == life else 0
            if found.lost >= TRIES:
                raise still_well(error) from None
            await asyncio.sleep(found.lost)
            return "abort"
        except Refused:
            if version in replica.versions:
                raise
            return self._moved(sampling.version)  # its adapter went while this was on its way
        finally:
            del replica.running[name]
        found.lost = 0
        finish = self._take(replica, reply["choices"][0], sampling.version, version, found)
        self._routes.note([*ids, *found.ids], replica)
        return finish

    def _take(
        self, replica: _Replica, choice: dict[str, Any], pinned: int | None, version: int, found: _Partial
    ) -> str:
        ids = choice["token_ids"]
        versions = [version] * len(ids)
        if self.config.weights != "lora":  # an adapter's name says it all
            for span in choice["weight_versions"] or ():
                if not span["version"].isdecimal():  # one of config.servers
                    what = f"{replica.server.name} serves version {span['version']!r}, which nobody here gave it"
                    raise EngineError(f"{what}: it was started anew. A new engine gives it what it shall serve")
                versions[span["start"] : span["end"]] = [int(span["version"])] * (span["end"] - span["start"])
        if pinned is not None and any(v != pinned for v in versions):  # it came too late to be aborted
            return self._moved(pinned)
        found.ids += ids
        found.versions += versions
        found.logprobs += [entry["logprob"] for entry in (choice["logprobs"] or {"content": ()})["content"] or ()]
        return self._moved(pinned) if choice["finish_reason"] == "abort" else choice["finish_reason"]

    def _moved(self, pinned: int | None) -> str:
        if self._closed:
            raise EngineError("the engine was closed")
        if pinned is not None and pinned not in self.resident():
            raise EngineError(f"version {pinned} was dropped before its request ended: {self._resident()}")
        return "abort"

    def _route(self, ids: Sequence[int], pinned: int | None) -> _Replica:
        if self._closed:
            raise EngineError("the engine is closed")
        able = [r for r in self._replicas if (self.newest if pinned is None else pinned) in r.versions]
        if not able:
            raise EngineError(f"version {pinned} is not resident in the engine: {self._resident()}")
        idle = min(able, key=lambda r: len(r.running))
        usual = self._routes.find(ids, able) or idle
        return idle if len(usual.running) > len(idle.running) + _SPILL else usual

    def _resident(self) -> str:
        return f"resident are {', '.join(map(str, self.resident()))} (newest: {self.newest})"

    def resident(self) -> tuple[int, ...]:
        """Versions that a request can be pinned to. 0 is the model of the folder."""
        return tuple(sorted({v for r in self._replicas for v in r.versions}))

    def stats(self) -> DraftCounts:
        """Nothing is drafted here."""
        return DraftCounts()

    # Weights

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None:
        """See the protocol. Raises EngineError if every replica serves a version of ``keep`` in full weights."""
        async with self._loading:
            if self._closed:
                raise EngineError("the engine is closed")
            kept = {v for v in keep if v != weights.version} & {*self.resident()}
            if self.config.weights == "lora":
                await self._load_adapter(weights, kept)
            else:
                await self._load_full(weights, kept)

    async def _load_adapter(self, weights: Weights, kept: Collection[int]) -> None:
        version = weights.version
        for replica in self._replicas:
            replica.versions = {**replica.versions, version: weights.where}
        await together(self._with(replica, self._add_adapter, version, weights.where) for replica in self._replicas)
        self.newest = version
        for replica in self._replicas:
            gone = [v for v in replica.versions if v not in kept and v != version]
            replica.versions = {v: w for v, w in replica.versions.items() if v not in gone}
            await self._abort(replica, [n for n, pinned in replica.running.items() if pinned not in replica.versions])
            for old in gone:
                await self._with(replica, self._remove_adapter, old)

    async def _load_full(self, weights: Weights, kept: Collection[int]) -> None:
        targets = self._free(kept)
        if not targets:
            raise EngineError(
                f"there is no replica for version {weights.version}: each serves another one to keep ("
                f"{self._resident()}). Set engine.replicas to loop.max_staleness + 1, or engine.weights to lora"
            )
        for replica in targets:  # from here on nobody who is pinned is sent there
            replica.versions = {weights.version: weights.where}
        self.newest = weights.version
        await together(self._with(r, self._switch, weights.version, weights.where) for r in targets)
        for replica in self._replicas:
            if replica not in targets:
                await self._abort(replica, [n for n, pinned in replica.running.items() if pinned is None])

    def _free(self, kept: Collection[int]) -> list[_Replica]:
        """Replicas for a new version: those that serve none to keep, and those that a kept version can spare."""
        running = [p for r in self._replicas for p in r.running.values()]
        new = max([*kept, self.newest]) + 1
        shares = partition(len(self._replicas), {v: 1 + running.count(v) for v in kept} | {new: 1 + len(running)})
        found = [r for r in self._replicas if not r.versions.keys() & kept]
        for version in kept:
            serving = sorted((r for r in self._replicas if version in r.versions), key=lambda r: len(r.running))
            found += serving[: max(0, len(serving) - max(1, shares.get(version, 1)))]
        return found

    async def _with(self, replica: _Replica, what: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Do that to the replica. One that is dead starts anew, with all that it shall serve, and then it is done."""
        for tried in range(1, TRIES + 1):
            life = await replica.keeper.settled()  # one that starts anew may have begun on what it had before
            try:
                return await what(replica, *args)
            except ServerGone as error:
                await replica.keeper.revive(life, error)
                if replica.keeper.lives != life:
                    return
                if tried == TRIES:
                    raise still_well(error) from None

    async def _switch(self, replica: _Replica, version: int, where: str) -> None:
        """Other full weights, between two tokens. Requests stay where they are, and what they have in the cache stays
        too or is computed anew; those that are pinned must go."""
        held = where.startswith(HELD)
        async with self._sending if held else nullcontext():  # one replica after another, none paused while it waits
            await self._abort(replica, [n for n, pinned in replica.running.items() if pinned is not None])
            clear = "true" if self.config.on_swap == "recompute" else "false"
            await replica.server.post(f"/pause?mode=keep&clear_cache={clear}")
            if held:
                await replica.sender.send(where, version)
            else:
                body = {"method": "take_weights", "kwargs": {"folder": where}}
                await replica.server.post("/collective_rpc", body)
                await replica.server.post("/update_weight_version", {"new_version": str(version)})
            replica.full = version
            await replica.server.post("/resume")

    def _adapted(self, replica: _Replica, version: int) -> bool:
        """Whether it serves the version as an adapter; else it is its full weights, or the adapters' base."""
        return replica.full is None and replica.versions[version] != str(self._model)

    def _adapter(self, version: int) -> str:
        """Its name."""
        return f"{self._own}-v{version}"

    async def _add_adapter(self, replica: _Replica, version: int, folder: str) -> None:
        if self._adapted(replica, version):
            again = version in replica.adapters
            body = {"lora_name": self._adapter(version), "lora_path": folder, "load_inplace": again}
            await replica.server.post("/v1/load_lora_adapter", body)
            replica.adapters.add(version)

    async def _remove_adapter(self, replica: _Replica, version: int) -> None:
        if version in replica.adapters:  # the base is none
            await replica.server.post("/v1/unload_lora_adapter", {"lora_name": self._adapter(version)})
            replica.adapters.discard(version)

    async def _abort(self, replica: _Replica, names: Sequence[str]) -> None:
        if names:
            body = {"request_ids": [f"generate-tokens-{name}" for name in names]}
            with suppress(ServerGone):  # then they are gone too
                await replica.server.post("/abort_requests", body)

    async def _begin(self, number: int) -> None:
        """Start the server and bring it to the versions that it shall have."""
        replica = self._replicas[number]
        await replica.server.start()
        replica.sender.drop()
        replica.adapters = set()
        for version, folder in replica.versions.items():
            if self.config.weights == "lora":
                await self._add_adapter(replica, version, folder)
            elif folder == str(self._model) and not self.config.servers:
                await replica.server.post("/update_weight_version", {"new_version": str(version)})
                replica.full = version
            else:
                await self._switch(replica, version, folder)

    async def close(self) -> None:
        """See the protocol. Servers that were there before stay, without this engine's adapters."""
        self._closed = True
        for replica in self._replicas if self.config.servers else ():
            with suppress(ServerGone, EngineError):
                for version in [*replica.adapters]:
                    await self._remove_adapter(replica, version)
        await asyncio.gather(*(r.keeper.close() for r in self._replicas))
