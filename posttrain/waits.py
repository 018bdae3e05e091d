"""Who waits for what, since when. Kept at all times, so that a run that stands still can say why.

Each wait is named where it happens (``waiting``), under the name of what waits: a coroutine of the loop, or a rollout.
``snapshot`` is what ``posttrain why`` shows of another process; the loop writes it beside the run, and logs it unasked
when the trainer has had nothing to do for long. A stage that ends as it should takes its record away (``forget``).
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.files import write_json

_who: ContextVar[str] = ContextVar("who", default="")
_keys = itertools.count()
_open: dict[int, tuple[str, str, float]] = {}
"""Key of a wait to who, what, and the second of ``time.time`` at which it began."""

_LONGEST = 100
"""Characters that are kept of a name: the model chooses those of tools."""
_SILENT_S = 30.0
"""A process that lives and has not written for so long does not get round to it."""


@contextmanager
def acting(who: str) -> Iterator[None]:
    """Waits inside are those of ``who``; so are the waits of tasks made inside."""
    token = _who.set(who)
    try:
        yield
    finally:
        _who.reset(token)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """The block waits for ``what``, or does work that takes time."""
    key = next(_keys)
    _open[key] = _who.get(), what, time.time()
    try:
        yield
    finally:
        del _open[key]


def snapshot(queues: Mapping[str, float] | None = None) -> dict[str, Any]:
    """All waits, the longest first, and the queues' depths. May be called from any thread."""
    found = list(_open.values())  # in one piece: others go on meanwhile
    waits = [{"who": _shown(who), "what": _shown(what), "since": since} for who, what, since in found]
    waits.sort(key=lambda w: (w["since"], w["who"]))
    process = {"pid": os.getpid(), "started": _started(os.getpid()), "host": platform.node()}
    return {"process": process, "time": time.time(), "queues": dict(queues or {}), "waits": waits}


def write(path: Path, queues: Mapping[str, float]) -> None:
    """Put a snapshot where another process can read it: whole, or the one before."""
    write_json(path, snapshot(queues))


def forget(path: Path) -> None:
    """Nobody waits any more."""
    path.unlink(missing_ok=True)


def text(found: Mapping[str, Any], now: float, most: int = 20) -> str:
    """A snapshot for people: queues, then the longest waits with their ages in seconds."""
    queues = ", ".join(f"{name} {depth:g}" for name, depth in found["queues"].items())
    lines = [f"{queues or 'no queues'}; {len(found['waits'])} waits, the longest first:"]
    for wait in found["waits"][:most]:
        lines.append(f"{now - wait['since']:8.1f} s  {wait['who'] or 'main'}: {wait['what']}")
    if len(found["waits"]) > most:
        lines.append(f"and {len(found['waits']) - most} more")
    return "\n".join(lines)


def why(path: Path, now: float) -> str | None:
    """What the record in ``path`` says at ``now`` (``time.time``); None if there is none: no stage that keeps one is
    under way. Raises UserError for a file that is no record."""
    try:
        found = json.loads(path.read_text())
        return f"{_writer(found['process'], now - found['time'])}\n{text(found, now)}"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is no record of waits. Remove it; a run that goes on writes it anew.") from None


def _writer(process: Mapping[str, Any], age: float) -> str:
    """Whether the process that wrote a record still lives, and how old the record is."""
    who, told = f"process {process['pid']}", f"told this {age:.1f} s ago"
    if process["host"] != platform.node():
        return f"{who} on {process['host']} {told}; from here nobody can see whether it lives"
    if not _lives(process["pid"], process["started"]):
        return f"{who} is gone, and {told}: the run was killed or failed. The same command goes on where it was"
    if age > _SILENT_S:
        return f"{who} lives, and {told}: it is stopped, or something blocks its event loop"
    return f"{who} lives, and {told}"


def _lives(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, perhaps one that got the number later
    return _started(pid) == started


def _started(pid: int) -> str:
    """When the process began, in ticks since the machine did: a number may be given to another process later. Empty
    where there is no /proc, and for a process that has ended and is not yet collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _shown(name: str) -> str:
    """One line without what a terminal would obey."""
    plain = "".join(c if c.isprintable() else "?" for c in name[: _LONGEST + 1])
    return plain if len(plain) <= _LONGEST else plain[:_LONGEST] + "..."
