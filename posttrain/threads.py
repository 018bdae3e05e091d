"""Work beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Work ended early because nobody waits for it any more."""


class Beside:
    """A thread for one piece of work after the other. Unlike an executor's it does not keep a process alive that wants
    to end while the work hangs."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._go_on, name=name, daemon=True)

    def _go_on(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    async def run(
        self, work: Callable[..., T], *args: object, patience_s: float, stop: Callable[[], None] | None = None
    ) -> T:
        """``work(*args)`` in the thread.

        Whoever is cancelled goes on only when it has ended, or after ``patience_s``: nothing that it uses may be
        closed, or made a second time, under its hands. ``stop`` is called then, to have it end early."""
        loop, context = asyncio.get_running_loop(), copy_context()
        done: asyncio.Future[T] = loop.create_future()

        def end(give: Callable[[], None]) -> None:
            with suppress(RuntimeError):  # the event loop is no more
                loop.call_soon_threadsafe(lambda: None if done.done() else give())

        def play() -> None:
            try:
                result = context.run(work, *args)
            except BaseException as error:
                failure = error
                end(lambda: done.set_exception(failure))
            else:
                end(lambda: done.set_result(result))

        self._work.put(play)
        if self._thread.ident is None:
            self._thread.start()
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if stop is not None:
                stop()
            if not done.done():
                await asyncio.wait({done}, timeout=patience_s)
            if done.done():
                done.exception()  # seen: who waited for it has left
            raise

    def close(self) -> None:
        """The thread ends after what it has to do."""
        self._work.put(None)
