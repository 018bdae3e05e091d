"""The trainer's end of the connection through which a server takes weights that this process holds."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import torch

from posttrain import waits
from posttrain.engine.transfer import Link, Lost, layout_of
from posttrain.engine.vllm_server import Server, ServerGone
from posttrain.weights import HeldOutlet

T = TypeVar("T")


class Sender:
    """Of one server. ``meetings``: a folder that the server can reach."""

    def __init__(self, server: Server, meetings: Path) -> None:
        self._server = server
        self._files = (meetings / f"meeting-{server.number}-{n}" for n in itertools.count())
        self._link: Link | None = None

    async def send(self, where: str, version: int) -> None:
        """Have the server, which is paused, take those weights as that version. Raises ServerGone if the connection
        breaks; the next call makes a new one."""
        tensors = HeldOutlet.held(where)
        try:
            link = self._link = self._link or await self._meet()
            await self._server.post("/start_weight_update")
            coming = {"update_info": {"layout": layout_of(tensors)}}
            with waits.waiting(f"{self._server.name} to take weights"):
                await self._both(self._server.post("/update_weights", coming), lambda: link.send(tensors))
            await self._server.post("/finish_weight_update", {"weight_version": str(version)})
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Forget the connection: what still uses it lets it end."""
        self._link = None

    async def _meet(self) -> Link:
        workers = (await self._server.get("/get_world_size"))["world_size"]
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        file, bound, loopback = next(self._files), self._server.config.timeout_s, not self._server.config.servers
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # of a run that was killed
        wanted = {"file": str(file.resolve()), "size": 1 + workers, "timeout_s": bound, "loopback": loopback}
        given_up = threading.Event()
        try:
            with waits.waiting(f"{self._server.name} to connect to the trainer"):
                return await self._both(
                    self._server.post("/init_weight_transfer_engine", {"init_info": wanted}),
                    lambda: Link(file, 0, 1 + workers, device, bound, loopback, given_up),
                )
        finally:
            given_up.set()
            file.unlink(missing_ok=True)

    async def _both(self, request: Coroutine[Any, Any, Any], work: Callable[[], T]) -> T:
        """Ask the server, and do meanwhile what it waits for. The first error is raised at once: if it is the server's,
        the work, in a thread, ends by itself when it notices."""
        asked = asyncio.ensure_future(request)
        done = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            await asyncio.wait((asked, done), return_when=asyncio.FIRST_EXCEPTION)
            if asked.done():
                asked.result()
            found = done.result()
            await asked
            return found
        except Lost as error:
            raise ServerGone(f"{self._server.name}: the connection for weights broke: {error}") from None
        finally:
            asked.cancel()
            done.cancel()


__all__ = ["Sender"]
