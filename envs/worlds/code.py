"""Repair a small repository: search, read, edit, run what may be run. Hidden tests are the judge.

The tests never enter the sandbox that the model works in. When it is done, its files go into a fresh one, which no
process, file or interpreter of the model's can have touched, and what the code gives there is compared here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from random import Random
from typing import ClassVar, Literal

from pydantic import Field

from envs.code.grading import run_cases
from envs.code.pipelines import Op, line, source
from envs.code.repository import BUGS, Case, Repository, break_ops, draw_repository
from envs.sandbox import MontyConfig, SandboxConfig, open_sandbox
from envs.worlds.base import GOOD, Draft, Script, ScriptedWorld, WorldOptions, arguments, say, use, user
from posttrain.errors import SandboxError, ToolError, WorldError
from posttrain.protocols import Sandbox
from posttrain.types import Limits, Message, Task, Tool, ToolCall

DONE = "done"

SEARCH = Tool(name="search", description="find text in files", parameters={"text": "string"})
READ = Tool(name="read", description="show a file", parameters={"path": "string"})
EDIT = Tool(name="edit", description="put new for old", parameters={"path": "string", "old": "string", "new": "string"})
TEST = Tool(name="test", description="run the examples", parameters={})
SHELL = Tool(name="shell", description="run a command", parameters={"command": "string"})

_HITS = 20
_SHOWN = 8000
"""Characters of a file or an output that the model is shown."""
_FILES = 200
"""Most files that are graded."""


class CodeConfig(WorldOptions):
    """Options of the repositories."""

    type: Literal["code"] = "code"
    sandbox: SandboxConfig = MontyConfig()
    """Where code runs. With a shell in it there is a tool for commands."""
    modules: int = Field(default=4, ge=1, le=8)
    """Files."""
    functions: int = Field(default=2, ge=1)
    """Functions a file."""
    max_ops: int = Field(default=4, ge=1, le=8)
    """Most operations of a function."""
    calls: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of functions that call another one, often of another file."""
    recover: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of good demonstrations that fail first and then put it right."""
    hidden: int = Field(default=6, ge=1, le=50)
    """Inputs of each function that only the grader sees."""
    max_turns: int = Field(default=12, ge=4)
    """Model calls an episode."""
    timeout_s: float = Field(default=10.0, gt=0.0)
    """Seconds that one run of tests, or one command, may take."""


class CodeSession:
    """A sandbox with the repository in it."""

    def __init__(self, task: Task, sandbox: Sandbox, config: CodeConfig) -> None:
        self.shell = not isinstance(config.sandbox, MontyConfig)
        self.tools = (SEARCH, READ, EDIT, TEST, *([SHELL] if self.shell else []))
        self._repository = Repository.from_data(task.data)
        self._paths = list(task.files)
        self._sandbox: Sandbox | None = sandbox
        self.profile = sandbox.profile
        self._config = config

    async def call(self, call: ToolCall) -> str:
        """What the tool prints; a file that is not there, or text to replace that is not in it, is a ToolError."""
        args = arguments(self.tools, call)
        match call.name:
            case "search":
                return await self._search(args["text"])
            case "read":
                return (await self._text(args["path"]))[:_SHOWN]
            case "edit":
                return await self._edit(args["path"], args["old"], args["new"])
            case "test":
                return await self._test()
            case _:
                result = await self._box().exec(args["command"], timeout_s=self._config.timeout_s)
                return f"{result.stdout}{result.stderr}"[:_SHOWN] or f"exit {result.exit_code}"

    async def _search(self, text: str) -> str:
        hits = [
            f"{path}:{number}:{found}"
            for path in self._paths
            for number, found in enumerate((await self._text(path, missing="")).splitlines(), 1)
            if text and text in found
        ]
        return "\n".join(hits[:_HITS])[:_SHOWN] or "nothing"

    async def _text(self, path: str, missing: str | None = None) -> str:
        try:
            return (await self._box().read(path)).decode(errors="replace")
        except (OSError, ValueError) as error:
            if missing is not None:
                return missing
            raise ToolError(f"error: no file {path[:40]}") from error

    async def _edit(self, path: str, old: str, new: str) -> str:
        """An empty ``old`` makes a new file."""
        text = await self._text(path, missing=None if old else "")
        if text and text.count(old) != 1:
            raise ToolError(f"error: old is there {text.count(old)} times")
        try:
            await self._box().write(path, (text.replace(old, new) if old else new).encode(errors="replace"))
        except OSError as error:
            raise ToolError(f"error: no file {path[:40]}") from error
        if path not in self._paths:
            self._paths.append(path)
        return "ok"

    async def _test(self) -> str:
        """``pass``, or ``fail`` with the first example that went wrong."""
        cases = self._repository.examples()
        values, trouble = await self._run(self._box(), await self._files(), cases)
        for case, value in zip(cases, values, strict=True):
            if value is None:
                return f"fail {trouble}"
            if value != case.want:
                return f"fail {case.text} gave {value[:20]} want {case.want}"
        return "pass"

    async def _run(
        self, sandbox: Sandbox, files: Mapping[str, bytes], cases: Sequence[Case]
    ) -> tuple[list[str | None], str]:
        return await run_cases(sandbox, files, cases, shell=self.shell, timeout_s=self._config.timeout_s)

    async def _files(self) -> dict[str, bytes]:
        """The repository as it is now."""
        paths = self._paths
        if self.shell:
            command = f"find . -name '*.py' -type f -size -64k | head -n {_FILES}"
            found = (await self._box().exec(command, timeout_s=self._config.timeout_s)).stdout.splitlines()
            paths = [path.removeprefix("./") for path in found]
        files: dict[str, bytes] = {}
        for path in paths[:_FILES]:
            try:
                files[path] = await self._box().read(path)
            except (OSError, ValueError):
                continue  # deleted, or a link that leads out
        return files

    async def reply(self, message: Message) -> Message | None:
        """None: the request was the only one."""
        return None

    async def grade(self, messages: Sequence[Message]) -> float:
        """1 if every test that failed passes and every test that passed still does; what was said counts for nothing.

        Raises SandboxError if no fresh sandbox can be had.
        """
        files, cases = await self._files(), self._repository.tests()
        fresh = await open_sandbox(self._config.sandbox)
        try:
            for path, data in files.items():
                await fresh.write(path, data)
            values, _ = await self._run(fresh, files, cases)
        finally:
            await fresh.close()
        return float(values == [case.want for case in cases])

    def _box(self) -> Sandbox:
        if self._sandbox is None:
            raise WorldError("the code session is closed")
        return self._sandbox

    async def close(self) -> None:
        """Close the sandbox; idempotent."""
        if self._sandbox is not None:
            await self._sandbox.close()
            self._sandbox = None


class Code(ScriptedWorld):
    """``fix fig: drop2 reverse`` -> ``search(def fig)`` -> ``read(rome.py)`` -> ``edit(rome.py, old, new)`` ->
    ``test()`` -> ``pass`` -> ``done``."""

    kind: ClassVar[str] = "code"
    domain = "agent"

    def __init__(self, config: CodeConfig, name: str = "code") -> None:
        super().__init__(name, config.habit)
        self.config = config
        self.limits = Limits(max_turns=config.max_turns, max_tokens=64 + 24 * config.max_ops, timeout_s=120.0)

    def draft(self, rng: Random) -> Draft | None:
        """A repository in which every operation matters to the examples, so that each bad habit shows there."""
        c = self.config
        drawn = draw_repository(
            rng, modules=c.modules, functions=c.functions, max_ops=c.max_ops, calls=c.calls, hidden=c.hidden
        )
        if drawn is None:
            return None
        asked = f"{drawn.broken}: {drawn.spec}"
        return Draft(
            content=repr((asked, drawn.wrong, drawn.returns)),
            key=asked,
            prompt=(user(f"fix {asked}"),),
            files=drawn.files(),
            data=drawn.data(),
            difficulty=float(len(drawn.functions[drawn.broken]) + c.modules),
        )

    def bad_habits(self, task: Task) -> tuple[str, ...]:
        """Saying it is done, reading only, editing what was not read, and taking a wrong repair for a right one."""
        return ("claims", "looks", "blind", "botches")

    def script(self, task: Task, habit: str, rng: Random) -> Script:
        """A good one botches first at times, and puts that right; a bad one takes ``fail`` for an end."""
        asked = Repository.from_data(task.data)
        wanted, name = list(asked.functions[asked.broken]), asked.broken
        if habit in ("claims", "blind"):
            if habit == "blind":
                yield use("edit", path=f"{asked.homes[name]}.py", old=line(rng.choice(BLIND)), new=line(wanted[-1]))
            yield say(DONE)
            return
        if habit not in (GOOD, "looks", "botches"):
            raise ValueError(f"no habit {habit!r}; {GOOD} or one of {self.bad_habits(task)}")
        hit = yield use("search", text=f"def {name}")
        path = hit.content.split(":")[0]
        shown = yield use("read", path=path)
        text = shown.content
        if habit == "botches" or (habit == GOOD and rng.random() < self.config.recover):
            body, new = _body(text, name), _botched(asked, rng)
            if new != body:
                text = yield from _replace(text, path, body, new)
                yield use("test")
        if habit == GOOD:
            right = source(name, wanted).splitlines()
            yield from _replace(text, path, _body(text, name), right)
            yield use("test")
        yield say(DONE)

    async def open(self, task: Task) -> CodeSession:
        """A session with a sandbox of its own. Raises SandboxError if it cannot be had."""
        sandbox = await open_sandbox(self.config.sandbox)
        try:
            for path, text in task.files.items():
                await sandbox.write(path, text.encode())
        except BaseException:
            with contextlib.suppress(SandboxError):  # what went wrong first is told; a cancellation stays one
                await sandbox.close()
            raise
        return CodeSession(task, sandbox, self.config)


BLIND: Sequence[Op] = (("map", 0), ("key", 0), ("sun", 0))
"""Lines that nobody has seen: calls of what may be there."""


def _body(text: str, name: str) -> list[str]:
    """The function's lines."""
    lines = text.splitlines()
    start = lines.index(f"def {name}(s):")
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
    return lines[start:end]


def _botched(asked: Repository, rng: Random) -> list[str]:
    """The function with a bug, another one than the files have if there is one."""
    for kind in rng.sample(BUGS, len(BUGS)):
        broken = break_ops(asked.functions[asked.broken], kind, asked.functions, rng)
        if broken is not None and broken != (list(asked.wrong), asked.returns):
            return source(asked.broken, *broken).splitlines()
    return source(asked.broken, asked.wrong, asked.returns).splitlines()


def _replace(text: str, path: str, old: list[str], new: list[str]) -> Generator[Message, Message, str]:
    """The smallest edit that turns the lines ``old`` into ``new``, with so much around it that it is unique; returns
    the text that it leaves. Knows only what was read. The first line, a function's head, is in both and unique."""
    first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    while text.count(before := "\n".join(old[first : len(old) - last])) != 1:
        first, last = (first - 1, last) if first else (first, last - 1)
    after = "\n".join(new[first : len(new) - last])
    yield use("edit", path=path, old=before, new=after)
    return text.replace(before, after)


__all__ = ["Code", "CodeConfig", "CodeSession"]
