"""Containers kept ready, the bounds on making them, the choice among engines, and images named by content."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest

from envs.sandbox import DockerConfig, docker_hosts, docker_pool, probe
from envs.sandbox.docker import DockerPlace
from envs.sandbox.docker_engine import RUN
from envs.sandbox.docker_hosts import least_loaded
from envs.sandbox.docker_images import build_image, image_tag
from envs.sandbox.docker_pool import close_pools, open_docker, pool_of
from envs.sandbox.shell import ShellSandbox
from posttrain.errors import ConfigError, SandboxError

pytestmark = pytest.mark.docker

SMALL = DockerConfig(memory_mb=128, pids=48, timeout_s=30)
ENGINE = "/var/run/docker.sock"


@pytest.fixture(autouse=True, scope="module")
def engine():
    try:
        probe(DockerConfig())
    except ConfigError as error:
        pytest.skip(str(error))
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture(autouse=True)
def no_pools() -> Iterator[None]:
    yield
    close_pools()


def ids(engine: docker.DockerClient, run: str) -> set[str]:
    labelled: dict[str, str | list[str] | bool] = {"label": f"{RUN}={run}"}
    return {str(container.id) for container in engine.containers.list(all=True, filters=labelled, ignore_removed=True)}


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


def test_ready_containers_are_used_once_and_replaced(engine: docker.DockerClient) -> None:
    config = SMALL.model_copy(update={"pool": 2})

    async def use() -> tuple[str, float]:
        started = time.monotonic()
        box = await open_docker(config, "pool-once")
        took = time.monotonic() - started
        seen = await box.exec("cat mark; echo used >mark")
        assert (seen.stdout, seen.exit_code) == ("", 0)
        await box.close()
        return container_id(box), took

    pool = pool_of(config, "pool-once")
    used: list[str] = []
    times: list[float] = []
    for _ in range(3):
        assert pool.ready(2, 30)
        ready = ids(engine, "pool-once")
        container, took = asyncio.run(use())
        assert container in ready
        assert container not in used
        used.append(container)
        times.append(took)
    # A cold start takes about half a second. The fastest: beside each the next one is started, on the same processors.
    assert min(times) < 0.2
    close_pools()
    assert ids(engine, "pool-once") == set()


def test_a_ready_container_that_died_is_not_handed_out(engine: docker.DockerClient) -> None:
    config = SMALL.model_copy(update={"pool": 1})
    assert pool_of(config, "pool-dead").ready(1, 30)
    (dead,) = ids(engine, "pool-dead")
    engine.containers.get(dead).kill()

    async def main() -> tuple[str, str]:
        box = await open_docker(config, "pool-dead")
        try:
            return container_id(box), (await box.exec("echo on")).stdout
        finally:
            await box.close()

    container, said = asyncio.run(main())
    assert (container != dead, said) == (True, "on\n")


def test_pool_of_another_config_or_run_is_another() -> None:
    config = SMALL.model_copy(update={"pool": 1})
    assert pool_of(config, "a") is pool_of(SMALL.model_copy(update={"pool": 1}), "a")
    assert pool_of(config, "a") is not pool_of(config, "b")
    assert pool_of(config, "a") is not pool_of(config.model_copy(update={"memory_mb": 256}), "a")


def test_pool_ends_with_its_process(engine: docker.DockerClient) -> None:
    program = """
from envs.sandbox import DockerConfig
from envs.sandbox.docker_pool import pool_of
assert pool_of(DockerConfig(memory_mb=128, pool=2), "pool-exit").ready(2, 60)
print("ready")
"""
    owner = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    assert (owner.returncode, owner.stdout, owner.stderr) == (0, "ready\n", "")
    assert ids(engine, "pool-exit") == set()


def test_a_container_that_was_not_started_ends_with_its_owner(engine: docker.DockerClient) -> None:
    # A killed owner's moment between making and starting, held open.
    program = """
import time
import docker
from envs.sandbox import DockerConfig
from envs.sandbox.docker_engine import container_options
from envs.sandbox.docker_reaper import watch
watch(None)
options = container_options(DockerConfig(memory_mb=128), run="pool-made", capped_layer=False, network="none")
docker.from_env().containers.create("posttrain-base", **options)
print("made", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "made\n"
        assert len(ids(engine, "pool-made")) == 1
        owner.kill()
    assert eventually(lambda: not ids(engine, "pool-made"), 30)


def test_slow_engine_is_a_named_error_within_the_bound(
    engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine here makes nothing before all have their answers: none of them waits for it."""
    config = SMALL.model_copy(update={"start_timeout_s": 1.0})
    make, answered, made = docker_pool.make, threading.Event(), list[ShellSandbox]()

    def make_late(config: DockerConfig, run: str) -> ShellSandbox:
        assert answered.wait(60)
        made.append(make(config, run))
        return made[-1]

    async def main() -> list[object]:
        opened = await asyncio.gather(*(open_docker(config, "too-slow") for _ in range(20)), return_exceptions=True)
        return list(opened)

    monkeypatch.setattr(docker_pool, "make", make_late)
    try:
        answers = asyncio.run(main())
    finally:
        answered.set()
    assert [type(answer) for answer in answers] == [SandboxError] * 20
    assert all("no container within 1 s (start_timeout_s)" in str(answer) for answer in answers)
    # The eight that were on their way are removed when they arrive, which is when all may be made again.
    for _ in range(docker_pool._MAKERS):
        assert docker_pool._STARTS.acquire(timeout=60)
    for _ in range(docker_pool._MAKERS):
        docker_pool._STARTS.release()
    assert 1 <= len(made) <= docker_pool._MAKERS
    assert eventually(lambda: not ids(engine, "too-slow"), 30)


@contextlib.contextmanager
def second_name(path: Path) -> Iterator[str]:
    """The same engine behind another socket: what is sent to it arrives there."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = server.accept()[0], socket.socket(socket.AF_UNIX)
                far.connect(ENGINE)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"unix://{path}"
    finally:
        server.close()


def test_a_silent_engine_is_passed_over(tmp_path: Path) -> None:
    with second_name(tmp_path / "docker.sock") as other:
        config = SMALL.model_copy(update={"hosts": ("unix:///nonexistent/docker.sock", other)})
        probe(config)

        async def main() -> str:
            box = await open_docker(config, "hosts")
            try:
                return (await box.exec("echo on", stdin="x" * 100_000)).stdout
            finally:
                await box.close()

        assert asyncio.run(main()) == "on\n"


def test_no_engine_answers() -> None:
    config = SMALL.model_copy(update={"hosts": ("unix:///nonexistent/a.sock", "unix:///nonexistent/b.sock")})
    with pytest.raises(ConfigError, match=r"start-docker\.sh"):
        probe(config)
    with pytest.raises(SandboxError, match=r"no engine of sandbox\.hosts answers: .*a\.sock.*b\.sock"):
        asyncio.run(open_docker(config))


def test_engines_are_used_in_turn_when_equally_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one engine is asked under both names, one after the other; what others start on it meanwhile is no load here.
    ask = docker_hosts._ask
    monkeypatch.setattr(docker_hosts, "_ask", lambda hosts: [(0.0, *rest) for _, *rest in ask(hosts)])
    with second_name(tmp_path / "docker.sock") as other, contextlib.ExitStack() as stack:
        hosts = (f"unix://{ENGINE}", other)
        # The containers that are being started count, though the engine, here the same for both, knows none of them.
        picked = [stack.enter_context(least_loaded(hosts)) for _ in range(4)]
        for client, _ in picked:
            stack.callback(client.close)
        assert sorted(host or "" for _, host in picked) == sorted(hosts * 2)


def test_image_of_a_folder_is_built_once_and_named_by_its_content(engine: docker.DockerClient, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM posttrain-base\nCOPY . /opt/task\n")
    (tmp_path / "data").write_text("first")
    tag = build_image(tmp_path)
    try:
        made = engine.images.get(tag).attrs["Created"]
        assert build_image(tmp_path) == tag == image_tag(tmp_path)
        assert engine.images.get(tag).attrs["Created"] == made

        async def main() -> str:
            box = await open_docker(SMALL.model_copy(update={"image": tag}))
            try:
                return (await box.exec("cat /opt/task/data")).stdout
            finally:
                await box.close()

        assert asyncio.run(main()) == "first"
        (tmp_path / "data").write_text("other")
        changed = image_tag(tmp_path)
        (tmp_path / "data").chmod(0o755)
        assert len({tag, changed, image_tag(tmp_path)}) == 3
    finally:
        engine.images.remove(tag)


def test_image_errors_name_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Dockerfile in it"):
        build_image(tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM posttrain-base\nRUN echo told && exit 3\n")
    with pytest.raises(ConfigError, match=r"(?s)does not build: .*told"):
        build_image(tmp_path)
