"""A sandbox for short Python programs: pydantic-monty, an interpreter of a Python subset, in worker processes.

One pool of warm workers serves every sandbox of the process, so that opening one costs nothing; each call gets a fresh
interpreter. Files live in memory, on this side, and are the only thing a program can reach.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Literal

from pydantic_monty import (
    AsyncMonty,
    Monty,
    MontyCrashedError,
    MontyError,
    MontyFileHandle,
    MontyRuntimeError,
    MontySyntaxError,
    OSAccess,
    PrintCallback,
    ResourceLimits,
)

from envs.sandbox.common import WORK, Capture, inside
from posttrain.errors import ConfigError, SandboxError
from posttrain.types import ExecResult

_GRACE_S = 0.5
"""Beyond the call's time: the worker stops itself first (and lives), then it is killed."""
_QUEUE_S = 600.0
"""Longest wait for a free worker; the wait is not part of a call's time."""
_HOST_CALLS = 100_000
"""File operations and lines of input of one call."""
_WRITE_BUDGET = 16 * 1024 * 1024
"""Bytes a sandbox may ever write. Small: appending copies the file, on the event loop."""
_FILE_COST = 512
"""What a file operation is charged beyond its bytes, for the objects that it leaves on this side."""


class _Files(OSAccess):
    """The work folder, in this process's memory.

    The budget is on everything ever written, not on what is left: the base class keeps the content of deleted files.
    """

    def __init__(self, budget: int) -> None:
        super().__init__(environ={})
        self._budget = budget
        super().path_mkdir(PurePosixPath(WORK), parents=True, exist_ok=True)

    def _charge(self, size: int) -> None:
        self._budget -= size + _FILE_COST
        if self._budget < 0:
            # One string argument: the interpreter cannot rebuild the (errno, text) form.
            raise OSError(f"[Errno {errno.ENOSPC}] No space left on device")

    def path_open(self, path: PurePosixPath, mode: str) -> MontyFileHandle:
        self._charge(0)
        return super().path_open(path, mode)

    def path_mkdir(self, path: PurePosixPath, parents: bool, exist_ok: bool) -> None:
        self._charge(_FILE_COST * len(PurePosixPath(path).parts))
        super().path_mkdir(path, parents, exist_ok)

    def path_write_text(self, path: PurePosixPath | MontyFileHandle, data: str) -> int:
        self._charge(len(data))
        return super().path_write_text(path, data)

    def path_write_bytes(self, path: PurePosixPath | MontyFileHandle, data: bytes) -> int:
        self._charge(len(data))
        return super().path_write_bytes(path, data)

    def path_append_text(self, path: PurePosixPath | MontyFileHandle, data: str) -> int:
        self._charge(len(data))
        return super().path_append_text(path, data)

    def path_append_bytes(self, path: PurePosixPath | MontyFileHandle, data: bytes) -> int:
        self._charge(len(data))
        return super().path_append_bytes(path, data)


class MontySandbox:
    """Runs Python source. Make one with ``open_monty``.

    A program sees only its work folder, ``input()`` over stdin, and a clock. Concurrent calls share the files.
    """

    profile = "monty"
    """How it is isolated, to be recorded with results."""

    def __init__(self, pool: AsyncMonty, *, memory_mb: int, timeout_s: float) -> None:
        self._pool = pool
        self._memory = memory_mb * 1024 * 1024
        self._timeout_s = timeout_s
        self._files = _Files(_WRITE_BUDGET)
        self._dead = ""

    async def exec(self, command: str, *, timeout_s: float = 10.0, stdin: str = "") -> ExecResult:
        """Run Python source as ``__main__`` in a fresh namespace.

        Exit code 1 with the traceback in stderr for an exception, also one made by the memory or recursion limit.
        """
        self._check()
        limit = min(timeout_s, self._timeout_s)
        streams = {"stdout": Capture(), "stderr": Capture()}

        def collect(stream: Literal["stdout", "stderr"], text: str) -> None:
            streams[stream].add(text.encode(errors="replace"))

        lines = stdin.splitlines()

        def read_line(prompt: str = "") -> str:
            collect("stdout", prompt)
            if not lines:
                raise EOFError("EOF when reading a line")
            return lines.pop(0)

        exit_code, message = await self._run(command, limit, collect, read_line)
        streams["stderr"].add(message.encode(errors="replace"))
        return ExecResult(
            exit_code=exit_code,
            stdout=streams["stdout"].text(),
            stderr=streams["stderr"].text(),
            truncated=any(stream.truncated for stream in streams.values()),
            timed_out=exit_code == 124,
        )

    async def read(self, path: str) -> bytes:
        """Contents of a file. Raises FileNotFoundError (also for a folder) or PermissionError (escape)."""
        self._check()
        where = PurePosixPath(inside(path))
        if not self._files.path_is_file(where):
            raise FileNotFoundError(f"no file {path!r}")
        return self._files.path_read_bytes(where)

    async def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, and the folders above it. Raises PermissionError (escape) or another OSError."""
        self._check()
        where = PurePosixPath(inside(path))
        self._files.path_mkdir(where.parent, parents=True, exist_ok=True)
        self._files.path_write_bytes(where, data)

    async def close(self) -> None:
        """Drop the files; idempotent. The pool stays, for the next sandbox."""
        self._dead = self._dead or "it was closed"
        self._files = _Files(_WRITE_BUDGET)

    async def _run(
        self, source: str, limit_s: float, collect: PrintCallback, read_line: Callable[[str], str]
    ) -> tuple[int, str]:
        """Exit code and text for stderr; raises SandboxError, after which the sandbox is dead."""
        started = None
        try:
            async with self._pool.checkout(limits=self._limits(limit_s)) as session:
                started = time.monotonic()
                # The worker's own clock stops while it waits for this side; this one does not.
                async with asyncio.timeout(limit_s + _GRACE_S):
                    # The value of a last expression would be converted for this side: None costs nothing.
                    await session.feed_run(
                        source + "\nNone",
                        print_callback=collect,
                        os=self._files,
                        cwd=WORK,
                        external_lookup={"input": read_line},
                    )
        except (MontyRuntimeError, MontySyntaxError) as error:
            return _judge(error, time.monotonic() - (started or 0.0), limit_s)
        except TimeoutError as error:
            if started is None:
                raise SandboxError(f"no monty worker was free within {_QUEUE_S:g} s") from error
            return 124, _timeout_text(limit_s)
        except MontyCrashedError as error:
            # The pool's watchdog kills a worker that does not keep to its own limit.
            if error.timed_out:
                return 124, _timeout_text(limit_s)
            raise self._died(error) from error
        except (MontyError, OSError, RuntimeError) as error:
            raise self._died(error) from error
        return 0, ""

    def _limits(self, timeout_s: float) -> ResourceLimits:
        return {
            "max_feed_duration_secs": timeout_s,
            "max_total_sleep_secs": timeout_s,
            "max_memory": self._memory,
            "max_suspensions": _HOST_CALLS,
        }

    def _check(self) -> None:
        if self._dead:
            raise SandboxError(f"the monty sandbox is dead: {self._dead}")

    def _died(self, error: Exception) -> SandboxError:
        self._dead = f"{type(error).__name__}: {error}"
        return SandboxError(f"the monty sandbox died: {self._dead}")


def _timeout_text(limit_s: float) -> str:
    return f"timed out after {limit_s:g} s\n"


def _judge(error: MontyRuntimeError | MontySyntaxError, elapsed_s: float, limit_s: float) -> tuple[int, str]:
    """Exit code and text for stderr of a program that ended by ``error``."""
    cause = error.exception()
    # A program may raise TimeoutError itself. The limits' own says so, and a sleep beyond the limit is cut at once.
    if isinstance(cause, TimeoutError) and (elapsed_s >= limit_s or str(cause).startswith("sleep limit exceeded")):
        return 124, _timeout_text(limit_s)
    if isinstance(cause, SystemExit):
        return (1, f"{cause}\n") if str(cause) else (0, "")
    return 1, error.display().replace("<python-input-0>", "main.py") + "\n"


_pools: dict[int, AsyncMonty] = {}
"""The pool of each process that uses one, by process id: a forked child must not talk to its parent's workers."""


async def open_monty(*, memory_mb: int = 64, timeout_s: float = 10.0) -> MontySandbox:
    """A fresh sandbox on this process's pool, which is started by the first. Raises SandboxError."""
    pool = _pools.get(os.getpid())
    if pool is None:
        try:
            # Workers end with this process: their end of the pipe closes.
            pool = AsyncMonty(min_processes=1, max_processes=max(4, os.cpu_count() or 1), checkout_timeout=_QUEUE_S)
            await pool.__aenter__()
        except (MontyError, OSError, RuntimeError) as error:
            raise SandboxError(f"monty does not start: {error}") from error
        # Another task may have been faster; its pool wins and ours, still idle, goes with its last reference.
        pool = _pools.setdefault(os.getpid(), pool)
    return MontySandbox(pool, memory_mb=memory_mb, timeout_s=timeout_s)


def probe_monty() -> None:
    """Raise ConfigError if the interpreter does not run here."""
    try:
        with Monty() as pool, pool.checkout() as session:
            answer = session.feed_run("6 * 7")
    except (MontyError, OSError, RuntimeError) as error:
        raise ConfigError(f"sandbox.type monty: {error}; reinstall with `pip install pydantic-monty`") from error
    if answer != 42:
        raise ConfigError(f"sandbox.type monty: 6 * 7 gave {answer!r}; reinstall with `pip install pydantic-monty`")


__all__ = ["MontySandbox", "open_monty", "probe_monty"]
