"""The code world: what its session says, what it counts, and the ways to cheat it."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.worlds.base import say
from envs.worlds.code import OPS, VISIBLE, Code, CodeConfig, CodeSession, apply, source
from posttrain.errors import SandboxError, ToolError
from posttrain.types import ExecResult, Task, ToolCall


def _code(ops: list[list[Any]] | None = None, **options: Any) -> tuple[Code, Task]:
    world = Code(CodeConfig(**options))
    task = world.tasks("eval", 1, 0)[0]
    if ops is None:
        return world, task
    data = {**task.data, "ops": ops}
    return world, Task(id="x", domain="agent", world="code", prompt=task.prompt, data=data)


def _submit(task: Task, world: Code, *codes: str) -> tuple[list[str], float]:
    async def run() -> tuple[list[str], float]:
        session = await world.open(task)
        try:
            answers = [await session.call(ToolCall(name="submit", arguments={"code": code})) for code in codes]
            return answers, await session.grade([say("done")])
        finally:
            await session.close()

    return asyncio.run(run())


OPS2 = [["reverse", 0], ["drop", 2]]
RIGHT = "def f(s):\n s=s[::-1]\n s=s[2:]\n return s"


def test_code_reports_the_examples() -> None:
    world, task = _code(OPS2)
    assert _submit(task, world, RIGHT) == (["pass"], 1.0)
    assert _submit(task, world, "def f(s):\n return s")[0] == ["fail Abcde gave Abcde want cbA"]
    assert _submit(task, world, "def f(s):\n pass")[0] == ["fail Abcde gave None want cbA"]
    assert "ZeroDivisionError" in _submit(task, world, "def f(s):\n return 1/0")[0][0]
    assert "NameError" in _submit(task, world, "def g(s):\n return s")[0][0]
    assert _submit(task, world, "def f(s:")[0][0].startswith("fail ")
    assert _submit(task, world, "")[1] == 0.0


def test_code_counts_the_last_submission_and_bounds_their_number() -> None:
    world, task = _code(OPS2)
    wrong = "def f(s):\n return s"
    assert _submit(task, world, wrong, RIGHT)[1] == 1.0
    assert _submit(task, world, RIGHT, wrong)[1] == 0.0
    with pytest.raises(ToolError, match="no tries"):
        _submit(task, world, wrong, wrong, RIGHT)


CHEATS = {
    "prints pass": "print('pass')\ndef f(s):\n return s",
    "exits": "raise SystemExit",
    "exits with 0": "import sys\nsys.exit(0)",
    "exits inside": "def f(s):\n raise SystemExit",
    "print redefined": "def print(*a):\n pass\ndef f(s):\n return s",
    "repr redefined": "def repr(x):\n return \"'cbA'\"\ndef f(s):\n return s",
    "equal to all": "class A:\n def __eq__(self, o):\n  return True\n def __repr__(self):\n  return 'pass'\n"
    "def f(s):\n return A()",
    "knows the examples": "def f(s):\n return {'Abcde':'cbA','xYz':'x'}.get(s,s)",
    "guesses the mark": "def f(s):\n for i in range(99):\n  print(str(i)+\"'cbA'\")\n return s",
    "swallows the tests": "def f(s):\n return s\n'''",
    "loops": "def f(s):\n while True:\n  pass",
    "floods": "def f(s):\n return s*10**6",
    "prints what it is told to": "o=print\ndef print(x):\n o(x)\n o(x)\ndef f(s):\n return s",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_code_is_not_fooled(cheat: str) -> None:
    world, task = _code(OPS2, timeout_s=0.5)
    answers, grade = _submit(task, world, CHEATS[cheat])
    assert grade == 0.0
    if cheat == "knows the examples":
        assert answers == ["pass"], "the hidden inputs are the ones that tell"
    else:
        assert answers[0].startswith("fail")
    assert len(answers[0]) < 120


class _Recorder:
    """A sandbox that keeps what it was given."""

    def __init__(self, broken: bool = False) -> None:
        self.programs: list[str] = []
        self.stdin: list[str] = []
        self.closed = 0
        self.broken = broken

    async def exec(self, command: str, *, timeout_s: float = 10.0, stdin: str = "") -> ExecResult:
        if self.broken:
            raise SandboxError("gone")
        self.programs.append(command)
        self.stdin.append(stdin)
        return ExecResult(exit_code=0, stdout="", stderr="")

    async def read(self, path: str) -> bytes:
        raise FileNotFoundError(path)

    async def write(self, path: str, data: bytes) -> None: ...

    async def close(self) -> None:
        self.closed += 1


def test_what_is_wanted_never_enters_the_sandbox() -> None:
    world, task = _code(OPS2)
    sandbox = _Recorder()
    session = CodeSession(task.data, sandbox, world.config)
    asyncio.run(session.call(ToolCall(name="submit", arguments={"code": "def f(s):\n return s"})))
    program = sandbox.programs[0]
    ops = [(name, n) for name, n in OPS2]
    for text in (*VISIBLE, *task.data["hidden"]):
        assert repr(text) in program
        assert repr(apply(ops, text)) not in program
    assert task.data["secret"] not in program
    asyncio.run(session.close())
    asyncio.run(session.close())
    assert sandbox.closed == 1


def test_a_container_gets_the_program_on_its_standard_input() -> None:
    world, task = _code(OPS2, sandbox={"type": "docker"})
    sandbox = _Recorder()
    session = CodeSession(task.data, sandbox, world.config)
    asyncio.run(session.call(ToolCall(name="submit", arguments={"code": RIGHT})))
    assert sandbox.programs == ["python3 -I -"]
    assert sandbox.stdin[0].startswith(RIGHT + "\nprint(")


@pytest.mark.docker
def test_code_runs_in_a_container() -> None:
    world, task = _code(OPS2, sandbox={"type": "docker"}, timeout_s=10.0)
    assert _submit(task, world, RIGHT) == (["pass"], 1.0)
    for cheat in ("exits with 0", "knows the examples", "print redefined", "swallows the tests"):
        assert _submit(task, world, CHEATS[cheat])[1] == 0.0


def test_a_broken_sandbox_is_never_text() -> None:
    world, task = _code(OPS2)
    session = CodeSession(task.data, _Recorder(broken=True), world.config)
    with pytest.raises(SandboxError, match="gone"):
        asyncio.run(session.call(ToolCall(name="submit", arguments={"code": RIGHT})))


@given(
    st.lists(st.sampled_from(sorted(OPS)).flatmap(lambda o: st.tuples(st.just(o), st.integers(1, 4)))),
    st.text("abXY1", max_size=8),
)
def test_the_lines_mean_what_the_grader_computes(ops: list[tuple[str, int]], text: str) -> None:
    """The Python that a good demonstration writes, run by Python itself."""
    scope: dict[str, Any] = {}
    exec(source(ops), scope)
    assert scope["f"](text) == apply(ops, text)


def test_good_demonstrations_recover_at_the_configured_share() -> None:
    async def turns(recover: float) -> set[int]:
        world = Code(CodeConfig(recover=recover))
        tasks = world.tasks("demo", 10, 0)
        return {sum(bool(m.tool_calls) for m in await world.act_out(t, "good", Random(0))) for t in tasks}

    assert asyncio.run(turns(0.0)) == {1}
    assert asyncio.run(turns(1.0)) == {2}
