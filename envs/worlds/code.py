"""Write a Python function from a list of string operations; a sandbox runs it.

What is wanted is computed here and never enters the sandbox, so code that is run there can redefine, print or exit as
it likes: it cannot print values that it does not know how to compute. Lines of results carry a mark that depends on
the task's private data and on the code itself, so that what the code prints is not taken for a result either.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field

from envs.sandbox import DockerConfig, MontyConfig, SandboxConfig, open_sandbox
from envs.worlds.base import GOOD, Draft, Script, ScriptedWorld, WorldOptions, arguments, say, use, user
from posttrain.errors import ToolError, WorldError
from posttrain.protocols import Sandbox
from posttrain.types import ExecResult, Limits, Message, Task, Tool, ToolCall

DONE = "done"

SUBMIT = Tool(name="submit", description="run your code", parameters={"code": "string"})

OPS: Mapping[str, tuple[str, Callable[[str, int], str]]] = {
    "reverse": ("s=s[::-1]", lambda s, n: s[::-1]),
    "double": ("s=s+s", lambda s, n: s + s),
    "upper": ("s=s.upper()", lambda s, n: s.upper()),
    "lower": ("s=s.lower()", lambda s, n: s.lower()),
    "add": ("s=s+'{n}'", lambda s, n: f"{s}{n}"),
    "put": ("s='{n}'+s", lambda s, n: f"{n}{s}"),
    "drop": ("s=s[{n}:]", lambda s, n: s[n:]),
    "chop": ("s=s[:-{n}]", lambda s, n: s[:-n]),
    "head": ("s=s[:{n}]", lambda s, n: s[:n]),
    "tail": ("s=s[-{n}:]", lambda s, n: s[-n:]),
}
"""Name to its line of Python and its meaning here; those with ``{n}`` take a number."""

VISIBLE = ("Abcde", "xYz")
"""Inputs of the examples that ``submit`` reports on."""

Op = tuple[str, int]
"""Name and number; 0 for an operation without one."""


def apply(ops: Sequence[Op], text: str) -> str:
    """What the pipeline makes of ``text``."""
    for name, n in ops:
        text = OPS[name][1](text, n)
    return text


def source(ops: Sequence[Op], returns: bool = True) -> str:
    """The pipeline as a Python function, one line an operation."""
    lines = ["def f(s):", *(" " + OPS[name][0].format(n=n) for name, n in ops)]
    return "\n".join([*lines, " return s"] if returns or not ops else lines)


def spell(ops: Sequence[Op]) -> str:
    """The pipeline in words: ``drop2 reverse``."""
    return " ".join(f"{name}{n or ''}" for name, n in ops)


class CodeConfig(WorldOptions):
    """Options of the pipelines."""

    type: Literal["code"] = "code"
    sandbox: SandboxConfig = MontyConfig()
    """Where submitted code runs."""
    max_ops: int = Field(default=3, ge=1, le=6)
    """Most operations of a pipeline."""
    tries: int = Field(default=2, ge=1, le=5)
    """How often code may be submitted; the last one counts."""
    recover: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of good demonstrations that fail first and then put it right."""
    hidden: int = Field(default=6, ge=1, le=50)
    """Inputs that only the grader sees."""
    timeout_s: float = Field(default=5.0, gt=0.0)
    """Seconds one submission may run."""


class CodeSession:
    """Runs what is submitted on the examples and on the hidden inputs, and tells of the examples only."""

    tools = (SUBMIT,)

    def __init__(self, data: Mapping[str, Any], sandbox: Sandbox, config: CodeConfig) -> None:
        self._ops: list[Op] = [(name, n) for name, n in data["ops"]]
        self._inputs: list[str] = [*VISIBLE, *data["hidden"]]
        self._secret: str = data["secret"]
        self._sandbox: Sandbox | None = sandbox
        self._config = config
        self._tries = 0
        self._solved = False

    async def call(self, call: ToolCall) -> str:
        """``pass``, or ``fail`` with the first example that went wrong or the error's last line."""
        code: str = arguments(self.tools, call)["code"]
        if self._tries == self._config.tries:
            raise ToolError("error: no tries")
        self._tries += 1
        self._solved = False
        mark = hashlib.sha256(f"{self._secret}/{code}".encode(errors="replace")).hexdigest()[:16]
        result = await self._run(code + _driver(self._inputs, mark))
        got = _results(result, mark, len(self._inputs))
        want = [apply(self._ops, text) for text in self._inputs]
        self._solved = got == want
        return _verdict(result, got, want)

    async def _run(self, program: str) -> ExecResult:
        if self._sandbox is None:
            raise WorldError("the code session is closed")
        match self._config.sandbox:
            case MontyConfig():
                return await self._sandbox.exec(program, timeout_s=self._config.timeout_s)
            case DockerConfig():
                return await self._sandbox.exec("python3 -I -", timeout_s=self._config.timeout_s, stdin=program)

    async def reply(self, message: Message) -> Message | None:
        """None: the request was the only one."""
        return None

    async def grade(self, messages: Sequence[Message]) -> float:
        """1 if the code submitted last was right on every input; what was said counts for nothing."""
        return float(self._solved)

    async def close(self) -> None:
        """Close the sandbox; idempotent."""
        if self._sandbox is not None:
            await self._sandbox.close()
            self._sandbox = None


def _driver(inputs: Sequence[str], mark: str) -> str:
    """Prints one marked line an input, on a line of its own whatever was printed before."""
    return "\n" + "\n".join(f"print('\\n{mark}' + repr(f({text!r})))" for text in inputs) + "\n"


def _results(result: ExecResult, mark: str, n: int) -> list[Any]:
    """The values of the marked lines, at most ``n``; a line that holds no plain value gives None."""
    lines = [line.removeprefix(mark) for line in result.stdout.split("\n") if line.startswith(mark)]
    if len(lines) > n:
        return []
    values: list[Any] = []
    for line in lines:
        try:
            values.append(ast.literal_eval(line))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values.append(None)
    return values


def _verdict(result: ExecResult, got: Sequence[Any], want: Sequence[str]) -> str:
    for i, text in enumerate(VISIBLE):
        if i < len(got) and got[i] == want[i]:
            continue
        if i < len(got):
            return f"fail {text} gave {str(got[i])[:20]} want {want[i]}"
        lines = result.stderr.strip().splitlines()
        return "fail timeout" if result.timed_out else f"fail {lines[-1][:60] if lines else 'no result'}"
    return "pass"


class Code(ScriptedWorld):
    """``write f: drop2 reverse`` -> ``submit(code)``, one line an operation -> ``pass`` -> ``done``."""

    kind: ClassVar[str] = "code"
    domain = "agent"

    def __init__(self, config: CodeConfig, name: str = "code") -> None:
        super().__init__(name, config.habit)
        self.config = config
        # A turn for each try, one for the last word and one to lose; a line is eleven tokens.
        self.limits = Limits(max_turns=config.tries + 2, max_tokens=48 + 16 * config.max_ops, timeout_s=60.0)

    def draft(self, rng: Random) -> Draft | None:
        """A pipeline in which every operation matters to the examples, so that each bad habit shows there."""
        ops = [_draw(rng) for _ in range(rng.randint(1, self.config.max_ops))]
        if not all(_differ(ops[:i] + ops[i + 1 :], ops) for i in range(len(ops))):
            return None
        words = spell(ops)
        # Hidden inputs hang on the pipeline alone: the same task has the same tests under every seed.
        own = Random(f"code/{words}")
        hidden = ["".join(own.choices("abcdeXYZ", k=own.randint(4, 9))) for _ in range(self.config.hidden)]
        return Draft(
            content=words,
            key=words,
            prompt=(user(f"write f: {words}"),),
            data={"ops": ops, "hidden": hidden, "secret": f"{own.getrandbits(64):x}"},
            difficulty=float(len(ops)),
        )

    def bad_habits(self, task: Task) -> tuple[str, ...]:
        """Forgetting the last operation, forgetting to return, not submitting, one operation wrong."""
        return ("forgets", "no_return", "claims", "swaps")

    def script(self, task: Task, habit: str, rng: Random) -> Script:
        """A good one fails first at times; a bad one takes ``fail`` for an end."""
        ops: list[Op] = [(name, n) for name, n in task.data["ops"]]
        match habit:
            case "good":
                if self.config.tries > 1 and rng.random() < self.config.recover:
                    yield use("submit", code=_broken(ops, rng.choice(("forgets", "no_return", "swaps")), rng))
                yield use("submit", code=source(ops))
                yield say(DONE)
            case "claims":
                yield say(DONE)
            case "forgets" | "no_return" | "swaps":
                yield use("submit", code=_broken(ops, habit, rng))
                yield say(DONE)
            case _:
                raise ValueError(f"no habit {habit!r}; {GOOD} or one of {self.bad_habits(task)}")

    async def open(self, task: Task) -> CodeSession:
        """A session with a sandbox of its own. Raises SandboxError if it cannot be had."""
        return CodeSession(task.data, await open_sandbox(self.config.sandbox), self.config)


def _draw(rng: Random) -> Op:
    name = rng.choice(tuple(OPS))
    if "{n}" not in OPS[name][0]:
        return name, 0
    return name, rng.randint(1, 9 if name in ("add", "put") else 4)


def _differ(one: Sequence[Op], other: Sequence[Op]) -> bool:
    return any(apply(one, text) != apply(other, text) for text in VISIBLE)


def _broken(ops: list[Op], habit: str, rng: Random) -> str:
    if habit == "no_return":
        return source(ops, returns=False)
    if habit == "forgets":
        return source(ops[:-1])
    at = rng.randrange(len(ops))
    for _ in range(100):
        wrong = [*ops[:at], _draw(rng), *ops[at + 1 :]]
        if _differ(wrong, ops):
            return source(wrong)
    return source(ops[:-1])
