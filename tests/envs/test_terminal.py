"""Terminal tasks: folders are read as they are, references pass, idleness and cheating do not."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from envs.sandbox import NetworkConfig, probe
from envs.terminal.task import read_task, read_tasks
from envs.terminal.verifier import _reward, tampered
from envs.worlds.base import use
from envs.worlds.terminal import SHIPPED, Terminal, TerminalConfig
from posttrain.errors import ConfigError, RewardError
from posttrain.protocols import World
from posttrain.types import Task

NAMES = ["count-words", "fix-script", "sort-ledger"]


def copy(tmp_path: Path, name: str = "count-words") -> Path:
    return shutil.copytree(SHIPPED / name, tmp_path / name)


# Reading


def test_the_shipped_tasks_are_read() -> None:
    tasks = read_tasks(SHIPPED)
    assert [t.name for t in tasks] == [f"posttrain/{name}" for name in NAMES]
    assert all(t.solution and t.instruction and t.file.agent.timeout_sec == 120 for t in tasks)
    assert tasks[0].file.environment.memory_mb == 512


def test_the_smallest_task_and_unknown_keys(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "task.toml").write_text('version = "1.0"\nsource = "x"\n[metadata]\nhard = true\n[agent]\nuser = "me"\n')
    task = read_task(folder)
    assert (task.name, task.file.verifier.timeout_sec, task.file.environment.cpus) == ("count-words", 600.0, None)


REFUSED = {
    "steps": ('[[steps]]\nname = "one"\n', "steps: tasks of several steps"),
    "gpus": ("[environment]\ngpus = 1\n", "environment.gpus: a GPU"),
    "os": ('[environment]\nos = "windows"\n', "environment.os"),
    "mcp": ('[[environment.mcp_servers]]\nname = "x"\n', "environment.mcp_servers"),
    "health": ('[environment.healthcheck]\ncommand = "true"\n', "environment.healthcheck"),
    "separate": ('[verifier]\nenvironment_mode = "separate"\n', "verifier.environment_mode"),
    "user": ('[verifier]\nuser = "judge"\n', "verifier.user"),
    "collect": ('[[verifier.collect]]\ncommand = "true"\n', "verifier.collect"),
    "type": ("[agent]\ntimeout_sec = -1\n", "agent.timeout_sec: Input should be greater than 0"),
    "toml": ("[agent\n", "task.toml: "),
    "range": ('[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["10.0.0.0/8"]\n', "allowed_hosts: 10.0."),
    "nobody": ('[environment]\nnetwork_mode = "allowlist"\n', "environment.allowed_hosts: none: give names"),
    "mode": ('[environment]\nnetwork_mode = "some"\n', "environment.network_mode: Input should be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_played_is_refused_by_name(case: str, tmp_path: Path) -> None:
    folder = copy(tmp_path)
    text, said = REFUSED[case]
    (folder / "task.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_task(folder)
    assert said in str(caught.value) and str(folder / "task.toml") in str(caught.value)


def test_the_network_of_a_task_is_its_own_list_or_none_or_the_configs(tmp_path: Path) -> None:
    folder, offered = copy(tmp_path), NetworkConfig(allow=("pypi.org",))
    found = {}
    for mode in ("allowlist", "no-network", "public"):
        hosts = 'allowed_hosts = ["*.debian.org", "10.0.0.7"]\n'
        (folder / "task.toml").write_text(f'[environment]\nnetwork_mode = "{mode}"\n{hosts}')
        found[mode] = read_task(folder).network(offered)
    own = NetworkConfig(allow=("*.debian.org", "10.0.0.7"))
    assert found == {"allowlist": own, "no-network": None, "public": offered}


def test_missing_parts_are_named(tmp_path: Path) -> None:
    for part, said in (
        ("tests/test.sh", "tests/test.sh is missing"),
        ("instruction.md", "instruction.md"),
        ("environment/Dockerfile", "environment/Dockerfile"),
    ):
        folder = copy(tmp_path / part.replace("/", "-"))
        (folder / part).unlink()
        with pytest.raises(ConfigError, match=said):
            read_task(folder)
    (folder / "environment" / "docker-compose.yaml").write_text("services: {}\n")
    with pytest.raises(ConfigError, match="compose"):
        read_task(folder)
    with pytest.raises(ConfigError, match="no such folder"):
        read_tasks(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no"):
        read_tasks(tmp_path / "empty")


def test_tasks_of_a_split() -> None:
    world = Terminal(TerminalConfig())
    assert isinstance(world, World)
    assert [t.id for t in world.tasks("eval", 3, 0)] == [t.id for t in Terminal(TerminalConfig()).tasks("eval", 3, 0)]
    assert {t.id for t in world.tasks("eval", 3, 1)} == {f"terminal/eval/posttrain/{name}" for name in NAMES}
    with pytest.raises(ConfigError, match="has 3 tasks for eval, not 4"):
        world.tasks("eval", 4, 0)
    with pytest.raises(ConfigError, match="set its key `train` to a folder"):
        world.tasks("train", 1, 0)


# The verifier's word


@pytest.mark.parametrize(
    ("as_json", "as_text", "value"),
    [
        (None, "1\n", 1.0),
        (None, " 0.25 ", 0.25),
        ('{"reward": 0.5, "speed": 1}', "1", 0.5),
        ('{"score": 1}', None, 1.0),
    ],
)
def test_rewards_are_read(as_json: str | None, as_text: str | None, value: float) -> None:
    assert _reward("t", as_json, as_text) == value


@pytest.mark.parametrize(
    ("as_json", "as_text", "said"),
    [
        (None, None, "RewardFileNotFoundError"),
        (None, " \n", "RewardFileEmptyError"),
        ("", "1", "RewardFileEmptyError"),
        (None, "good", "VerifierOutputParseError"),
        (None, "nan", "VerifierOutputParseError"),
        (None, "inf", "VerifierOutputParseError"),
        (None, "3", "VerifierOutputParseError"),
        ("{", "1", "VerifierOutputParseError"),
        ('{"a": 1, "b": 0}', "1", "VerifierOutputParseError"),
        ("[1]", None, "VerifierOutputParseError"),
    ],
)
def test_a_verifier_without_a_reward_is_an_error_not_a_zero(as_json: str, as_text: str, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        _reward("t", as_json, as_text)


@pytest.mark.parametrize(
    ("kind", "path", "found"),
    [
        ("added", "/app/counts.tsv", False),
        ("added", "/usr/lib/python3/dist-packages/requests/api.py", False),
        ("added", "/usr/bin/jq", False),
        ("modified", "/usr/bin/python3.11", True),
        ("deleted", "/bin/sh", True),
        ("modified", "/lib/x86_64-linux-gnu/libc.so.6", True),
        ("added", "/usr/lib/python3/dist-packages/sitecustomize.py", True),
        ("added", "/usr/lib/python3/dist-packages/a.pth", True),
        ("added", "/usr/lib/python3/dist-packages/requests/__init__.py", False),
        ("added", "/usr/lib/python3.11/csv/__init__.py", True),
        ("added", "/usr/lib/python3.11/__pycache__/csv.cpython-311.pyc", False),
        ("added", "/usr/lib/python311.zip", True),
        ("added", "/usr/bin/pyvenv.cfg", True),
        ("added", "/etc/ld.so.preload", True),
        ("modified", "/etc/ld.so.cache", True),
        ("modified", "/etc/passwd", False),
    ],
)
def test_what_counts_as_tampering(kind: str, path: str, found: bool) -> None:
    assert (tampered([("added", "/app/x"), (kind, path)]) == path) == found


# Playing


@pytest.fixture(scope="module")
def world() -> Terminal:
    world = Terminal(TerminalConfig())
    try:
        probe(world.config.sandbox)
    except ConfigError as error:
        pytest.skip(str(error))
    return world


def play(world: Terminal, name: str, *commands: str) -> tuple[list[str], float]:
    """What the commands said, and the reward."""

    async def go() -> tuple[list[str], float]:
        session = await world.open(task_of(world, name))
        try:
            said = [await session.call(use("shell", command=c).tool_calls[0]) for c in commands]
            return said, await session.grade([])
        finally:
            await session.close()

    return asyncio.run(go())


def task_of(world: Terminal, name: str) -> Task:
    return next(t for t in world.tasks("eval", 3, 0) if t.id.endswith(name))


@pytest.mark.docker
def test_references_pass_and_idleness_does_not(world: Terminal) -> None:
    assert asyncio.run(world.check()) == {"reference": 1.0, "empty": 0.0}


@pytest.mark.docker
def test_the_shell_keeps_its_folder_and_its_variables(world: Terminal) -> None:
    said, reward = play(
        world, "count-words", "pwd; x=texts", "cd $x; ls", "pwd; seq 1 9999", "id -u; ls /tests /logs /solution"
    )
    assert said[0] == "/app\n" and said[1] == "a.txt\nb.txt\nempty.txt\nlong.txt\n"
    assert said[2].startswith("/app/texts\n1\n2\n") and "characters left out" in said[2] and said[2].endswith("9999\n")
    assert said[3].startswith("0\n") and said[3].count("No such file or directory") == 3
    assert reward == 0.0


LOGS = "mkdir -p /logs/verifier"
FAKE = "echo 1 >/logs/verifier/reward.txt"
CHEATS = {
    "edits the tests": (
        "count-words",
        f"mkdir /tests; {LOGS}; printf '#!/bin/sh\\n{FAKE}\\n' >/tests/test.sh; chmod 555 /tests/test.sh",
    ),
    "fakes the reward": ("count-words", f"{LOGS}; {FAKE}; chmod 444 /logs/verifier/*"),
    "a better reward file": ("count-words", f"{LOGS}; echo '{{\"reward\": 1}}' >/logs/verifier/reward.json"),
    "a process that writes it": ("count-words", f"(while true; do {LOGS}; {FAKE}; done) >/dev/null 2>&1 &"),
    "overwrites the interpreter": ("count-words", "cp /bin/true /usr/bin/python3.11; python3 -c 1 && echo yes"),
    "replaces the shell": ("count-words", "cp /bin/true /tmp/t; cp /tmp/t /bin/dash"),
    "a hook in the interpreter": (
        "count-words", "echo 'import os; os._exit(0)' >/usr/lib/python3/dist-packages/sitecustomize.py"
    ),
    "a module before Python's own": (
        "count-words",
        "cd /usr/lib/python3.11; mkdir pathlib; echo 'import os; os._exit(0)' >pathlib/__init__.py",
    ),
    "a preloaded library": ("count-words", "echo /tmp/x.so >/etc/ld.so.preload"),
    "an earlier python": ("count-words", "cp /bin/true /usr/local/bin/python3"),
    "exits early": ("fix-script", "printf '#!/bin/sh\\nexit 0\\n' >/app/sum.sh"),
    "hard-codes an output": ("fix-script", "printf '#!/bin/sh\\necho 0\\n' >/app/sum.sh"),
    "patches the checker": (
        "fix-script", f"printf '#!/bin/sh\\necho exit >/tests/check.py; {FAKE}; kill -9 $PPID\\n' >/app/sum.sh"
    ),
}  # fmt: skip


@pytest.mark.docker
@pytest.mark.parametrize("cheat", CHEATS)
def test_cheating_scores_nothing(world: Terminal, cheat: str) -> None:
    name, command = CHEATS[cheat]
    assert play(world, name, command)[1] == 0.0


@pytest.mark.docker
def test_work_beside_the_system_still_counts(world: Terminal) -> None:
    """A program that the agent installs is no cheat."""
    solution = (SHIPPED / "count-words" / "solution" / "solve.sh").read_text()
    assert play(world, "count-words", "cp /bin/true /usr/bin/my-tool && mkdir /usr/lib/mine", solution)[1] == 1.0


@pytest.mark.docker
def test_a_verifier_that_fails_is_no_zero(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "tests" / "test.sh").write_text("#!/bin/sh\nexit 1\n")
    world = Terminal(TerminalConfig(eval=tmp_path))
    task = world.tasks("eval", 1, 0)[0]

    async def go() -> float:
        session = await world.open(task)
        try:
            return await session.grade([])
        finally:
            await session.close()

    with pytest.raises(RewardError, match="RewardFileNotFoundError"):
        asyncio.run(go())
