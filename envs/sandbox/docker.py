"""A sandbox that is a container of its own: hardened, without network, gone with its owner or after its time.

Three identities, none of them root: the container's keep-alive process is ``nobody``, so that the work user can be
wiped out (``kill -9 -1``) after each call without ending the container. Every call runs under a small shell program
inside, which measures, kills what the call left behind and reports in a trailer on stderr; a call without a trailer is
not believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import requests
import urllib3
from docker.errors import APIError, DockerException, NotFound
from docker.models.containers import Container

from envs.sandbox.common import OUTPUT_CAP, WORK, Capture, inside
from envs.sandbox.docker_engine import connect, container_options, require_image
from envs.sandbox.docker_stream import End, converse, start
from posttrain.errors import ConfigError, SandboxError
from posttrain.types import ExecResult

_USER = "1000:1000"
_GRACE_S = 5.0
"""From the end of a call's time inside to the end of our patience outside."""
_FLOOD = 16 * 1024 * 1024
"""A call that prints more bytes is killed."""
_FILE_CAP = 64 * 1024 * 1024
"""Largest file that ``read`` returns, in bytes."""
_COMMAND_CAP = 120_000
"""Bytes of a command: Linux passes at most 128 KiB in one argument."""

_THREADS = ThreadPoolExecutor(64, thread_name_prefix="posttrain-docker")
"""Calls that are in progress at one time, over all sandboxes: docker-py blocks."""
_STARTS = threading.BoundedSemaphore(8)
"""More containers starting at one time are slower in total."""

# $1 command, $2 seconds, $3 token. Nothing here forks once the command has run, because the command may have used up
# the processes: read, kill and printf are built into the shell.
_SUPERVISE = r"""
ooms() {
    n=0
    for f in /sys/fs/cgroup/memory/memory.oom_control /sys/fs/cgroup/memory.events; do
        [ -r "$f" ] && while read -r k v; do [ "$k" = oom_kill ] && n=$v; done <"$f"
    done
}
ooms; before=$n
read -r begin _ </proc/uptime
timeout -s KILL "$2" /bin/sh -c "$1"
status=$?
read -r end _ </proc/uptime
kill -9 -1 2>/dev/null
ooms
printf '\n%s %s %s %s %s' "$3" "$status" "$begin" "$end" "$((n - before))" >&2
"""

# readlink -m also follows the links of a path whose end does not exist yet. The dot keeps a newline that ends the name.
_RESOLVE = r"""
p=$(readlink -m -- "$1"; echo .); p=${p%?.}
case "$p" in /work/?*) ;; *) exit 45;; esac
"""
_READ = (
    _RESOLVE
    + r"""
[ -f "$p" ] || exit 44
[ -r "$p" ] || exit 45
stat -c %s -- "$p"; exec cat -- "$p"
"""
)
_WRITE = (
    _RESOLVE
    + r"""
[ -d "$p" ] && exit 46
mkdir -p -- "${p%/*}" || exit 47
true >"$p" || exit 45
cat >"$p"; stat -c %s -- "$p"
"""
)

T = TypeVar("T")


@dataclass(slots=True)
class _Outcome:
    """One supervised command, as it ended."""

    status: int
    out: Capture
    err: Capture
    timed_out: bool = False
    oom: bool = False


class DockerSandbox:
    """Runs shell commands. Make one with ``open_docker``.

    One call at a time; when it ends, so does everything that it started. Files below /work, /tmp and /dev/shm last
    until ``close``, all in memory.
    """

    def __init__(self, container: Container, *, timeout_s: float) -> None:
        self._container = container
        self._api = container.client.api  # pyright: ignore[reportOptionalMemberAccess]
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._dead = ""
        self._closing: asyncio.Future[None] | None = None

    @property
    def id(self) -> str:
        """The container's id."""
        return str(self._container.id)

    async def exec(self, command: str, *, timeout_s: float = 10.0, stdin: str = "") -> ExecResult:
        """Run ``command`` with /bin/sh in the work folder, as an unprivileged user.

        Exit code 137 with a note in stderr when the memory limit or the bound on output killed it.
        """
        self._check()
        if len(command.encode()) > _COMMAND_CAP or "\0" in command:
            # What a shell answers to such a command, without asking one.
            return ExecResult(exit_code=126, stdout="", stderr="sh: argument list too long or with a null byte\n")
        limit = min(timeout_s, self._timeout_s)
        ended = await _in_thread(lambda: self._supervised(command, limit, stdin.encode(), OUTPUT_CAP))
        if ended.oom and ended.status:
            ended.err.add(b"killed: out of memory\n")
        if ended.timed_out:
            ended.err.add(f"timed out after {limit:g} s\n".encode())
        return ExecResult(
            exit_code=124 if ended.timed_out else ended.status,
            stdout=ended.out.text(),
            stderr=ended.err.text(),
            truncated=ended.out.truncated or ended.err.truncated,
            timed_out=ended.timed_out,
        )

    async def read(self, path: str) -> bytes:
        """Contents of a file. Raises FileNotFoundError (also for a folder), PermissionError (escape, unreadable)."""
        ended = await self._file_call(_READ, path, b"", _FILE_CAP)
        size, _, data = bytes(ended.out.head).partition(b"\n")
        if ended.out.truncated:
            raise OSError(errno.EFBIG, f"larger than {_FILE_CAP} bytes", path)
        if not size.isdigit() or int(size) != len(data):
            raise SandboxError(f"{len(data)} bytes of {path!r} arrived where {size!r} were said to come")
        return data

    async def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, and the folders above it. Raises PermissionError (escape) or another OSError."""
        ended = await self._file_call(_WRITE, path, data, OUTPUT_CAP)
        stored = bytes(ended.out.head).strip()
        if not stored.isdigit():
            raise SandboxError(f"writing {path!r} ended with status {ended.status}: {ended.err.text()}")
        if int(stored) != len(data):
            raise OSError(errno.ENOSPC, f"{int(stored)} of {len(data)} bytes fitted", path)

    async def close(self) -> None:
        """Kill and remove the container; idempotent, and finished even if the caller is cancelled meanwhile."""
        if self._closing is None:
            self._dead = self._dead or "it was closed"
            # Not on _THREADS: a close must not queue behind the calls that it is to end.
            self._closing = asyncio.ensure_future(asyncio.to_thread(self._remove))
        await asyncio.shield(self._closing)

    async def _file_call(self, program: str, path: str, stdin: bytes, cap: int) -> _Outcome:
        self._check()
        # Not the lexical path: a link followed by .. leads elsewhere, and _RESOLVE judges where.
        inside(path)
        command = f"set -- {shlex.quote(path)}\n{program}"
        ended = await _in_thread(lambda: self._supervised(command, self._timeout_s, stdin, cap))
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

    def _supervised(self, command: str, limit_s: float, stdin: bytes, cap: int) -> _Outcome:
        """Run ``command`` under the supervisor; blocks for at most ``limit_s`` + grace once it is its turn."""
        token = secrets.token_hex(16)
        ended = _Outcome(status=137, out=Capture(cap), err=Capture())
        with self._turn, self._guard():
            self._check()
            argv = ["/bin/sh", "-c", _SUPERVISE, "sh", command, f"{limit_s:.3f}", token]
            deadline = time.monotonic() + limit_s + _GRACE_S
            end, exec_id = self._converse(argv, stdin, ended, deadline, bound=max(_FLOOD, cap))
            if _read_trailer(ended, token, limit_s):
                return ended
            self._settle(exec_id, end, ended)
        return ended

    def _converse(self, argv: list[str], stdin: bytes, ended: _Outcome, deadline: float, bound: int) -> tuple[End, str]:
        created = self._api.exec_create(
            self.id, argv, stdin=bool(stdin), user=_USER, workdir=WORK, environment={"HOME": WORK, "LANG": "C.UTF-8"}
        )
        keep, sock, early = start(self._api, created["Id"])
        try:
            return converse(sock, early, stdin, ended.out, ended.err, deadline=deadline, bound=bound), created["Id"]
        finally:
            sock.close()
            keep.close()

    def _settle(self, exec_id: str, end: End, ended: _Outcome) -> None:
        """A call whose supervisor did not report: killed by the command, flooding, stuck, or a broken container."""
        code = self._api.exec_inspect(exec_id)["ExitCode"]
        if end is End.EOF and code != 137:
            raise SandboxError(f"the container could not run a command (status {code}): {ended.err.text()[:500]}")
        # The supervisor is the work user's own process, so the command may kill it and live on.
        swept = _Outcome(status=0, out=Capture(), err=Capture())
        argv = ["/bin/sh", "-c", "kill -9 -1; exit 0"]
        how, sweep_id = self._converse(argv, b"", swept, time.monotonic() + _GRACE_S, bound=_FLOOD)
        if how is not End.EOF or self._api.exec_inspect(sweep_id)["ExitCode"] != 0:
            raise SandboxError(f"what a command left behind could not be killed: {swept.out.text()[:500]}")
        ended.timed_out = end is End.DEADLINE
        if end is End.FLOOD:
            ended.err.add(f"killed: printed more than {_FLOOD} bytes\n".encode())

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Whatever fails in here, the container is of no use any more: kill it and say so."""
        try:
            yield
        except (SandboxError, DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError) as e:
            self._dead = self._dead or f"{type(e).__name__}: {e}"
            with contextlib.suppress(SandboxError):
                self._remove()
            raise SandboxError(f"the container is dead: {self._dead}") from e

    def _check(self) -> None:
        if self._dead:
            raise SandboxError(f"the container is dead: {self._dead}")

    def _remove(self) -> None:
        _remove(self._container)


def _read_trailer(ended: _Outcome, token: str, limit_s: float) -> bool:
    """Take the supervisor's report off stderr and into ``ended``; False if there is none."""
    at = ended.err.tail.rfind(f"\n{token} ".encode())
    if at < 0:
        return False
    status, begin, end, ooms = ended.err.tail[at:].split()[1:5]
    ended.err.cut(ended.err.total - len(ended.err.tail) + at)
    ended.status, ended.oom = int(status), int(ooms) > 0
    # The clock of /proc/uptime counts in hundredths.
    ended.timed_out = ended.status == 137 and not ended.oom and float(end) - float(begin) >= limit_s - 0.02
    return True


def _remove(container: Container) -> None:
    """Kill and remove; a container that is gone or going is fine."""
    try:
        container.remove(force=True, v=True)
    except NotFound:
        pass
    except APIError as error:
        if error.status_code != 409:
            raise SandboxError(f"container {container.short_id} cannot be removed: {error}") from error
    except (DockerException, requests.RequestException) as error:
        raise SandboxError(f"container {container.short_id} cannot be removed: {error}") from error
    finally:
        container.client.close()  # pyright: ignore[reportOptionalMemberAccess]


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)


async def open_docker(
    *,
    image: str = "posttrain-base",
    memory_mb: int = 512,
    cpus: float = 1.0,
    pids: int = 128,
    timeout_s: float = 120.0,
    host: str | None = None,
    run: str = "",
    ttl_s: int = 7200,
) -> DockerSandbox:
    """A fresh container, which ends by itself after ``ttl_s`` seconds even if this process dies.

    Raises ConfigError when the engine or the image is missing, SandboxError when the engine refuses.
    """

    def make() -> DockerSandbox:
        client = connect(host)
        try:
            require_image(client, image)
            with _STARTS:
                options = container_options(memory_mb=memory_mb, cpus=cpus, pids=pids, run=run, ttl_s=ttl_s)
                container = client.containers.create(image, **options)
                try:
                    container.start()
                except BaseException:
                    _remove(container)
                    raise
        except (DockerException, requests.RequestException) as error:
            client.close()
            raise SandboxError(f"no container: {error}") from error
        except ConfigError:
            client.close()
            raise
        return DockerSandbox(container, timeout_s=timeout_s)

    future = _THREADS.submit(make)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        # Nobody is left to close the container that the thread may still make.
        future.add_done_callback(_discard)
        raise


def _discard(future: Future[DockerSandbox]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result()._remove()


def probe_docker(*, image: str, host: str | None = None) -> None:
    """Raise ConfigError if the engine does not answer or lacks the image."""
    client = connect(host)
    try:
        require_image(client, image)
    except DockerException as error:
        raise ConfigError(f"sandbox.type docker: the engine failed: {error}") from error
    finally:
        client.close()


__all__ = ["DockerSandbox", "open_docker", "probe_docker"]
