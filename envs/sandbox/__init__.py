"""Where model output runs: the one place that turns a config into a sandbox."""

from __future__ import annotations

from envs.sandbox.config import BubblewrapConfig, DockerConfig, MontyConfig, NetworkConfig, SandboxConfig
from posttrain.protocols import Sandbox


async def open_sandbox(config: MontyConfig | BubblewrapConfig | DockerConfig, *, run: str = "") -> Sandbox:
    """A fresh sandbox of the type that ``config`` names, labelled with ``run`` where it can be.

    Raises SandboxError if it cannot be had, ConfigError if this machine cannot have one at all.
    """
    # Imported in the branch: validating a config must not cost the import of an engine's client.
    match config:
        case MontyConfig():
            from envs.sandbox.monty import open_monty

            return await open_monty(memory_mb=config.memory_mb, timeout_s=config.timeout_s)
        case BubblewrapConfig():
            from envs.sandbox.bubblewrap import open_bubblewrap

            return await open_bubblewrap(config)
        case DockerConfig():
            from envs.sandbox.docker_pool import open_docker

            return await open_docker(config, run)


def probe(config: MontyConfig | BubblewrapConfig | DockerConfig) -> None:
    """Raise ConfigError, with the cure, when sandboxes of this type cannot run on this machine."""
    match config:
        case MontyConfig():
            from envs.sandbox.monty import probe_monty

            probe_monty()
        case BubblewrapConfig():
            from envs.sandbox.bubblewrap import probe_bubblewrap

            probe_bubblewrap()
        case DockerConfig():
            from envs.sandbox.docker import probe_docker

            probe_docker(config)


__all__ = ["BubblewrapConfig", "DockerConfig", "MontyConfig", "NetworkConfig", "SandboxConfig", "open_sandbox", "probe"]
