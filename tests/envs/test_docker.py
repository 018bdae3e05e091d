"""What the container promises beyond the contract: limits hold, nothing outlives a call, nothing is left behind."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import docker
import pytest

from envs.sandbox.docker import DockerSandbox, open_docker, probe_docker
from envs.sandbox.docker_engine import OWNER, PID, RUN, reap
from posttrain.errors import ConfigError, SandboxError

pytestmark = pytest.mark.docker

PROCESSES = "ps -eo user,comm --no-headers >list; sort list"
"""Lists the container's processes, itself among them. No pipe: its other end would show before or after its start."""


@pytest.fixture(autouse=True, scope="module")
def engine():
    try:
        probe_docker(image="posttrain-base")
    except ConfigError as error:
        pytest.skip(str(error))
    client = docker.from_env()
    yield client
    client.close()


T = TypeVar("T")


def run(body: Callable[[DockerSandbox], Awaitable[T]]) -> T:
    async def main() -> T:
        box = await open_docker(memory_mb=128, cpus=1.0, pids=48, timeout_s=30, run="test")
        try:
            return await body(box)
        finally:
            await box.close()

    return asyncio.run(main())


def test_identity_and_privileges() -> None:
    result = run(lambda box: box.exec("id -u; pwd; grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status"))
    values = result.stdout.split()
    assert values[:2] == ["1000", "/work"]
    assert dict(zip(values[2::2], values[3::2], strict=True)) == {
        "CapBnd:": "0000000000000000",
        "CapEff:": "0000000000000000",
        "NoNewPrivs:": "1",
        "Seccomp:": "2",
    }


def test_root_is_read_only_and_work_is_not() -> None:
    result = run(lambda box: box.exec("touch /etc/x; touch /usr/x; touch /x; echo 'echo ran' > s; chmod +x s; ./s"))
    assert result.stderr.count("Read-only file system") == 3
    assert result.stdout == "ran\n"


def test_only_the_loopback_interface() -> None:
    result = run(lambda box: box.exec("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '"))
    assert result.stdout == "lo\n"


def test_engine_records_every_limit(engine: docker.DockerClient) -> None:
    async def body(box: DockerSandbox):
        return engine.containers.get(box.id).attrs

    attrs = run(body)
    host, mb = attrs["HostConfig"], 1024 * 1024
    assert (host["Memory"], host["MemorySwap"], host["PidsLimit"]) == (128 * mb, 128 * mb, 48)
    assert (host["NanoCpus"], host["NetworkMode"], host["ReadonlyRootfs"]) == (10**9, "none", True)
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges:true"])
    assert (host["AutoRemove"], host["Init"], host["LogConfig"]["Type"]) == (True, True, "none")
    assert not host["Privileged"]
    assert attrs["Mounts"] == []
    assert attrs["Config"]["Cmd"] == ["sleep", "7200"]
    assert attrs["Config"]["Labels"][RUN] == "test"


def test_fork_bomb_is_held_and_cleared() -> None:
    async def body(box: DockerSandbox):
        before = await box.exec(PROCESSES)
        started = time.monotonic()
        bomb = await box.exec("f() { f | f & }; f; sleep 20", timeout_s=2)
        took = time.monotonic() - started
        return before, bomb, took, await box.exec(PROCESSES)

    before, bomb, took, after = run(body)
    assert bomb.exit_code != 0
    assert took < 8
    assert after.stdout == before.stdout


def test_memory_bomb_is_killed_and_named() -> None:
    async def body(box: DockerSandbox):
        bomb = await box.exec("python3 -c 'x = bytearray(1 << 30); print(len(x))'")
        return bomb, await box.exec("echo alive")

    bomb, after = run(body)
    assert (bomb.exit_code, bomb.stdout, bomb.timed_out) == (137, "", False)
    assert bomb.stderr.endswith("killed: out of memory\n")
    assert after.stdout == "alive\n"


def test_full_disk_is_an_error_of_the_command_and_of_write() -> None:
    async def body(box: DockerSandbox):
        full = await box.exec("head -c 100000000 /dev/zero > big; stat -c %s big")
        await box.exec("rm big")
        with pytest.raises(OSError, match="bytes fitted"):
            await box.write("big", bytes(40_000_000))
        return full

    # A quarter of the memory is the work folder.
    assert run(body).stdout == f"{32 * 1024 * 1024}\n"


@pytest.mark.parametrize(
    "command",
    [
        "sleep 300 & echo started",
        "setsid sh -c 'sleep 300; sleep 300' & echo started",
        "nohup sh -c 'trap \"\" TERM INT HUP; while :; do sleep 1; done' >/dev/null 2>&1 & echo started",
        "(setsid setsid sleep 300 &) ; echo started",
    ],
)
def test_background_child_neither_delays_nor_outlives_its_call(command: str) -> None:
    async def body(box: DockerSandbox):
        before = await box.exec(PROCESSES)
        started = time.monotonic()
        first = await box.exec(command)
        took = time.monotonic() - started
        return before, first, took, await box.exec(PROCESSES)

    before, first, took, after = run(body)
    assert (first.exit_code, first.stdout) == (0, "started\n")
    assert took < 3
    assert after.stdout == before.stdout


def test_command_that_kills_its_supervisor_still_leaves_nothing() -> None:
    async def body(box: DockerSandbox):
        before = await box.exec(PROCESSES)
        first = await box.exec("setsid sh -c 'kill -9 -1; exec sleep 300' & wait; echo no", timeout_s=2)
        return before, first, await box.exec(PROCESSES)

    before, first, after = run(body)
    assert first.exit_code in (124, 137)
    assert first.stdout == ""
    assert after.stdout == before.stdout


def test_endless_output_is_stopped_early() -> None:
    async def body(box: DockerSandbox):
        started = time.monotonic()
        result = await box.exec("yes", timeout_s=25)
        return result, time.monotonic() - started, await box.exec("echo alive")

    result, took, after = run(body)
    assert (result.exit_code, result.truncated, result.timed_out) == (137, True, False)
    assert result.stdout == "y\n" * (32 * 1024)
    assert took < 20
    assert after.stdout == "alive\n"


def test_stderr_beyond_the_cap_does_not_hide_the_report() -> None:
    result = run(lambda box: box.exec("yes e | head -n 32767 >&2; exit 5"))
    assert (result.exit_code, result.truncated, len(result.stderr)) == (5, False, 65534)
    result = run(lambda box: box.exec("yes e | head -n 100000 >&2; exit 5"))
    assert (result.exit_code, result.truncated, len(result.stderr)) == (5, True, 65536)


def test_large_stdin_with_large_output_does_not_block() -> None:
    text = "0123456789abcdef\n" * 60_000

    async def body(box: DockerSandbox):
        return await box.exec("tee copy | wc -c; wc -c < copy", stdin=text), await box.exec("true", stdin=text)

    copied, ignored = run(body)
    assert copied.stdout.split() == [str(len(text))] * 2
    assert (ignored.exit_code, ignored.stdout, ignored.stderr) == (0, "", "")


def test_early_output_is_never_lost() -> None:
    async def body(box: DockerSandbox) -> list[str]:
        return [(await box.exec(f"echo {i}")).stdout for i in range(30)]

    assert run(body) == [f"{i}\n" for i in range(30)]


def test_symlinks_do_not_lead_out() -> None:
    async def body(box: DockerSandbox) -> list[str]:
        await box.exec("ln -s /etc/passwd file; ln -s /tmp folder; ln -s / root; ln -s real inner; echo in > real")
        refused = []
        for path in ("file", "folder/x", "root/etc/passwd", "folder/new/x"):
            for name, call in (("read", box.read), ("write", lambda p: box.write(p, b"x"))):
                try:
                    await call(path)
                except PermissionError:
                    refused.append(f"{name} {path}")
        refused.append((await box.read("inner")).decode())
        refused.append((await box.exec("ls /tmp")).stdout)
        return refused

    paths = ("file", "folder/x", "root/etc/passwd", "folder/new/x")
    assert run(body) == [f"{name} {path}" for path in paths for name in ("read", "write")] + ["in\n", ""]


def test_odd_names_are_only_names() -> None:
    async def body(box: DockerSandbox) -> list[bytes]:
        names = ["-n", "a b", "$(touch pwned)", "quo'te\"", "é", "*"]
        for name in names:
            await box.write(name, name.encode())
        listed = await box.exec("ls -1")
        return [*[await box.read(name) for name in names], str(len(listed.stdout.splitlines())).encode()]

    names = ["-n", "a b", "$(touch pwned)", "quo'te\"", "é", "*"]
    assert run(body) == [*[name.encode() for name in names], b"6"]


def test_newline_at_the_end_of_a_name_counts() -> None:
    async def body(box: DockerSandbox) -> tuple[bytes, bytes]:
        await box.write("line", b"without")
        await box.write("line\n", b"with")
        return await box.read("line"), await box.read("line\n")

    assert run(body) == (b"without", b"with")


def test_fifo_is_not_a_file_and_does_not_block() -> None:
    async def body(box: DockerSandbox) -> float:
        await box.exec("mkfifo pipe")
        started = time.monotonic()
        with pytest.raises(FileNotFoundError):
            await box.read("pipe")
        return time.monotonic() - started

    assert run(body) < 3


def test_impossible_commands_are_answered_like_a_shell() -> None:
    async def body(box: DockerSandbox):
        return await box.exec("echo " + "x" * 200_000), await box.exec("echo a\0b"), await box.exec("nosuchprogram")

    assert [r.exit_code for r in run(body)] == [126, 126, 127]


def test_dead_container_raises_from_every_method(engine: docker.DockerClient) -> None:
    async def body(box: DockerSandbox) -> Sequence[object]:
        running = asyncio.create_task(box.exec("echo text; sleep 20"))
        await asyncio.sleep(1.0)
        engine.containers.get(box.id).kill()
        calls = running, box.exec("echo text"), box.read("x"), box.write("x", b"")
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(answer) for answer in run(body)] == [SandboxError] * 4


def test_close_removes_the_container_even_under_a_running_call(engine: docker.DockerClient) -> None:
    async def main() -> tuple[str, object, float]:
        box = await open_docker(memory_mb=128)
        running = asyncio.create_task(box.exec("sleep 30", timeout_s=30))
        await asyncio.sleep(0.7)
        started = time.monotonic()
        await box.close()
        (answer,) = await asyncio.gather(running, return_exceptions=True)
        return box.id, answer, time.monotonic() - started

    container, answer, took = asyncio.run(main())
    assert isinstance(answer, SandboxError)
    assert took < 5
    assert container not in [c.id for c in engine.containers.list(all=True)]


def test_cancelled_close_still_removes(engine: docker.DockerClient) -> None:
    async def main() -> str:
        box = await open_docker(memory_mb=128)
        closing = asyncio.create_task(box.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await box.close()
        return box.id

    container = asyncio.run(main())
    assert container not in [c.id for c in engine.containers.list(all=True)]


def test_cancelled_open_leaves_nothing(engine: docker.DockerClient) -> None:
    async def main() -> None:
        opening = asyncio.create_task(open_docker(memory_mb=128, run="cancelled-open"))
        await asyncio.sleep(0.05)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    asyncio.run(main())
    time.sleep(3)
    assert engine.containers.list(all=True, filters={"label": f"{RUN}=cancelled-open"}) == []


def test_container_ends_by_itself(engine: docker.DockerClient) -> None:
    async def main() -> str:
        return (await open_docker(memory_mb=128, ttl_s=1)).id

    container = asyncio.run(main())
    deadline = time.monotonic() + 10
    while container in [c.id for c in engine.containers.list(all=True)] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert container not in [c.id for c in engine.containers.list(all=True)]


def test_reaper_takes_only_what_lost_its_owner(engine: docker.DockerClient) -> None:
    finished = subprocess.Popen(["true"])
    finished.wait()

    async def body(box: DockerSandbox) -> tuple[int, list[str]]:
        labels = engine.containers.get(box.id).labels
        orphan = engine.containers.run(
            "posttrain-base", ["sleep", "60"], detach=True, labels={**labels, PID: str(finished.pid)}
        )
        foreign = engine.containers.run(
            "posttrain-base",
            ["sleep", "60"],
            detach=True,
            labels={**labels, PID: str(finished.pid), OWNER: "another machine"},
        )
        try:
            removed = reap()
            left = [c.id for c in engine.containers.list(all=True)]
            alive = (await box.exec("echo alive")).stdout.strip()
            return removed, [alive, str(orphan.id in left), str(foreign.id in left)]
        finally:
            foreign.remove(force=True)

    reap()
    assert run(body) == (1, ["alive", "False", "True"])


def test_missing_image_names_the_cure() -> None:
    with pytest.raises(ConfigError, match=r"docker-base\.sh"):
        asyncio.run(open_docker(image="no-such-image-here"))
