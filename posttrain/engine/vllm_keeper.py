"""A vLLM server that starts anew when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from posttrain.engine.vllm_server import Late, Refused, Server, ServerGone
from posttrain.errors import EngineError, in_order

log = logging.getLogger(__name__)

TRIES = 3
"""For what is not answered though the server lives."""

T = TypeVar("T")


class Keeper:
    """Of one server. ``begin`` starts it and gives it all that it shall serve."""

    def __init__(self, server: Server, begin: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.server, self._begin = server, begin
        self.lives = self.deaths = 0
        """Times that it was started anew, and that this was tried, but for those that were given up."""
        self._reviving, self._closed = asyncio.Lock(), False

    async def start(self) -> None:
        """For the first time. Raises UserError if vLLM is not to be had and EngineError if it does not come up."""
        try:
            await self._begin()
        except ServerGone as error:
            raise EngineError(str(error)) from None

    @property
    def reviving(self) -> bool:
        """Whether it starts anew: until it has its weights it would answer with those that it starts with."""
        return self._reviving.locked()

    async def settled(self) -> int:
        """Wait while it starts anew. Returns its number of lives."""
        async with self._reviving:
            return self.lives

    async def revive(self, life: int, error: Exception) -> None:
        """Start it anew if it is dead, once for all that found it so in that life, and again if it dies while it
        starts. Raises EngineError if that was done too often."""
        async with self._reviving:
            if self.lives != life or await self.server.well():  # else only the connection was lost
                return
            while self.lives == life:
                if self._closed:
                    raise EngineError(f"{self.server.name} is closed")
                self.deaths += 1
                if self.deaths > self.server.config.restarts or self.server.config.servers:
                    raise EngineError(str(error))
                log.warning("%s. It starts again, and what it was asked is asked again", error)
                try:
                    await self.server.kill()
                    await self._begin()
                    self.lives += 1
                except BaseException as again:
                    # It may answer, but has not all of its weights: nobody may take it for well.
                    await self.server.kill()
                    if isinstance(again, asyncio.CancelledError):
                        self.deaths -= 1  # given up by who asked, and no fault of the server's
                    if isinstance(again, Refused) or not isinstance(again, (ServerGone, EngineError)):
                        raise
                    error = again

    async def ask(self, path: str, body: Any) -> Any:
        """What the server answers to a post, or the one that was started in its stead: also if it neither answered in
        time nor says that it is well. Raises EngineError."""
        lost = 0
        while True:
            life = await self.settled()
            try:
                return await self.server.post(path, body)
            except (ServerGone, Late) as error:
                await self.revive(life, error)
                lost = lost + 1 if self.lives == life else 0
                if lost and isinstance(error, Late):
                    raise
                if lost >= TRIES:
                    raise still_well(error) from None
                await asyncio.sleep(lost)

    async def close(self) -> None:
        """End the server; idempotent."""
        self._closed = True
        await self.server.close()


def still_well(error: Exception) -> EngineError:
    """Of a server that did not answer ``TRIES`` times."""
    return EngineError(f"{error}; it says that it is well, but not so {TRIES} times")


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All of it; the first error as it is, when the others have been cancelled."""
    try:
        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(part) for part in work]
    except BaseExceptionGroup as group:
        raise in_order(group)[0] from None
    return [m.result() for m in made]
