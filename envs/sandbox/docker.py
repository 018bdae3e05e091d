"""A place for shell commands that is a container of its own: limited, without a network, gone with its owner.

The container's first process belongs to ``nobody`` (profile strict), so that the work user can be wiped out after each
call without ending the container. It lives as long as the owner's connection: nothing is left of a killed owner.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import requests
import urllib3
from docker import DockerClient
from docker.errors import APIError, DockerException, NotFound
from docker.models.containers import Container

from envs.sandbox.channel import Channel, DockerFrames
from envs.sandbox.common import WORK
from envs.sandbox.config import DockerConfig
from envs.sandbox.docker_engine import connect, container_options, require, work_user
from envs.sandbox.docker_gate import PROXY, Lodge, open_lodge
from envs.sandbox.docker_hosts import least_loaded
from envs.sandbox.docker_reaper import watch
from envs.sandbox.programs import RUNNER, START, Program
from envs.sandbox.shell import ShellSandbox, start
from posttrain.errors import ConfigError, SandboxError

# Run as root, with no capability but KILL: the work user cannot signal it. Stopping all of them first, in one system
# call, leaves none to fork or to start another.
_SWEEP = """
kill -STOP -1
for p in /proc/[0-9]*; do
    while read -r key value _; do
        [ "$key" = Uid: ] && [ "$value" = 1000 ] && kill -9 "${p#/proc/}"
    done <"$p/status"
done 2>/dev/null
kill -CONT -1
"""

_REMOVAL_S = 30
"""For a container that has ended to be gone."""
_ENGINE_ERRORS = (DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError)


class DockerPlace:
    """One container; see ``shell.Place``."""

    def __init__(
        self,
        client: DockerClient,
        container: Container,
        alive: Any,
        lodge: Lodge | None,
        config: DockerConfig,
        capped: bool,
    ):
        self.profile = _describe(client, config, capped)
        self._client = client
        self._container = container
        self._alive = alive
        self._lodge = lodge
        self._user = work_user(config)
        self._layer_cap = 0 if config.profile == "strict" or capped else config.disk_mb * 1024 * 1024
        self._removed = threading.Lock()

    @property
    def id(self) -> str:
        """The container's id."""
        return str(self._container.id)

    def own_processes(self, program: Program) -> int:
        """The shell that keeps the container, its cat, and the program."""
        return 3

    def spawn(self, program: Program) -> Channel:
        """Start ``program`` in the container; blocks for a docker exec."""
        environment = {"HOME": WORK, "LANG": "C.UTF-8", "program": program.text}
        if self._lodge is not None:
            environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), PROXY)
        with _engine("the container runs nothing"):
            created = self._client.api.exec_create(
                self.id, list(START), stdin=True, user=self._user, workdir=WORK, environment=environment
            )
            wrapped: Any = self._client.api.exec_start(created["Id"], socket=True)
            # The answer's head is read through a buffer: output of a fast program can be in it already.
            reader = wrapped._response.raw._fp.fp
            sock = wrapped._sock
            sock.setblocking(False)
            early = reader.peek()
        fd = sock.fileno()

        def close() -> None:
            with contextlib.suppress(OSError, ValueError):
                sock.close()
                wrapped.close()

        return Channel(fd, {fd: DockerFrames()}, close, early)

    def sweep(self) -> None:
        """Kill the work user's processes as root, where a command cannot have changed what root runs."""
        if self._user == "0:0":
            return
        with _engine("the container cannot be swept"):
            created = self._client.api.exec_create(self.id, ["/bin/sh", "-c", _SWEEP], user="0:0", workdir="/")
            self._client.api.exec_start(created["Id"])

    def audit(self) -> None:
        """The way out must stand; and where the storage cannot limit the layer, it is measured."""
        if self._lodge is not None:
            with _engine("the sandbox's way out cannot be inspected"):
                self._lodge.check()
        if not self._layer_cap:
            return
        with _engine("the container's layer cannot be measured"):
            (listed,) = self._client.api.containers(filters={"id": self.id}, size=True)
        if listed.get("SizeRw", 0) > self._layer_cap:
            raise SandboxError(f"a command filled the container's layer beyond {self._layer_cap} bytes (disk_mb)")

    def changes(self) -> list[tuple[str, str]]:
        """``modified``, ``added`` or ``deleted``, and the path, of what is not as the image has it; blocks."""
        kinds = ("modified", "added", "deleted")
        with _engine("the container's changes cannot be read"):
            found = self._container.diff() or []
        return [(kinds[int(change["Kind"])], str(change["Path"])) for change in found]

    def remove(self) -> None:
        """Kill and remove the container; one that is gone or going is fine."""
        if not self._removed.acquire(blocking=False):
            return
        try:
            _remove(self._client, self._container, self._alive)
        finally:
            if self._lodge is not None:
                self._lodge.end()


@contextlib.contextmanager
def _engine(what: str) -> Iterator[None]:
    try:
        yield
    except _ENGINE_ERRORS as error:
        raise SandboxError(f"{what}: {error}") from error


def _remove(client: DockerClient, container: Container, alive: Any) -> None:
    try:
        with _engine(f"container {container.short_id} cannot be removed"), contextlib.suppress(NotFound):
            try:
                container.remove(force=True, v=True)
            except APIError as error:
                if error.status_code != 409:
                    raise
                # It is being removed already, because it has ended.
                container.wait(condition="removed", timeout=_REMOVAL_S)
    finally:
        if alive is not None:
            with contextlib.suppress(OSError, ValueError):
                alive._sock.close()
        client.close()


def make(config: DockerConfig, run: str) -> ShellSandbox:
    """A fresh, started container on the least loaded engine; blocks. Raises ConfigError or SandboxError."""
    with least_loaded(config.engines) as (client, host):
        watch(host)
        with _engine("no container"):
            require(client, config)
            place = _place(client, host, config, run)
        try:
            return ShellSandbox(place, start(place, RUNNER), timeout_s=config.timeout_s)
        except BaseException:
            place.remove()
            raise


def _place(client: DockerClient, host: str | None, config: DockerConfig, run: str) -> DockerPlace:
    lodge = None if config.network is None else open_lodge(client, host, config.network, run)
    alive = container = None
    try:
        container, capped = _create(client, config, run, "none" if lodge is None else lodge.network)
        # Before the start, so that no container runs without its owner's connection.
        alive = client.api.attach_socket(str(container.id), params={"stdin": 1, "stream": 1})
        container.start()
        return DockerPlace(client, container, alive, lodge, config, capped)
    except BaseException:
        if lodge is not None:
            lodge.end()
        if container is not None:
            _remove(client, container, alive)
        raise


def _create(client: DockerClient, config: DockerConfig, run: str, network: str) -> tuple[Container, bool]:
    """The container, and whether its layer has a size."""
    if config.profile != "strict":
        try:
            options = container_options(config, run=run, capped_layer=True, network=network)
            return client.containers.create(config.image, **options), True
        except APIError as error:
            if "storage-opt" not in str(error):
                raise
    options = container_options(config, run=run, capped_layer=False, network=network)
    return client.containers.create(config.image, **options), False


def _describe(client: DockerClient, config: DockerConfig, capped: bool) -> str:
    words = [f"docker {config.profile}", f"runtime {config.runtime or 'default'}"]
    if config.network is not None:
        words.append(f"network of {' '.join(config.network.allow)}")
    if config.profile != "strict":
        remapped = any("userns" in option for option in client.info().get("SecurityOptions") or ())
        words.append("root in a user namespace" if remapped else "root without a user namespace")
        words.append("layer capped" if capped else "layer measured")
    return ", ".join(words)


def probe_docker(config: DockerConfig) -> None:
    """Raise ConfigError if no engine answers, or one that answers lacks the image or the runtime."""
    answered = 0
    problems = []
    for host in config.engines:
        try:
            client = connect(host)
        except ConfigError as error:
            problems.append(error)
            continue
        try:
            require(client, config)
            answered += 1
        except DockerException as error:
            raise ConfigError(f"sandbox.type docker: the engine failed: {error}") from error
        finally:
            client.close()
    if not answered:
        raise problems[0]


__all__ = ["DockerPlace", "make", "probe_docker"]
