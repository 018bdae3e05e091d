"""Containers ready before they are asked for, and the bound on how many are being made.

A container serves one sandbox and is never used again. Making them is bounded over the whole process: an engine that
starts more at one time is slower in total. Who waits longer than ``start_timeout_s`` gets a SandboxError that says so.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from envs.sandbox.config import DockerConfig
from envs.sandbox.docker import make
from envs.sandbox.shell import ShellSandbox
from posttrain.errors import ConfigError, SandboxError

_MAKERS = 8
_STARTS = threading.BoundedSemaphore(_MAKERS)
_OPENERS = ThreadPoolExecutor(64, thread_name_prefix="posttrain-open")
"""Not the threads that run calls: who waits for a container must not keep a call from running."""


class _Pool:
    """Ready sandboxes of one config and run. Filled by threads of its own, beside whoever takes one."""

    def __init__(self, config: DockerConfig, run: str) -> None:
        self._config = config
        self._run = run
        self._ready: deque[ShellSandbox] = deque()
        self._coming = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self) -> ShellSandbox | None:
        """One that answers, or None if there is none."""
        try:
            while True:
                with self._changed:
                    if not self._ready:
                        return None
                    box = self._ready.popleft()
                if box.alive():
                    return box
                _discard_quietly(box)
        finally:
            self.fill()

    def fill(self) -> None:
        """Start making what is missing; returns at once."""
        with self._changed:
            missing = 0 if self._closed else self._config.pool - len(self._ready) - self._coming
            self._coming += max(missing, 0)
        for _ in range(missing):
            # Daemons: the end of the process must not wait for containers that nobody will use.
            threading.Thread(target=self._add, daemon=True, name="posttrain-pool").start()

    def ready(self, count: int, timeout_s: float) -> bool:
        """Wait until ``count`` are ready; whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._ready) >= count, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Wait for what is being made, and remove everything."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._coming, timeout_s)
            boxes = list(self._ready)
            self._ready.clear()
        for box in boxes:
            _discard_quietly(box)

    def _add(self) -> None:
        box = None
        try:
            if not self._closed:
                box = _make(self._config, self._run)
        except (SandboxError, ConfigError):
            # Whoever takes next finds none ready and meets the engine, and its error, himself.
            pass
        if box is not None and self._closed:
            _discard_quietly(box)
            box = None
        with self._changed:
            self._coming -= 1
            if box is not None:
                self._ready.append(box)
            self._changed.notify_all()


_pools: dict[tuple[int, DockerConfig, str], _Pool] = {}
"""By process, config and run: a forked child must not use its parent's connections."""
_pools_lock = threading.Lock()


def pool_of(config: DockerConfig, run: str = "") -> _Pool:
    """The pool of ``config`` and ``run`` in this process, begun to be filled if it is new."""
    with _pools_lock:
        key = os.getpid(), config, run
        new = key not in _pools
        pool = _pools.setdefault(key, _Pool(config, run))
    if new:
        pool.fill()
    return pool


@atexit.register
def close_pools() -> None:
    """Remove every container that this process keeps ready."""
    with _pools_lock:
        mine = [key for key in _pools if key[0] == os.getpid()]
        pools = [_pools.pop(key) for key in mine]
    for pool in pools:
        pool.close()


async def open_docker(config: DockerConfig, run: str = "") -> ShellSandbox:
    """A sandbox in a container that nobody has used: a ready one if there is one.

    Raises ConfigError when the image is missing, SandboxError when the engine is gone, refuses or is too slow.
    """

    def have() -> ShellSandbox:
        ready = pool_of(config, run).take() if config.pool else None
        return ready or _make(config, run)

    future = _OPENERS.submit(have)
    try:
        async with asyncio.timeout(config.start_timeout_s):
            return await asyncio.wrap_future(future)
    except TimeoutError as error:
        future.add_done_callback(_discard)
        raise _too_slow(config) from error
    except asyncio.CancelledError:
        # Nobody is left to close the container that the thread may still make.
        future.add_done_callback(_discard)
        raise


def _make(config: DockerConfig, run: str) -> ShellSandbox:
    began = time.monotonic()
    if not _STARTS.acquire(timeout=config.start_timeout_s):
        raise _too_slow(config)
    try:
        if time.monotonic() - began > config.start_timeout_s:
            raise _too_slow(config)
        return make(config, run)
    finally:
        _STARTS.release()


def _too_slow(config: DockerConfig) -> SandboxError:
    return SandboxError(
        f"no container within {config.start_timeout_s:g} s (start_timeout_s): the engine is too slow for the"
        f" {_MAKERS} that are started at one time"
    )


def _discard(future: Future[ShellSandbox]) -> None:
    if not future.cancelled() and future.exception() is None:
        _discard_quietly(future.result())


def _discard_quietly(box: ShellSandbox) -> None:
    # What cannot be removed ends with this process at the latest.
    with contextlib.suppress(SandboxError):
        box.discard()


__all__ = ["close_pools", "open_docker", "pool_of"]
