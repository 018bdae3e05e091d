"""Who waits for what, since when. Kept at all times, so that a run that stands still can say why.

Each wait is named where it happens (``waiting``), under the name of what waits: a coroutine of the loop, or a rollout.
``snapshot`` is what ``posttrain why`` shows of another process; the loop writes it beside the run, and logs it unasked
when the trainer has waited for long. A stage that ends as it should takes its record away (``forget``).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.files import write_json

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Wait:
    """That somebody waits."""

    who: str
    what: str
    """May be said anew while the wait lasts."""
    since: float
    """Second of ``time.time``."""


_who: ContextVar[str] = ContextVar("who", default="")
_keys = itertools.count()
_open: dict[int, Wait] = {}

_TELL_S = 5.0
"""Between two records of who waits."""
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
def waiting(what: str) -> Iterator[Wait]:
    """The block waits for ``what``, or does work that takes time."""
    key = next(_keys)
    _open[key] = wait = Wait(_who.get(), what, time.time())
    try:
        yield wait
    finally:
        del _open[key]


class Changes:
    """Who waits for a change is woken by ``tell``. Waits are named, and bounded by a time in which nothing moves."""

    def __init__(self, bound_s: float) -> None:
        self._bound_s, self._condition = bound_s, asyncio.Condition()

    async def tell(self) -> None:
        """Something has changed."""
        async with self._condition:
            self._condition.notify_all()

    async def until(self, ready: Callable[[], bool], what: Callable[[], str], moved: Callable[[], float]) -> None:
        """Wait until ``ready()``, for what ``what()`` says after each change. TimeoutError when the bound has passed
        since this began and since ``moved()``, a second of ``time.monotonic``."""
        began = time.monotonic()
        with waiting(what()) as wait:
            async with self._condition:
                while not ready():
                    wait.what = what()
                    left = max(began, moved()) + self._bound_s - time.monotonic()
                    if left <= 0:
                        raise TimeoutError(f"waited {time.monotonic() - began:.1f} s for {wait.what}")
                    with suppress(TimeoutError):
                        async with asyncio.timeout(left):
                            await self._condition.wait()


def snapshot(queues: Mapping[str, float] | None = None) -> dict[str, Any]:
    """All waits, the longest first, and the queues' depths. May be called from any thread."""
    found = list(_open.values())  # in one piece: others go on meanwhile
    waits = [{"who": _shown(w.who), "what": _shown(w.what), "since": w.since} for w in found]
    waits.sort(key=lambda w: (w["since"], w["who"]))
    process = {"pid": os.getpid(), "started": _started(os.getpid()), "host": platform.node()}
    return {"process": process, "time": time.time(), "queues": dict(queues or {}), "waits": waits}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Put a snapshot where another process can read it: whole, or the one before."""
    write_json(path, found)


async def telling(path: Path | None, queues: Callable[[], Mapping[str, float]], who: str, every_s: float) -> None:
    """Without end: write down who waits, and log it again and again while a wait of ``who`` lasts, whatever for."""
    told, since = 0.0, 0.0
    while True:
        await asyncio.sleep(min(_TELL_S, every_s))
        found = snapshot(queues())
        if path is not None:
            await asyncio.to_thread(write, path, found)
        for wait in [w for w in found["waits"] if w["who"] == who]:
            told, since = (told if wait["since"] == since else 0.0), wait["since"]
            waited = found["time"] - since
            if waited - told > every_s:
                told = waited
                log.warning("%s waits %.0f s for %s; %s", who, waited, wait["what"], text(found, time.time()))


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
