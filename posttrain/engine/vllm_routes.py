"""Who has read how a request begins: the replica whose prefix cache has most of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from typing import Generic, TypeVar

_BLOCK = 64
"""Tokens between two places at which beginnings are compared."""
_MOST = 65536
"""Beginnings that are remembered, the latest."""

T = TypeVar("T")


class Routes(Generic[T]):
    """What was read where, a hash for every beginning."""

    def __init__(self) -> None:
        self._readers: OrderedDict[int, T] = OrderedDict()

    def note(self, ids: Sequence[int], reader: T) -> None:
        """``reader`` has these tokens now."""
        for _, key in _beginnings(ids):
            self._readers[key] = reader
            self._readers.move_to_end(key)
        while len(self._readers) > _MOST:
            self._readers.popitem(last=False)

    def find(self, ids: Sequence[int], able: Collection[T]) -> T | None:
        """The one of ``able`` that last read the longest beginning of ``ids``; None if that is less than half of them:
        an opening that all requests share is no reason to send them all to the same place."""
        found = None
        for length, key in _beginnings(ids):
            if (reader := self._readers.get(key)) is None:
                break
            if 2 * length >= len(ids) and reader in able:
                found = reader
        return found


def _beginnings(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Length and hash of each that is whole blocks."""
    key = 0
    for end in range(_BLOCK, len(ids) + 1, _BLOCK):
        key = hash((key, *ids[end - _BLOCK : end]))
        yield end, key
