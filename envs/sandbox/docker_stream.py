"""The two output streams of one command in a container, read until a deadline and never beyond a bound.

Not docker-py's own reader, which waits for the end of the stream: a background child that holds stdout would keep it
waiting for ever, and an endless output would fill the memory.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from docker.api.client import APIClient

from envs.sandbox.common import Capture

_HEADER = struct.Struct(">BxxxL")
"""Of each frame: stream (1 stdout, 2 stderr), length."""
_CHUNK = 64 * 1024


class End(Enum):
    """Why reading stopped."""

    EOF = auto()
    """Nothing holds the streams any more."""
    DEADLINE = auto()
    """The time was up."""
    FLOOD = auto()
    """More output than the bound."""


@dataclass(slots=True)
class _Frames:
    """Cuts the bytes of the connection into the payloads of the two streams."""

    out: Capture
    err: Capture
    pending: bytes = b""
    stream: int = 0
    left: int = 0

    def feed(self, data: bytes) -> None:
        data = self.pending + data
        self.pending = b""
        while data:
            if not self.left:
                if len(data) < _HEADER.size:
                    self.pending = data
                    return
                self.stream, self.left = _HEADER.unpack_from(data)
                data = data[_HEADER.size :]
            (self.err if self.stream == 2 else self.out).add(data[: self.left])
            self.left, data = max(self.left - len(data), 0), data[self.left :]


def start(client: APIClient, exec_id: str) -> tuple[Any, socket.socket, bytes]:
    """Start the command; what keeps the connection alive, its socket, and bytes that came with the answer's head.

    The head is read through a buffer. Output of a fast command can be in it already, and would be lost on the socket.
    """
    wrapped: Any = client.exec_start(exec_id, socket=True)
    reader = wrapped._response.raw._fp.fp
    sock: socket.socket = wrapped._sock
    sock.setblocking(False)
    return wrapped, sock, reader.peek()


def converse(
    sock: socket.socket, early: bytes, stdin: bytes, out: Capture, err: Capture, *, deadline: float, bound: int
) -> End:
    """Send ``stdin`` and collect the output, until ``deadline`` (monotonic seconds) or ``bound`` bytes."""
    frames = _Frames(out, err)
    frames.feed(early)
    unsent = memoryview(stdin)
    poll = select.poll()
    poll.register(sock, select.POLLIN | (select.POLLOUT if unsent else 0))
    while out.total + err.total <= bound:
        left_ms = (deadline - time.monotonic()) * 1000
        if left_ms <= 0:
            return End.DEADLINE
        for _, event in poll.poll(left_ms):
            if event & select.POLLOUT and unsent:
                unsent = _send(sock, unsent)
                if not unsent:
                    poll.modify(sock, select.POLLIN)
            if event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                try:
                    data = sock.recv(_CHUNK)
                except BlockingIOError:
                    continue
                if not data:
                    return End.EOF
                frames.feed(data)
    return End.FLOOD


def _send(sock: socket.socket, data: memoryview) -> memoryview:
    """What is still to be sent; closes the command's stdin after the last byte."""
    try:
        data = data[sock.send(data[:_CHUNK]) :]
        if not data:
            sock.shutdown(socket.SHUT_WR)
    except BlockingIOError:
        pass
    except OSError:
        # The command ended, or closed its stdin, before it had read everything: as in a pipe, not an error.
        return data[:0]
    return data
