"""Reads task folders in the Harbor / Terminal-Bench 2 layout (``task.toml``, schema 1.4) as they are.

    <task>/task.toml  instruction.md  environment/Dockerfile  tests/test.sh  solution/solve.sh (optional)

What is not there here is refused by name, not guessed: several steps, compose files, GPUs, a verifier of another user.
A task reaches the hosts of its own allow-list (``network_mode = "allowlist"``); where it asks for the whole network it
has what ``sandbox.network`` allows, by default nothing.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from envs.sandbox.config import NetworkConfig
from posttrain.errors import ConfigError


class _Table(BaseModel):
    """Keys that are not named here say nothing about how a task is played."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class AgentTable(_Table):
    """[agent]"""

    timeout_sec: float | None = Field(default=None, gt=0)


class VerifierTable(_Table):
    """[verifier]"""

    timeout_sec: float = Field(default=600.0, gt=0)
    env: dict[str, str] = Field(default_factory=dict[str, str])
    environment_mode: str | None = None
    user: str | int | None = None
    collect: list[Any] = Field(default_factory=list[Any])


class EnvironmentTable(_Table):
    """[environment]"""

    docker_image: str | None = None
    os: str = "linux"
    cpus: float | None = Field(default=None, gt=0)
    memory_mb: int | None = Field(default=None, gt=0)
    storage_mb: int | None = Field(default=None, gt=0)
    gpus: int | None = None
    workdir: str | None = None
    env: dict[str, str] = Field(default_factory=dict[str, str])
    mcp_servers: list[Any] = Field(default_factory=list[Any])
    healthcheck: dict[str, Any] | None = None
    network_mode: Literal["public", "no-network", "allowlist"] = "public"
    allowed_hosts: list[str] = Field(default_factory=list[str])


class TaskTable(_Table):
    """[task]"""

    name: str | None = None


class TaskFile(_Table):
    """The whole file."""

    task: TaskTable = TaskTable()
    agent: AgentTable = AgentTable()
    verifier: VerifierTable = VerifierTable()
    environment: EnvironmentTable = EnvironmentTable()
    metadata: dict[str, Any] = Field(default_factory=dict[str, Any])
    steps: list[Any] = Field(default_factory=list[Any])


class TerminalTask(BaseModel):
    """One folder, read."""

    model_config = ConfigDict(frozen=True)

    folder: Path
    file: TaskFile
    instruction: str

    @property
    def name(self) -> str:
        """Of the file, or of the folder."""
        return self.file.task.name or self.folder.name

    def network(self, default: NetworkConfig | None) -> NetworkConfig | None:
        """What the task may reach; ``default`` where it asks for everything. Raises ValidationError for a host that is
        none."""
        match self.file.environment.network_mode:
            case "allowlist":
                return NetworkConfig(allow=tuple(self.file.environment.allowed_hosts))
            case "no-network":
                return None
            case "public":
                return default

    @property
    def solution(self) -> str | None:
        """The reference, a shell script, if the task has one."""
        script = self.folder / "solution" / "solve.sh"
        return script.read_text() if script.is_file() else None


def read_task(folder: Path) -> TerminalTask:
    """Raises ConfigError naming file, key and cure."""
    path = folder / "task.toml"
    try:
        file = TaskFile.model_validate(tomllib.loads(path.read_text()))
        instruction = (folder / "instruction.md").read_text()
    except OSError as error:
        raise ConfigError(f"{error.filename}: a task folder needs task.toml and instruction.md") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    _refuse(folder, path, file)
    task = TerminalTask(folder=folder, file=file, instruction=instruction.strip())
    try:
        task.network(None)
    except ValidationError:
        hosts = ", ".join(file.environment.allowed_hosts) or "none"
        raise ConfigError(
            f"{path}: environment.allowed_hosts: {hosts}: give names, *.names or addresses; ranges cannot be had here"
        ) from None
    return task


def _refuse(folder: Path, path: Path, file: TaskFile) -> None:
    there = {
        "steps: tasks of several steps": bool(file.steps) or (folder / "steps").exists(),
        "environment.gpus: a GPU": bool(file.environment.gpus),
        "environment.os: anything but linux": file.environment.os != "linux",
        "environment.mcp_servers: MCP servers": bool(file.environment.mcp_servers),
        "environment.healthcheck: a health check": file.environment.healthcheck is not None,
        "environment/: a compose file": any((folder / "environment").glob("*compose*.y*ml")),
        "verifier.environment_mode: a verifier with an environment of its own": (
            file.verifier.environment_mode not in (None, "shared")
        ),
        "verifier.user: a verifier that is not root": file.verifier.user not in (None, 0, "0", "root"),
        "verifier.collect: commands to collect": bool(file.verifier.collect),
    }
    for what, found in there.items():
        if found:
            raise ConfigError(f"{path}: {what} cannot be had here; leave the task out")
    if not (folder / "tests" / "test.sh").is_file():
        raise ConfigError(f"{folder}: tests/test.sh is missing; the verifier writes /logs/verifier/reward.txt")
    if file.environment.docker_image is None and not (folder / "environment" / "Dockerfile").is_file():
        raise ConfigError(f"{folder}: give environment/Dockerfile, or environment.docker_image in task.toml")


def read_tasks(folder: Path) -> list[TerminalTask]:
    """Every task folder directly below ``folder``, by name. Raises ConfigError, also if there is none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; give one that holds task folders")
    found = [read_task(path.parent) for path in sorted(folder.glob("*/task.toml"))]
    if not found:
        raise ConfigError(f"{folder}: holds no */task.toml")
    return found
