"""Runs tests of a repository in a sandbox and believes nothing but values.

What is wanted never enters the sandbox, so code that is run there can redefine, print, exit or write what it likes: it
cannot give values that it does not know how to compute. Lines of results carry a mark, so that what code prints is not
taken for a result by accident.
"""

from __future__ import annotations

import ast
import re
import secrets
from collections.abc import Mapping, Sequence

from envs.code.repository import Case
from posttrain.protocols import Sandbox
from posttrain.types import ExecResult

Results = list[str | None]
"""Value of each test; None where there is none."""


async def run_cases(
    sandbox: Sandbox, files: Mapping[str, bytes], cases: Sequence[Case], *, shell: bool, timeout_s: float
) -> tuple[Results, str]:
    """Values of ``cases`` with the files that are in the sandbox, and what went wrong, in a few words.

    ``shell``: the sandbox runs commands, and modules import each other; else it runs Python, and ``files`` are joined.
    """
    mark = secrets.token_hex(8)
    if shell:
        result = await sandbox.exec("python3 -I -", timeout_s=timeout_s, stdin=_importing(cases, mark))
    else:
        result = await sandbox.exec(_joined(files) + _calls(cases, mark), timeout_s=timeout_s)
    return _values(result, mark, len(cases)), _trouble(result, mark)


def _importing(cases: Sequence[Case], mark: str) -> str:
    asked = [(c.module, c.function, c.text) for c in cases]
    return (
        "import importlib, sys\nsys.path.insert(0, '.')\nsys.dont_write_bytecode = True\n"
        f"for m, f, s in {asked!r}:\n"
        " try:\n  v = 'v' + repr(getattr(importlib.import_module(m), f)(s))\n"
        " except BaseException as e:\n  v = 'e' + type(e).__name__ + ' ' + str(e)\n"
        f" print('\\n{mark}' + v.replace('\\n', ' '), flush=True)\n"
    )


def _joined(files: Mapping[str, bytes]) -> str:
    """All modules as one program. Their imports of each other are left out: what they name is there."""
    own = "|".join(re.escape(path.removesuffix(".py")) for path in files)
    texts = [text.decode(errors="replace") for text in files.values()]
    return "\n".join(re.sub(rf"(?m)^from ({own}) import .*$", "", text) for text in texts)


def _calls(cases: Sequence[Case], mark: str) -> str:
    lines = [
        f"try:\n  print('\\n{mark}v' + repr({c.function}({c.text!r})))\n"
        f"except Exception as e:\n  print('\\n{mark}e' + repr(e))"
        for c in cases
    ]
    return "\n" + "\n".join(lines) + "\n"


def _values(result: ExecResult, mark: str, n: int) -> Results:
    lines = [line.removeprefix(mark) for line in result.stdout.split("\n") if line.startswith(mark)]
    if len(lines) != n:
        return [None] * n  # fewer: it ended early; more: somebody forged some
    return [_text(line[1:]) if line.startswith("v") else None for line in lines]


def _text(literal: str) -> str | None:
    try:
        value = ast.literal_eval(literal)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def _trouble(result: ExecResult, mark: str) -> str:
    if result.timed_out:
        return "timeout"
    raised = [line.removeprefix(f"{mark}e") for line in result.stdout.split("\n") if line.startswith(f"{mark}e")]
    lines = raised or result.stderr.strip().splitlines()[-1:]
    return lines[0][:60] if lines else "no result"
