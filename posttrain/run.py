"""The directory of a run: who may write in it, what lies where, which stages are done, and the log.

::

    config.yaml      the resolved config, itself a valid config
    stages.json      for every stage: digest of what it was made from, seconds, outputs
    metrics.jsonl    one record a step
    rollouts/        one journal a stage, and of RL what was trained (.trained) and its gaps to the engine (.mismatch)
    weights/         one folder a stage, one in it a version
    checkpoints/     one folder a stage, Hugging Face format
    results.json, report.html, log.txt
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config import Config, dump
from posttrain.errors import UserError
from posttrain.files import no_room, remove, sweep, write_json, write_text

_MARKER = ".posttrain"
"""Makes a directory a run directory; locked while a process writes there, and holds that process's id."""

_STAGE = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
_OURS = ("posttrain", "rewards", "envs", "experts", "fusion")


class RunDir:
    """A run directory. Made without touching the disk; ``open`` creates and locks it, ``require`` only looks."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.results_file = self.path / "results.json"
        self.report_file = self.path / "report.html"
        self.log_file = self.path / "log.txt"
        self.waits_file = self.path / "waits.json"
        self._ledger_file = self.path / "stages.json"
        self._lock = -1

    @classmethod
    def open(cls, path: str | Path, config: Config) -> RunDir:
        """Create the directory or take up the one that is there, for writing, and put ``config`` into it.

        Raises UserError, having changed nothing, for a path that holds something else or is in use.
        """
        run = cls(path)
        run._refuse_foreign()
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run._acquire()
        except OSError as error:
            raise UserError(f"{run.path}: cannot be written: {error.strerror}. Choose another --out.") from None
        sweep(run.path)
        for folder in ("rollouts", "weights", "checkpoints"):
            (run.path / folder).mkdir(exist_ok=True)
        write_text(run.config_file, dump(config))
        return run

    @classmethod
    def require(cls, path: str | Path) -> RunDir:
        """An existing run, for reading. Raises UserError if there is none at ``path``."""
        run = cls(path)
        if not (run.path / _MARKER).is_file():
            state = "is not the directory of a run" if run.path.exists() else "there is no such directory"
            raise UserError(f"{path}: {state}. Make one with: posttrain run CONFIG --out {path}")
        return run

    def close(self) -> None:
        """Let another process have the directory; idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Places of a stage

    def rollouts(self, stage: str) -> Path:
        """Journal of the stage's rollouts."""
        return self.path / "rollouts" / f"{_checked(stage)}.jsonl"

    def weights(self, stage: str) -> Path:
        """Folder of the weights that the stage publishes."""
        return self.path / "weights" / _checked(stage)

    def checkpoint(self, stage: str) -> Path:
        """Folder of what the stage ends with and resumes from."""
        return self.path / "checkpoints" / _checked(stage)

    # Ledger of stages

    def done(self, stage: str, digest: str) -> bool:
        """Whether the stage was finished from exactly what ``digest`` names and its outputs are still there."""
        entry = self._ledger().get(_checked(stage), {})
        outputs = (self.path / output for output in entry.get("outputs", ()))
        return entry.get("digest") == digest and entry["seconds"] is not None and all(p.exists() for p in outputs)

    def begin(self, stage: str, digest: str) -> bool:
        """Start or resume a stage that is not done. True if what an earlier try left may be used: same digest.

        Otherwise the stage's journal, weights and checkpoints are removed first. ``digest`` must cover the stage's
        config and the digests of the stages that it reads.
        """
        ledger = self._ledger()
        entry = ledger.pop(_checked(stage), None)
        resumed = entry is not None and entry["digest"] == digest
        if not resumed:
            write_json(self._ledger_file, ledger)  # first: a kill while removing must not look like a resumable try
            for place in (self.rollouts(stage), self.weights(stage), self.checkpoint(stage)):
                remove(place)
        write_json(self._ledger_file, {**ledger, stage: {"digest": digest, "seconds": None, "outputs": []}})
        return resumed

    def finish(self, stage: str, digest: str, seconds: float, outputs: Sequence[str | Path] = ()) -> None:
        """Record that the stage is done. ``outputs`` are paths in the run directory; they must exist.

        ``seconds`` is the stage's wall clock, of all its tries if the caller knows them.
        """
        relative = [str(Path(o).relative_to(self.path) if Path(o).is_relative_to(self.path) else o) for o in outputs]
        if missing := [o for o in relative if not (self.path / o).exists()]:
            raise FileNotFoundError(f"stage {stage} says it made {', '.join(missing)}, not in {self.path}")
        entry = {"digest": digest, "seconds": round(seconds, 3), "outputs": relative}
        write_json(self._ledger_file, {**self._ledger(), _checked(stage): entry})

    def seconds(self) -> dict[str, float]:
        """Wall clock of every finished stage, in the order they were begun."""
        return {stage: e["seconds"] for stage, e in self._ledger().items() if e["seconds"] is not None}

    def _ledger(self) -> dict[str, Any]:
        try:
            return json.loads(self._ledger_file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            raise UserError(f"{self._ledger_file}: is not JSON. Remove it: every stage is then run again.") from None

    # Ownership

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file. Give --out a directory.")
        if self.path.is_dir() and not (self.path / _MARKER).exists():
            found = sorted(p.name for p in self.path.iterdir())
            if found:
                shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
                raise UserError(
                    f"{self.path}: is not empty ({shown}) and not the directory of a run. Choose another --out."
                )

    def _acquire(self) -> None:
        fd = os.open(self.path / _MARKER, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            who = f"process {owner}" if owner else "another process"
            raise UserError(
                f"{self.path}: {who} is writing there. Wait for it, stop it, or choose another --out."
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock = fd
        # A forked child must not hold the lock after its parent was killed.
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: run.close() if (run := this()) else None)


def _checked(stage: str) -> str:
    if not _STAGE.match(stage):
        raise ValueError(f"{stage!r} cannot name a stage: letters, digits, '_', '.' and '-' only")
    return stage


class _LogFile(logging.FileHandler):
    """A full disk is reported by what cannot do without it, not line by line."""

    def handleError(self, record: logging.LogRecord) -> None:
        """What else goes wrong with a record is shown."""
        if not no_room(sys.exc_info()[1]):
            super().handleError(record)


def start_logging(file: str | Path, *, verbose: bool = False) -> None:
    """Our loggers from INFO on, everybody else's warnings, to ``file``; to the terminal what is a warning or our own.

    Calling it again moves the log. ``verbose`` shows our DEBUG lines too.
    """
    from rich.console import Console
    from rich.logging import RichHandler

    root = logging.getLogger()
    for handler in [h for h in root.handlers if h.get_name() == "posttrain"]:
        root.removeHandler(handler)
        handler.close()
    to_file = _LogFile(file, encoding="utf-8", delay=True)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s  %(message)s"))
    to_terminal = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S", markup=False)
    for handler in (to_file, to_terminal):
        handler.set_name("posttrain")
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.captureWarnings(True)


__all__ = ["RunDir", "start_logging"]
