"""The engine side of the Docker sandbox: connection, the hardened container's options, and the reaper."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import docker
import requests
from docker import DockerClient
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig, Ulimit

from envs.sandbox.common import WORK
from posttrain.errors import ConfigError

RUN, PID, OWNER = "posttrain.run", "posttrain.pid", "posttrain.owner"
"""Labels: the run, the owning process and where that process id means something."""

_HTTP_TIMEOUT_S = 60
_CURE = (
    "install and start an engine (as root: scripts/start-docker.sh, which does `apt-get install docker.io` and starts"
    " dockerd), or set `sandbox.type: monty`"
)


def connect(host: str | None) -> DockerClient:
    """A client of the engine at ``host``, which answers. Raises ConfigError with the cure."""
    try:
        if host is None:
            client = docker.from_env(timeout=_HTTP_TIMEOUT_S)
        else:
            client = DockerClient(base_url=host, timeout=_HTTP_TIMEOUT_S)
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


def require_image(client: DockerClient, image: str) -> None:
    """Raise ConfigError unless the engine has ``image``. Nothing is pulled: a run must not depend on a registry."""
    try:
        client.images.get(image)
    except ImageNotFound as error:
        raise ConfigError(
            f"sandbox.image: the engine has no image {image!r}; build the default one with scripts/docker-base.sh,"
            f" or `docker pull {image}`"
        ) from error


def container_options(*, memory_mb: int, cpus: float, pids: int, run: str, ttl_s: int) -> dict[str, Any]:
    """What ``docker run`` is told, beyond the image. The default seccomp profile stays."""
    mb = 1024 * 1024
    quarter, eighth = memory_mb * mb // 4, memory_mb * mb // 8
    # Docker would mount a tmpfs noexec; scripts of a task must run. Few inodes: they are kernel memory.
    work = f"rw,exec,nosuid,nodev,size={quarter},nr_inodes=16k,uid=1000,gid=1000,mode=0700"
    return {
        "command": ["sleep", str(ttl_s)],
        "entrypoint": [],
        "auto_remove": True,
        "init": True,
        "user": "65534:65534",
        "working_dir": WORK,
        "hostname": "sandbox",
        "labels": {RUN: run, PID: str(os.getpid()), OWNER: _owner()},
        "network_mode": "none",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "read_only": True,
        "tmpfs": {WORK: work, "/tmp": f"rw,exec,nosuid,nodev,size={eighth},nr_inodes=16k,mode=1777"},
        "shm_size": eighth,
        "mem_limit": memory_mb * mb,
        "memswap_limit": memory_mb * mb,
        "nano_cpus": int(cpus * 1e9),
        "pids_limit": pids,
        "ulimits": [
            Ulimit(name="fsize", soft=quarter, hard=quarter),
            Ulimit(name="nofile", soft=1024, hard=1024),
            Ulimit(name="core", soft=0, hard=0),
        ],
        "log_config": LogConfig(type="none"),
    }


def _owner() -> str:
    """Names this machine, boot and process namespace: elsewhere the same process id is somebody else's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename


def reap(host: str | None = None) -> int:
    """Remove the containers whose owning process on this machine is gone; how many there were.

    Containers of other machines that share the engine are left alone; these end when their time is up.
    """
    client = connect(host)
    try:
        removed = 0
        for container in client.containers.list(all=True, filters={"label": [PID, f"{OWNER}={_owner()}"]}):
            if Path(f"/proc/{container.labels[PID]}").exists():
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


__all__ = ["connect", "container_options", "reap", "require_image"]
