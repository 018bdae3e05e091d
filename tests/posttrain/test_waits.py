"""Who waits for whom: the record itself, and another process that reads it while a tool hangs."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from envs.worlds.base import user
from experts.credit import GroupCredit, GroupCreditConfig
from experts.rollouts import Player
from experts.tasks import TaskStream
from experts.train import Stage, run_stage
from posttrain import waits
from posttrain.chat import Chat
from posttrain.config import Config
from posttrain.errors import UserError
from posttrain.files import write_json
from posttrain.metrics import Metrics
from posttrain.objective_settings import DppoLoss
from posttrain.run import RunDir, start_logging
from posttrain.settings import LocalEngineConfig, LoopConfig, TrainerConfig
from posttrain.types import Limits, Message, Task, Tool, ToolCall
from rewards import RewardConfig
from tests.posttrain.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
LOOKUP = Tool(name="lookup", description="finds a record", parameters={"name": "string"})


# The record


def test_waits_are_named_and_the_longest_comes_first() -> None:
    async def main() -> dict[str, Any]:
        inside = asyncio.Event()

        async def one(name: str, what: str) -> None:
            with waits.acting(name), waits.waiting(what):
                await inside.wait()

        with waits.waiting("them all"):
            tasks = [asyncio.create_task(one(f"s/0/{i}", what)) for i, what in enumerate(("the engine", "a tool"))]
            await asyncio.sleep(0)
            found = waits.snapshot({"shelf": 3})
            inside.set()
            await asyncio.gather(*tasks)
        assert waits.snapshot()["waits"] == []
        return found

    found = asyncio.run(main())
    assert [(w["who"], w["what"]) for w in found["waits"]] == [
        ("", "them all"), ("s/0/0", "the engine"), ("s/0/1", "a tool")
    ]  # fmt: skip
    assert found["queues"] == {"shelf": 3} and found["process"]["pid"] == os.getpid()


def test_a_wait_that_fails_is_over_too() -> None:
    with pytest.raises(ZeroDivisionError), waits.waiting("what cannot be"):
        _ = 1 / 0
    assert waits.snapshot()["waits"] == []


def test_a_wait_says_what_it_is_for_now() -> None:
    """The name is asked for anew at every change, and the wait ends when it is over."""

    async def main() -> list[str]:
        changes, there, heard = waits.Changes(30.0), list[int](), list[str]()
        waiting = asyncio.ensure_future(
            changes.until(lambda: len(there) == 2, lambda: f"{2 - len(there)} more", lambda: 0.0)
        )
        for n in range(2):
            await asyncio.sleep(0)
            heard += [w["what"] for w in waits.snapshot()["waits"]]
            there.append(n)
            await changes.tell()
            await asyncio.sleep(0)
        await waiting
        return heard

    assert asyncio.run(main()) == ["2 more", "1 more"]


def test_a_wait_is_bounded_from_when_something_moved_last() -> None:
    """The bound is a fifth of a second; something moves for one second, and then nothing."""

    async def main() -> float:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"^waited 1\.\d s for what never comes$|^waited [2-9]"):
            await waits.Changes(0.2).until(
                lambda: False, lambda: "what never comes", lambda: min(time.monotonic(), began + 1.0)
            )
        return time.monotonic() - began

    assert asyncio.run(main()) >= 1.2


def test_a_record_for_people() -> None:
    found = {
        "queues": {"running groups": 2, "free slots": 0},
        "waits": [{"who": w, "what": "a tool", "since": s} for w, s in (("s/1/0", 10.0), ("", 12.5), ("s/1/1", 99.75))],
    }
    assert waits.text(found, 100.0, most=2).splitlines() == [
        "running groups 2, free slots 0; 3 waits, the longest first:",
        "    90.0 s  s/1/0: a tool",
        "    87.5 s  main: a tool",
        "and 1 more",
    ]


def test_a_name_that_a_model_chose_does_nothing_to_a_terminal(tmp_path: Path) -> None:
    with waits.acting("s/0/0"), waits.waiting("the tool \x1b[2J\nerror: \u202e\ud800" + "x" * 500):
        waits.write(tmp_path / "w.json", waits.snapshot())
    (wait,) = json.loads((tmp_path / "w.json").read_text())["waits"]
    assert wait["what"] == "the tool ?[2J?error: ??" + "x" * 77 + "..."


def test_a_snapshot_can_be_taken_while_others_go_on() -> None:
    """From another thread, as the loop writes it: two threads come and go while two hundred waits stand."""
    going = threading.Event()

    def busy() -> None:
        while not going.is_set():
            with waits.waiting("a"), waits.waiting("b"):
                pass

    threads = [threading.Thread(target=busy) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ExitStack() as standing:
        for i in range(200):
            standing.enter_context(waits.waiting(str(i)))
        for thread in threads:
            thread.start()
        try:
            counts = {len(waits.snapshot()["waits"]) for _ in range(300)}
        finally:
            going.set()
            for thread in threads:
                thread.join()
            sys.setswitchinterval(interval)
    assert counts <= set(range(200, 205)) and len(counts) > 1


# Whose it is


def record(path: Path, **changes: Any) -> float:
    """A record of this process, and the second it is of."""
    found = waits.snapshot({"shelf": 1})
    process = {**found["process"], **{k: v for k, v in changes.items() if k != "time"}}
    write_json(path, {**found, "process": process})
    return found["time"]


def test_the_process_that_wrote_lives(tmp_path: Path) -> None:
    at = record(tmp_path / "w")
    me = f"process {os.getpid()}"
    assert (
        waits.why(tmp_path / "w", at + 4)
        == f"{me} lives, and told this 4.0 s ago\nshelf 1; 0 waits, the longest first:"
    )
    late = waits.why(tmp_path / "w", at + 31) or ""
    assert late.startswith(f"{me} lives, and told this 31.0 s ago: it is stopped, or something blocks its event loop\n")


def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path: Path) -> None:
    at = record(tmp_path / "w", started="1")
    gone = (
        f"process {os.getpid()} is gone, and told this 0.5 s ago: the run was killed or failed. The same command goes"
    )
    assert (waits.why(tmp_path / "w", at + 0.5) or "").startswith(gone)


def test_a_process_that_ended_is_gone_before_and_after_it_is_collected(tmp_path: Path) -> None:
    written = f"waits.write(Path({str(tmp_path / 'w')!r}), waits.snapshot())"
    code = f"from posttrain import waits; from pathlib import Path; {written}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert f"process {process.pid} is gone" in (waits.why(tmp_path / "w", time.time()) or "")
    assert process.wait(60) == 0
    assert f"process {process.pid} is gone" in (waits.why(tmp_path / "w", time.time()) or "")


def test_another_machine_cannot_be_asked(tmp_path: Path) -> None:
    at = record(tmp_path / "w", host="elsewhere")
    assert platform.node() != "elsewhere"
    assert "on elsewhere told this 1.0 s ago; from here nobody can see" in (waits.why(tmp_path / "w", at + 1) or "")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"waits": []}', '{"process": 3, "time": 1}'])
def test_what_is_no_record_is_named_with_the_cure(text: str, tmp_path: Path) -> None:
    (tmp_path / "w").write_text(text)
    with pytest.raises(UserError, match=r"w: is no record of waits\. Remove it; a run that goes on writes it anew\."):
        waits.why(tmp_path / "w", 0.0)


def test_a_record_that_was_taken_away(tmp_path: Path) -> None:
    record(tmp_path / "w")
    for _ in range(2):
        waits.forget(tmp_path / "w")
        assert waits.why(tmp_path / "w", 0.0) is None


# The command


class Nothing(Config):
    """The config of a run directory."""


def why(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "posttrain.cli", "why", str(directory)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_says_where_nobody_waits(tmp_path: Path) -> None:
    foreign = why(tmp_path)
    assert foreign.returncode == 2 and "Make one with: posttrain run CONFIG --out" in foreign.stderr
    with RunDir.open(tmp_path / "run", Nothing()) as run:
        run.finish("base", "digest", 3.0)
        begun = why(run.path)
        write_json(run.results_file, {})
        ended = why(run.path)
    assert (begun.returncode, ended.returncode) == (0, 0)
    assert begun.stdout.startswith("nobody waits: no stage that keeps records is under way. Finished stages: base.")
    assert ended.stdout.startswith("nobody waits: the run is finished. Finished stages: base.")
    assert str(run.log_file) in ended.stdout


# A tool that hangs


class HangingSession:
    """Its only tool never answers."""

    tools = (LOOKUP,)

    async def call(self, call: ToolCall) -> str:
        await asyncio.Event().wait()
        return ""

    async def reply(self, message: Message) -> Message | None:
        return None

    async def grade(self, messages: Sequence[Message]) -> float:
        return 0.0

    async def close(self) -> None: ...


class HangingWorld:
    """Asks for what its tool would have to find."""

    name, domain = "hanging", "agent"

    def tasks(self, split: str, n: int, seed: int) -> list[Task]:
        limits = Limits(max_turns=2, max_tokens=24, timeout_s=3600.0)
        prompt = (user("which room has 12 chairs?"),)
        return [Task(id="hanging/0", domain="agent", world="hanging", prompt=prompt, thinking=False, limits=limits)]

    async def open(self, task: Task) -> HangingSession:
        return HangingSession()


def train_to_call(folder: Path) -> None:
    """A model that has learned one sentence by heart: the call of the tool."""
    chat, (task,) = Chat(make_tokenizer()), HangingWorld().tasks("train", 1, 0)
    call = Message(role="assistant", content="", tool_calls=(ToolCall(name="lookup", arguments={"name": "amber"}),))
    given, said = chat.opening(task.prompt, (LOOKUP,), False), chat.answer(call, False)
    ids = torch.tensor([[*given, *said]])
    model = make_model("longcat2", vocab_size=len(make_tokenizer())).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.tensor(9.0)
    for _ in range(200):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(given) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(given) :])
        if loss < 1e-3:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01, f"it has not learned the call: {loss:.3f}"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def hang(folder: Path) -> None:
    """A run whose rollouts all wait for the tool."""
    train_to_call(folder / "model")
    worlds: Any = {"hanging": HangingWorld()}
    stage = Stage(
        name="expert-toy",
        start=folder / "model",
        loop=LoopConfig(steps=2, groups_per_step=2, group_size=2, max_running=2, wait_s=100.0),
        trainer=TrainerConfig(),
        loss=DppoLoss(),
        engine=LocalEngineConfig(slots=4, max_context=128),
        credit=GroupCredit(GroupCreditConfig()),
        player=Player(worlds, Chat(make_tokenizer()), RewardConfig()),
        source=TaskStream(worlds, {"hanging": 1.0}, 1, seed=1),
        shares={"hanging": 1.0},
        seed=1,
    )
    with RunDir.open(folder / "run", Nothing()) as run:
        start_logging(run.log_file)
        asyncio.run(run_stage(stage, run, Metrics(run.metrics_file), Progress(disable=True)))


@pytest.mark.slow
def test_another_process_says_which_trajectory_waits_for_which_tool_and_the_log_does_unasked(tmp_path: Path) -> None:
    code = f"from tests.posttrain.test_waits import hang, Path; hang(Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run, log, last = tmp_path / "run", tmp_path / "run/log.txt", ""
    try:
        ages: list[float] = []
        said = ""
        until = time.monotonic() + 300
        while len(ages) < 2 or not (log.exists() and "learn waits" in log.read_text()):
            assert process.poll() is None, process.communicate()[0].decode()[-3000:]
            assert time.monotonic() < until, said
            time.sleep(1.0)
            said = why(run).stdout if (run / "waits.json").exists() else ""
            found = re.search(r"^ *([\d.]+) s  expert-toy/0/0: the tool lookup, turn 1$", said, re.MULTILINE)
            if found is not None:
                ages.append(float(found[1]))
                last = said
        assert 0 < ages[0] < ages[-1] < 300
        assert re.match(rf"process {process.pid} lives, and told this [\d.]+ s ago\n", last)
        assert "running groups 2, running rollouts 4, arrived groups 0, groups on the shelf 0, free slots 0" in last
        assert re.search(r" s  expert-toy: learn: 2 groups to train on$", last, re.MULTILINE)
        assert re.search(
            r"WARNING .*expert-toy: learn waits \d+ s for 2 groups to train on; running groups 2", log.read_text()
        )
        assert re.search(r"^ *[\d.]+ s  expert-toy/1/1: the tool lookup, turn 1$", log.read_text(), re.MULTILINE)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert f"process {process.pid} is gone, and told this" in why(run).stdout
