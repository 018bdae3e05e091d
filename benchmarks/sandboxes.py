"""What the sandboxes cost: ``python benchmarks/sandboxes.py [--calls 1000] [--sandboxes 32]``.

Needs a Docker engine with the image posttrain-base (scripts/start-docker.sh). Every ratio is of two things measured in
turn in this run, medians. A call is ``/bin/sh -c true``, through the sandbox and as an exec of docker-py in a container
with the same limits. A cold start is ``open_sandbox``; a warm one takes a container of the pool, which is filled again
before the next. The last row kills the process that owns the containers with SIGKILL, one of them in a call, and waits
until the engine has none of them. The exit status is 1 if a row misses what it should reach.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import docker
from rich.console import Console
from rich.table import Table

from envs.sandbox import BubblewrapConfig, DockerConfig, MontyConfig, open_sandbox, probe
from envs.sandbox.docker import DockerPlace
from envs.sandbox.docker_engine import RUN, reap
from envs.sandbox.docker_pool import pool_of
from envs.sandbox.shell import ShellSandbox
from posttrain.errors import ConfigError, SandboxError
from posttrain.protocols import Sandbox

CONFIG = DockerConfig(memory_mb=128, pids=64)
OWNED = "benchmark-owner"
OWNER = f"""
import asyncio, sys
from envs.sandbox import DockerConfig, open_sandbox

async def main():
    config = DockerConfig(memory_mb=128)
    boxes = await asyncio.gather(*(open_sandbox(config, run="{OWNED}") for _ in range(int(sys.argv[1]))))
    busy = asyncio.create_task(boxes[0].exec("sleep 1000 & sleep 1000", timeout_s=120))
    await asyncio.sleep(0.5)
    print("ready", flush=True)
    await busy

asyncio.run(main())
"""

Row = tuple[str, str, str, str, bool]
"""What, before, now, ratio or count, whether it reaches what it should."""


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    """Seconds."""
    started = time.perf_counter()
    await work()
    return time.perf_counter() - started


def ms(seconds: float) -> str:
    """For people."""
    return f"{seconds * 1000:.1f} ms"


async def calls(rounds: int) -> Row:
    """One call, through the sandbox and through docker-py."""
    box = await open_sandbox(CONFIG)
    assert isinstance(box, ShellSandbox) and isinstance(box.place, DockerPlace)
    client = docker.from_env()
    container = client.containers.get(box.place.id)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(await timed(lambda: box.exec("true")))
        theirs.append(await timed(lambda: asyncio.to_thread(container.exec_run, ["/bin/sh", "-c", "true"])))
    client.close()
    await box.close()
    before, now = statistics.median(theirs), statistics.median(ours)
    return f"a call, median of {rounds}", ms(before), ms(now), f"{before / now:.0f} times faster", before / now >= 20


async def others(rounds: int) -> list[Row]:
    """One call of each other sandbox, next to nothing."""
    rows: list[Row] = []
    kinds = [(MontyConfig(), "None"), (BubblewrapConfig(), "true")]
    for config, command in kinds:
        try:
            probe(config)
        except ConfigError as error:
            rows.append((f"a call of {config.type}", "", "", str(error)[:60], True))
            continue
        box: Sandbox = await open_sandbox(config)
        took = [await timed(lambda box=box, command=command: box.exec(command)) for _ in range(rounds)]
        rows.append((f"a call of {config.type}", "", ms(statistics.median(took)), "", True))
        await box.close()
    return rows


async def many(sandboxes: int, total: int) -> Row:
    """Many sandboxes at once, each with its share of the calls."""
    failed = 0

    async def one(index: int) -> None:
        nonlocal failed
        try:
            box = await open_sandbox(CONFIG)
        except SandboxError:
            failed += 1
            return
        try:
            for call in range(index, total, sandboxes):
                try:
                    result = await box.exec(f"echo {call}")
                    failed += result.stdout != f"{call}\n"
                except SandboxError:
                    failed += 1
        finally:
            await box.close()

    took = await timed(lambda: asyncio.gather(*(one(index) for index in range(sandboxes))))
    return f"{total} calls in {sandboxes} sandboxes at once", "", f"{took:.1f} s", f"{failed} errors", failed == 0


async def starts(rounds: int) -> Row:
    """A cold start and one from the pool."""
    config = CONFIG.model_copy(update={"pool": 2})
    pool = pool_of(config)
    cold, warm = [], []
    for _ in range(rounds):
        if not await asyncio.to_thread(pool.ready, 2, 60.0):
            raise SandboxError("the pool is not filled within 60 s")
        for chosen, took in ((config, warm), (CONFIG, cold)):
            boxes: list[Sandbox] = []

            async def open_one(chosen: DockerConfig = chosen, boxes: list[Sandbox] = boxes) -> None:
                boxes.append(await open_sandbox(chosen))

            took.append(await timed(open_one))
            await boxes[0].close()
            # The next is not to share the engine with the pool's refill.
            await asyncio.to_thread(pool.ready, 2, 60.0)
    before, now = statistics.median(cold), statistics.median(warm)
    return f"a start, median of {rounds}", ms(before), ms(now), f"{before / now:.0f} times faster", before / now >= 10


def killed_owner(sandboxes: int) -> Row:
    """Seconds until nothing of a killed process is left."""
    client = docker.from_env()
    reap()

    def left() -> int:
        return len(client.api.containers(all=True, filters={"label": f"{RUN}={OWNED}"}))

    command = [sys.executable, "-c", OWNER, str(sandboxes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        had = left()
        owner.kill()
    started = time.monotonic()
    while left() and time.monotonic() - started < 120:
        time.sleep(0.05)
    took, remaining = time.monotonic() - started, left()
    client.close()
    return f"kill -9 of the owner of {had}", "", f"{took:.1f} s", f"{remaining} left", took < 60 and not remaining


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--sandboxes", type=int, default=32)
    arguments = parser.parse_args()
    console = Console()
    try:
        probe(CONFIG)
    except ConfigError as error:
        console.print(str(error), style="red")
        return 2

    async def measure() -> list[Row]:
        rows = [await calls(100), *await others(100), await starts(7)]
        return [*rows, await many(arguments.sandboxes, arguments.calls)]

    with console.status("measuring, about a minute"):
        rows = [*asyncio.run(measure()), killed_owner(8)]
    table = Table("what", "before", "now", "result", "reached")
    for what, before, now, result, reached in rows:
        table.add_row(what, before, now, result, "yes" if reached else "NO")
    console.print(table)
    return 0 if all(reached for *_, reached in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
