"""The engine side of the Docker sandbox: connection, what a container is allowed, its keep-alive, and the reaper."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import docker
import requests
from docker import DockerClient
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig, Ulimit

from envs.sandbox.common import WORK
from envs.sandbox.config import BASE_IMAGE, DockerConfig
from envs.sandbox.programs import TOOLS
from posttrain.errors import ConfigError

RUN, PID, OWNER = "posttrain.run", "posttrain.pid", "posttrain.owner"
"""Labels: the run, the owning process and where that process id means something."""

GATE = "posttrain.gate"
"""Label of an image that has the proxy's programs."""

HTTP_TIMEOUT_S = 60
"""For an answer of an engine."""
_MB = 1024 * 1024
_CURE = (
    "install and start an engine (as root: scripts/start-docker.sh, which does `apt-get install docker.io` and starts"
    " dockerd), or set `sandbox.type: monty`"
)

# The container's first process. Its stdin is the owner's connection: when the owner ends, however it ends, cat ends and
# with it the container. While the shell waits for cat it reaps every orphan.
_KEEP_ALIVE = f"""
unset program
umask 022
cp -L /bin/sh {TOOLS}/.sh && chmod 111 {TOOLS}/.sh && mv {TOOLS}/.sh {TOOLS}/sh || exit 1
until cat >/dev/null; do :; done
"""


def connect(host: str | None, timeout_s: float = HTTP_TIMEOUT_S) -> DockerClient:
    """A client of the engine at ``host``, which answers. Raises ConfigError with the cure."""
    try:
        if host is None:
            client = docker.from_env(timeout=int(timeout_s))
        else:
            client = DockerClient(base_url=host, timeout=int(timeout_s))
    except (DockerException, requests.RequestException) as error:
        raise ConfigError(
            f"sandbox.type docker: no engine at {host or 'the default socket'} ({error}); {_CURE}"
        ) from error
    base: str = client.api.base_url
    if base.startswith(("https:", "http+docker://ssh")):
        client.close()
        raise ConfigError(
            f"sandbox.host {host or base}: only unix:// and tcp:// work; forward the socket of a remote engine with"
            " `ssh -N -L /tmp/docker.sock:/var/run/docker.sock HOST` and set unix:///tmp/docker.sock"
        )
    return client


def require(client: DockerClient, config: DockerConfig) -> None:
    """Raise ConfigError unless the engine has the image and the runtime. Nothing is pulled: a run must not depend on
    a registry."""
    try:
        client.images.get(config.image)
    except ImageNotFound as error:
        raise ConfigError(
            f"sandbox.image: the engine has no image {config.image!r}; build the default one with"
            f" scripts/docker-base.sh, or `docker pull {config.image}`"
        ) from error
    if config.network is not None and GATE not in _labels_of(client):
        raise ConfigError(
            f"sandbox.network: the engine's image {BASE_IMAGE} has no proxy; build it anew with"
            " `scripts/docker-base.sh --force`"
        )
    if config.runtime is not None and config.runtime not in (known := client.info()["Runtimes"]):
        raise ConfigError(
            f"sandbox.runtime: the engine has no runtime {config.runtime!r}, only {', '.join(sorted(known))};"
            " install it and name it in /etc/docker/daemon.json (gVisor: `runsc install`), then restart the engine"
        )


def _labels_of(client: DockerClient) -> Mapping[str, str]:
    try:
        return client.images.get(BASE_IMAGE).labels
    except ImageNotFound:
        return {}


def labels(run: str) -> dict[str, str]:
    """What every container of ours carries."""
    return {RUN: run, PID: str(os.getpid()), OWNER: _owner()}


def work_user(config: DockerConfig) -> str:
    """Who runs the commands."""
    return "1000:1000" if config.profile == "strict" else "0:0"


def container_options(config: DockerConfig, *, run: str, capped_layer: bool, network: str) -> dict[str, Any]:
    """What ``docker run`` is told, beyond the image. All keep the default seccomp profile; ``network`` is none, or the
    loopback of a ``docker_gate.Lodge``.

    strict: a read-only root, files in memory, an unprivileged user without any capability. build: a writable root and
    root's default capabilities but NET_RAW and MKNOD, to install and compile. compat: Docker's defaults, which also
    let setuid programs work. The layer of the last two has ``disk_mb`` where the engine's storage can limit it
    (``capped_layer``); elsewhere the engine measures it after each command, and a file has at most that size.
    """
    shm = config.memory_mb * _MB // 8
    largest = config.memory_mb * _MB // 4 if config.profile == "strict" else config.disk_mb * _MB
    return {
        "command": ["/bin/sh", "-c", 'eval "$program"'],
        "environment": {"program": _KEEP_ALIVE},
        "entrypoint": [],
        "stdin_open": True,
        "auto_remove": True,
        "working_dir": WORK,
        "labels": labels(run),
        "network_mode": network,
        # A container that shares another's network has its name too.
        **({"hostname": "sandbox"} if network == "none" else {}),
        "runtime": config.runtime,
        "shm_size": shm,
        "mem_limit": config.memory_mb * _MB,
        "memswap_limit": config.memory_mb * _MB,
        "nano_cpus": int(config.cpus * 1e9),
        "pids_limit": config.pids,
        "ulimits": [
            Ulimit(name="fsize", soft=largest, hard=largest),
            Ulimit(name="nofile", soft=1024, hard=1024),
            Ulimit(name="core", soft=0, hard=0),
        ],
        "log_config": LogConfig(type="none"),
        **_privileges(config),
        **({"storage_opt": {"size": f"{config.disk_mb}m"}} if capped_layer else {}),
    }


def _privileges(config: DockerConfig) -> Mapping[str, Any]:
    # Docker would mount a tmpfs noexec; scripts of a task must run. Few inodes: they are kernel memory.
    common = "rw,exec,nosuid,nodev,nr_inodes=16k"
    quarter, eighth = config.memory_mb * _MB // 4, config.memory_mb * _MB // 8
    tools = {TOOLS: f"{common},size=16m,mode=0755"}
    match config.profile:
        case "strict":
            return {
                # Root keeps the container alive and can wipe out the work user, which can do nothing to root. It has no
                # other capability; no command runs as root, and no-new-privileges keeps it so.
                "user": "0:0",
                "cap_drop": ["ALL"],
                "cap_add": ["KILL"],
                "security_opt": ["no-new-privileges:true"],
                "read_only": True,
                "tmpfs": {
                    WORK: f"{common},size={quarter},uid=1000,gid=1000,mode=0700",
                    "/tmp": f"{common},size={eighth},mode=1777",
                    **tools,
                },
            }
        case "build":
            return {
                "user": "0:0",
                "cap_drop": ["NET_RAW", "MKNOD"],
                "security_opt": ["no-new-privileges:true"],
                "tmpfs": tools,
            }
        case "compat":
            return {"user": "0:0", "tmpfs": tools}


def _owner() -> str:
    """Names this machine, boot and process namespace: elsewhere the same process id is somebody else's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename


def _alive(pid: str) -> bool:
    try:
        # The name of the program, in brackets, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def reap(host: str | None = None) -> int:
    """Remove the containers whose owning process on this machine is gone; how many there were.

    Started containers end with their owner's connection: what is found here had been made and not yet started.
    """
    client = connect(host)
    try:
        removed = 0
        for container in client.containers.list(
            all=True, filters={"label": [PID, f"{OWNER}={_owner()}"]}, ignore_removed=True
        ):
            if _alive(container.labels[PID]):
                continue
            try:
                container.remove(force=True, v=True)
            except (NotFound, APIError):
                # Somebody else's reaper, or the container's own end, was faster.
                continue
            removed += 1
        return removed
    finally:
        client.close()


__all__ = [
    "BASE_IMAGE",
    "HTTP_TIMEOUT_S",
    "OWNER",
    "PID",
    "RUN",
    "connect",
    "container_options",
    "labels",
    "reap",
    "require",
    "work_user",
]
