"""Runs a task's verifier in the agent's container, after everything of the agent's has been stopped.

Harbor's contract: ``/tests`` arrives after the agent is done, ``test.sh`` writes ``/logs/verifier/reward.json`` (flat,
finite numbers) or ``reward.txt`` (one), its exit code says nothing. Beyond it: an agent that has changed what the
verifier itself runs on scores 0.
"""

from __future__ import annotations

import base64
import io
import json
import math
import posixpath
import re
import shlex
import tarfile
from collections.abc import Iterable
from pathlib import Path

from envs.sandbox.shell import ShellSandbox
from envs.terminal.task import TerminalTask
from posttrain.errors import RewardError

LOGS = "/logs/verifier"
_SYSTEM = re.compile(r"/(usr/(local/)?)?(s?bin|lib\w*)/")
_HOOKS = re.compile(
    r"\.pth$|/(site|user)customize\.py$|/pyvenv\.cfg$|/glibc-hwcaps/|/python\d+\.zip$"
    r"|/lib/python3\.\d+/(?!site-packages/|dist-packages/|.*__pycache__/)"
)
"""Files that change what a program does by being there: a new module beside Python's own can stand before one."""
_LOADER = re.compile(r"/etc/ld\.so\.")
_PATH = "/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin:/usr/local/sbin"
"""The image's own programs before those that an agent may have added."""
_UPLOAD = 60_000
"""Bytes of a command that carries a part of the tests."""


def tampered(changes: Iterable[tuple[str, str]]) -> str | None:
    """The first of the agent's ``changes`` (``modified``, ``added`` or ``deleted``, path of a file) that the verifier
    would run on: a program or library of the image that is not as it was, a hook, the loader's settings.

    An agent may add programs and packages; one that upgrades those of the image cannot be told from one that cheats.
    """
    for kind, path in sorted(changes, key=lambda change: change[1]):
        if _LOADER.match(path) or (_SYSTEM.match(path) and (kind != "added" or _HOOKS.search(path))):
            return path
    return None


async def verify(box: ShellSandbox, task: TerminalTask, workdir: str, changes: Iterable[tuple[str, str]]) -> float:
    """The reward; 0 if the agent has ``tampered``. Raises RewardError if the verifier gives none, SandboxError if the
    container is broken."""
    changes = list(changes)
    if tampered(changes) is not None:
        return 0.0
    # Compiled code that Python would take for its own: made again from the image's sources.
    for compiled in (path for kind, path in changes if kind == "added" and path.endswith(".pyc")):
        await _must(box, f"rm -f {shlex.quote(compiled)}")
    await _put(box, task.folder / "tests", "/tests")
    env = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "PYTHONNOUSERSITE": "1", **task.file.verifier.env}
    pairs = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    command = (
        f"rm -rf /logs && mkdir -p {LOGS} && chmod -R u+rwX /tests && chmod +x /tests/test.sh && "
        f"cd {shlex.quote(workdir)} && env -i {pairs} /tests/test.sh"
    )
    result = await box.exec(command, timeout_s=task.file.verifier.timeout_sec)
    if result.timed_out:
        raise RewardError(f"{task.name}: VerifierTimeoutError: no end within {task.file.verifier.timeout_sec:g} s")
    await box.renew()
    return _reward(task.name, await _show(box, f"{LOGS}/reward.json"), await _show(box, f"{LOGS}/reward.txt"))


async def _show(box: ShellSandbox, path: str) -> str | None:
    result = await box.exec(f"test -f {path} && head -c 4096 {path}", timeout_s=10)
    return result.stdout if result.exit_code == 0 else None


def _reward(name: str, as_json: str | None, as_text: str | None) -> float:
    if as_json is None and as_text is None:
        raise RewardError(f"{name}: RewardFileNotFoundError: the verifier wrote neither reward.json nor reward.txt")
    if not (as_json if as_json is not None else as_text or "").strip():
        raise RewardError(f"{name}: RewardFileEmptyError")
    try:
        value = float(as_text or "") if as_json is None else _one(json.loads(as_json))
    except (ValueError, TypeError, KeyError) as error:
        raise RewardError(f"{name}: VerifierOutputParseError: {error}") from None
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise RewardError(f"{name}: VerifierOutputParseError: a reward of {value} is not in 0..1")
    return value


def _one(rewards: dict[str, float]) -> float:
    """The number named ``reward``, or the only one."""
    if not isinstance(rewards, dict):  # pyright: ignore[reportUnnecessaryIsInstance]  # a verifier may write anything
        raise TypeError(f"{rewards!r} is no object")
    if "reward" not in rewards and len(rewards) != 1:
        raise KeyError(f"none of {sorted(rewards)} is named reward")
    return float(rewards.get("reward", next(iter(rewards.values()))))


async def _put(box: ShellSandbox, folder: Path, target: str) -> None:
    """Copy a folder to ``target``, through commands: engines refuse or lose copies onto some mounts."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder, arcname=".", filter=_owned_by_root)
    text = base64.b64encode(packed.getvalue()).decode()
    parcel = posixpath.join("/", "tests.b64")
    await _must(box, f"rm -rf {target} {parcel} && mkdir -p {target}")
    for start in range(0, len(text), _UPLOAD):
        await _must(box, f"cat >>{parcel}", text[start : start + _UPLOAD])
    await _must(box, f"base64 -d <{parcel} | tar -xzf - -C {target} && rm {parcel}")


def _owned_by_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info


async def _must(box: ShellSandbox, command: str, stdin: str = "") -> None:
    result = await box.exec(command, timeout_s=60, stdin=stdin)
    if result.exit_code:
        raise RewardError(f"AddTestsDirError: {command[:60]!r} ended with {result.exit_code}: {result.stderr[:200]}")
