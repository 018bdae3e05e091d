"""A place for shell commands made of Linux namespaces, by bubblewrap: no daemon, no image, this machine's own /usr.

Two layers. The outer one holds the files: a read-only root with /usr, and /work, /tmp and /dev/shm in memory, in
namespaces of their own (user, mount, pid, ipc, uts, cgroup, and a network with no interface but a dead loopback). It
ends with its owner, whose pipe its only process reads. Each program of ours runs in an inner layer with processes of
its own, so that it cannot see the outer one, and killing the program ends whatever it started.

What stops what: no capability and no new privileges (bubblewrap sets them), no namespaces of one's own
(``--disable-userns``), /sys absent, /proc/sys read-only, resource limits for processes, open files, file size and each
process's memory. There is no bound on the memory of all processes together but their number times ``memory_mb`` (they
are the first to be killed when the machine has none left), none on the processor or on the number of files, and no
filter of system calls; where that matters, use Docker.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence

from envs.sandbox.channel import Channel, plain
from envs.sandbox.common import WORK
from envs.sandbox.config import BubblewrapConfig
from envs.sandbox.programs import RUNNER, START, TOOLS, Program
from envs.sandbox.shell import ShellSandbox, in_thread, start
from posttrain.errors import ConfigError, SandboxError

_NEEDED = {"bwrap": "bubblewrap", "nsenter": "util-linux", "prlimit": "util-linux", "choom": "util-linux"}
"""Program to Debian package."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEVICES = ("null", "zero", "full", "random", "urandom")
# The first process of an inner layer, from the unreadable shell: bubblewrap's own could be traced by a command, which
# would then live on in it, beyond the reach of `kill -9 -1`. While it waits it reaps every orphan.
_FIRST = """
exec 3<&0
eval "$program" <&3 3<&- &
unset program
exec 3<&- </dev/null >/dev/null 2>&1
wait $!
"""
# It ends with the program, and everything with it; but not with the first process of a program that moves.
_STAY = "while :; do sleep 1000000; done"
_WAIT_S = 10.0
"""For a namespace to be made, and for a killed process to be gone."""
_MB = 1024 * 1024


class BubblewrapPlace:
    """The outer layer; see ``shell.Place``."""

    profile = "bubblewrap"

    def __init__(self, config: BubblewrapConfig) -> None:
        self._config = config
        self._user = _identity()
        self._removed = False
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._outer, self._pid = self._open()

    def own_processes(self, program: Program) -> int:
        """The first one of the inner layer, its sleep once a program has moved, and the program."""
        return 3 if program.moves else 2

    def spawn(self, program: Program) -> Channel:
        """Start ``program`` in an inner layer."""
        spaces = ("--user", "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup")
        join = ["nsenter", "--target", str(self._pid), *spaces, "--preserve-credentials", "--"]
        layer = ["bwrap", "--unshare-user", "--unshare-pid", "--disable-userns", "--die-with-parent", "--as-pid-1"]
        layer += ["--new-session", "--dev-bind", "/", "/", "--proc", "/proc", "--chdir", WORK, "--"]
        # The limit on processes counts those of the namespace in which it is set: prlimit runs inside.
        argv = ["choom", "-n", "1000", "--", *join, *layer, "prlimit", *_limits(self._config), "--", *START]
        text = f"program={shlex.quote(program.text)}\n{_FIRST}{_STAY if program.moves else ''}"
        environment = {"PATH": _PATH, "HOME": WORK, "LANG": "C.UTF-8", "program": text}
        with self._lock:
            if self._removed or self._outer.poll() is not None:
                raise SandboxError("the namespaces are gone")
            child = self._popen(argv, environment)
            self._children.add(child)
        assert child.stdin and child.stdout and child.stderr
        fds = [child.stdin.fileno(), child.stdout.fileno(), child.stderr.fileno()]
        for fd in fds:
            os.set_blocking(fd, False)
        return Channel(fds[0], {fds[1]: plain(1), fds[2]: plain(2)}, lambda: self._end(child))

    def sweep(self) -> None:
        """Nothing is left: closing its channel has killed the inner layer."""

    def audit(self) -> None:
        """Nothing is beyond the limits."""

    def remove(self) -> None:
        """Kill both layers; the files go with them."""
        with self._lock:
            self._removed = True
            for child in [*self._children, self._outer]:
                child.kill()
        self._reap(self._outer)

    def _open(self) -> tuple[subprocess.Popen[bytes], int]:
        """The outer layer, and the process whose namespaces the inner ones join."""
        told, tell = os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, told)
            user = os.getuid() if self._user is None else self._user
            files = {
                "/etc/passwd": ("0444", _memory(stack, f"work:x:{user}:{user}::{WORK}:/bin/sh\n")),
                "/etc/group": ("0444", _memory(stack, f"work:x:{user}:\n")),
                f"{TOOLS}/sh": ("0111", stack.enter_context(open("/bin/sh", "rb")).fileno()),
            }
            argv = ["bwrap", *_outer_options(self._config), "--info-fd", str(tell)]
            for path, (mode, fd) in files.items():
                argv += ["--perms", mode, "--ro-bind-data", str(fd), path]
            argv += ["--remount-ro", "/", "--", "cat"]
            try:
                outer = self._popen(argv, {"PATH": _PATH}, [tell, *(fd for _, fd in files.values())])
            finally:
                os.close(tell)
            said = _read_all(told)
        try:
            return outer, int(json.loads(said)["child-pid"])
        except (ValueError, KeyError) as error:
            outer.kill()
            _, problem = outer.communicate()
            raise SandboxError(f"bubblewrap made no sandbox: {problem.decode(errors='replace').strip()}") from error

    def _popen(self, argv: Sequence[str], env: Mapping[str, str], fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        pipe, user = subprocess.PIPE, self._user
        try:
            return subprocess.Popen(
                argv,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                bufsize=0,
                env=env,
                cwd="/",
                pass_fds=fds,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        except OSError as error:
            raise SandboxError(f"{argv[0]} does not run: {error}") from error

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """Kill an inner layer; returns when none of its processes is left."""
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            # Below nsenter is bubblewrap, below that the layer's first process. The kernel ends that one last.
            (layer,) = _children(child.pid)
            (first,) = _children(layer)
            handle = os.pidfd_open(first)
            try:
                # Still there, so the handle is of it and not of another that got its number.
                if _children(layer) == [first]:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    child.wait(_WAIT_S)
            finally:
                os.close(handle)
        # Where that was not to be had, the layer has ended, or ends with nsenter.
        child.kill()
        self._reap(child)
        with self._lock:
            self._children.discard(child)

    def _reap(self, child: subprocess.Popen[bytes]) -> None:
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                stream.close()
        try:
            child.wait(_WAIT_S)
        except subprocess.TimeoutExpired as error:
            raise SandboxError(f"process {child.pid} of a sandbox cannot be killed") from error


def _identity() -> int | None:
    """Root makes the sandbox as a user that exists nowhere, one for each sandbox; anybody else as himself."""
    return 1_000_000_000 + secrets.randbelow(1_000_000_000) if os.getuid() == 0 else None


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return [int(child) for child in children.read().split()]


def _limits(config: BubblewrapConfig) -> list[str]:
    """For prlimit."""
    limits = {"nproc": config.pids, "nofile": 1024, "core": 0}
    limits |= {"fsize": config.memory_mb * _MB // 4, "as": config.memory_mb * _MB}
    return [f"--{name}={value}" for name, value in limits.items()]


def _outer_options(config: BubblewrapConfig) -> list[str]:
    quarter, eighth = str(config.memory_mb * _MB // 4), str(config.memory_mb * _MB // 8)
    options = ["--unshare-all", "--hostname", "sandbox", "--clearenv", "--new-session", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = f"/{name}"
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            options += ["--ro-bind", path, path]
    # Debian's editors, compilers and pagers are links into /etc/alternatives.
    options += ["--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc"]
    for device in _DEVICES:
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for name, target in {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
        options += ["--symlink", target, f"/dev/{name}"]
    options += ["--perms", "0700", "--size", quarter, "--tmpfs", WORK]
    for path in ("/tmp", "/dev/shm"):
        options += ["--perms", "1777", "--size", eighth, "--tmpfs", path]
    return options


def _read_all(fd: int) -> bytes:
    """Until the other end is closed, or nothing has come for a while."""
    said = b""
    while select.select([fd], [], [], _WAIT_S)[0] and (data := os.read(fd, 4096)):
        said += data
    return said


def _memory(stack: contextlib.ExitStack, text: str) -> int:
    """A descriptor to read ``text`` from, closed with ``stack``."""
    fd = os.memfd_create("posttrain")
    stack.callback(os.close, fd)
    os.write(fd, text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _open(config: BubblewrapConfig) -> ShellSandbox:
    place = BubblewrapPlace(config)
    try:
        return ShellSandbox(place, start(place, RUNNER), timeout_s=config.timeout_s)
    except BaseException:
        place.remove()
        raise


async def open_bubblewrap(config: BubblewrapConfig) -> ShellSandbox:
    """A fresh sandbox. Raises SandboxError if it cannot be had."""
    return await in_thread(lambda: _open(config))


def probe_bubblewrap() -> None:
    """Raise ConfigError if a program is missing or the machine forbids the namespaces."""
    missing = [program for program in _NEEDED if shutil.which(program, path=_PATH) is None]
    if missing:
        packages = " ".join(sorted({_NEEDED[program] for program in missing}))
        raise ConfigError(
            f"sandbox.type bubblewrap: {', '.join(missing)} missing; run (as root) `apt-get install -y {packages}`, or"
            " set `sandbox.type: monty`"
        )
    try:
        _open(BubblewrapConfig()).discard()
    except SandboxError as error:
        raise ConfigError(
            f"sandbox.type bubblewrap: this machine forbids its namespaces ({error}); allow them with `sysctl"
            " user.max_user_namespaces=10000` (and kernel.unprivileged_userns_clone=1,"
            " kernel.apparmor_restrict_unprivileged_userns=0 where they exist), or set `sandbox.type: monty`; inside a"
            " container they need one that may make namespaces and has an unmasked /proc"
        ) from error


__all__ = ["BubblewrapPlace", "open_bubblewrap", "probe_bubblewrap"]
