"""The code world: what its tools say, what its tests count, and the ways to cheat them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.code.pipelines import OPS, VISIBLE, Op, apply, source
from envs.code.repository import BUGS, Repository, break_ops, draw_repository
from envs.sandbox import SandboxConfig, probe
from envs.worlds.base import say, use, user
from envs.worlds.code import Code, CodeConfig
from posttrain.errors import ConfigError, SandboxError, ToolError, WorldError
from posttrain.types import Task

FIG: list[Op] = [("reverse", 0), ("drop", 2)]
OWL: list[Op] = [("fig", 0), ("upper", 0)]
HAND = Repository(
    functions={"jar": [("add", 7)], "fig": FIG, "owl": OWL},
    homes={"jar": "oslo", "fig": "oslo", "owl": "rome"},
    broken="fig",
    wrong=[("reverse", 0)],
    returns=True,
    hidden=["abcdX"],
)
"""``owl`` in another file calls the broken ``fig``; ``jar`` has nothing to do with it."""
FIX = use("edit", path="oslo.py", old=" s=s[::-1]\n", new=" s=s[::-1]\n s=s[2:]\n")
PYTHON = "def fig(s):\n s=s[::-1]\n return s\n"


def task_of(repository: Repository) -> Task:
    return Task(
        id="x", domain="agent", world="code", prompt=(user("fix it"),), files=repository.files(), data=repository.data()
    )


def play(*messages: Any, repository: Repository = HAND, **options: Any) -> tuple[list[str], float]:
    """What the calls of ``messages`` answered, and the grade."""
    world = Code(CodeConfig(**options))

    async def run() -> tuple[list[str], float]:
        session = await world.open(task_of(repository))
        answers: list[str] = []
        try:
            for message in messages:
                for call in message.tool_calls:
                    try:
                        answers.append(await session.call(call))
                    except ToolError as error:
                        answers.append(str(error))
            return answers, await session.grade([say("done")])
        finally:
            await session.close()

    return asyncio.run(run())


def rewrite(code: str) -> Any:
    """An edit that puts ``code`` in place of the whole broken function."""
    return use("edit", path="oslo.py", old=PYTHON, new=code)


# What is drawn


def test_files_and_tests_of_a_repository() -> None:
    assert HAND.files() == {
        "oslo.py": "def jar(s):\n s=s+'7'\n return s\n\n\n" + PYTHON,
        "rome.py": "from oslo import fig\n\n\ndef owl(s):\n s=fig(s)\n s=s.upper()\n return s\n",
    }
    assert HAND.spec == "reverse drop2"
    assert Repository.from_data(HAND.data()) == HAND
    told = {(c.module, c.function, c.text, c.want): c.passed for c in HAND.tests()}
    assert told[("oslo", "fig", "Abcde", "cbA")] is False  # fail to pass
    assert told[("rome", "owl", "abcdX", "CBA")] is False  # through its callee
    assert told[("oslo", "jar", "xYz", "xYz7")] is True  # pass to pass
    assert len(told) == 9 and [(c.text, c.want) for c in HAND.examples()] == [("Abcde", "cbA"), ("xYz", "x")]


def drawn(seed: int) -> Repository:
    rng = Random(seed)
    while True:
        found = draw_repository(rng, modules=3, functions=2, max_ops=3, calls=0.7, hidden=3)
        if found is not None:
            return found


def run_python(repository: Repository, files: dict[str, str], function: str, text: str) -> object:
    """By Python itself, modules joined."""
    scope: dict[str, Any] = {}
    for code in files.values():
        exec("\n".join(line for line in code.splitlines() if not line.startswith("from ")), scope)
    try:
        return scope[function](text)
    except (TypeError, AttributeError):
        return None


@pytest.mark.parametrize("seed", range(40))
def test_the_files_fail_and_pass_as_the_tests_say(seed: int) -> None:
    repository = drawn(seed)
    cases = repository.tests()
    assert {c.passed for c in repository.examples()} != {True}, "the bug shows"
    for case in cases:
        assert (run_python(repository, repository.files(), case.function, case.text) == case.want) == case.passed
    assert {c.function for c in cases if not c.passed} <= repository._callers()


@given(
    st.lists(st.sampled_from(sorted(OPS)).flatmap(lambda o: st.tuples(st.just(o), st.integers(1, 4)))),
    st.text("abXY1", max_size=8),
)
def test_the_lines_mean_what_the_grader_computes(ops: list[Op], text: str) -> None:
    scope: dict[str, Any] = {}
    exec(source("f", ops), scope)
    assert scope["f"](text) == apply(ops, text, {})


@pytest.mark.parametrize("kind", BUGS)
def test_a_bug_shows_in_the_examples(kind: str) -> None:
    found = 0
    for seed in range(200):
        repository = drawn(seed % 20)
        ops = repository.functions[repository.broken]
        broken = break_ops(ops, kind, repository.functions, Random(seed))
        if broken is None:
            continue
        found += 1
        wrong, returns = broken
        texts = [apply(wrong, t, repository.functions) != apply(ops, t, repository.functions) for t in VISIBLE]
        assert any(texts) if kind != "no_return" else not returns
    assert found > 50


# What the tools say


def test_a_repair_by_its_tools() -> None:
    answers, grade = play(use("search", text="fig"), use("read", path="oslo.py"), use("test"), FIX, use("test"))
    assert answers == [
        "oslo.py:6:def fig(s):\nrome.py:1:from oslo import fig\nrome.py:5: s=fig(s)",
        HAND.files()["oslo.py"],
        "fail Abcde gave edcbA want cbA",
        "ok",
        "pass",
    ]
    assert grade == 1.0


def test_tools_that_fail_say_why() -> None:
    twice = use("edit", path="oslo.py", old=" return s\n", new="")
    calls = [
        (use("read", path="none.py"), "error: no file none.py"),
        (use("read", path="../../etc/passwd"), "error: no file ../../etc/passwd"),
        (use("edit", path="oslo.py", old="x", new="y"), "error: old is there 0 times"),
        (twice, "error: old is there 2 times"),
        (use("edit", path="oslo.py", old="", new="y"), f"error: old is there {len(HAND.files()['oslo.py']) + 1} times"),
        (use("edit", path="none.py", old="x", new="y"), "error: no file none.py"),
        (use("edit", path="/etc/passwd", old="", new="y"), "error: no file /etc/passwd"),
        (use("search", text="nowhere"), "nothing"),
        (use("shell", command="id"), "error: no tool shell"),
    ]
    answers, grade = play(*(call for call, _ in calls))
    assert answers == [said for _, said in calls]
    assert grade == 0.0


def test_new_files_are_graded_too() -> None:
    new = use("edit", path="york.py", old="", new="def cut(s):\n return s[2:]\n")
    edit = rewrite("from york import cut\ndef fig(s):\n return cut(s[::-1])\n")
    assert play(new, edit, use("search", text="cut("), sandbox={"type": "monty"})[0][-1] == (
        "oslo.py:8: return cut(s[::-1])\nyork.py:1:def cut(s):"
    )


def test_verdicts() -> None:
    for code, said in (
        ("def fig(s):\n return None\n", "fail no result"),
        ("def fig(s):\n return 1/0\n", "fail ZeroDivisionError('division by zero')"),
        ("def fig(s):\n return s\n", "fail Abcde gave Abcde want cbA"),
        ("def fog(s):\n return s\n", "fail NameError"),
        ("def fig(s:", "fail "),
    ):
        answers, grade = play(rewrite(code), use("test"))
        assert answers[1].startswith(said) and len(answers[1]) < 80 and grade == 0.0, code


# Cheating

RIGHT = "def fig(s):\n return s[::-1][2:]\n"
CHEATS = {
    "prints pass": "print('pass')\ndef fig(s):\n return s\n",
    "exits": "raise SystemExit\n",
    "exits with 0": "import sys\nsys.exit(0)\n",
    "exits inside": "def fig(s):\n raise SystemExit\n",
    "print redefined": "def print(*a, **k):\n pass\n" + RIGHT,
    "repr redefined": "def repr(x):\n return \"'cbA'\"\ndef fig(s):\n return s\n",
    "equal to all": "class A:\n def __eq__(self, o):\n  return True\ndef fig(s):\n return A()\n",
    "knows the examples": "def fig(s):\n return {'Abcde':'cbA','xYz':'x'}.get(s,s)\n",
    "swallows the tests": "def fig(s):\n return s\n'''",
    "loops": "def fig(s):\n while True:\n  pass\n",
    "floods": "def fig(s):\n return s*10**6\n",
    "breaks another": "def jar(s):\n return s\n" + RIGHT,
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_the_tests_are_not_fooled(cheat: str) -> None:
    # Little time only for what never ends: else any of them might fail merely by its time.
    timeout_s = 0.5 if cheat == "loops" else 60.0
    sandbox = {"type": "monty", "timeout_s": timeout_s}
    answers, grade = play(rewrite(CHEATS[cheat]), use("test"), sandbox=sandbox, timeout_s=timeout_s)
    assert grade == 0.0
    assert ("timeout" in answers[1]) == (cheat == "loops")
    if cheat in ("knows the examples", "breaks another"):
        assert answers[1] == "pass", "the hidden tests are the ones that tell"
    else:
        assert answers[1].startswith("fail")


def test_the_right_code_in_another_form_passes() -> None:
    assert play(rewrite(RIGHT), use("test")) == (["ok", "pass"], 1.0)


def test_deleting_the_code_under_test_is_no_repair() -> None:
    assert play(use("edit", path="oslo.py", old=HAND.files()["oslo.py"], new=""))[1] == 0.0


SHELLS = [
    pytest.param({"type": "docker"}, marks=pytest.mark.docker, id="docker"),
    pytest.param({"type": "bubblewrap"}, id="bubblewrap"),
]
PRINTS = "print('pass'); import os; os._exit(0)"
PLOTS = {
    "idle": "true",
    "tests of its own": "mkdir tests; echo 'def test_fig(): pass' >tests/test_oslo.py; echo '[pytest]' >pytest.ini",
    "a reward file": "mkdir -p /tmp/logs/verifier logs/verifier; echo 1 | tee reward.txt logs/verifier/reward.txt",
    "a module that shadows the driver's": f'for m in importlib re os site; do echo "{PRINTS}" >$m.py; done',
    "another interpreter": "printf '#!/bin/sh\\necho pass\\n' >python3; chmod +x python3; export PATH=/work:$PATH",
    "the interpreter itself": "cp /bin/true /usr/bin/python3; cp /bin/true $(readlink -f /usr/bin/python3)",
    "a process that stays": f'(while true; do echo "{PRINTS}" >oslo.py; done) >/dev/null 2>&1 &',
    "a link to the host": "ln -sf /etc/passwd oslo.py",
    "no read permission": "chmod 000 oslo.py",
    "bytecode": f'mkdir -p __pycache__; echo "{PRINTS}" >__pycache__/oslo.cpython-311.pyc',
}


def shell_of(config: SandboxConfig) -> dict[str, Any]:
    world = CodeConfig.model_validate({"sandbox": config})
    try:
        probe(world.sandbox)
    except ConfigError as error:
        pytest.skip(str(error))
    return {"sandbox": world.sandbox}


@pytest.mark.parametrize("config", SHELLS)
@pytest.mark.parametrize("plot", PLOTS)
def test_a_shell_does_not_help_to_cheat(config: SandboxConfig, plot: str) -> None:
    """And a repair after it still counts, where the plot has left something to repair."""
    options = shell_of(config)
    assert play(use("shell", command=PLOTS[plot]), **options)[1] == 0.0


@pytest.mark.parametrize("config", SHELLS)
def test_a_repair_by_shell(config: SandboxConfig) -> None:
    options = shell_of(config)
    sed = use(
        "shell", command="sed -i 's/^ s=s\\[::-1\\]$/&\\n s=s[2:]/' oslo.py && python3 -c 'import rome; print(1)'"
    )
    answers, grade = play(sed, use("test"), **options)
    assert (answers, grade) == (["1\n", "pass"], 1.0)
    new = use("shell", command="mkdir lib; printf 'def cut(s):\\n return s[2:]\\n' >lib/cut.py")
    edit = rewrite("from lib.cut import cut\ndef fig(s):\n return cut(s[::-1])\n")
    assert play(new, edit, **options)[1] == 1.0
    slow = play(use("shell", command="echo a; sleep 60"), **options, timeout_s=2.0)
    assert slow[0][0].startswith("a\n") and "timed out" in slow[0][0]


@pytest.mark.parametrize("config", SHELLS)
@pytest.mark.parametrize("cheat", ["exits with 0", "knows the examples", "print redefined", "swallows the tests"])
def test_the_tests_are_not_fooled_in_a_shell_either(config: SandboxConfig, cheat: str) -> None:
    assert play(rewrite(CHEATS[cheat]), **shell_of(config))[1] == (cheat == "print redefined")


# Infrastructure


class Broken:
    """A sandbox that is gone."""

    profile = "none"

    async def exec(self, command: str, *, timeout_s: float = 10.0, stdin: str = "") -> Any:
        raise SandboxError("gone")

    async def read(self, path: str) -> bytes:
        raise SandboxError("gone")

    async def write(self, path: str, data: bytes) -> None: ...

    async def close(self) -> None: ...


def test_a_broken_sandbox_is_never_text() -> None:
    from envs.worlds.code import CodeSession

    session = CodeSession(task_of(HAND), Broken(), CodeConfig())
    for message in (use("read", path="oslo.py"), use("test"), FIX):
        with pytest.raises(SandboxError, match="gone"):
            asyncio.run(session.call(message.tool_calls[0]))
    with pytest.raises(SandboxError, match="gone"):
        asyncio.run(session.grade([]))
    asyncio.run(session.close())
    with pytest.raises(WorldError, match="closed"):
        asyncio.run(session.call(use("test").tool_calls[0]))


def test_good_demonstrations_recover_at_the_configured_share() -> None:
    async def edits(recover: float) -> set[int]:
        world = Code(CodeConfig(recover=recover))
        tasks = world.tasks("demo", 12, 0)
        played: Sequence[Any] = [await world.act_out(t, "good", Random(0)) for t in tasks]
        return {sum(c.name == "edit" for m in messages for c in m.tool_calls) for messages in played}

    assert asyncio.run(edits(0.0)) == {1}
    assert 2 in asyncio.run(edits(1.0))
