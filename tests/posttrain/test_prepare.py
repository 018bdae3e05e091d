"""What is done to a process before it trains."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys, torch
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from posttrain.prepare import keep_memory

def step():
    return sum(len(b) for b in [torch.ones(1 << 20) for _ in range(16)])

if sys.argv[1] == "kept":
    keep_memory()
barrier = Barrier(4)
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: barrier.wait(), range(4)))
    pool.submit(step).result()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        pool.submit(step).result()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_step_finds_the_memory_of_the_last_one() -> None:
    """Eight steps of 64 MiB, in whichever of four threads; a page has 4 KiB."""

    def faults(way: str) -> int:
        return int(subprocess.run([sys.executable, "-c", _PROGRAM, way], capture_output=True, check=True).stdout)

    kept, plain = faults("kept"), faults("plain")
    assert kept < plain / 2, (kept, plain)
