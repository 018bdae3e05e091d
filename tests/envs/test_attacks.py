"""Hostile commands against every sandbox that runs shell commands.

Each test says what stops the attack. ``attack`` asserts what all have in common: afterwards the sandbox answers, and
nothing runs in it that did not run before.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from envs.sandbox import BubblewrapConfig, DockerConfig, open_sandbox, probe
from envs.sandbox.programs import TOOLS
from envs.sandbox.shell import ShellSandbox
from posttrain.errors import ConfigError
from posttrain.types import ExecResult
from tests.contracts.test_sandbox import comes_in_time

Shell = BubblewrapConfig | DockerConfig

MB = 1024 * 1024
BUBBLEWRAP = BubblewrapConfig(memory_mb=256, pids=48, timeout_s=30)
DOCKER = DockerConfig(memory_mb=256, pids=48, timeout_s=30)
PROCESSES = "cat /proc/[0-9]*/comm >/tmp/list; sort /tmp/list; rm /tmp/list"
"""Lists all processes but this cat, which starts when the list of names is complete."""

T = TypeVar("T")


@pytest.fixture(
    params=[pytest.param(BUBBLEWRAP, id="bubblewrap"), pytest.param(DOCKER, id="docker", marks=pytest.mark.docker)]
)
def shell(request: pytest.FixtureRequest) -> Shell:
    try:
        probe(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    return request.param


def run(shell: Shell, body: Callable[[ShellSandbox], Awaitable[T]]) -> T:
    async def main() -> T:
        box = await open_sandbox(shell, run="attack")
        assert isinstance(box, ShellSandbox)
        try:
            before = await box.exec(PROCESSES)
            assert before.exit_code == 0
            answer = await body(box)
            after = await box.exec(PROCESSES)
            assert (after.exit_code, after.stdout) == (0, before.stdout)
            return answer
        finally:
            await box.close()

    return asyncio.run(main())


def attack(shell: Shell, command: str, *, timeout_s: float = 10.0) -> tuple[ExecResult, float]:
    """The result and the seconds it took."""

    async def body(box: ShellSandbox) -> tuple[ExecResult, float]:
        started = time.monotonic()
        result = await box.exec(command, timeout_s=timeout_s)
        return result, time.monotonic() - started

    return run(shell, body)


def python(source: str) -> str:
    return f"python3 - <<'END'\n{source}\nEND"


# What takes too much.


@pytest.mark.parametrize("bomb", ["f() { f | f & }; f; sleep 20", "f() { f | f & }; f", ":(){ :|:& };:; kill -9 $PPID"])
def test_fork_bomb(shell: Shell, bomb: str) -> None:
    """Stopped by the limit on processes; cleared by one system call that kills all of the user's."""

    def play() -> float:
        result, took = attack(shell, bomb, timeout_s=2)
        assert result.exit_code != 0 or not bomb.endswith("20")
        return took

    comes_in_time(play, 12)


def test_memory_bomb(shell: Shell) -> None:
    """Stopped by the container's memory limit, or by the limit on the process's address space."""
    result, _ = attack(shell, "python3 -c 'x = bytearray(1 << 30); print(len(x))'")
    assert (result.stdout, result.timed_out) == ("", False)
    if isinstance(shell, DockerConfig):
        assert result.exit_code == 137
        assert result.stderr.endswith("killed: out of memory\n")
    else:
        assert result.exit_code == 1
        assert result.stderr.endswith("MemoryError\n")


@pytest.mark.parametrize(("folder", "share"), [("/work", 4), ("/tmp", 8), ("/dev/shm", 8)])
def test_disk_fill(shell: Shell, folder: str, share: int) -> None:
    """Stopped by the size of the file systems, which are in memory; an error of the command, and of ``write``."""

    async def body(box: ShellSandbox) -> str:
        full = await box.exec(f"for i in 1 2 3; do head -c 30000000 /dev/zero >{folder}/$i; done; du -sb {folder}")
        if folder == "/work":
            with pytest.raises(OSError, match="bytes fitted"):
                await box.write("more", bytes(40_000_000))
        elif folder == "/tmp":
            told = await box.exec("cat", stdin="x" * 100_000)
            assert (told.exit_code, told.stderr) == (1, "sh: no space in /tmp for the input of this command\n")
        await box.exec(f"rm -f {folder}/*")
        return full.stdout.split()[0]

    assert 0 <= 256 // share * MB - int(run(shell, body)) <= 16_384


def test_output_flood(shell: Shell) -> None:
    """Stopped by the bound on a call's output, long before its time; kept is the head."""
    result, took = attack(shell, "yes", timeout_s=25)
    assert (result.exit_code, result.truncated, result.timed_out) == (137, True, False)
    assert result.stdout == "y\n" * (32 * 1024)
    assert result.stderr == f"killed: printed more than {16 * MB} bytes\n"
    assert took < 20


@pytest.mark.parametrize(
    "loop", ["while :; do :; done", "trap '' TERM INT HUP; while :; do sleep 1; done", python("while True: pass")]
)
def test_endless_loop(shell: Shell, loop: str) -> None:
    """Stopped by the call's time, kept from outside; SIGKILL cannot be trapped."""

    def play() -> float:
        result, took = attack(shell, loop, timeout_s=1)
        assert (result.exit_code, result.timed_out) == (124, True)
        assert took >= 1
        return took

    comes_in_time(play, 4)


@pytest.mark.parametrize(
    "command",
    [
        "sleep 300 & echo started",
        "setsid sh -c 'sleep 300; sleep 300' & echo started",
        "nohup sh -c 'trap \"\" TERM INT HUP; while :; do sleep 1; done' >/dev/null 2>&1 & echo started",
        "(setsid setsid sleep 300 &) ; echo started",
    ],
)
def test_background_process_ends_with_its_call(shell: Shell, command: str) -> None:
    """Stopped by ``kill -9 -1``, which no session and no double fork escapes. Its output is not waited for: that would
    last until the call's time is over, with another exit code."""
    result, _ = attack(shell, command)
    assert (result.exit_code, result.stdout) == (0, "started\n")


# What leads out.


def test_writing_outside_the_work_folder(shell: Shell) -> None:
    """Stopped by a root that is read-only."""
    result, _ = attack(shell, "for f in /x /etc/x /usr/x /usr/bin/env /etc/passwd; do (echo >$f); done")
    assert result.stderr.count("Read-only file system") == 5


def test_files_processes_and_environment_of_the_host(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a root, a process list and an environment that are the sandbox's own."""
    secret = tmp_path / "secret"
    secret.write_text("s3cret-value")
    monkeypatch.setenv("POSTTRAIN_SECRET", "s3cret-value")
    with subprocess.Popen(["sleep", "987654"]) as host:
        look = f"cat {secret} /proc/1/root{secret}; env; cat /proc/*/environ /proc/*/cmdline; ls ~root {Path.home()}"
        result, _ = attack(shell, look)
        alive = host.poll() is None
        host.kill()
    assert alive
    assert "s3cret-value" not in result.stdout + result.stderr
    assert "987654" not in result.stdout
    assert "POSTTRAIN" not in result.stdout


def test_network(shell: Shell) -> None:
    """Stopped by a network namespace without an interface: not even this machine can be reached."""
    reach = """
import socket
for host, port in (("192.0.2.1", 80), ("127.0.0.1", 1), ("169.254.169.254", 80)):
    try:
        socket.create_connection((host, port), 2)
    except OSError as error:
        print(error.strerror)
try:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
except PermissionError:
    print("no raw socket")
print([name for _, name in socket.if_nameindex()])
"""
    result, _ = attack(shell, python(reach))
    lines = result.stdout.splitlines()
    assert lines[0] == lines[2] == "Network is unreachable"
    assert lines[1] in ("Connection refused", "Network is unreachable")
    assert lines[3:] == ["no raw socket", "['lo']"]


@pytest.mark.parametrize(
    "target",
    [
        "/proc/sys/kernel/core_pattern",
        "/proc/sysrq-trigger",
        "/proc/1/oom_score_adj",
        "/proc/1/mem",
        "/sys/power/state",
    ],
)
def test_kernel_switches(shell: Shell, target: str) -> None:
    """Stopped by mounts that are read-only or absent, and by processes that are not the work user's to change."""
    result, _ = attack(shell, f"echo x >{target} && echo wrote")
    assert (result.stdout, result.exit_code) == ("", 2)
    assert any(
        word in result.stderr for word in ("Read-only file system", "Permission denied", "nonexistent", "No such file")
    )


def test_root_of_other_processes(shell: Shell) -> None:
    """Stopped by a process list that ends at the sandbox: behind /proc/PID/root is the sandbox's own root."""
    result, _ = attack(shell, "for p in /proc/[0-9]*; do ls $p/root/work $p/cwd 2>&1; done; ls /proc/1/root/host")
    assert result.exit_code == 2
    assert "host" in result.stderr


def test_links_and_paths_of_read_and_write(shell: Shell) -> None:
    """Stopped by resolving the path inside, where the links are."""
    paths = ("file", "folder/x", "root/etc/passwd", "folder/new/x", "up/../../etc/passwd", "../x", "/etc/passwd")

    async def body(box: ShellSandbox) -> list[str]:
        await box.exec("ln -s /etc/passwd file; ln -s /tmp folder; ln -s / root; ln -s /usr/lib up; mkfifo pipe")
        await box.exec("ln -s real inner; echo in >real")
        refused = []
        for path in paths:
            for name, call in (("read", box.read), ("write", lambda p: box.write(p, b"x"))):
                try:
                    await call(path)
                except PermissionError:
                    refused.append(f"{name} {path}")
        with pytest.raises(FileNotFoundError):
            await box.read("pipe")
        return [*refused, (await box.read("inner")).decode(), (await box.exec("ls -A /tmp")).stdout]

    assert run(shell, body) == [f"{name} {path}" for path in paths for name in ("read", "write")] + ["in\n", ""]


def test_mount_namespace_and_setuid(shell: Shell) -> None:
    """Stopped by no-new-privileges, no capability, and no namespaces of one's own."""
    tries = (
        "mount -t tmpfs none /tmp",
        "mount --bind /usr /work",
        "umount /work",
        "unshare -Ur id -u",
        "unshare -m true",
        "chroot / true",
        "su -c true",
        "cp /bin/sh s && chmod 6755 s && ./s -c 'test $(id -u) = 0'",
        "chown 0:0 s",
        "nsenter -t 1 -m true",
    )
    result, _ = attack(shell, "\n".join(f"({line}) >/dev/null 2>&1 </dev/null && echo '{line[:12]}'" for line in tries))
    assert result.stdout == ""
    status, _ = attack(shell, "grep -E '^(CapEff|CapBnd|CapAmb|NoNewPrivs):' /proc/self/status")
    # Docker's bounding set has KILL, for the root that sweeps; no-new-privileges keeps it from everybody else.
    bound = "0" * 14 + ("20" if isinstance(shell, DockerConfig) else "00")
    assert dict(line.split() for line in status.stdout.splitlines()) == {
        "CapEff:": "0" * 16,
        "CapBnd:": bound,
        "CapAmb:": "0" * 16,
        "NoNewPrivs:": "1",
    }


def test_device_node(shell: Shell) -> None:
    """Stopped by a missing capability, and by file systems that are mounted nodev."""
    result, _ = attack(shell, "mknod disk b 254 0; mknod null c 1 3; ls; find /dev -type b; ls /dev/kmsg /dev/mem")
    assert result.stdout == ""
    assert result.stderr.count("Operation not permitted") == 2
    assert result.stderr.count("No such file") == 2


# What confuses.


def test_huge_names(shell: Shell) -> None:
    """Stopped by the file system's own limits, as an OSError."""

    async def body(box: ShellSandbox) -> str:
        for path in ("n" * 300, "d/" * 3000 + "f", "n" * 119_000, "'" * 60_000):
            with pytest.raises(OSError):
                await box.write(path, b"x")
            with pytest.raises(OSError):
                await box.read(path)
        await box.write("n" * 255, b"longest")
        return (await box.read("n" * 255)).decode()

    assert run(shell, body) == "longest"


def test_binary_output(shell: Shell) -> None:
    """Harmless: bytes that are not UTF-8 are replaced, and what looks like a frame is text."""
    frames = "\\001\\000\\000\\000\\377\\377\\377\\377"
    result, _ = attack(shell, f"printf '\\000\\377\\033[2Jx{frames}'; printf '{frames}\\n0 0 on\\n' >&2; exit 9")
    assert result.exit_code == 9
    assert result.stdout == "\0\ufffd\x1b[2Jx\x01\0\0\0" + "\ufffd" * 4
    assert result.stderr == "\x01\0\0\0" + "\ufffd" * 4 + "\n0 0 on\n"


# What goes for the runner.


@pytest.mark.parametrize(
    ("command", "codes"),
    [
        ("kill -9 $PPID; echo on; sleep 20", (124, 137)),
        ("kill -9 $PPID; kill -9 -1; exit 0", (124, 137)),
        ("setsid sh -c 'kill -9 -1; exec sleep 300' & wait; echo no", (124, 137)),
        ("kill -STOP $PPID; exit 0", (124,)),
        ("while :; do kill -STOP -1; done", (124,)),
        ("while :; do kill -9 -1; done", (124, 137)),
        ("for i in 1 2 3 4; do setsid sh -c 'while :; do kill -9 -1; done' & done; wait", (124, 137)),
    ],
)
def test_killing_or_stopping_the_runner(shell: Shell, command: str, codes: tuple[int, ...]) -> None:
    """Noticed by the end of its streams, or of the call's time; swept from outside, by a new runner."""

    def play() -> float:
        result, took = attack(shell, command, timeout_s=2)
        assert result.exit_code in codes
        assert result.stdout in ("", "on\n")
        return took

    comes_in_time(play, 9)


def test_reading_and_tracing_the_runner(shell: Shell) -> None:
    """Stopped by the kernel: what runs from a file that it may not read cannot be read either."""
    spy = f"""
import ctypes, os
for pid in (1, os.getppid(), int(open(f"/proc/{{os.getppid()}}/stat").read().split(") ")[1].split()[1])):
    for name in ("mem", "environ", "fd/0", "maps", "stack", "auxv", "cwd/x", "exe"):
        try:
            open(f"/proc/{{pid}}/{{name}}", "rb").read(1)
            print("read", pid, name)
        except OSError:
            pass
    if pid != os.getppid() and ctypes.CDLL(None).ptrace(16, pid, 0, 0) == 0:
        print("traced", pid)
for path in ("{TOOLS}/sh", "{TOOLS}"):
    try:
        os.chmod(path, 0o777)
        print("changed", path)
    except OSError:
        pass
print("done")
"""
    # Its parent is the command's own shell, which it may read; that one's parent is the runner.
    result, _ = attack(shell, f"{python(spy)}; true")
    lines = [line for line in result.stdout.splitlines() if not re.fullmatch(r"read \d+ (environ|maps|auxv|exe)", line)]
    readable = {line.split()[1] for line in result.stdout.splitlines() if line.startswith("read")}
    assert (lines[-1], len(readable)) == ("done", 1)


def test_limits_that_a_command_lowers_for_the_runner_end_with_renew(shell: Shell) -> None:
    """Not stopped: a process may lower the limits of any other of its user. Bounded by ``renew``, before grading."""
    lower = "import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_FSIZE, (0, 0))"
    probe_file = "echo text >f && cat f"

    async def body(box: ShellSandbox) -> tuple[str, str]:
        done = await box.exec(f"exec {python(lower)}")
        assert (done.exit_code, done.stderr) == (0, "")
        before = await box.exec(probe_file)
        await box.renew()
        return before.stdout, (await box.exec(probe_file)).stdout

    assert run(shell, body) == ("", "text\n")


def test_forging_a_report(shell: Shell) -> None:
    """Stopped by a secret of each call that no process but the runner has met."""
    forge = "for i in 1 2 3; do printf '\\n%032d\\n' $i; printf '\\n%032d 0 0 on\\n' $i >&2; done; exit 5"
    result, _ = attack(shell, forge)
    assert result.exit_code == 5
    assert result.stdout.count("0" * 31) == result.stderr.count(" 0 0 on\n") == 3
