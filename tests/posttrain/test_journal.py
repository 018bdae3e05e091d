"""The journal, and rollouts in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import DiskFull, UserError
from posttrain.journal import Journal, read_journal, rollout_from_dict, rollout_to_dict
from posttrain.types import (
    Choices,
    Culprit,
    Failure,
    Limits,
    Message,
    Role,
    Rollout,
    Score,
    Segment,
    StopReason,
    Task,
    ToolCall,
)

ROOT = Path(__file__).parents[2]


# Journal


def test_journal_cuts_a_torn_line_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.write({"n": 1, "text": "a\nb ä"})
        journal.write({"n": 2})
    with path.open("ab") as file:
        file.write(b'{"n": 3, "te')
    assert [r["n"] for r in read_journal(path)] == [1, 2]
    with Journal(path) as journal:
        journal.write({"n": 4})
        assert list(journal.read()) == [{"n": 1, "text": "a\nb ä"}, {"n": 2}, {"n": 4}]
    journal.close()


@given(st.lists(st.text(max_size=30), max_size=5), st.integers(0, 200))
def test_a_journal_cut_anywhere_keeps_every_whole_record(tmp_path_factory: Any, texts: list[str], cut: int) -> None:
    path = tmp_path_factory.mktemp("j") / "j"
    with Journal(path) as journal:
        for text in texts:
            journal.write({"t": text})
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole)
    kept = [{"t": t} for t in texts[: whole.count(b"\n")]]
    assert list(read_journal(path)) == kept
    with Journal(path) as journal:
        journal.write({"t": "more"})
        assert list(journal.read()) == [*kept, {"t": "more"}]


def test_journal_with_long_lines_and_zeros_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "j"
    long = {"t": "x" * 200_000}
    with Journal(path) as journal:
        journal.write(long)
        journal.write(long)
    with path.open("ab") as file:
        file.write(b"\0" * 100_000 + b"\n")
    assert list(read_journal(path)) == [long, long]
    with Journal(path) as journal:
        assert list(journal.read()) == [long, long]
    assert path.read_bytes().count(b"\0") == 0
    with path.open("ab") as file:
        file.write(b'{"t": "' + b"y" * 300_000)
    with Journal(path) as journal:
        assert list(journal.read()) == [long, long]


def test_journal_broken_in_the_middle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_text('{"n":1}\noops\n{"n":2}\n')
    with pytest.raises(UserError, match=r"j, line 2: is not a JSON record. Remove that line."):
        list(read_journal(tmp_path / "j"))
    assert list(read_journal(tmp_path / "none")) == []


def test_journal_on_a_full_disk_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.write({"n": 1})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    with pytest.raises(DiskFull, match=r"/j: the disk is full\. Make room there"):
        journal.write({"n": 2})
    monkeypatch.undo()
    journal.write({"n": 3})
    assert list(journal.read()) == [{"n": 1}, {"n": 3}]


@pytest.mark.faults
def test_no_record_is_lost_when_the_writer_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom posttrain.journal import Journal\nj = Journal(sys.argv[1])\nn = 0\n"
        "while True:\n    j.write({'n': n, 'pad': 'x' * (n % 5000)})\n    print(n, flush=True)\n    n += 1\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "j")], stdout=subprocess.PIPE, env=env)
    assert child.stdout
    for _ in range(300):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    told = 300 + len(child.stdout.read().splitlines())
    child.wait()
    numbers = [r["n"] for r in read_journal(tmp_path / "j")]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= told - 1  # the last line of the pipe may be torn, not the journal


# Rollouts

text = st.text(max_size=8)
number = st.floats(allow_nan=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | number | text,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3),
    max_leaves=5,
)
mappings = st.dictionaries(text, json_values, max_size=3)
messages = st.builds(
    Message,
    role=st.sampled_from(get_args(Role)),
    content=text,
    thinking=text,
    tool_calls=st.lists(st.builds(ToolCall, name=text, arguments=mappings), max_size=2).map(tuple),
)
choices = st.integers(0, 3).map(
    lambda n: Choices(slots=b"\x01\x02" * 6 * n, slot_shape=(2, 3), columns=b"\xff" * 32 * n, column_shape=(2, 1, 4))
)
tokens = st.tuples(st.integers(0, 2**31), st.booleans(), number, st.integers(-1, 9))
segments = st.tuples(st.lists(tokens, max_size=6), st.none() | choices).map(
    lambda made: Segment(
        ids=tuple(r[0] for r in made[0]),
        sampled=tuple(r[1] for r in made[0]),
        logprobs=tuple(r[2] for r in made[0]),
        versions=tuple(r[3] for r in made[0]),
        choices=made[1],
    )
) | st.lists(st.integers(0, 99), max_size=5).map(Segment.given)
tasks = st.builds(
    Task,
    id=text,
    domain=text,
    world=text,
    prompt=st.lists(messages, max_size=2).map(tuple),
    thinking=st.booleans(),
    files=st.dictionaries(text, text, max_size=2),
    limits=st.builds(Limits, max_turns=st.integers(), max_tokens=st.integers(), timeout_s=number),
    difficulty=number,
    rollouts=st.none() | st.integers(1, 99),
    data=mappings,
)
scores = st.builds(
    Score, value=number, parts=st.dictionaries(text, number, max_size=2), outcome=number, valid=st.booleans()
)
rollouts = st.builds(
    Rollout,
    id=text,
    group=text,
    task=tasks,
    branches=st.lists(st.lists(segments, max_size=3).map(tuple), max_size=2).map(tuple),
    messages=st.lists(messages, max_size=2).map(tuple),
    stop=st.sampled_from(StopReason),
    score=st.none() | scores,
    error=st.none() | st.builds(Failure, culprit=st.sampled_from(Culprit), message=text),
    parse_errors=st.lists(text, max_size=2).map(tuple),
    tool_errors=st.integers(),
    noise=st.integers(0, 3),
    sandbox=text,
    wall_s=number,
)


@given(rollouts)
def test_a_rollout_comes_back_equal(rollout: Rollout) -> None:
    back = rollout_from_dict(json.loads(json.dumps(rollout_to_dict(rollout))))
    assert back == rollout
    for left, right in zip(
        (s for b in back.branches for s in b), (s for b in rollout.branches for s in b), strict=True
    ):
        assert [type(v) for v in left.sampled] == [type(v) for v in right.sampled]
    assert isinstance(back.stop, StopReason)


def test_no_field_is_forgotten() -> None:
    """A field added to a noun without the journal knowing it would come back as its default."""
    known = {Rollout: 13, Task: 10, Segment: 5, Choices: 4, Message: 4, ToolCall: 2, Limits: 3, Score: 4, Failure: 2}
    assert {cls: len(fields(cls)) for cls in known} == known, "teach posttrain/journal.py the new field"


def long_rollout() -> Rollout:
    call = Segment(ids=(7,) * 40, sampled=(True,) * 40, logprobs=(-0.123456789012345,) * 40, versions=(3,) * 40)
    task = Task(id="t", domain="agent", world="w", prompt=(Message(role="user", content="Find it. " * 20),))
    branch = (Segment.given(range(100)), call, Segment.given(range(30)), call)
    return Rollout(id="g/0", group="g", task=task, branches=(branch,), messages=task.prompt, stop=StopReason.SCORED)


def test_rollouts_are_compact_and_fast() -> None:
    rollout = long_rollout()
    data = json.dumps(rollout_to_dict(rollout), separators=(",", ":"))
    assert len(data) < 3_000
    segment = json.loads(data)["branches"][0][0]
    assert (segment["sampled"], segment["versions"], "logprobs" in segment) == ([0, 100], [-1, 100], False)
    start = time.process_time()
    for _ in range(500):
        rollout_from_dict(json.loads(json.dumps(rollout_to_dict(rollout))))
    assert 500 / (time.process_time() - start) > 1_000, "there and back, a second of processor time"
