"""Tasks at a terminal, from folders in the Harbor / Terminal-Bench 2 layout, each in a container of its own image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.sandbox.config import DockerConfig
from envs.terminal.task import TerminalTask, read_tasks
from envs.worlds.base import Script, arguments, empty, play, say, use, user
from posttrain.errors import ConfigError, WorldError
from posttrain.protocols import Session
from posttrain.types import ExecResult, Limits, Message, Task, Tool, ToolCall

if TYPE_CHECKING:
    from envs.terminal.box import TaskBox

SHELL = Tool(name="shell", description="run a command", parameters={"command": "string"})
SHIPPED = Path(__file__).parent.parent / "terminal" / "tasks"
_SHOWN = 8000
"""Characters of an output that the model is shown: its head and its tail."""


class TerminalConfig(BaseModel):
    """Options of the terminal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["terminal"] = "terminal"
    eval: Path = SHIPPED
    """Folder of the task folders of this split; the three shipped ones need nothing but the image posttrain-base."""
    train: Path | None = None
    """The same for training; null: there are none."""
    demo: Path | None = None
    """The same for demonstrations, which run the reference solutions."""
    sandbox: DockerConfig = DockerConfig(profile="build", memory_mb=2048, timeout_s=3600.0)
    """Limits where a task has none of its own; its image is the task's."""
    timeout_s: float = Field(default=900.0, gt=0)
    """Seconds the agent has where a task does not say."""
    call_timeout_s: float = Field(default=120.0, gt=0)
    """Seconds a command may take."""
    max_turns: int = Field(default=30, ge=1)
    """Model calls an episode."""
    max_tokens: int = Field(default=1024, ge=1)
    """Tokens sampled a turn."""
    thinking: bool = False
    """Whether the model thinks before it speaks."""


class TerminalSession:
    """A shell whose folder and variables last from call to call, in the task's container."""

    tools = (SHELL,)

    def __init__(self, task: TerminalTask, box: TaskBox, config: TerminalConfig) -> None:
        self._task = task
        self._box: TaskBox | None = box
        self._shell = box.sandbox.session()
        self.profile = box.sandbox.profile
        self._config = config

    async def call(self, call: ToolCall) -> str:
        """Output and errors of the command."""
        command: str = arguments(self.tools, call)["command"]
        self._open()
        result = await self._shell.exec(command, timeout_s=self._config.call_timeout_s)
        return _shown(result)

    async def reply(self, message: Message) -> Message | None:
        """None: the instruction was the only one."""
        return None

    async def grade(self, messages: Sequence[Message]) -> float:
        """The verifier's reward; 0 if the agent changed what the verifier runs on."""
        from envs.terminal.verifier import verify

        box = self._open()
        await box.sandbox.renew()
        return await verify(box.sandbox, self._task, box.workdir, await box.changes())

    def _open(self) -> TaskBox:
        if self._box is None:
            raise WorldError("the terminal's session is closed")
        return self._box

    async def close(self) -> None:
        """Remove the container; idempotent."""
        if self._box is not None:
            box, self._box = self._box, None
            await box.sandbox.close()


def _shown(result: ExecResult) -> str:
    text = result.stdout + result.stderr
    if len(text) > _SHOWN:
        cut = len(text) - _SHOWN
        text = f"{text[: _SHOWN // 2]}\n[{cut} characters left out]\n{text[-_SHOWN // 2 :]}"
    return text or f"exit {result.exit_code}"


def _reference(solution: str) -> Script:
    script = "/tmp/solve.sh"
    write = f"cat >{script} <<'END OF SOLUTION'\n{solution}\nEND OF SOLUTION\n"
    yield use("shell", command=f"{write}chmod +x {script}; {script}; rm {script}")
    yield say("done")


class Terminal:
    """Implements ``protocols.World``."""

    domain = "agent"

    def __init__(self, config: TerminalConfig, name: str = "terminal") -> None:
        self.name, self.config = name, config
        folders: Mapping[str, Path | None] = {"eval": config.eval, "train": config.train, "demo": config.demo}
        self._tasks = {split: read_tasks(folder) for split, folder in folders.items() if folder is not None}

    def tasks(self, split: str, n: int, seed: int) -> list[Task]:
        """See the protocol. Raises ConfigError for a split that has no folder, or fewer tasks."""
        found = self._tasks.get(split)
        if found is None:
            raise ConfigError(
                f"{self.name} has no tasks for {split}: set its key `{split}` to a folder of task folders"
            )
        if n > len(found):
            raise ConfigError(f"{self.name} has {len(found)} tasks for {split}, not {n}: ask for fewer")
        order = Random(f"terminal/{split}/{seed}").sample(range(len(found)), n)
        return [self._task(split, index, found[index]) for index in order]

    def _task(self, split: str, index: int, task: TerminalTask) -> Task:
        seconds = task.file.agent.timeout_sec or self.config.timeout_s
        return Task(
            id=f"{self.name}/{split}/{task.name}",
            domain=self.domain,
            world=self.name,
            prompt=(user(task.instruction),),
            thinking=self.config.thinking,
            limits=Limits(max_turns=self.config.max_turns, max_tokens=self.config.max_tokens, timeout_s=seconds),
            data={"split": split, "index": index},
        )

    def _source(self, task: Task) -> TerminalTask:
        return self._tasks[task.data["split"]][task.data["index"]]

    async def open(self, task: Task) -> TerminalSession:
        """A container of the task's image, built if need be. Raises SandboxError if it cannot be had."""
        from envs.terminal.box import open_box  # checking a config must not cost the import of an engine's client

        source = self._source(task)
        return TerminalSession(source, await open_box(source, self.config.sandbox), self.config)

    async def demonstrate(self, task: Task, rng: Random) -> list[Message]:
        """The reference solution, one command. Raises ConfigError if the task has none."""
        session = await self.open(task)
        try:
            return await self._solve(session, task)
        finally:
            await session.close()

    async def _solve(self, session: Session, task: Task) -> list[Message]:
        source = self._source(task)
        if source.solution is None:
            raise ConfigError(f"{source.folder}: solution/solve.sh is missing, so it cannot be demonstrated or checked")
        return await play(session, _reference(source.solution))

    async def check(self) -> dict[str, float]:
        """Mean rewards of the reference and of the empty solution over all tasks of ``eval``."""
        sums = {"reference": 0.0, "empty": 0.0}
        tasks = self.tasks("eval", len(self._tasks["eval"]), 0)
        for task in tasks:
            for kind in sums:
                session = await self.open(task)
                try:
                    played = await (self._solve(session, task) if kind == "reference" else play(session, empty()))
                    sums[kind] += await session.grade([*task.prompt, *played])
                finally:
                    await session.close()
        return {kind: total / len(tasks) for kind, total in sums.items()}
