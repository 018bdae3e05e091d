"""What a config may say about sandboxes. Standard library and pydantic only: checking a config imports no engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

BASE_IMAGE = "posttrain-base"
"""Built by scripts/docker-base.sh: a small Debian with python3, and with the proxy of ``docker_gate``."""

_HOST = r"^(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(:[0-9]{1,5})?$"


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MontyConfig(_Config):
    """A subset of Python in an interpreter with no way out: no daemon, under a millisecond a call."""

    type: Literal["monty"] = "monty"
    memory_mb: int = Field(default=64, ge=1)
    """Heap of one call, in MiB."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Longest call, in seconds; a call may ask for less."""


class BubblewrapConfig(_Config):
    """Linux namespaces without a daemon: this machine's own /usr, read-only, for shell commands."""

    type: Literal["bubblewrap"] = "bubblewrap"
    memory_mb: int = Field(default=512, ge=64)
    """Address space of each process in MiB; of it a quarter for the work folder, an eighth each for /tmp, /dev/shm."""
    pids: int = Field(default=64, ge=16)
    """Processes and threads at one time."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Longest call, in seconds; a call may ask for less."""


class NetworkConfig(_Config):
    """Hosts that a sandbox may reach, by HTTP and HTTPS, through a proxy that refuses all others."""

    allow: tuple[Annotated[str, Field(pattern=r"^(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(:[0-9]{1,5})?$")], ...] = (
        Field(min_length=1)
    )
    """``pypi.org`` (ports 80 and 443), ``*.pypi.org`` (every name below it), ``10.0.0.7:8080`` (that port alone)."""


class DockerConfig(_Config):
    """A container for each sandbox: a whole Linux, for shell commands."""

    type: Literal["docker"] = "docker"
    image: str = BASE_IMAGE
    """Must exist on the engine; scripts/docker-base.sh builds the default one. Needs sh and GNU coreutils."""
    profile: Literal["strict", "build", "compat"] = "strict"
    """What the container may do: ``docker_engine.container_options`` lists it."""
    runtime: str | None = None
    """Runtime of the engine, for example runsc (gVisor); None takes the engine's default."""
    memory_mb: int = Field(default=512, ge=64)
    """Memory of the container in MiB, its files included (work folder a quarter, /tmp and /dev/shm an eighth each)."""
    network: NetworkConfig | None = None
    """What the container may reach; null: nothing. Programs in it must heed ``https_proxy``."""
    disk_mb: int = Field(default=2048, ge=64)
    """Size in MiB of the writable layer of the profiles build and compat."""
    cpus: float = Field(default=1.0, gt=0)
    """Share of the machine, in processors."""
    pids: int = Field(default=128, ge=16)
    """Processes and threads at one time."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Longest call, in seconds; a call may ask for less."""
    start_timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait for a container, in seconds, the queue before the engine included."""
    pool: int = Field(default=0, ge=0, le=64)
    """Containers kept ready, started, for the next sandboxes of this config."""
    host: str | None = None
    """Engine, as unix:///path or tcp://name:port; None takes DOCKER_HOST or the local socket."""
    hosts: tuple[str, ...] = ()
    """Several engines instead of ``host``: each sandbox goes to the least loaded that answers."""

    @model_validator(mode="after")
    def _one_way_to_name_engines(self) -> DockerConfig:
        if self.host is not None and self.hosts:
            raise ValueError("give host or hosts, not both")
        return self

    @property
    def engines(self) -> tuple[str | None, ...]:
        """Every engine that may be used; None for the default one."""
        return self.hosts or (self.host,)


SandboxConfig = Annotated[MontyConfig | BubblewrapConfig | DockerConfig, Field(discriminator="type")]

__all__ = ["BubblewrapConfig", "DockerConfig", "MontyConfig", "NetworkConfig", "SandboxConfig"]
