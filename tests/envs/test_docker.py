"""What the container promises beyond the contract: limits hold, nothing outlives a call, nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import docker
import pytest
from docker.errors import NotFound

from envs.sandbox import DockerConfig, docker_engine, docker_pool, probe
from envs.sandbox.docker import DockerPlace
from envs.sandbox.docker_engine import OWNER, PID, RUN, reap
from envs.sandbox.docker_pool import open_docker
from envs.sandbox.shell import ShellSandbox
from posttrain.errors import ConfigError, SandboxError

pytestmark = pytest.mark.docker


@pytest.fixture(autouse=True, scope="module")
def engine():
    try:
        probe(DockerConfig())
    except ConfigError as error:
        pytest.skip(str(error))
    client = docker.from_env()
    yield client
    client.close()


SMALL = DockerConfig(memory_mb=128, pids=48, timeout_s=30)

KILL, NET_RAW, MKNOD = 1 << 5, 1 << 13, 1 << 27
"""Bits of a set of capabilities."""

T = TypeVar("T")


def run(body: Callable[[ShellSandbox], Awaitable[T]], **changes: object) -> T:
    async def main() -> T:
        box = await open_docker(SMALL.model_copy(update=changes), run="test")
        try:
            return await body(box)
        finally:
            await box.close()

    return asyncio.run(main())


def container_id(box: ShellSandbox) -> str:
    assert isinstance(box.place, DockerPlace)
    return box.place.id


def eventually(holds: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def privileges(status: str) -> dict[str, int]:
    """Of /proc/PID/status, the fields that are hexadecimal or small numbers."""
    return {key: int(value, 16) for key, value in (line.split(":\t") for line in status.splitlines())}


PRIVILEGES = "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status"


def test_identity_and_privileges() -> None:
    async def body(box: ShellSandbox):
        return box.profile, (await box.exec("id -u; pwd")).stdout, (await box.exec(PRIVILEGES)).stdout

    profile, who, status = run(body)
    assert profile == "docker strict, runtime default"
    assert who == "1000\n/work\n"
    assert privileges(status) == {"CapBnd": KILL, "CapEff": 0, "NoNewPrivs": 1, "Seccomp": 2}


def test_engine_records_every_limit(engine: docker.DockerClient) -> None:
    async def body(box: ShellSandbox):
        return engine.containers.get(container_id(box)).attrs

    attrs = run(body)
    host, mb = attrs["HostConfig"], 1024 * 1024
    assert (host["Memory"], host["MemorySwap"], host["PidsLimit"]) == (128 * mb, 128 * mb, 48)
    assert (host["NanoCpus"], host["NetworkMode"], host["ReadonlyRootfs"]) == (10**9, "none", True)
    assert (host["CapDrop"], host["CapAdd"]) == (["ALL"], ["KILL"])
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (host["AutoRemove"], host["LogConfig"]["Type"]) == (True, "none")
    assert not host["Privileged"]
    assert attrs["Mounts"] == []
    # Its stdin is the owner's connection, closed for ever when that ends.
    assert (attrs["Config"]["OpenStdin"], attrs["Config"]["StdinOnce"]) == (True, True)
    assert attrs["Config"]["Labels"][RUN] == "test"


def test_dead_container_raises_from_every_method(engine: docker.DockerClient) -> None:
    async def body(box: ShellSandbox) -> Sequence[object]:
        running = asyncio.create_task(box.exec("echo text; sleep 20"))
        await asyncio.sleep(1.0)
        engine.containers.get(container_id(box)).kill()
        calls = running, box.exec("echo text"), box.read("x"), box.write("x", b"")
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(answer) for answer in run(body)] == [SandboxError] * 4


def test_close_removes_the_container_even_under_a_running_call(engine: docker.DockerClient) -> None:
    async def main() -> tuple[str, object, float]:
        box = await open_docker(SMALL)
        running = asyncio.create_task(box.exec("sleep 30", timeout_s=30))
        await asyncio.sleep(0.7)
        started = time.monotonic()
        await box.close()
        (answer,) = await asyncio.gather(running, return_exceptions=True)
        return container_id(box), answer, time.monotonic() - started

    container, answer, took = asyncio.run(main())
    assert isinstance(answer, SandboxError)
    assert took < 20  # the call alone would go on for 30
    assert container not in [c.id for c in engine.containers.list(all=True, ignore_removed=True)]


def test_cancelled_close_still_removes(engine: docker.DockerClient) -> None:
    async def main() -> str:
        box = await open_docker(SMALL)
        closing = asyncio.create_task(box.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await box.close()
        return container_id(box)

    container = asyncio.run(main())
    assert container not in [c.id for c in engine.containers.list(all=True, ignore_removed=True)]


def test_cancelled_open_leaves_nothing(engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while its container is on the way, which then comes."""
    asked, cancelled = threading.Event(), threading.Event()
    make, made = docker_pool.make, list[str]()

    def make_late(config: DockerConfig, run: str) -> ShellSandbox:
        asked.set()
        assert cancelled.wait(60)
        box = make(config, run)
        made.append(container_id(box))
        return box

    async def main() -> None:
        opening = asyncio.create_task(open_docker(SMALL, run="cancelled-open"))
        assert await asyncio.to_thread(asked.wait, 60)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    monkeypatch.setattr(docker_pool, "make", make_late)
    try:
        asyncio.run(main())
    finally:
        cancelled.set()
    # All may be made again when none is on its way any more.
    for _ in range(docker_pool._MAKERS):
        assert docker_pool._STARTS.acquire(timeout=60)
    for _ in range(docker_pool._MAKERS):
        docker_pool._STARTS.release()
    assert len(made) == 1
    mine: dict[str, str | list[str] | bool] = {"label": f"{RUN}=cancelled-open"}
    assert eventually(lambda: not engine.containers.list(all=True, filters=mine, ignore_removed=True), 30)


def test_nothing_outlives_a_killed_owner(engine: docker.DockerClient) -> None:
    program = """
import asyncio
from envs.sandbox import DockerConfig, open_sandbox

async def main():
    config = DockerConfig(memory_mb=128, pool=1)
    boxes = [await open_sandbox(config, run="killed-owner") for _ in range(2)]
    busy = asyncio.create_task(boxes[0].exec("sleep 100 & sleep 100", timeout_s=100))
    await asyncio.sleep(1)
    print("ready", flush=True)
    await busy

asyncio.run(main())
"""
    mine: dict[str, str | list[str] | bool] = {"label": f"{RUN}=killed-owner"}
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        assert owner.stdout.readline() == "ready\n"
        assert len(engine.containers.list(filters=mine, ignore_removed=True)) >= 2
        owner.kill()
        owner.wait()
    assert eventually(lambda: not engine.containers.list(filters=mine, ignore_removed=True), 30)

    def gone() -> bool:
        # What the engine had been asked for may come only now; what has ended is not yet removed.
        reap()
        return not engine.containers.list(all=True, filters=mine, ignore_removed=True)

    assert eventually(gone, 30)


def test_reaper_takes_only_what_lost_its_owner(engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    # By a name of its own: reapers that other tests' killed owners have left behind do not look for it.
    machine = f"{docker_engine._owner()} {os.getpid()}"
    monkeypatch.setattr(docker_engine, "_owner", lambda: machine)
    finished = subprocess.Popen(["true"])
    finished.wait()

    def there() -> list[str | None]:
        return [c.id for c in engine.containers.list(all=True, ignore_removed=True)]

    async def body(box: ShellSandbox) -> tuple[int, str, bool, bool]:
        labels = {**engine.containers.get(container_id(box)).labels, PID: str(finished.pid)}

        def leave(labels: dict[str, str]):
            # Made and not started: what a reaper is for.
            return engine.containers.create("posttrain-base", ["sleep", "60"], network_mode="none", labels=labels)

        orphan, foreign = leave(labels), leave({**labels, OWNER: "another machine"})
        try:
            removed, left = reap(), there()
            return removed, (await box.exec("echo alive")).stdout.strip(), orphan.id in left, foreign.id in left
        finally:
            for container in (orphan, foreign):
                with contextlib.suppress(NotFound):
                    container.remove(force=True)

    assert run(body) == (1, "alive", False, True)


def test_missing_image_names_the_cure() -> None:
    with pytest.raises(ConfigError, match=r"docker-base\.sh"):
        asyncio.run(open_docker(DockerConfig(image="no-such-image-here")))


def test_build_profile_may_install_and_has_no_network() -> None:
    async def body(box: ShellSandbox):
        changed = await box.exec("id -u; echo 'echo made' >/usr/bin/made; chmod +x /usr/bin/made; made")
        links = await box.exec("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '")
        node = await box.exec("mknod /tmp/node c 1 3")
        return box.profile, changed.stdout, links.stdout, node.exit_code, (await box.exec(PRIVILEGES)).stdout

    profile, changed, links, node, status = run(body, profile="build")
    assert profile.startswith("docker build, runtime default, root with")
    assert (changed, links, node) == ("0\nmade\n", "lo\n", 1)
    held = privileges(status)
    assert (held["CapEff"] & NET_RAW, held["CapEff"] & MKNOD, held["CapEff"] & KILL) == (0, 0, KILL)
    assert (held["NoNewPrivs"], held["Seccomp"]) == (1, 2)


def test_compat_profile_is_what_docker_does_without_a_network() -> None:
    async def body(box: ShellSandbox):
        return box.profile, (await box.exec(PRIVILEGES)).stdout, (await box.exec("cat /proc/net/dev")).stdout

    profile, status, links = run(body, profile="compat")
    assert profile.startswith("docker compat, ")
    held = privileges(status)
    assert held["CapEff"] & (NET_RAW | MKNOD) == NET_RAW | MKNOD
    assert (held["NoNewPrivs"], held["Seccomp"], links.count("eth")) == (0, 2, 0)


def test_writable_layer_has_a_size() -> None:
    async def body(box: ShellSandbox) -> str:
        few = await box.exec("head -c 30000000 /dev/zero >/var/few; stat -c %s /var/few")
        assert few.stdout == "30000000\n"
        fill = "for i in 1 2 3; do head -c 40000000 /dev/zero >/var/$i || exit 1; done"
        if "capped" in box.profile:
            return f"filled {(await box.exec(fill)).exit_code}"
        with pytest.raises(SandboxError, match="disk_mb"):
            await box.exec(fill)
        with pytest.raises(SandboxError, match="is dead"):
            await box.exec("echo on")
        return "filled 1"

    assert run(body, profile="build", disk_mb=64) == "filled 1"


def test_unknown_runtime_names_the_cure(engine: docker.DockerClient) -> None:
    assert "no-such-runtime" not in engine.info()["Runtimes"]
    for refused in (probe, lambda config: asyncio.run(open_docker(config))):
        with pytest.raises(ConfigError, match=r"no runtime 'no-such-runtime', only .*runc.*daemon\.json"):
            refused(DockerConfig(runtime="no-such-runtime"))
    assert run(lambda box: box.exec("echo on"), runtime="runc").stdout == "on\n"
