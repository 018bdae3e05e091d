"""Files and folders that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import DiskFull

_serial = itertools.count()
_MARK = ".partial-"


@contextmanager
def needs_room(path: str | Path) -> Iterator[None]:
    """The block writes ``path``: raises DiskFull if what it raises says that there is no room."""
    try:
        yield
    except Exception as error:
        if no_room(error):
            raise DiskFull(
                f"{path}: the disk is full. Make room there; the same command goes on from what is written"
            ) from None
        raise


def no_room(error: BaseException | None) -> bool:
    """Whether the disk was full. Some writers have it in their text alone, or behind an error of their own."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_text(path: str | Path, text: str) -> None:
    """Create or replace ``path`` at once: written beside it, flushed to the disk, renamed over it."""
    path = Path(path)
    partial = _beside(path)
    try:
        with needs_room(path), open(partial, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """``write_text`` of indented JSON. Refuses NaN, which is no JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends well and vanishes when it does not.

    If ``path`` exists it is replaced; killed between its two renames, the process leaves no ``path``, never a mixture.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            old = _beside(path)
            os.rename(path, old)
            os.rename(partial, path)
            shutil.rmtree(old)
        else:
            os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def sweep(folder: str | Path) -> None:
    """Remove what killed writers left under ``folder``. Nobody may be writing there."""
    for partial in list(Path(folder).rglob(f".*{_MARK}*")):
        remove(partial)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there: a folder at once, so that nobody takes half of it for a whole one."""
    if path.is_dir() and not path.is_symlink():
        gone = _beside(path)
        os.rename(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_MARK}{os.getpid()}-{next(_serial)}")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint that is either whole or absent."""
    import torch

    temporary = _beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with needs_room(path), open(temporary, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
