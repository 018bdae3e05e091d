"""A tiny process beside this one that outlives it, and removes what a killed owner had made and not yet started.

Started containers end with their owner's connection, within a second. Between the making and the start of a container
there is no connection yet: that is what this process is for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from posttrain.errors import SandboxError

# Until the owner ends it has imported nothing: waiting costs a few megabytes. Engines finish what they had been asked.
_PROGRAM = """
import sys
hosts = {line.rstrip("\\n") for line in sys.stdin}
import time
for pause in (1, 5, 20):
    time.sleep(pause)
    from envs.sandbox.docker_engine import reap
    for host in hosts:
        try:
            reap(host or None)
        except Exception:
            pass
"""

_lock = threading.Lock()
_reapers: dict[int, tuple[subprocess.Popen[str], set[str]]] = {}
"""By owning process: a forked child has containers of its own."""


def watch(host: str | None) -> None:
    """See to it that nothing of this process is left on the engine at ``host`` when it has ended, however it ends."""
    name = host or ""
    with _lock:
        reaper, hosts = _reapers.get(os.getpid(), (None, set[str]()))
        if reaper is None or reaper.poll() is not None:
            hosts = set()
            reaper = _start()
            _reapers[os.getpid()] = reaper, hosts
        if name in hosts:
            return
        assert reaper.stdin is not None
        try:
            reaper.stdin.write(f"{name}\n")
            reaper.stdin.flush()
        except OSError as error:
            raise SandboxError(f"the reaper of containers ended: {error}") from error
        hosts.add(name)


def _start() -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # An interrupt at the keyboard is for the owner.
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"the reaper of containers does not start: {error}") from error


__all__ = ["watch"]
