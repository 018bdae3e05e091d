"""Tensors from the trainer's process to the workers of a server, and no file between: by NCCL from GPU to GPU, by gloo
through the host's memory if an end has none or both have the same one.

Both environments import this, so it knows nothing of vLLM and of the rest of the project.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 1 << 28
"""Bytes that travel at once, unless one tensor has more."""
_c10d: Any = dist
"""Its groups by themselves, beside a default one that the process may have; not whole for a type checker."""
_ALIGN = 16
"""Bytes: a tensor begins where any type may."""
_POLL_S = 0.02


class Layout(NamedTuple):
    """Of one tensor."""

    name: str
    dtype: str
    """As in ``torch.<dtype>``."""
    shape: list[int]


class Lost(Exception):
    """The others did not come, or they are gone."""


class Link:
    """One end of a connection of a sender, rank 0, and receivers.

    ``meeting``: a file that does not exist yet, the same for all, in a folder that all can reach. ``loopback``: listen
    there and nowhere else, where the memory of the hosts is the way. Raises Lost when the others did not come within
    ``timeout_s``, or ``given_up`` was set meanwhile."""

    def __init__(
        self,
        meeting: Path,
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float,
        loopback: bool,
        given_up: threading.Event | None = None,
    ) -> None:
        bound = timedelta(seconds=timeout_s)
        store = _c10d.FileStore(str(meeting), size)
        store.set_timeout(bound)
        store.set(f"rank {rank}", _place(device))
        keys, deadline = [f"rank {r}" for r in range(size)], time.monotonic() + timeout_s
        while not store.check(keys):
            if time.monotonic() > deadline or (given_up is not None and given_up.is_set()):
                raise Lost(f"not all of {size} ends came to {meeting}")
            time.sleep(_POLL_S)
        places = [store.get(key).decode() for key in keys]
        self.by_nccl = "" not in places and len({*places}) == size
        self.device = device if self.by_nccl else torch.device("cpu")
        self._bound = bound
        try:
            self._group = _nccl(store, rank, size, bound) if self.by_nccl else _gloo(store, rank, size, bound, loopback)
        except RuntimeError as error:  # torch.distributed's own are of this kind
            raise Lost(str(error)) from None

    def send(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """To all receivers, which know the layout. Raises Lost."""
        layout = layout_of(tensors)
        for first, last, size in _buckets(layout):
            bucket = torch.empty(size, dtype=torch.uint8, device=self.device)
            for (_, tensor), (a, b) in zip(tensors[first:last], _spans(layout[first:last]), strict=True):
                bucket[a:b].copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
            self._broadcast(bucket)

    def receive(self, layout: Sequence[Layout]) -> Iterator[tuple[str, Tensor]]:
        """What the sender sends, on ``device``. Raises Lost."""
        for first, last, size in _buckets(layout):
            # New memory each time: whoever loads may keep a tensor until its layer is complete.
            bucket = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._broadcast(bucket)
            for entry, (a, b) in zip(layout[first:last], _spans(layout[first:last]), strict=True):
                yield entry.name, bucket[a:b].view(getattr(torch, entry.dtype)).view(entry.shape)

    def _broadcast(self, bucket: Tensor) -> None:
        try:
            self._group.broadcast(bucket, 0).wait(self._bound)
        except RuntimeError as error:
            raise Lost(str(error)) from None

    def close(self) -> None:
        """Let go: the others' calls end with an error; idempotent."""
        self._group.shutdown()


def layout_of(tensors: Iterable[tuple[str, Tensor]]) -> list[Layout]:
    """What receivers must be told."""
    return [Layout(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors]


def _bytes(entry: Layout) -> int:
    count = 1
    for n in entry.shape:
        count *= n
    return count * getattr(torch, entry.dtype).itemsize


def _spans(layout: Sequence[Layout]) -> list[tuple[int, int]]:
    """Where each begins and ends in a bucket of them."""
    found, start = list[tuple[int, int]](), 0
    for entry in layout:
        found.append((start, start + _bytes(entry)))
        start += -(-_bytes(entry) // _ALIGN) * _ALIGN
    return found


def _buckets(layout: Sequence[Layout]) -> Iterator[tuple[int, int, int]]:
    """First, last (exclusive) and bytes of each: the same at both ends, since it hangs on the layout alone."""
    first, size = 0, 0
    for i, entry in enumerate(layout):
        room = -(-_bytes(entry) // _ALIGN) * _ALIGN
        if i > first and size + room > BUCKET:
            yield first, i, size
            first, size = i, 0
        size += room
    if layout:
        yield first, len(layout), size


def _place(device: torch.device) -> str:
    """Which GPU that is, in the whole world; empty for none. Two ends on one GPU are more than NCCL allows."""
    if device.type != "cuda":
        return ""
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def _gloo(store: Any, rank: int, size: int, bound: timedelta, loopback: bool) -> Any:
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._timeout = bound
    options._devices = [kind.create_device(hostname="127.0.0.1") if loopback else kind.create_device()]
    return kind(_c10d.PrefixStore("gloo", store), rank, size, options)


def _nccl(store: Any, rank: int, size: int, bound: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = bound
    return dist.ProcessGroupNCCL(_c10d.PrefixStore("nccl", store), rank, size, options)


__all__ = ["BUCKET", "Layout", "Link", "Lost", "layout_of"]
