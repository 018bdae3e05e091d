"""What bubblewrap promises beyond the contract: two layers, no trace in the machine, as root and as anybody."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from envs.sandbox import BubblewrapConfig, bubblewrap, open_sandbox, probe
from envs.sandbox.bubblewrap import BubblewrapPlace
from envs.sandbox.shell import ShellSandbox
from posttrain.errors import ConfigError, SandboxError

SMALL = BubblewrapConfig(memory_mb=128, pids=32, timeout_s=30)
ROOT = Path(__file__).parents[2]

T = TypeVar("T")


@pytest.fixture(autouse=True, scope="module")
def allowed() -> None:
    try:
        probe(SMALL)
    except ConfigError as error:
        pytest.skip(str(error))


def run(body: Callable[[ShellSandbox], Awaitable[T]]) -> T:
    async def main() -> T:
        box = await open_sandbox(SMALL)
        assert isinstance(box, ShellSandbox)
        try:
            return await body(box)
        finally:
            await box.close()

    return asyncio.run(main())


def eventually(holds: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def sandboxes(parent: int) -> list[str]:
    """Processes called bwrap below ``parent``, this machine's view."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(status.parent.name)] = int(fields["PPid"]), fields["Name"]

    def below(pid: int) -> bool:
        return pid == parent or (pid in parents and below(parents[pid][0]))

    return [name for pid, (_, name) in parents.items() if name == "bwrap" and below(pid)]


def test_identity_and_namespaces() -> None:
    spaces = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
    show = f"for s in {' '.join(spaces)}; do readlink /proc/self/ns/$s; done; id -u; hostname; env | cut -d= -f1 | sort"
    result = run(lambda box: box.exec(show))
    lines = result.stdout.splitlines()
    mine = [os.readlink(f"/proc/self/ns/{space}") for space in spaces]
    assert [line.split(":")[0] for line in lines[:7]] == list(spaces)
    assert not set(lines[:7]) & set(mine)
    assert int(lines[7]) == os.getuid() if os.getuid() else int(lines[7]) >= 1_000_000_000
    assert lines[8:] == ["sandbox", "HOME", "LANG", "PATH", "PWD"]


def test_limits() -> None:
    async def body(box: ShellSandbox) -> tuple[list[str], list[str]]:
        limits = await box.exec("ulimit -p; ulimit -n; ulimit -c; ulimit -f; ulimit -v")
        sizes = await box.exec("df -k --output=size /work /tmp /dev/shm | tail -n 3")
        return limits.stdout.split(), sizes.stdout.split()

    limits, sizes = run(body)
    # dash counts files in blocks of 512 bytes and memory in KiB.
    assert limits == ["32", "1024", "0", str(32 * 2048), str(128 * 1024)]
    assert sizes == [str(32 * 1024), str(16 * 1024), str(16 * 1024)]


def test_only_usr_and_our_own_folders_are_there() -> None:
    result = run(lambda box: box.exec("ls /; ls /etc; ls -A /root /home /var /sys /boot 2>/dev/null; ls /dev"))
    seen = set(result.stdout.split())
    mine = {"bin", "sbin", "lib", "lib32", "lib64", "usr", "dev", "etc", "proc", "run", "tmp", "work"}
    etc = {"alternatives", "group", "ld.so.cache", "passwd"}
    dev = {"fd", "full", "null", "random", "shm", "stderr", "stdin", "stdout", "urandom", "zero"}
    assert seen <= mine | etc | dev
    assert {"usr", "work", "passwd", "null"} <= seen


def test_no_namespace_can_be_made_inside() -> None:
    result = run(lambda box: box.exec("unshare -U true; unshare -n true; bwrap --ro-bind / / true"))
    assert result.exit_code != 0
    assert result.stdout == ""
    assert result.stderr.count("unshare failed") == 2


def test_a_killed_sandbox_raises_from_every_method() -> None:
    async def body(box: ShellSandbox) -> Sequence[object]:
        assert isinstance(box.place, BubblewrapPlace)
        running = asyncio.create_task(box.exec("echo text; sleep 20"))
        await asyncio.sleep(0.5)
        os.kill(box.place._pid, signal.SIGKILL)
        calls = running, box.exec("echo text"), box.read("x"), box.write("x", b"")
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(answer) for answer in run(body)] == [SandboxError] * 4


def test_close_leaves_no_process_even_under_a_running_call() -> None:
    async def main() -> tuple[object, float]:
        box = await open_sandbox(SMALL)
        running = asyncio.create_task(box.exec("setsid sleep 30 & sleep 30", timeout_s=30))
        await asyncio.sleep(0.5)
        assert sandboxes(os.getpid())
        started = time.monotonic()
        await box.close()
        (answer,) = await asyncio.gather(running, return_exceptions=True)
        return answer, time.monotonic() - started

    answer, took = asyncio.run(main())
    assert isinstance(answer, SandboxError)
    assert took < 20  # the call alone would go on for 30
    assert sandboxes(os.getpid()) == []


OWNER = """
import asyncio
from envs.sandbox import BubblewrapConfig, open_sandbox

async def main():
    box = await open_sandbox(BubblewrapConfig())
    print("ready", flush=True)
    await box.exec("sleep 98765 & sleep 98765", timeout_s=100)

asyncio.run(main())
"""


def test_nothing_outlives_a_killed_owner() -> None:
    def sleeping() -> int:
        lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
        return lines.count("sleep 98765")

    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout is not None
    with owner.stdout:
        assert owner.stdout.readline() == "ready\n"
        assert eventually(lambda: sleeping() == 2, 30)
        owner.kill()
        owner.wait()
    assert eventually(lambda: sleeping() == 0, 30)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that ``BubblewrapPlace`` starts is started by the user 12345, as if Python ran as him."""
    monkeypatch.setattr(bubblewrap, "_identity", lambda: 12345)

    async def body(box: ShellSandbox) -> tuple[str, bytes]:
        await box.write("a/b", b"\0\xff")
        said = await box.exec("id -u; id -un; touch /usr/x || echo no; chmod 755 /run/posttrain/sh || echo no")
        return said.stdout, await box.read("a/b")

    assert run(body) == ("12345\nwork\nno\nno\n", b"\0\xff")


def test_probe_says_what_is_missing_and_what_is_forbidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bubblewrap, "_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"bwrap.* missing; run \(as root\) `apt-get install -y bubblewrap"):
        probe(SMALL)
    for program in bubblewrap._NEEDED:
        (tmp_path / program).write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setattr(bubblewrap, "_identity", lambda: None)
    with pytest.raises(ConfigError, match=r"No permissions to create.*user\.max_user_namespaces.*monty"):
        probe(SMALL)
