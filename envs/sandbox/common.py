"""What every sandbox shares: the work folder's name, the rule for paths in it, and capped output."""

from __future__ import annotations

import posixpath

WORK = "/work"
"""The work folder, as code in the sandbox sees it; its working directory."""

OUTPUT_CAP = 64 * 1024
"""Bytes kept of each output stream of one call: the head, because the first error explains the later ones."""


def inside(path: str) -> str:
    """Absolute path, below ``WORK``, that ``path`` names; relative paths start there.

    Lexical only: a sandbox with symbolic links checks again where it can see them. Raises PermissionError on escape.
    """
    absolute = posixpath.normpath(posixpath.join(WORK, path))
    if "\0" in path or path.encode(errors="ignore").decode() != path or not absolute.startswith(f"{WORK}/"):
        raise PermissionError(f"{path!r} is not a file below {WORK}")
    return absolute


class Capture:
    """Keeps the head of a byte stream, and its last few bytes, however long it grows."""

    TAIL = 512

    def __init__(self, cap: int = OUTPUT_CAP) -> None:
        self.cap = cap
        self.total = 0
        self.head = bytearray()
        self.tail = b""

    def add(self, data: bytes) -> None:
        """Append ``data``, dropping what is beyond the cap."""
        self.total += len(data)
        if room := self.cap - len(self.head):
            self.head += data[:room]
        self.tail = (self.tail + data[-self.TAIL :])[-self.TAIL :]

    def cut(self, at: int) -> None:
        """Forget everything from byte ``at`` of the stream on."""
        self.total = at
        del self.head[at:]

    @property
    def truncated(self) -> bool:
        """Whether bytes were dropped."""
        return self.total > len(self.head)

    def text(self) -> str:
        """The head, with bytes that are not UTF-8 replaced."""
        return self.head.decode("utf-8", errors="replace")
