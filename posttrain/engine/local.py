"""An engine on this machine: a process of its own that batches requests continuously (see ``worker``).

Requests made in one turn of the event loop travel as one message, so that rollouts which start together are prefilled
together and, in synchronous mode, batches have the same composition in every run.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import socket
import struct
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from posttrain.engine import worker
from posttrain.engine.slots import Request
from posttrain.engine.speculative import DraftCounts
from posttrain.errors import EngineError, UserError
from posttrain.types import Completion, Sampling, Weights


class LocalEngine:
    """Implements ``protocols.Engine``. Create with ``await LocalEngine.start(...)``."""

    def __init__(self, process: Any, pipe: Any, timeout_s: float) -> None:
        self._process, self._pipe, self._timeout_s = process, pipe, timeout_s
        self._keys = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._outbox: list[Request] = []
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._counts = DraftCounts()
        self._resident: tuple[int, ...] = (0,)
        self._closed = False
        self._end = "the engine is closed"
        _bound(pipe.fileno(), timeout_s)
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._receive)

    @classmethod
    async def start(
        cls,
        folder: Path,
        *,
        slots: int = 64,
        max_context: int = 512,
        threads: int = 1,
        timeout_s: float = 300.0,
        draft_steps: int = 0,
        record_choices: bool = False,
        on_swap: Literal["keep", "recompute"] = "keep",
        compiling: bool = False,
    ) -> LocalEngine:
        """Load the model in ``folder`` in a new process; see ``LocalEngineConfig`` for what it can be told.
        ``timeout_s`` bounds every later wait for an answer. Raises UserError if the model cannot do what is asked."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        args = (there, str(folder), slots, max_context, threads, draft_steps, record_choices, on_swap, compiling)
        process = context.Process(target=worker.main, args=args, daemon=True, name="engine")
        process.start()
        there.close()
        engine = cls(process, here, timeout_s)
        try:
            await engine._wait(engine._ready, "the engine to start")
        except BaseException:
            process.kill()
            await engine.close()
            raise
        return engine

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        """See the protocol. Empty with finish ``length`` if the context leaves no room. ValueError: no ids."""
        if not ids:
            raise ValueError("nothing to continue: ids is empty")
        key = next(self._keys)
        future = self._expect(key)
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(Request(id=key, ids=tuple(ids), sampling=sampling))
        try:
            return await self._wait(future, f"a completion of at most {sampling.max_tokens} tokens", key)
        finally:
            if future.cancelled():
                self._forget(key)

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None:
        """See the protocol. Taken between two tokens. What is not resident cannot be kept, nor an earlier version of
        the same number. The memory is that of one model a version."""
        key = next(self._keys)
        future = self._expect(key)
        self._send(("load", key, weights, frozenset(keep)))
        await self._wait(future, f"the engine to load version {weights.version}", key)

    def stats(self) -> DraftCounts:
        """What came of drafts, up to the last completion that arrived."""
        return self._counts

    def resident(self) -> tuple[int, ...]:
        """Versions that a request can be pinned to, in the order in which they were loaded. 0 is the model of the
        folder."""
        return self._resident

    async def close(self) -> None:
        """See the protocol."""
        if self._closed:
            return
        self._closed = True
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        with suppress(OSError):  # already dead
            self._pipe.send(("close",))
        self._fail("the engine was closed")
        self._pipe.close()
        await asyncio.to_thread(self._process.join, 5)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join, 5)

    def _expect(self, key: int) -> asyncio.Future[Any]:
        if self._closed:
            raise EngineError(self._end)
        future = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        return future

    async def _wait(self, future: asyncio.Future[Any], what: str, key: int | None = None) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await future
        except TimeoutError as error:
            raise EngineError(f"waited {self._timeout_s:g} s for {what}") from error
        finally:
            if key is not None:
                self._waiting.pop(key, None)

    def _flush(self) -> None:
        batch, self._outbox = self._outbox, []
        if batch and not self._closed:
            self._send(("generate", batch))

    def _forget(self, key: int) -> None:
        """Nobody waits for that completion any more: its slot is for others."""
        unsent = [r for r in self._outbox if r.id == key]
        self._outbox = [r for r in self._outbox if r.id != key]
        if not unsent and not self._closed:
            self._send(("forget", key))

    def _send(self, message: tuple[Any, ...]) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            self._died()

    def _receive(self) -> None:
        try:
            while not self._closed and self._pipe.poll():
                kind, *rest = self._pipe.recv()
                if kind == "ready":
                    self._ready.set_result(None)
                elif kind == "refused":
                    self._ready.set_exception(UserError(rest[0]))
                elif kind == "loaded":
                    key, self._resident = rest
                    self._resolve(key, None)
                else:
                    completions, failures, self._counts = rest
                    for key, completion in completions:
                        self._resolve(key, completion)
                    for key, text in failures:
                        self._resolve(key, EngineError(text))
        except (EOFError, OSError):
            self._died()

    def _resolve(self, key: int, value: Any) -> None:
        future = self._waiting.get(key)
        if future is None or future.done():
            return
        if isinstance(value, EngineError):
            future.set_exception(value)
        else:
            future.set_result(value)

    def _died(self) -> None:
        if self._closed:
            return
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._closed = True
        self._pipe.close()
        self._process.join(5)  # it has closed its end, so it is about to be gone
        if self._process.is_alive():  # it does not read, or stopped in the middle of an answer
            self._process.kill()
            self._process.join(5)
        self._end = f"the engine process died with exit code {self._process.exitcode}; its last words are on stderr"
        self._fail(self._end)

    def _fail(self, text: str) -> None:
        for future in [self._ready, *self._waiting.values()]:
            if not future.done():
                future.set_exception(EngineError(text))
                future.exception()  # marked as seen: a caller that was cancelled will not fetch it


def _bound(pipe: int, seconds: float) -> None:
    """A message that the other end leaves half written, or does not fetch, is an OSError after so long. Else a process
    that is stopped would stop this one's event loop, and with it all bounds."""
    duration = struct.pack("ll", int(seconds), max(1, int(seconds % 1 * 1e6)))
    with socket.socket(fileno=os.dup(pipe)) as end:
        for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, way, duration)
