"""A sandbox that may reach some hosts reaches those and nothing else."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import docker
import pytest
from pydantic import ValidationError

from envs.sandbox import DockerConfig, NetworkConfig, probe
from envs.sandbox.docker import DockerPlace
from envs.sandbox.docker_engine import RUN
from envs.sandbox.docker_gate import patterns
from envs.sandbox.docker_pool import open_docker
from envs.sandbox.shell import ShellSandbox
from posttrain.errors import ConfigError, SandboxError

T = TypeVar("T")
RUN_NAME = "gate-test"

CASES = [
    ("pypi.org", ["pypi.org:443", "http://pypi.org/simple/", "http://pypi.org:80/", "http://PyPI.org"]),
    ("*.pypi.org", ["files.pypi.org:443", "http://a.b.pypi.org/x"]),
    ("10.0.0.7:8080", ["10.0.0.7:8080", "http://10.0.0.7:8080/x?y=http://z/"]),
]
REFUSED = [
    ("pypi.org", ["pypi.org:22", "http://pypi.org:22/", "xpypi.org:443", "pypi.org.evil.net:443", "pypixorg:443"]),
    ("pypi.org", ["http://pypi.org@evil.net/", "http://user@pypi.org@evil.net/", "ftp://pypi.org/", "evil.net:443"]),
    ("pypi.org", ["http://evil.net/http://pypi.org/", "http://evil.net/?pypi.org:443", "/", "pypi.org:443:22"]),
    ("*.pypi.org", ["pypi.org:443", "evilpypi.org:443", ".pypi.org:443", "http://evil.net/.pypi.org/"]),
    (
        "10.0.0.7:8080",
        ["10.0.0.7:443", "http://10.0.0.7/", "http://10.0.0.7:80/", "10.0.0.78080:443", "1010.0.0.7:8080"],
    ),
]


def passes(entry: str, url: str) -> bool:
    """As tinyproxy reads a filter: any expression, anywhere, letters of either case."""
    return any(re.search(p, url, re.IGNORECASE) for p in patterns(NetworkConfig(allow=(entry,))))


@pytest.mark.parametrize(("entry", "urls"), CASES)
def test_what_is_allowed_passes(entry: str, urls: list[str]) -> None:
    assert [u for u in urls if not passes(entry, u)] == []


@pytest.mark.parametrize(("entry", "urls"), REFUSED)
def test_what_looks_like_it_does_not(entry: str, urls: list[str]) -> None:
    assert [u for u in urls if passes(entry, u)] == []


@pytest.mark.parametrize(
    "entry", ["http://pypi.org", "pypi.org/simple", "*", "*.", "a b", "10.0.0.0/8", "a:b", ".*", ""]
)
def test_entries_that_are_no_hosts_are_refused(entry: str) -> None:
    with pytest.raises(ValidationError):
        NetworkConfig(allow=(entry,))


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    """Addresses of two web servers on the engine's bridge; the network is refused if the image has no proxy."""
    try:
        probe(DockerConfig(network=NetworkConfig(allow=("a.b",))))
    except ConfigError as error:
        pytest.skip(str(error))
    client = docker.from_env()
    started = []
    try:
        for name in ("allowed", "forbidden"):
            serve = f"mkdir /s && cd /s && echo {name} >page && python3 -m http.server 8000"
            box = client.containers.run("posttrain-base", ["sh", "-c", serve], detach=True, auto_remove=True)
            started.append(box)
        found = []
        for box in started:
            for _ in range(100):
                box.reload()
                log = box.exec_run(["sh", "-c", "grep -q ':1F40 00000000:0000 0A' /proc/net/tcp"])
                if log.exit_code == 0:
                    break
                time.sleep(0.1)
            found.append(box.attrs["NetworkSettings"]["IPAddress"])
        yield found[0], found[1]
    finally:
        for box in started:
            box.remove(force=True)
        client.close()


def run(allowed: str, body: Callable[[ShellSandbox], Awaitable[T]]) -> T:
    async def main() -> T:
        config = DockerConfig(memory_mb=128, pids=48, network=NetworkConfig(allow=(allowed,)))
        box = await open_docker(config, run=RUN_NAME)
        try:
            return await body(box)
        finally:
            await box.close()

    return asyncio.run(main())


DIRECT = "unset http_proxy HTTP_PROXY; "


def fetch(url: str) -> str:
    """Prints the page, or what the proxy said."""
    source = (
        "import urllib.request, urllib.error\n"
        "try: print(urllib.request.urlopen('%s', timeout=10).read().decode().strip())\n"
        "except urllib.error.HTTPError as error: print('refused', error.code)\n"
        "except OSError as error: print('no way', error)\n"
    )
    return f"python3 - <<'END'\n{source % url}END\n"


@pytest.mark.docker
def test_the_allowed_server_and_no_other(servers: tuple[str, str]) -> None:
    """Through the proxy by http and by CONNECT; nothing at all past it: no bridge, no resolver, no other sandbox."""
    good, bad = servers
    tunnel = (
        "import socket\n"
        f"for target in ('{good}:8000', '{bad}:8000', '127.0.0.1:8888', '169.254.169.254:80'):\n"
        "    s = socket.create_connection(('127.0.0.1', 3128))\n"
        f"    s.sendall(f'CONNECT {{target}} HTTP/1.1\\r\\nHost: {good}:8000\\r\\n\\r\\n'.encode())\n"
        "    print(s.recv(100).split()[1].decode())\n"
        "s = socket.create_connection(('127.0.0.1', 3128))\n"
        f"s.sendall(b'GET /page HTTP/1.1\\r\\nHost: {bad}:8000\\r\\n\\r\\n')\n"
        "print(s.recv(100).split()[1].decode())\n"
    )
    direct = f"import socket\nsocket.create_connection(('{good}', 8000), 3)"

    async def body(box: ShellSandbox) -> list[str]:
        assert f"network of {good}:8000" in box.profile
        commands = [
            fetch(f"http://{good}:8000/page"),
            fetch(f"http://{bad}:8000/page"),
            f"python3 - <<'END'\n{tunnel}END\n",
            f'python3 -c "{direct}" 2>&1 | tail -n 1',
            DIRECT + fetch("http://example.com/"),
            "ls /sys/class/net; cat /proc/net/route | wc -l",
        ]
        return [(await box.exec(c, timeout_s=30)).stdout for c in commands]

    page, refused, tunnels, past, name, interfaces = run(f"{good}:8000", body)
    assert page == "allowed\n"
    assert refused == "refused 403\n"
    assert tunnels.split() == ["200", "403", "403", "403", "403"]
    assert past == "OSError: [Errno 101] Network is unreachable\n"
    assert name.startswith("no way")
    assert interfaces.split() == ["lo", "1"]


@pytest.mark.docker
def test_sandboxes_of_one_gate_do_not_meet(servers: tuple[str, str]) -> None:
    """Each has a loopback of its own; what one listens on is not there for the other."""
    config = DockerConfig(memory_mb=128, pids=48, network=NetworkConfig(allow=(f"{servers[0]}:8000",)))
    ask = f"ask() {{\n{DIRECT}{fetch('http://127.0.0.1:9000/')}}}\n"
    serve = (
        "cd /tmp; python3 -m http.server 9000 >/dev/null 2>&1 &\n"
        "until ask | grep -q 'Directory listing'; do sleep 0.2; done\n"
        "echo listed >/tmp/listed; until [ -e /tmp/enough ]; do sleep 0.2; done; ask"
    )

    def root(client: docker.DockerClient, box: ShellSandbox, command: str) -> int | None:
        """Run beside the call that is under way."""
        assert isinstance(box.place, DockerPlace)
        return client.containers.get(box.place.id).exec_run(["sh", "-c", command], user="0:0").exit_code

    async def main() -> tuple[str, str]:
        client = docker.from_env()
        first, second = await open_docker(config, run=RUN_NAME), await open_docker(config, run=RUN_NAME)
        try:
            serving = asyncio.create_task(first.exec(ask + serve, timeout_s=100))
            # What the second asks, it asks between two answers that the first had of itself.
            while await asyncio.to_thread(root, client, first, "test -e /tmp/listed"):
                assert not serving.done(), serving.result()
                await asyncio.sleep(0.2)
            there = await second.exec(ask + "ask", timeout_s=30)
            assert await asyncio.to_thread(root, client, first, "touch /tmp/enough") == 0
            return (await serving).stdout, there.stdout
        finally:
            await first.close()
            await second.close()
            client.close()

    here, there = asyncio.run(main())
    assert "Directory listing" in here
    assert there.startswith("no way") and "refused" in there


@pytest.mark.docker
@pytest.mark.parametrize("part", ["gate", "lodge"])
def test_a_broken_way_out_is_an_error_and_not_text(servers: tuple[str, str], part: str) -> None:
    """A refused connection would teach the model that the host is down. The next sandbox gets a new gate."""

    async def body(box: ShellSandbox) -> str:
        assert isinstance(box.place, DockerPlace)
        client = docker.from_env()
        mode = "bridge" if part == "gate" else "none"
        for found in client.containers.list(filters={"label": f"{RUN}={RUN_NAME}"}, ignore_removed=True):
            if found.attrs["HostConfig"]["NetworkMode"] == mode:
                found.kill()
        client.close()
        with pytest.raises(SandboxError, match=f"the {part} of a sandbox with a network is"):
            await box.exec(fetch(f"http://{servers[0]}:8000/page"))
        return "raised"

    assert run(f"{servers[0]}:8000", body) == "raised"

    async def again(box: ShellSandbox) -> str:
        return (await box.exec(fetch(f"http://{servers[0]}:8000/page"))).stdout

    assert run(f"{servers[0]}:8000", again) == "allowed\n"


@pytest.mark.docker
def test_nothing_is_left(servers: tuple[str, str]) -> None:
    """Containers and the volume with the socket go with the process, however it ends."""
    program = (
        "import asyncio, os, signal\n"
        "from envs.sandbox import DockerConfig, NetworkConfig\n"
        "from envs.sandbox.docker_pool import open_docker\n"
        "async def main():\n"
        f"    config = DockerConfig(memory_mb=128, network=NetworkConfig(allow=('{servers[0]}:8000',)))\n"
        "    await open_docker(config, run='gate-killed')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    client = docker.from_env()
    before = {v.id for v in client.volumes.list()}
    left, volumes = [], before
    ended = subprocess.run([sys.executable, "-c", program], check=False)
    assert ended.returncode == -9
    for _ in range(100):
        left = client.containers.list(all=True, filters={"label": f"{RUN}=gate-killed"}, ignore_removed=True)
        volumes = {v.id for v in client.volumes.list()} - before
        if not left and not volumes:
            break
        time.sleep(0.2)
    client.close()
    assert (left, volumes) == ([], set())
