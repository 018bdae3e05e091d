"""Where model output runs: the config union, and the one place that turns a config into a sandbox."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from posttrain.protocols import Sandbox


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MontyConfig(_Config):
    """A subset of Python in an interpreter with no way out: no daemon, under a millisecond a call."""

    type: Literal["monty"] = "monty"
    memory_mb: int = Field(default=64, ge=1)
    """Heap of one call, in MiB."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Longest call, in seconds; a call may ask for less."""


class DockerConfig(_Config):
    """A hardened container for each sandbox: a whole Linux, for shell commands."""

    type: Literal["docker"] = "docker"
    image: str = "posttrain-base"
    """Must exist on the engine; scripts/docker-base.sh builds the default one. Needs sh, timeout, stat, readlink."""
    memory_mb: int = Field(default=512, ge=64)
    """Memory of the container in MiB, its files included (work folder a quarter, /tmp and /dev/shm an eighth each)."""
    cpus: float = Field(default=1.0, gt=0)
    """Share of the machine, in processors."""
    pids: int = Field(default=128, ge=16)
    """Processes and threads at one time."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Longest call, in seconds; a call may ask for less."""
    host: str | None = None
    """Engine, as unix:///path or tcp://name:port; None takes DOCKER_HOST or the local socket."""


SandboxConfig = Annotated[MontyConfig | DockerConfig, Field(discriminator="type")]


async def open_sandbox(config: MontyConfig | DockerConfig, *, run: str = "") -> Sandbox:
    """A fresh sandbox of the type that ``config`` names, labelled with ``run`` where it can be.

    Raises SandboxError if it cannot be had, ConfigError if this machine cannot have one at all.
    """
    # Imported in the branch: validating a config must not cost the import of an engine's client.
    match config:
        case MontyConfig():
            from envs.sandbox.monty import open_monty

            return await open_monty(memory_mb=config.memory_mb, timeout_s=config.timeout_s)
        case DockerConfig():
            from envs.sandbox.docker import open_docker

            return await open_docker(**config.model_dump(exclude={"type"}), run=run)


def probe(config: MontyConfig | DockerConfig) -> None:
    """Raise ConfigError, with the cure, when sandboxes of this type cannot run on this machine."""
    match config:
        case MontyConfig():
            from envs.sandbox.monty import probe_monty

            probe_monty()
        case DockerConfig():
            from envs.sandbox.docker import probe_docker

            probe_docker(image=config.image, host=config.host)


__all__ = ["DockerConfig", "MontyConfig", "SandboxConfig", "open_sandbox", "probe"]
