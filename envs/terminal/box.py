"""The container that a task is played in."""

from __future__ import annotations

import contextlib
import posixpath
import shlex
from dataclasses import dataclass

from docker.errors import DockerException

from envs.sandbox import open_sandbox
from envs.sandbox.config import DockerConfig
from envs.sandbox.docker import DockerPlace
from envs.sandbox.docker_engine import connect
from envs.sandbox.docker_images import build_image
from envs.sandbox.shell import ShellSandbox, in_thread
from envs.terminal.task import TerminalTask
from posttrain.errors import SandboxError

_LISTED = 2000
"""Changed paths that are looked at; an agent that changes more of the system has changed it."""


@dataclass(frozen=True, slots=True)
class TaskBox:
    """A container of the task's image."""

    sandbox: ShellSandbox
    workdir: str
    """Where commands start."""

    async def changes(self) -> list[tuple[str, str]]:
        """``modified``, ``added`` or ``deleted``, and path, of files and links that are not as the image has them."""
        assert isinstance(self.sandbox.place, DockerPlace)
        listed = await in_thread(self.sandbox.place.changes)
        parents = {posixpath.dirname(path) for _, path in listed}
        leaves = [(kind, path) for kind, path in listed if path not in parents]
        there = [path for kind, path in leaves if kind != "deleted"]
        folders = await self._folders(there[:_LISTED])
        return [(kind, path) for kind, path in leaves if path not in folders]

    async def _folders(self, paths: list[str]) -> set[str]:
        """Those of ``paths`` that are folders; by builtins of a shell that the agent cannot have changed."""
        found: set[str] = set()
        for start in range(0, len(paths), 200):
            words = " ".join(map(shlex.quote, paths[start : start + 200]))
            result = await self.sandbox.exec(
                f'for p in {words}; do [ -d "$p" ] && [ ! -L "$p" ] && printf "%s\\n" "$p"; done; true', timeout_s=30
            )
            if result.exit_code:
                raise SandboxError(f"the container's changes cannot be listed: {result.stderr[:200]}")
            found |= set(result.stdout.splitlines())
        return found


async def open_box(task: TerminalTask, defaults: DockerConfig) -> TaskBox:
    """Build the image if it is not there, start a container, go to the task's folder. Raises SandboxError."""
    environment = task.file.environment
    image = environment.docker_image
    if image is None:
        image = await in_thread(lambda: build_image(task.folder / "environment", defaults.engines[0]))
    limits = {"memory_mb": environment.memory_mb, "cpus": environment.cpus, "disk_mb": environment.storage_mb}
    given = {"image": image, "network": task.network(defaults.network)}
    config = defaults.model_copy(update={**given, **{k: v for k, v in limits.items() if v is not None}})
    workdir = environment.workdir or await in_thread(lambda: _workdir(image, defaults.engines[0]))
    sandbox = await open_sandbox(config)
    try:
        assert isinstance(sandbox, ShellSandbox)
        exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in environment.env.items())
        entered = await sandbox.session().exec(f"{exports}cd {shlex.quote(workdir)}")
        if entered.exit_code:
            raise SandboxError(f"{task.name}: its folder {workdir} is not in the image: {entered.stderr[:200]}")
    except BaseException:
        with contextlib.suppress(SandboxError):  # what went wrong first is told; a cancellation stays one
            await sandbox.close()
        raise
    return TaskBox(sandbox, workdir)


def _workdir(image: str, host: str | None) -> str:
    client = connect(host)
    try:
        return client.images.get(image).attrs["Config"].get("WorkingDir") or "/"
    except DockerException as error:
        raise SandboxError(f"image {image}: {error}") from error
    finally:
        client.close()
