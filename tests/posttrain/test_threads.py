"""Work beside the event loop: what comes of it, who waits for its end, and who does not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from contextvars import ContextVar
from pathlib import Path

import pytest

from posttrain.threads import Beside

ROOT = Path(__file__).parents[2]
name: ContextVar[str] = ContextVar("name", default="")


def test_results_errors_and_the_caller_s_context_go_across() -> None:
    async def main() -> None:
        beside = Beside("worker")
        name.set("caller")
        assert await beside.run(lambda a, b: (a + b, name.get()), 1, 2, patience_s=1) == (3, "caller")
        with pytest.raises(ZeroDivisionError):
            await beside.run(lambda: 1 / 0, patience_s=1)
        threads = {await beside.run(threading.get_ident, patience_s=1) for _ in range(3)}
        assert len(threads) == 1 and threads != {threading.get_ident()}
        beside.close()

    asyncio.run(main())


@pytest.mark.parametrize("stopped", [False, True])
def test_whoever_is_cancelled_goes_on_when_the_work_has_ended(stopped: bool) -> None:
    """By itself, or because it is told to."""

    async def main() -> list[str]:
        beside, begun, free, seen = Beside("worker"), threading.Event(), threading.Event(), list[str]()

        def work() -> None:
            begun.set()
            assert free.wait(30)
            seen.append("ended")

        waiting = asyncio.ensure_future(beside.run(work, patience_s=30, stop=free.set if stopped else None))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        waiting.cancel()
        if not stopped:
            asyncio.get_running_loop().call_later(0.05, free.set)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        seen.append("went on")
        beside.close()
        return seen

    assert asyncio.run(main()) == ["ended", "went on"]


def test_work_that_hangs_is_left_behind_and_the_process_ends() -> None:
    code = """
import asyncio, threading
from posttrain.threads import Beside

async def main():
    async with asyncio.timeout(0.1):
        await Beside("worker").run(threading.Event().wait, patience_s=0.1)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("TimeoutError")


def test_a_micro_batch_that_hangs_keeps_neither_its_owner_nor_the_process() -> None:
    code = """
import threading, time
from posttrain.side_by_side import SideBySide
import torch
weight = torch.nn.Parameter(torch.ones(2))
begun = threading.Event()
def hangs():
    begun.set()
    threading.Event().wait()
def step():
    list(beside.accumulate([weight], [lambda: ((weight * 3).sum(), 'first'), hangs]))
beside = SideBySide(2)
threading.Thread(target=step, daemon=True).start()
assert begun.wait(60)
while weight.grad is None:  # the other one has ended: what computes in C++ when Python ends is another matter
    time.sleep(0.01)
beside.close()
beside.close()
print('ended')
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended.stderr
