"""The way out of a container that may have one: two containers of ours between it and the allowed hosts.

The sandbox keeps a network with nothing but a loopback. It shares that with a *lodge*, which listens on it and passes
every connection through a socket file to the *gate*: a proxy (tinyproxy) with a network, which knows the allow-list and
refuses the rest. So no packet of a sandbox reaches a bridge, a resolver, this machine or another sandbox. One gate
serves all sandboxes of a process, an engine and a list; a lodge serves one. Both end with their owner's connection.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from docker import DockerClient
from docker.errors import DockerException, NotFound
from docker.models.containers import Container
from docker.types import LogConfig, Ulimit

from envs.sandbox.config import NetworkConfig
from envs.sandbox.docker_engine import BASE_IMAGE, labels
from posttrain.errors import SandboxError

PROXY = "http://127.0.0.1:3128"
"""Where a sandbox finds the way out."""
_READY_S = 30.0
"""For a gate or a lodge to listen."""
_MB = 1024 * 1024
_SOCKETS = "/gate"
"""The volume that a gate shares with its lodges, which holds one socket."""

# ``cat`` reads the owner's connection and ends with it. If a program ends, it takes all others with it, and the
# container: what does not work must not seem to.
_GATE = f"""
printf '%s\\n' "$settings" >/run/settings
printf '%s\\n' "$filter" >/run/filter
{{ tinyproxy -d -c /run/settings >/dev/null 2>&1; kill -9 -1; }} &
{{ socat UNIX-LISTEN:{_SOCKETS}/socket,fork,mode=666,max-children=256 TCP:127.0.0.1:8888; kill -9 -1; }} &
until [ -S {_SOCKETS}/socket ] && grep -q ':22B8 00000000:0000 0A' /proc/net/tcp; do sleep 0.02; done
echo ready
cat >/dev/null
"""
_LODGE = f"""
{{ socat TCP-LISTEN:3128,bind=127.0.0.1,fork,max-children=64 UNIX-CONNECT:{_SOCKETS}/socket; kill -9 -1; }} &
until grep -q ':0C38 00000000:0000 0A' /proc/net/tcp; do sleep 0.02; done
echo ready
cat >/dev/null
"""
_SETTINGS = """Port 8888
Listen 127.0.0.1
Timeout 600
MaxClients 256
DisableViaHeader Yes
LogLevel Critical
Filter "/run/filter"
FilterURLs On
FilterExtended On
FilterDefaultDeny Yes"""


def patterns(network: NetworkConfig) -> list[str]:
    """Regular expressions of the URLs that the gate passes: ``host:port`` of a CONNECT, ``http://host[:port]/...``."""
    found: list[str] = []
    for entry in network.allow:
        name, _, port = entry.partition(":")
        host = re.escape(name.removeprefix("*."))
        if name.startswith("*."):
            host = rf"([A-Za-z0-9_-]+\.)+{host}"
        found.append(rf"^{host}:{port or '443'}$")
        found.append(rf"^http://{host}{f':{port}' if port and port != '80' else '(:80)?'}(/.*)?$")
    return found


@dataclass(frozen=True, slots=True)
class _Keeper:
    """A started container of ours, and the connection that it lives by."""

    container: Container
    alive: Any

    def check(self, what: str) -> None:
        """Raise SandboxError unless it runs."""
        try:
            self.container.reload()
            status = self.container.status
        except NotFound:
            status = "gone"
        if status != "running":
            raise SandboxError(f"the {what} of a sandbox with a network is {status}")

    def end(self) -> None:
        """Closing the connection ends the container, and the engine removes it."""
        with contextlib.suppress(OSError, ValueError):
            self.alive._sock.shutdown(socket.SHUT_RDWR)
            self.alive._sock.close()


class Lodge:
    """The loopback that one sandbox shares, and the gate behind it."""

    def __init__(self, keeper: _Keeper, gate: _Keeper) -> None:
        self._keeper, self._gate = keeper, gate

    @property
    def network(self) -> str:
        """What the sandbox's container takes for its network."""
        return f"container:{self._keeper.container.id}"

    def check(self) -> None:
        """Raise SandboxError if the way out is broken: a command cannot tell that from a refusal."""
        self._keeper.check("lodge")
        self._gate.check("gate")

    def end(self) -> None:
        """Idempotent."""
        self._keeper.end()


_gates: dict[tuple[object, ...], _Keeper] = {}
_lock = threading.Lock()


def open_lodge(client: DockerClient, host: str | None, network: NetworkConfig, run: str) -> Lodge:
    """A fresh lodge, and its gate if there is none; blocks. Raises SandboxError, and what docker-py raises."""
    with _lock:
        key = (os.getpid(), host, network, run)
        gate = _gates.get(key)
        if gate is not None:
            with contextlib.suppress(SandboxError):
                gate.check("gate")
                return _lodge(client, gate, run)
        filters = {"settings": _SETTINGS, "filter": "\n".join(patterns(network))}
        gate = _gates[key] = _start(
            client,
            _GATE,
            run,
            environment=filters,
            network_mode="bridge",
            volumes=[_SOCKETS],
            tmpfs={"/run": "size=1m"},
        )
    return _lodge(client, gate, run)


def _lodge(client: DockerClient, gate: _Keeper, run: str) -> Lodge:
    volumes = [f"{gate.container.id}:ro"]
    return Lodge(_start(client, _LODGE, run, environment={}, network_mode="none", volumes_from=volumes), gate)


def _start(client: DockerClient, program: str, run: str, *, environment: dict[str, str], **options: Any) -> _Keeper:
    container = client.containers.create(
        BASE_IMAGE,
        command=["/bin/sh", "-c", 'eval "$program"'],
        environment={"program": program, **environment},
        stdin_open=True,
        auto_remove=True,
        labels=labels(run),
        user="0:0",
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        read_only=True,
        mem_limit=128 * _MB,
        memswap_limit=128 * _MB,
        pids_limit=600,
        ulimits=[Ulimit(name="core", soft=0, hard=0)],
        log_config=LogConfig(type="none"),
        **options,
    )
    try:
        alive = client.api.attach_socket(str(container.id), params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        container.start()
    except BaseException:
        with contextlib.suppress(DockerException, OSError):  # the engine may have removed what did not start
            container.remove(force=True, v=True)
        raise
    keeper = _Keeper(container, alive)
    try:
        _await_ready(alive._sock)
    except BaseException:
        keeper.end()
        raise
    return keeper


def _await_ready(connection: socket.socket) -> None:
    heard, until = b"", time.monotonic() + _READY_S
    while b"ready\n" not in heard:
        connection.settimeout(max(0.001, until - time.monotonic()))
        try:
            chunk = connection.recv(4096)
        except TimeoutError as error:
            raise SandboxError(f"a sandbox's way out does not listen after {_READY_S:g} s: {heard!r}") from error
        if not chunk:
            raise SandboxError(f"a sandbox's way out ended at its start: {heard!r}")
        heard += chunk


__all__ = ["PROXY", "Lodge", "open_lodge", "patterns"]
