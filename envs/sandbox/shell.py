"""A sandbox for shell commands, over any place that can run the two shell programs.

One call at a time. A command's report is believed because it carries a secret that the command cannot read; when a
report does not come (the command killed the runner, flooded, or outlived its time) the place is swept from outside and
a new runner is started. A place in which that fails is dead.

Grading: call ``renew`` first, or grade in a fresh sandbox. ``renew`` leaves no process of earlier commands, and a
runner that none of them has met; files, of course, stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from envs.sandbox.channel import Channel, End
from envs.sandbox.common import OUTPUT_CAP, WORK, Capture, inside
from envs.sandbox.programs import READ, RUNNER, SESSION, WRITE, Ended, Program, frame, on_file, reported, take_report
from posttrain.errors import SandboxError
from posttrain.types import ExecResult

_GRACE_S = 5.0
"""From the end of a session's call, which its shell ends itself, to the end of our patience."""
_START_S = 30.0
"""For a new runner, whatever the commands before it have left."""
_FLOOD = 16 * 1024 * 1024
"""A call that prints more bytes is killed."""
_FILE_CAP = 64 * 1024 * 1024
"""Largest file that ``read`` returns, in bytes."""
_COMMAND_CAP = 120_000
"""Bytes of a command: Linux passes at most 128 KiB in one argument."""

_PATH_CAP = 4096
"""Bytes of a path: Linux's own bound."""

_THREADS = ThreadPoolExecutor(128, thread_name_prefix="posttrain-sandbox")
"""Calls that are in progress at one time, over all sandboxes of the process."""

T = TypeVar("T")


class Place(Protocol):
    """Somewhere to run a shell program, isolated from this machine."""

    profile: str
    """How it is isolated, to be recorded with results."""

    def own_processes(self, program: Program) -> int:
        """How many there are in the sandbox when nothing but ``program`` runs."""
        ...

    def spawn(self, program: Program) -> Channel:
        """Start ``program`` as the work user, in the work folder, from the unreadable shell. Raises SandboxError."""
        ...

    def sweep(self) -> None:
        """Kill whatever runs in it, whose channels are closed. Raises SandboxError."""
        ...

    def audit(self) -> None:
        """Raise SandboxError if a command has taken more than its share of what no limit holds."""
        ...

    def remove(self) -> None:
        """Kill and free everything; idempotent, from any thread. Raises SandboxError."""
        ...


class ShellSandbox:
    """Runs shell commands in a place; when a call ends, so does everything that it started.

    Files last until ``close``.
    """

    def __init__(self, place: Place, runner: Channel, *, timeout_s: float) -> None:
        self.place = place
        self._runner: Channel | None = runner
        self._session: Channel | None = None
        self._session_lost = False
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._dead = ""
        self._closing: asyncio.Future[None] | None = None

    @property
    def profile(self) -> str:
        """How it is isolated, to be recorded with results."""
        return self.place.profile

    async def exec(self, command: str, *, timeout_s: float = 10.0, stdin: str = "") -> ExecResult:
        """Run ``command`` with /bin/sh in the work folder, as the work user. Ends a session that is open.

        Exit code 137 with a note in stderr when the memory limit or the bound on output killed it, or when it killed
        its own runner. 126 for what no shell takes.
        """
        return await self._command(self._stateless, command, timeout_s, stdin.encode(errors="replace"))

    def session(self) -> ShellSession:
        """A shell whose state lasts. One a sandbox; a second one is the same shell."""
        return ShellSession(self)

    def alive(self) -> bool:
        """Whether the runner answers within seconds; blocks."""
        with contextlib.suppress(SandboxError):
            return self._locked(lambda: self._call(self._live_runner(), "file", ":", _GRACE_S, b"", OUTPUT_CAP)).alive
        return False

    async def renew(self) -> None:
        """Kill every process, and start a runner that no earlier command has met: what a grader calls first."""
        self._check()
        await in_thread(lambda: self._locked(self._renew))

    async def read(self, path: str) -> bytes:
        """Contents of a file. Raises FileNotFoundError (also for a folder), PermissionError (escape, unreadable)."""
        ended = await self._file_call(READ, path, b"", _FILE_CAP)
        size, _, data = bytes(ended.out.head).partition(b"\n")
        if ended.out.truncated:
            raise OSError(errno.EFBIG, f"larger than {_FILE_CAP} bytes", path)
        if not size.isdigit() or int(size) != len(data):
            raise SandboxError(f"{len(data)} bytes of {path!r} arrived where {size!r} were said to come")
        return data

    async def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, and the folders above it. Raises PermissionError (escape) or another OSError."""
        ended = await self._file_call(WRITE, path, data, OUTPUT_CAP)
        stored = bytes(ended.out.head).strip()
        if not stored.isdigit():
            raise SandboxError(f"writing {path!r} ended with status {ended.status}: {ended.err.text()}")
        if int(stored) != len(data):
            raise OSError(errno.ENOSPC, f"{int(stored)} of {len(data)} bytes fitted", path)

    async def close(self) -> None:
        """Kill and remove everything; idempotent, and finished even if the caller is cancelled meanwhile."""
        if self._closing is None:
            self._dead = self._dead or "it was closed"
            # Not on _THREADS: a close must not queue behind the calls that it is to end.
            self._closing = asyncio.ensure_future(asyncio.to_thread(self.discard))
        await asyncio.shield(self._closing)

    def discard(self) -> None:
        """``close`` for a caller without an event loop; blocks."""
        self._dead = self._dead or "it was closed"
        self.place.remove()
        # The call in progress sees the end of its streams at once, and closes them itself if it does not in time.
        if self._turn.acquire(timeout=_GRACE_S):
            self._drop_channels()
            self._turn.release()

    async def _command(
        self, call: Callable[[str, float, bytes], Ended], command: str, timeout_s: float, stdin: bytes
    ) -> ExecResult:
        self._check()
        if len(command.encode(errors="replace")) > _COMMAND_CAP or "\0" in command:
            # What a shell answers to such a command, without asking one.
            return ExecResult(exit_code=126, stdout="", stderr="sh: argument list too long or with a null byte\n")
        limit = min(timeout_s, self._timeout_s)
        ended = await in_thread(lambda: self._locked(lambda: call(command, limit, stdin)))
        return _result(ended, limit)

    async def _file_call(self, program: str, path: str, data: bytes, cap: int) -> Ended:
        self._check()
        # Not the lexical path: a link followed by .. leads elsewhere, and the program judges where.
        inside(path)
        if len(path.encode()) > _PATH_CAP:
            raise OSError(errno.ENAMETOOLONG, "name too long", path[:100])

        def call() -> Ended:
            command = on_file(program, path)
            ended = self._call(self._live_runner(), "file", command, self._timeout_s, data, cap)
            if not ended.alive:
                self._renew()
            return ended

        ended = await in_thread(lambda: self._locked(call))
        match ended.status:
            case 44:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            case 45:
                raise PermissionError(errno.EACCES, f"leads out of {WORK} or is not ours", path)
            case 46:
                raise IsADirectoryError(errno.EISDIR, "is a folder", path)
            case 47:
                raise NotADirectoryError(errno.ENOTDIR, "its folder cannot be made", path)
            case _:
                return ended

    def _stateless(self, command: str, limit_s: float, stdin: bytes) -> Ended:
        if self._session is not None:
            # Its shell has run the model's commands: nothing may run beside it that it could touch.
            self._renew()
        ended = self._call(self._live_runner(), "run", command, limit_s, stdin, OUTPUT_CAP)
        if not ended.alive:
            self._renew()
        self.place.audit()
        return ended

    def _stateful(self, command: str, limit_s: float, stdin: bytes) -> Ended:
        note, self._session_lost = self._session_lost, False
        if self._session is None:
            self._drop_channels()
            self._session = start(self.place, SESSION)
        ended = self._call(self._session, "run", command, limit_s, stdin, OUTPUT_CAP, grace_s=_GRACE_S)
        # Like any command it has killed what else there was, the runner among it.
        self._drop(self._runner)
        self._runner = None
        if note:
            ended.err.add(b"[the shell before this one ended: this one started anew]\n")
        if not ended.alive:
            self._renew()
            self._session_lost = False
            ended.err.add(b"[the shell ended: its variables, functions and folder are lost]\n")
        elif ended.timed_out:
            ended.err.add(b"[the shell's variables, functions and folder are those from before this command]\n")
        self.place.audit()
        return ended

    def _call(
        self, channel: Channel, kind: str, command: str, limit_s: float, data: bytes, cap: int, grace_s: float = 0.0
    ) -> Ended:
        """One frame; blocks for at most ``limit_s``, and ``grace_s`` for a program that keeps the limit itself."""
        token = secrets.token_hex(16)
        data = frame(kind, token, limit_s, command, data, secrets.token_hex(16))
        deadline = time.monotonic() + limit_s + grace_s
        end, ended = _until_reported(channel, data, token, cap, deadline)
        if end is End.FLOOD:
            ended.err.add(f"killed: printed more than {_FLOOD} bytes\n".encode())
        ended.timed_out = ended.timed_out or end is End.DEADLINE
        return ended

    def _live_runner(self) -> Channel:
        if self._runner is None:
            self._runner = start(self.place, RUNNER, sweep=self._session is None)
        return self._runner

    def _renew(self) -> None:
        """Sweep from outside; then start a runner, which nothing can disturb."""
        self._session_lost = self._session_lost or self._session is not None
        self._drop_channels()
        self.place.sweep()
        self._runner = start(self.place, RUNNER)

    def _drop_channels(self) -> None:
        self._drop(self._runner)
        self._drop(self._session)
        self._runner = self._session = None

    @staticmethod
    def _drop(channel: Channel | None) -> None:
        if channel is not None:
            channel.close()

    def _locked(self, work: Callable[[], T]) -> T:
        with self._turn, self._guard():
            self._check()
            return work()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Whatever fails in here, the sandbox is of no use any more: kill it and say so."""
        try:
            yield
        except (SandboxError, OSError) as error:
            self._dead = self._dead or f"{type(error).__name__}: {error}"
            with contextlib.suppress(SandboxError):
                self.place.remove()
            raise SandboxError(f"the sandbox is dead: {self._dead}") from error

    def _check(self) -> None:
        if self._dead:
            raise SandboxError(f"the sandbox is dead: {self._dead}")


class ShellSession:
    """A shell of the sandbox whose working folder, variables and functions last from one command to the next.

    Made by ``ShellSandbox.session``. A command that runs out of time is killed and the state from before it is kept;
    where that is impossible, and after ``exit``, the state is lost, and stderr says which. Processes do not outlast
    their command. Its results are the shell's own word, which a command can forge: never grade through a session.
    """

    def __init__(self, sandbox: ShellSandbox) -> None:
        self._sandbox = sandbox

    async def exec(self, command: str, *, timeout_s: float = 10.0) -> ExecResult:
        """Run ``command`` in the shell, its stdin empty. Raises SandboxError if the sandbox is broken."""
        return await self._sandbox._command(self._sandbox._stateful, command, timeout_s, b"")


def start(place: Place, program: Program, *, sweep: bool = True) -> Channel:
    """Start ``program`` and wait until it has killed everything else (``sweep``) and says so. Raises SandboxError."""
    deadline = time.monotonic() + _START_S
    while True:
        channel = place.spawn(program)
        token = secrets.token_hex(16)
        hello = f"{token} {place.own_processes(program)} {'sweep' if sweep else 'keep'}\n".encode()
        end, ended = _until_reported(channel, hello, token, OUTPUT_CAP, deadline)
        if end is End.DONE:
            return channel
        channel.close()
        if time.monotonic() > deadline:
            said = ended.err.text()[-500:] + ended.out.text()[-500:]
            raise SandboxError(f"no shell starts in the sandbox within {_START_S:g} s: {said}")
        # A new container may not have its shell in place yet.
        time.sleep(0.05)


def _until_reported(channel: Channel, data: bytes, token: str, cap: int, deadline: float) -> tuple[End, Ended]:
    ended = Ended(out=Capture(cap), err=Capture())
    end = channel.exchange(
        data,
        ended.out,
        ended.err,
        done=lambda: reported(ended, token),
        deadline=deadline,
        bound=max(_FLOOD, cap),
    )
    if end is End.DONE:
        take_report(ended, token)
    return end, ended


def _result(ended: Ended, limit_s: float) -> ExecResult:
    if ended.oom and ended.status:
        ended.err.add(b"killed: out of memory\n")
    if ended.timed_out:
        ended.err.add(f"timed out after {limit_s:g} s\n".encode())
    return ExecResult(
        exit_code=124 if ended.timed_out else ended.status,
        stdout=ended.out.text(),
        stderr=ended.err.text(),
        truncated=ended.out.truncated or ended.err.truncated,
        timed_out=ended.timed_out,
    )


async def in_thread(work: Callable[[], T]) -> T:
    """Run ``work``, which blocks, beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)


__all__ = ["Place", "ShellSandbox", "ShellSession", "in_thread", "start"]
