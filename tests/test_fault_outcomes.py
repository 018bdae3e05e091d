"""One fault at a time in a real stage, and what docs/async.md says comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from envs.sandbox import DockerConfig, open_sandbox, probe
from posttrain.errors import ConfigError, EngineError, SandboxError
from posttrain.types import StopReason
from tests.test_faults import finish, start, write_config
from tests.toy_stage import STEPS, check_books, fine, records, rollouts, run_toy, weights

pytestmark = pytest.mark.faults


def kill_engine() -> None:
    """The engine of this process, as the kernel does when memory is short."""
    for child in multiprocessing.active_children():
        if child.name == "engine":
            child.kill()


# The engine process dies


@pytest.mark.parametrize("k", [0, 2])
def test_an_engine_that_dies_is_replaced_and_nothing_is_lost(
    k: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice, in the middle of rollouts. Synchronously the weights are those of a run in which it lived."""

    async def deadly(where: str, count: int) -> None:
        if where == "grade" and count in (13, 27):
            kill_engine()

    with caplog.at_level(logging.WARNING):
        run = run_toy(tmp_path, "killed", deadly, max_staleness=k)
    assert caplog.text.count("A new engine goes on from the last checkpoint and the journal") == 2
    check_books(run)
    assert {(r.score is None, r.error is None) for r in rollouts(run)} <= {(True, False), (False, True)}
    assert any(r.error is None for r in rollouts(run)), "what broke has no reward, all else has one"
    if k == 0:
        calm = weights(run_toy(tmp_path, "calm", max_staleness=0))
        assert all(torch.equal(calm[name], w) for name, w in weights(run).items())


def test_an_engine_that_dies_ever_again_ends_the_run_by_name_and_the_same_command_goes_on(tmp_path: Path) -> None:
    async def deadly(where: str, count: int) -> None:
        if where == "grade" and count > 13:
            kill_engine()

    with pytest.raises(EngineError, match="the engine process died with exit code -9"):
        run_toy(tmp_path, hook=deadly, restarts=1)
    check_books(run_toy(tmp_path))


# The sandbox host dies


class Gate:
    """A socket in front of the Docker engine's that can be shut, as if its host were gone."""

    def __init__(self, path: Path) -> None:
        self.path, self._loop = path, asyncio.new_event_loop()
        self._open = set[asyncio.StreamWriter]()
        self._server: asyncio.Server | None = None
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def _run(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def start(self) -> None:
        async def listen() -> None:
            self._server = await asyncio.start_unix_server(self._serve, self.path)

        self._run(listen())

    def stop(self) -> None:
        """Nobody listens any more, and whoever is connected is cut off."""

        async def shut() -> None:
            assert self._server is not None
            self._server.close()
            self.path.unlink(missing_ok=True)
            for writer in list(self._open):
                writer.transport.abort()

        self._run(shut())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_unix_connection("/var/run/docker.sock")
        self._open |= {writer, there_writer}

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    sink.write(data)
                    await sink.drain()
                sink.write_eof()

        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))
        for end in (writer, there_writer):
            self._open.discard(end)
            end.close()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    try:
        probe(DockerConfig())
    except ConfigError as error:
        pytest.skip(str(error))
    found = Gate(tmp_path / "gate.sock")
    found.start()
    yield found
    found.stop()


@pytest.mark.docker
@pytest.mark.slow
def test_rollouts_wait_for_a_sandbox_host_that_comes_back(gate: Gate, tmp_path: Path) -> None:
    """Down for a second: what was under way is masked and tried again, with twice the pause each time."""
    down = False

    async def work(where: str, count: int) -> None:
        nonlocal down
        if where != "open":
            return
        if count == 12:
            gate.stop()
        try:
            box = await open_sandbox(DockerConfig(host=f"unix://{gate.path}", memory_mb=128, start_timeout_s=20))
            try:
                ran = await box.exec("true")
                assert ran.exit_code == 0
            finally:
                await box.close()
        except SandboxError:
            # Counted from the first who meets it: else the second might pass while nobody asks.
            if count >= 12 and not down:
                down = True
                threading.Timer(1.0, gate.start).start()
            raise

    run = run_toy(tmp_path, hook=work, retry_s=0.5, attempts=6, steps=3)
    check_books(run, steps=3)
    broken = [r for r in rollouts(run) if not r.valid]
    assert broken and {r.stop for r in broken} == {StopReason.INFRASTRUCTURE}
    assert all(r.score is None for r in broken)


@pytest.mark.docker
@pytest.mark.slow
def test_a_sandbox_host_that_stays_away_ends_the_run_by_name(gate: Gate, tmp_path: Path) -> None:
    async def work(where: str, count: int) -> None:
        if where == "open":
            if count == 10:
                gate.stop()
            box = await open_sandbox(DockerConfig(host=f"unix://{gate.path}", memory_mb=128, start_timeout_s=20))
            await box.close()

    with pytest.raises(RuntimeError, match=r"groups in a row had too few valid rollouts.*gate\.sock"):
        run_toy(tmp_path, hook=work, attempts=2, max_invalid_groups=2, steps=3)
    gate.start()
    check_books(run_toy(tmp_path, steps=3), steps=3)


# The reward raises


def test_a_reward_that_raises_now_and_then_costs_a_retry_and_is_never_a_zero(tmp_path: Path) -> None:
    async def faulty(where: str, count: int) -> None:
        if where == "grade" and count % 5 == 3:
            raise ZeroDivisionError("a score of nothing")

    run = run_toy(tmp_path, hook=faulty)
    check_books(run)
    broken = [r for r in rollouts(run) if not r.valid]
    assert len(broken) > 5 and {r.stop for r in broken} == {StopReason.VERIFIER_ERROR}
    assert all(r.score is None and r.error and "ZeroDivisionError" in r.error.message for r in broken)
    assert records(run)[-1]["retries"] >= len(broken) / 2


def test_a_reward_that_always_raises_ends_the_run_with_its_message(tmp_path: Path) -> None:
    async def faulty(where: str, count: int) -> None:
        if where == "grade":
            raise ZeroDivisionError("a score of nothing")

    with pytest.raises(RuntimeError, match=r"too few valid rollouts.*verifier.*ZeroDivisionError: a score of nothing"):
        run_toy(tmp_path, hook=faulty, max_invalid_groups=2)
    check_books(run_toy(tmp_path))


# A straggler of an hour


async def straggle(where: str, count: int) -> None:
    """One session takes an hour to open."""
    if where == "open" and count == 7:
        await asyncio.sleep(3600)


def test_evict_does_not_wait_for_a_straggler(tmp_path: Path) -> None:
    run = run_toy(tmp_path, hook=straggle, timeout_s=7200.0, stragglers="evict")
    check_books(run)
    assert records(run)[-1]["evicted"] == 1
    assert max(r["staleness_max"] for r in records(run)) <= 2


@pytest.mark.parametrize("where", ["open", "grade"])
def test_drain_waits_for_a_straggler_until_its_episode_s_time_is_over(where: str, tmp_path: Path) -> None:
    """A tool or a user that hangs ends as the agent's time-out (``tests/envs/test_episode.py``), and the engine has a
    bound of its own."""

    async def hang(at: str, count: int) -> None:
        if at == where and count == 7:
            await asyncio.sleep(3600)

    # The others have the same time, and must not need it where the machine stands still.
    run = run_toy(tmp_path, hook=hang, timeout_s=10.0)
    check_books(run)
    (broken,) = [r for r in rollouts(run) if not r.valid]
    assert broken.error is not None and "waited 10 s for" in broken.error.message
    assert 1.0 < max(r["time/wait_s"] for r in records(run)) < 60.0


def test_a_straggler_that_nothing_ends_ends_the_run_by_name_and_the_same_command_goes_on(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"waited \d+\.\d s for (.|\n)*expert-toy/\d+/\d: a session of requests"):
        run_toy(tmp_path, hook=straggle, timeout_s=7200.0, wait_s=3.0)
    check_books(run_toy(tmp_path, hook=fine))


# The disk is full


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system of one's own cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 2])
def test_a_full_disk_ends_the_run_by_name_and_with_room_the_same_command_goes_on(k: int, tmp_path: Path) -> None:
    """At whatever it was writing: the less room there was, the earlier."""
    config = write_config(tmp_path, k, STEPS)
    calm = tmp_path / "calm"
    finish(config, calm)
    needs = sum(f.stat().st_size for f in calm.rglob("*") if f.is_file())
    ended_at: list[str] = []
    for part in (0.02, 0.5):
        with small_disk(tmp_path / f"disk-{part}", str(2 * needs + (1 << 20))) as disk:
            out, filler = disk / "run", disk / "filler"
            free = psutil.disk_usage(str(disk)).free
            filler.write_bytes(bytes(int(free - part * needs)))
            process = start(config, out, tmp_path / f"log-{part}")
            assert process.wait(300) == 2
            said = (tmp_path / f"log-{part}").read_text()
            assert "is full" in said and "the same command goes on" in said and "Traceback" not in said, said[-3000:]
            ended_at.append(said.split("error: ")[-1].split(":")[0])
            filler.unlink()
            finish(config, out)
            ours, undisturbed = (torch.load(p / "checkpoints/expert-interaction/state.pt") for p in (out, calm))
            assert ours["trainer"]["version"] == STEPS
            if k == 0:
                for name, w in undisturbed["trainer"]["model"].items():
                    assert torch.equal(ours["trainer"]["model"][name], w)
    assert all("disk-" in place for place in ended_at)
