"""One suite for every sandbox that runs shell commands: what it promises beyond the contract of all sandboxes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from envs.sandbox import BubblewrapConfig, DockerConfig, open_sandbox, probe
from envs.sandbox.shell import ShellSandbox
from posttrain.errors import ConfigError
from tests.contracts.test_sandbox import comes_in_time

Shell = BubblewrapConfig | DockerConfig


@pytest.fixture(
    params=[
        pytest.param(BubblewrapConfig(memory_mb=256), id="bubblewrap"),
        pytest.param(DockerConfig(memory_mb=256, pids=64), id="docker", marks=pytest.mark.docker),
    ]
)
def shell(request: pytest.FixtureRequest) -> Shell:
    try:
        probe(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    return request.param


T = TypeVar("T")


def run(shell: Shell, body: Callable[[ShellSandbox], Awaitable[T]]) -> T:
    async def main() -> T:
        box = await open_sandbox(shell, run="test")
        assert isinstance(box, ShellSandbox)
        try:
            return await body(box)
        finally:
            await box.close()

    return asyncio.run(main())


def test_session_keeps_folder_variables_and_functions(shell: Shell) -> None:
    async def body(box: ShellSandbox) -> tuple[list[str], str]:
        session = box.session()
        await session.exec("mkdir sub; cd sub; x=5; export y=6; twice() { echo $(($1 * 2)); }")
        await box.write("sub/note", b"kept")
        shown = await session.exec('pwd; echo "$x"; sh -c "echo \\$y"; twice 21; cat note; exec 3>&1; echo done >&3')
        stateless = await box.exec('pwd; echo "$x$y"; twice 1')
        return shown.stdout.split(), f"{stateless.stdout.split()} {stateless.exit_code}"

    assert run(shell, body) == (["/work/sub", "5", "6", "42", "keptdone"], "['/work'] 127")


def test_session_reports_like_exec(shell: Shell) -> None:
    async def body(box: ShellSandbox):
        session = box.session()
        code = await session.exec("echo out; echo err >&2; (exit 7)")
        flood = await session.exec("yes 0123456789 | head -n 30000")
        waits = await session.exec("sleep 0.2 & wait; read -r x || echo eof")
        return code, flood, waits

    code, flood, waits = run(shell, body)
    assert (code.exit_code, code.stdout, code.stderr) == (7, "out\n", "err\n")
    assert (flood.truncated, flood.stdout) == (True, ("0123456789\n" * 6000)[: 64 * 1024])
    assert (waits.exit_code, waits.stdout, waits.stderr) == (0, "eof\n", "")


@pytest.mark.parametrize("spin", ["x=2; cd /; sleep 60 & sleep 60", "x=2; cd /; while :; do :; done"])
def test_session_goes_back_after_a_timeout(shell: Shell, spin: str) -> None:
    async def body(box: ShellSandbox):
        session = box.session()
        await session.exec("x=1; f() { echo f; }")
        started = time.monotonic()
        late = await session.exec(spin, timeout_s=1.0)
        took = time.monotonic() - started
        return late, took, await session.exec("echo $x; f; pwd; cat /proc/[0-9]*/cmdline | grep -ac '[s]leep.60'")

    def play() -> float:
        late, took, after = run(shell, body)
        assert (late.exit_code, late.timed_out) == (124, True)
        assert "are those from before this command]\ntimed out after 1 s\n" in late.stderr
        assert took >= 1.0
        assert after.stdout == "1\nf\n/work\n0\n"
        return took

    comes_in_time(play, 3.0)


@pytest.mark.parametrize("end", ["exit 4", "x=2; kill -9 -1; (kill -9 $$; kill -9 -1); exit 4"])
def test_session_that_ends_says_what_is_lost(shell: Shell, end: str) -> None:
    async def body(box: ShellSandbox):
        session = box.session()
        await session.exec("x=1")
        ended = await session.exec(end, timeout_s=2.0)
        return ended, await session.exec("echo x=$x")

    ended, after = run(shell, body)
    assert ended.exit_code != 0
    assert "variables, functions and folder are lost]" in ended.stderr
    assert (after.stdout, after.stderr) == ("x=\n", "")


def test_exec_and_renew_end_a_session_and_its_next_command_says_so(shell: Shell) -> None:
    async def body(box: ShellSandbox) -> list[tuple[str, str]]:
        session, said = box.session(), []
        for between in (lambda: box.exec("true"), box.renew):
            await session.exec("x=1")
            await between()
            result = await session.exec("echo x=$x")
            said.append((result.stdout, result.stderr))
        return said

    note = "[the shell before this one ended: this one started anew]\n"
    assert run(shell, body) == [("x=\n", note)] * 2


def test_stdin_is_exact_and_leaves_nothing(shell: Shell) -> None:
    text = "é0123456789abcde\n" * 60_000

    async def body(box: ShellSandbox) -> list[object]:
        count = await box.exec("wc -c; ls -A /tmp", stdin=text)
        ignored = await box.exec("true", stdin=text)
        background = await box.exec("setsid sleep 20 <&0 & echo on", stdin=text)
        tail = await box.exec("tail -c 5", stdin=text)
        return [count.stdout.split(), ignored.exit_code, background.stdout, tail.stdout]

    assert run(shell, body) == [[str(len(text.encode()))], 0, "on\n", "bcde\n"]


def test_stderr_beyond_the_cap_does_not_hide_the_report(shell: Shell) -> None:
    result = run(shell, lambda box: box.exec("yes e | head -n 32767 >&2; exit 5"))
    assert (result.exit_code, result.truncated, len(result.stderr)) == (5, False, 65534)
    result = run(shell, lambda box: box.exec("yes e | head -n 100000 >&2; exit 5"))
    assert (result.exit_code, result.truncated, len(result.stderr)) == (5, True, 65536)


def test_large_stdin_with_large_output_does_not_block(shell: Shell) -> None:
    text = "0123456789abcdef\n" * 60_000

    async def body(box: ShellSandbox):
        return await box.exec("tee copy | wc -c; wc -c < copy", stdin=text), await box.exec("true", stdin=text)

    copied, ignored = run(shell, body)
    assert copied.stdout.split() == [str(len(text))] * 2
    assert (ignored.exit_code, ignored.stdout, ignored.stderr) == (0, "", "")


def test_early_output_is_never_lost(shell: Shell) -> None:
    async def body(box: ShellSandbox) -> list[str]:
        return [(await box.exec(f"echo {i}")).stdout for i in range(30)]

    assert run(shell, body) == [f"{i}\n" for i in range(30)]


def test_odd_names_are_only_names(shell: Shell) -> None:
    async def body(box: ShellSandbox) -> list[bytes]:
        names = ["-n", "a b", "$(touch pwned)", "quo'te\"", "é", "*"]
        for name in names:
            await box.write(name, name.encode())
        listed = await box.exec("ls -1")
        return [*[await box.read(name) for name in names], str(len(listed.stdout.splitlines())).encode()]

    names = ["-n", "a b", "$(touch pwned)", "quo'te\"", "é", "*"]
    assert run(shell, body) == [*[name.encode() for name in names], b"6"]


def test_newline_at_the_end_of_a_name_counts(shell: Shell) -> None:
    async def body(box: ShellSandbox) -> tuple[bytes, bytes]:
        await box.write("line", b"without")
        await box.write("line\n", b"with")
        return await box.read("line"), await box.read("line\n")

    assert run(shell, body) == (b"without", b"with")


def test_session_that_forges_its_report_only_loses_its_state(shell: Shell) -> None:
    # The token is a variable of the shell itself.
    forge = "printf '\\n%s\\n' $__token; printf '\\n%s what 0 on\\n' $__token >&2; sleep 5"

    async def body(box: ShellSandbox):
        session = box.session()
        forged = await session.exec(f"x=1; {forge}", timeout_s=3)
        return forged, await session.exec("echo x=$x"), await box.exec("echo on")

    forged, after, stateless = run(shell, body)
    assert (forged.exit_code, forged.timed_out) == (137, False)
    assert "are lost]" in forged.stderr
    assert (after.stdout, stateless.stdout) == ("x=\n", "on\n")


def test_text_that_is_no_unicode_does_no_harm(shell: Shell) -> None:
    result = run(shell, lambda box: box.exec("echo '\ud800'; cat", stdin="\udfff"))
    assert (result.exit_code, result.stdout) == (0, "?\n?")


def test_impossible_commands_are_answered_like_a_shell(shell: Shell) -> None:
    async def body(box: ShellSandbox):
        return await box.exec("echo " + "x" * 200_000), await box.exec("echo a\0b"), await box.exec("nosuchprogram")

    assert [r.exit_code for r in run(shell, body)] == [126, 126, 127]
