"""The processes that train one model: rank 0, where the trainer was made, and followers, which do what it does.

Rank 0 starts the followers, gives each one command after another through a pipe, and takes its part in every command
itself. Only tensors go through torch.distributed: a follower that waits for a command waits at its pipe, where no
collective can run out of time, and a pipe that closes says at once that the process behind it is gone.

A command ends on all ranks or the trainer is done for: what failed, died or was too slow is named, and the followers
are ended. The stage then ends as with any other failure, and the same command goes on from its checkpoint.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, DistributedType
from torch import distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.fsdp import MixedPrecisionPolicy

from posttrain import waits
from posttrain.errors import RankError, UserError
from posttrain.settings import DdpConfig, FsdpConfig, TrainerConfig

_GRACE_S = 5.0
"""For the others to say what went wrong with them, and for a rank to end."""
_LEAVES_S = 60.0
"""For this rank to leave a command whose followers are gone: by gloo that is when it next needs one of them."""
_MARGIN_S = 60.0
"""By which collectives are allowed more than a whole command, whose bound has a better message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Of one process among those that train a model."""

    rank: int
    count: int
    meeting: str
    """A file in which they find each other. (A TCPStore would listen on every address of the host.)"""
    device: int | None
    """Number of its GPU; None: the CPU."""
    timeout_s: float
    """Of a command."""


def make_accelerator(config: TrainerConfig, place: Place | None) -> Accelerator:
    """What prepares the model; at a ``place``, returns when all ranks have met."""
    # Precision and what is parallel are kept in the process, and an earlier stage may have been something else.
    AcceleratorState._reset_state(reset_partial_state=True)
    # Its cache of weights in bf16 serves a weight that a forward uses twice, and hangs where micro-batches are side by
    # side: it waits for Python under a lock of its own, and so does whoever compiles, for the lock.
    half = AutocastKwargs(cache_enabled=False)
    if place is None:
        return Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[half])
    shards = _shards(config) if isinstance(config.parallel, FsdpConfig) else None
    with _environment(place, config.threads):
        dist.init_process_group(
            "gloo" if place.device is None else "cpu:gloo,cuda:nccl",
            store=FileStore(place.meeting, place.count),
            rank=place.rank,
            world_size=place.count,
            timeout=timedelta(seconds=place.timeout_s + _MARGIN_S),
        )
        cpu = place.device is None
        more: Any = {"cpu": cpu, "fsdp_plugin": shards, "kwargs_handlers": [half]}
        accelerator = Accelerator(mixed_precision=config.mixed_precision, **more)
    if shards is not None and place.device is None:
        # Accelerate thinks of FSDP on GPUs alone; torch does the same on a CPU.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = shards
    return accelerator


def _shards(config: TrainerConfig) -> FullyShardedDataParallelPlugin:
    # What a bare head returns is a view, and nobody writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=half if config.mixed_precision == "bf16" else None,
    )


@contextmanager
def _environment(place: Place, threads: int) -> Iterator[None]:
    """Where Accelerate looks for its place. Not for longer: engines would take it for theirs."""
    local = place.rank if place.device is None else place.device
    mine = {"RANK": place.rank, "LOCAL_RANK": local, "WORLD_SIZE": place.count, "LOCAL_WORLD_SIZE": place.count}
    before = dict(os.environ)
    mine["OMP_NUM_THREADS"] = threads  # else Accelerate takes all cores
    os.environ.update({k: str(v) for k, v in mine.items()})
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        yield
    finally:
        for key in set(os.environ) - set(before):
            del os.environ[key]
        os.environ.update({k: v for k, v in before.items() if os.environ.get(k) != v})


class Ranks:
    """Rank 0's hold on the others."""

    def __init__(self, config: DdpConfig | FsdpConfig) -> None:
        """Starts the followers. Raises UserError if there are fewer GPUs than ranks."""
        devices = _devices(config)
        if devices[0] is not None:
            torch.cuda.set_device(devices[0])  # for whatever else this process does with a GPU
        self._folder = TemporaryDirectory(prefix="posttrain-ranks-")
        meeting, count = f"{self._folder.name}/meeting", config.processes
        places = [
            Place(rank=i, count=count, meeting=meeting, device=device, timeout_s=config.timeout_s)
            for i, device in enumerate(devices)
        ]
        self.place = places[0]
        self._timeout_s = config.timeout_s
        self._pipes: dict[int, Connection] = {}
        self._processes: dict[int, Any] = {}
        self._thread: threading.Thread | None = None
        self._ending, self._closed = threading.Lock(), False
        context = get_context("spawn")
        for place in places[1:]:
            here, there = context.Pipe()
            process = context.Process(target=_follow, args=(there, place), daemon=True, name=f"rank{place.rank}")
            process.start()
            there.close()
            self._pipes[place.rank], self._processes[place.rank] = here, process

    def begin(self, build: Callable[[Place], Any], work: Callable[[], None]) -> None:
        """Have the followers make, by ``build``, what all later commands are for, while this rank does ``work``."""
        try:
            self._together("start", ("", (build,)), work)
        except BaseException:
            self.close()
            raise

    def together(self, method: str, args: Sequence[Any], work: Callable[[], Any]) -> list[Any]:
        """Have the followers call ``method`` of theirs while this rank does ``work``; what each returned, by rank.

        Raises what ``work`` raises, or RankError if it is another rank that failed, died or was too slow. After that
        there are no followers any more."""
        return self._together(method.strip("_").replace("_", " "), (method, tuple(args)), work)

    def _together(self, what: str, message: tuple[str, tuple[Any, ...]], work: Callable[[], Any]) -> list[Any]:
        if not self._pipes:
            raise RankError(f"the other ranks of the trainer are gone, and cannot take part in {what}")
        mine: list[Any] = []
        done, told = connection.Pipe(duplex=False)
        job = partial(self._work, pickle.dumps(message), work, mine, told)
        self._thread = threading.Thread(target=job, daemon=True, name=f"rank0 {what}")
        self._thread.start()
        with done, waits.waiting(f"all {self.place.count} ranks of the trainer to {what}"):
            try:
                others = self._watch(what, done, mine)
            except BaseException:
                self._end()
                raise
        return [mine[0], *others]

    def _work(self, message: bytes, work: Callable[[], Any], mine: list[Any], told: Connection) -> None:
        """In a thread, because nothing else can be stopped that waits for a process that is not there any more."""
        with told:
            try:
                if self.place.device is not None:
                    torch.cuda.set_device(self.place.device)  # a thread has one of its own
                for pipe in self._pipes.values():
                    with suppress(OSError):  # it is gone, and whoever watches sees that
                        pipe.send_bytes(message)
                mine.append(work())
            except BaseException as error:
                mine.append(_Failed(str(error), error=error))

    def _watch(self, what: str, done: Connection, mine: list[Any]) -> list[Any]:
        """What the followers returned, by rank. Raises what ``together`` does."""
        deadline = time.monotonic() + self._timeout_s
        replies: dict[int, Any] = {}
        while len(replies) < len(self._pipes) or not mine:
            waiting = {pipe: rank for rank, pipe in self._pipes.items() if rank not in replies}
            ready = connection.wait([*waiting, *([] if mine else [done])], max(0.0, deadline - time.monotonic()))
            for pipe in waiting.keys() & set(ready):
                replies[waiting[pipe]] = _reply(pipe)
            bad = any(isinstance(found, _Failed) for found in [*replies.values(), *mine])
            if bad:  # the others may know better why
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            if not ready:
                break
        self._judge(what, mine, replies)
        return [replies[rank] for rank in sorted(replies)]

    def _judge(self, what: str, mine: list[Any], replies: dict[int, Any]) -> None:
        own = mine[0].error if mine and isinstance(mine[0], _Failed) else None
        failed = {rank: found for rank, found in sorted(replies.items()) if isinstance(found, _Failed)}
        for rank, found in failed.items():
            if found.message is None:
                raise RankError(f"rank {rank} of the trainer {self._fate(rank)} during {what}. {_GOES_ON}") from own
        for rank, found in failed.items():
            if own is None or found.message != str(own):
                raise RankError(f"rank {rank} of the trainer failed during {what}: {found.text}\n{_GOES_ON}") from own
        if own is not None:
            raise own
        late = [rank for rank in range(self.place.count) if not (rank in replies if rank else mine)]
        if late:
            raise RankError(
                f"ranks {late} of the trainer did not end {what} within {self._timeout_s:g} s "
                f"(trainer.parallel.timeout_s). {_GOES_ON}"
            )

    def _fate(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(_GRACE_S)
        code = process.exitcode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        return f"was killed by {signal.Signals(-code).name}"

    def close(self) -> None:
        """End the followers, and forget that there were any; idempotent."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + _GRACE_S
        for pipe in list(self._pipes.values()):
            with suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        for process in list(self._processes.values()):
            process.join(max(0.0, until - time.monotonic()))
        self._end()
        if self._thread is not None:
            self._thread.join(_LEAVES_S)
            if dist.is_initialized() and not self._thread.is_alive():
                dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        self._folder.cleanup()

    def _end(self) -> None:
        with self._ending:  # what closes this may not be what waits for a command
            for process in self._processes.values():
                process.kill()
                process.join()
            for pipe in self._pipes.values():
                pipe.close()
            self._pipes, self._processes = {}, {}


@dataclass(frozen=True, slots=True)
class _Failed:
    """What a rank gave instead of a result."""

    message: str | None
    """None: the process is gone."""
    text: str = ""
    """Its traceback."""
    error: BaseException | None = None
    """Of this process."""


_GOES_ON = "The same command goes on from the last checkpoint"


def _devices(config: DdpConfig | FsdpConfig) -> list[int | None]:
    """Number of each rank's GPU; None on a machine without."""
    if not torch.cuda.is_available():
        return [None] * config.processes
    devices, there = config.devices or list(range(config.processes)), torch.cuda.device_count()
    if max(devices) >= there:
        raise UserError(
            f"trainer.parallel.processes: {config.processes} ranks want the GPUs {devices}, and there are {there}: "
            "lower it, or name others in trainer.parallel.devices"
        )
    return list(devices)


def _reply(pipe: Connection) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        return _Failed(None)


def _follow(pipe: Connection, place: Place) -> None:
    """A follower: does what it is told until it is told to end, or fails."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is at the keyboard speaks to rank 0
    follower: Any = None
    with suppress(EOFError, OSError):
        while (message := pickle.loads(pipe.recv_bytes())) is not None:
            method, args = message
            try:
                if method:
                    found = getattr(follower, method)(*args)
                else:
                    found, follower = None, args[0](place)
                reply = pickle.dumps(found)
            except BaseException as error:
                pipe.send_bytes(pickle.dumps(_Failed(str(error), traceback.format_exc())))
                return
            pipe.send_bytes(reply)
        dist.destroy_process_group()


def die_with_parent() -> None:
    """End this process when the one that started it is gone, however it went. For processes of multiprocessing."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


__all__ = ["Place", "Ranks", "die_with_parent", "make_accelerator"]
