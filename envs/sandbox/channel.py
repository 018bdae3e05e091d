"""The streams of a program that lives in a sandbox, written and read until a deadline and never beyond a bound.

Not docker-py's own reader, which waits for the end of the stream: a background child that holds stdout would keep it
waiting for ever, and an endless output would fill the memory.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto

from envs.sandbox.common import Capture

_HEADER = struct.Struct(">BxxxL")
"""Of each of Docker's frames: stream (1 stdout, 2 stderr), length."""
_CHUNK = 64 * 1024

Split = Callable[[bytes], Iterable[tuple[int, bytes]]]
"""Cuts what arrived into (stream, payload)."""


class End(Enum):
    """Why an exchange stopped."""

    DONE = auto()
    """The program said so."""
    EOF = auto()
    """Nothing holds the streams any more."""
    DEADLINE = auto()
    """The time was up."""
    FLOOD = auto()
    """More output than the bound."""


class DockerFrames:
    """Cuts the bytes of a connection to Docker into the payloads of the two streams."""

    def __init__(self) -> None:
        self._pending = b""
        self._stream = 0
        self._left = 0

    def __call__(self, data: bytes) -> Iterable[tuple[int, bytes]]:
        data = self._pending + data
        self._pending = b""
        while data:
            if not self._left:
                if len(data) < _HEADER.size:
                    self._pending = data
                    return
                self._stream, self._left = _HEADER.unpack_from(data)
                data = data[_HEADER.size :]
            yield self._stream, data[: self._left]
            self._left, data = max(self._left - len(data), 0), data[self._left :]


def plain(stream: int) -> Split:
    """For a descriptor that carries one stream and nothing else."""
    return lambda data: [(stream, data)]


class Channel:
    """Descriptors in non-blocking mode: one to write to, and those to read from, each with what cuts its bytes."""

    def __init__(self, write: int, read: Mapping[int, Split], close: Callable[[], None], early: bytes = b"") -> None:
        self._write = write
        self._read = dict(read)
        self._early = early
        self.close = close
        """Close the descriptors. Nothing may be in progress."""

    def exchange(
        self, data: bytes, out: Capture, err: Capture, *, done: Callable[[], bool], deadline: float, bound: int
    ) -> End:
        """Send ``data`` and collect output until ``done``, ``deadline`` (monotonic seconds) or ``bound`` bytes."""
        streams = {1: out, 2: err}
        if self._early:
            self._feed(next(iter(self._read)), self._early, streams)
            self._early = b""
        unsent = memoryview(data)
        poll = select.poll()
        for fd in {self._write, *self._read}:
            poll.register(fd, self._wanted(fd, bool(unsent)))
        while not done():
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0:
                return End.DEADLINE
            for fd, event in poll.poll(left_ms):
                if fd == self._write and unsent and event & (select.POLLOUT | select.POLLERR):
                    unsent = self._send(unsent)
                    if not unsent:
                        poll.modify(fd, self._wanted(fd, False))
                if fd in self._read and event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    try:
                        arrived = os.read(fd, _CHUNK)
                    except BlockingIOError:
                        continue
                    if not arrived:
                        return End.EOF
                    self._feed(fd, arrived, streams)
            if out.total + err.total > bound:
                return End.FLOOD
        return End.DONE

    def _wanted(self, fd: int, sending: bool) -> int:
        return (select.POLLIN if fd in self._read else 0) | (select.POLLOUT if fd == self._write and sending else 0)

    def _feed(self, fd: int, data: bytes, streams: Mapping[int, Capture]) -> None:
        for stream, payload in self._read[fd](data):
            streams[stream].add(payload)

    def _send(self, data: memoryview) -> memoryview:
        """What is still to be sent."""
        try:
            return data[os.write(self._write, data[:_CHUNK]) :]
        except BlockingIOError:
            return data
        except OSError:
            # Nobody reads any more: the end of the output, which comes next, says so.
            return data[:0]


__all__ = ["Channel", "DockerFrames", "End", "Split", "plain"]
