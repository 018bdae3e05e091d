"""The run directory and atomic files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from posttrain.config import Config, digest
from posttrain.errors import UserError
from posttrain.files import new_folder, remove, save_state, sweep, write_json, write_text
from posttrain.run import RunDir, start_logging

ROOT = Path(__file__).parents[2]


class Small(Config):
    seed: int = 0


def tree(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


# Files


def test_write_text_replaces_at_once_and_leaves_nothing_beside(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one\n")
    write_text(tmp_path / "a", "zwei ä\r\n")
    assert (tmp_path / "a").read_bytes() == "zwei ä\r\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_bytes() == "zwei ä\r\n".encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b", float("nan"))
    assert tree(tmp_path) == ["a"]


def test_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_folder(tmp_path / "w" / "1") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "w" / "1").exists()
    with new_folder(tmp_path / "w" / "1") as folder:
        (folder / "y").write_text("2")
    assert tree(tmp_path) == ["w", "w/1", "w/1/y"]
    with pytest.raises(RuntimeError), new_folder(tmp_path / "w" / "1") as folder:
        (folder / "z").write_text("3")
        raise RuntimeError
    assert tree(tmp_path) == ["w", "w/1", "w/1/y"]


def test_sweep_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    with new_folder(tmp_path / "w") as folder:
        kept = folder.name
        (folder / "x").write_text("1")
    (tmp_path / kept).mkdir()
    (tmp_path / kept / "x").touch()
    (tmp_path / "w" / ".f.partial-1-2").touch()
    (tmp_path / ".hidden").touch()
    sweep(tmp_path)
    assert tree(tmp_path) == [".hidden", "w", "w/x"]


def test_a_folder_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed while it is removed leaves no half of it."""
    with new_folder(tmp_path / "w") as folder:
        (folder / "x").write_text("1")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        remove(tmp_path / "w")
    assert not (tmp_path / "w").exists() and len(tree(tmp_path)) == 2
    sweep(tmp_path)
    assert tree(tmp_path) == []
    remove(tmp_path / "w")


def test_what_a_killed_process_left_of_a_checkpoint_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    save_state({"version": 1}, path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # it is killed before it gets there
        save_state({"version": 2}, path)
    assert torch.load(path) == {"version": 1} and len(tree(tmp_path)) == 2
    sweep(tmp_path)
    assert tree(tmp_path) == ["state.pt"]


# Run directory


def test_open_makes_the_places_and_writes_the_config(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a" / "r", Small(seed=3)) as run:
        assert tree(run.path) == [".posttrain", "checkpoints", "config.yaml", "rollouts", "weights"]
        assert run.config_file.read_text() == "seed: 3\n"
        (run.path / ".results.json.partial-1-1").touch()
    with RunDir.open(run.path, Small(seed=4)) as run:
        assert run.config_file.read_text() == "seed: 4\n"
        assert not (run.path / ".results.json.partial-1-1").exists()
    assert RunDir.require(run.path).path == run.path


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"is not empty \(thesis.tex\) and not the directory of a run. Choose another"):
        RunDir.open(tmp_path, Small())
    assert tree(tmp_path) == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis.tex: is a file. Give --out a directory."):
        RunDir.open(tmp_path / "thesis.tex", Small())
    with pytest.raises(UserError, match=r"cannot be written: Not a directory"):
        RunDir.open(tmp_path / "thesis.tex" / "r", Small())
    with pytest.raises(UserError, match=r"is not the directory of a run. Make one with: posttrain run"):
        RunDir.require(tmp_path)
    with pytest.raises(UserError, match=r"there is no such directory"):
        RunDir.require(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    RunDir.open(tmp_path / "empty", Small()).close()


def test_two_runs_cannot_share_a_directory(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "r", Small(seed=1))
    with pytest.raises(UserError, match=rf"r: process {os.getpid()} is writing there. Wait for it, stop it, or"):
        RunDir.open(tmp_path / "r", Small(seed=2))
    assert run.config_file.read_text() == "seed: 1\n"
    run.close()
    run.close()
    RunDir.open(tmp_path / "r", Small(seed=2)).close()


@pytest.mark.faults
def test_the_lock_goes_with_its_owner_even_if_a_forked_child_lives_on(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom posttrain.config import Config\nfrom posttrain.run import RunDir\n"
        "run = RunDir.open(sys.argv[1], Config())\n"
        "if not os.fork():\n    print(os.getpid(), flush=True)\ntime.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r")], stdout=subprocess.PIPE, env=env)
    assert owner.stdout
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {owner.pid} is writing there"):
            RunDir.open(tmp_path / "r", Small())
        owner.kill()
        owner.wait()
        os.kill(child, 0)  # still there
        RunDir.open(tmp_path / "r", Small()).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_ledger_skips_what_is_done_and_clears_what_has_changed(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "r", Small())
    one, two = digest({"lr": 1}), digest({"lr": 2})
    assert not run.done("sft", one)
    assert run.begin("sft", one) is False
    run.rollouts("sft").write_text("{}\n")
    run.checkpoint("sft").mkdir()
    assert not run.done("sft", one)
    assert run.begin("sft", one) is True, "killed and started again: what is there may be used"
    assert run.rollouts("sft").exists()
    run.finish("sft", one, 1.23456, [run.checkpoint("sft")])
    run.close()

    run = RunDir.open(tmp_path / "r", Small())
    assert run.done("sft", one)
    assert not run.done("sft", two)
    assert run.seconds() == {"sft": 1.235}
    assert json.loads((run.path / "stages.json").read_text()) == {
        "sft": {"digest": one, "seconds": 1.235, "outputs": ["checkpoints/sft"]}
    }
    assert run.begin("sft", two) is False
    assert not run.rollouts("sft").exists()
    assert not run.checkpoint("sft").exists()
    assert not run.done("sft", one)
    assert run.seconds() == {}
    with pytest.raises(FileNotFoundError, match="stage sft says it made checkpoints/sft"):
        run.finish("sft", two, 1.0, [run.checkpoint("sft")])
    run.finish("sft", two, 1.0)
    run.checkpoint("rl").mkdir()
    run.begin("rl", one)
    assert run.done("sft", two)
    run.checkpoint("rl").mkdir()
    run.finish("rl", one, 2.0, [run.checkpoint("rl")])
    run.checkpoint("rl").rmdir()
    assert not run.done("rl", one), "its output was removed by hand"
    with pytest.raises(ValueError, match="cannot name a stage"):
        run.rollouts("../x")
    (run.path / "stages.json").write_text("{")
    with pytest.raises(UserError, match=r"stages.json: is not JSON. Remove it"):
        run.done("sft", two)


@contextmanager
def own_logging() -> Iterator[int]:
    """What is set up inside is taken away again. Gives the number of handlers before."""
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    try:
        yield len(before[0])
    finally:
        for handler in [h for h in root.handlers if h not in before[0]]:
            root.removeHandler(handler)
            with suppress(OSError):
                handler.close()
        root.setLevel(before[1])
        logging.captureWarnings(False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_no_matter_of_the_log_and_a_wrong_record_is(capsys: pytest.CaptureFixture[str]) -> None:
    with own_logging():
        start_logging("/dev/full")
        logging.getLogger("posttrain.loop").info("step %d", 3)
        assert "Logging error" not in capsys.readouterr().err
        (handler,) = [h for h in logging.getLogger().handlers if getattr(h, "baseFilename", "") == "/dev/full"]
        handler.handle(logging.LogRecord("posttrain.loop", logging.INFO, "f.py", 1, "step %d", ("three",), None))
        assert "Logging error" in capsys.readouterr().err


def test_log_goes_to_the_file(tmp_path: Path) -> None:
    root = logging.getLogger()
    with own_logging() as before:
        start_logging(tmp_path / "one.txt")
        start_logging(tmp_path / "log.txt")
        logging.getLogger("posttrain.loop").info("step %d", 3)
        logging.getLogger("other").info("chatter")
        logging.getLogger("other").warning("care")
        lines = (tmp_path / "log.txt").read_text().splitlines()
        assert [line.split(maxsplit=2)[2] for line in lines] == [
            "INFO    posttrain.loop  step 3",
            "WARNING other  care",
        ]
        assert not (tmp_path / "one.txt").exists()
        assert len(root.handlers) == before + 2
