"""Append-only JSONL that survives ``kill -9``, and the JSON form of a rollout.

A record is one ``write`` system call on a file opened for appending: it is there whole or it is the last line and torn.
Torn last lines are cut off when the journal is opened and passed over by readers.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.files import needs_room
from posttrain.types import (
    Choices,
    Culprit,
    Failure,
    Limits,
    Message,
    Rollout,
    Score,
    Segment,
    StopReason,
    Task,
    ToolCall,
)

_BLOCK = 1 << 16


class Journal:
    """One writer, any number of readers. Creates the file; on opening cuts off a half-written last line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._fd, _whole(self._fd))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Raises DiskFull, leaving the journal as it was."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with needs_room(self.path):
            written = os.write(self._fd, line)
            if written != len(line):
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
                raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes fitted")

    def read(self) -> Iterator[dict[str, Any]]:
        """Every record written so far, oldest first."""
        return read_journal(self.path)

    def close(self) -> None:
        """Flush to the disk and close; idempotent."""
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a journal that may be still growing; none if there is no file.

    Raises UserError for a line that is no record and not the last: something else wrote into the file.
    """
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        broken = 0
        for number, line in enumerate(file, start=1):
            if broken:
                raise UserError(f"{path}, line {broken}: is not a JSON record. Remove that line.")
            if not line.endswith(b"\n"):
                return
            record = _record(line)
            if record is None:
                broken = number
            else:
                yield record


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in one line; None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _whole(fd: int) -> int:
    """Length of the file without a torn last line."""
    size = end = os.fstat(fd).st_size
    tail = b""
    while end > 0:  # from the end backwards until the tail holds the last two line ends
        start = max(0, end - _BLOCK)
        tail = os.pread(fd, end - start, start) + tail
        end = start
        if tail.count(b"\n") >= 2:
            break
    torn = len(tail) - (tail.rfind(b"\n") + 1)
    last = tail[: len(tail) - torn]
    line = last[last.rfind(b"\n", 0, -1) + 1 :]
    if line and _record(line) is None:  # a complete line of rubbish, as a power cut leaves it
        torn += len(line)
    return size - torn


def rollout_to_dict(rollout: Rollout) -> dict[str, Any]:
    """JSON values from which ``rollout_from_dict`` makes an equal rollout; floats are kept bit for bit."""
    return {
        "id": rollout.id,
        "group": rollout.group,
        "task": task_to_dict(rollout.task),
        "branches": [[_segment_to_dict(segment) for segment in branch] for branch in rollout.branches],
        "messages": [_message_to_dict(message) for message in rollout.messages],
        "stop": rollout.stop.value,
        "score": _score_to_dict(rollout.score),
        "error": None if rollout.error is None else [rollout.error.culprit.value, rollout.error.message],
        "parse_errors": list(rollout.parse_errors),
        "tool_errors": rollout.tool_errors,
        "noise": rollout.noise,
        "sandbox": rollout.sandbox,
        "wall_s": rollout.wall_s,
    }


def rollout_from_dict(data: Mapping[str, Any]) -> Rollout:
    """Inverse of ``rollout_to_dict``."""
    score, error = data["score"], data["error"]
    return Rollout(
        id=data["id"],
        group=data["group"],
        task=task_from_dict(data["task"]),
        branches=tuple(tuple(_segment_from_dict(s) for s in branch) for branch in data["branches"]),
        messages=tuple(_message_from_dict(m) for m in data["messages"]),
        stop=StopReason(data["stop"]),
        score=None if score is None else Score(**score),
        error=None if error is None else Failure(culprit=Culprit(error[0]), message=error[1]),
        parse_errors=tuple(data["parse_errors"]),
        tool_errors=data["tool_errors"],
        noise=data.get("noise", 0),
        sandbox=data["sandbox"],
        wall_s=data["wall_s"],
    )


def task_to_dict(task: Task) -> dict[str, Any]:
    """JSON values from which ``task_from_dict`` makes an equal task."""
    return {
        "id": task.id,
        "domain": task.domain,
        "world": task.world,
        "prompt": [_message_to_dict(message) for message in task.prompt],
        "thinking": task.thinking,
        "files": dict(task.files),
        "limits": [task.limits.max_turns, task.limits.max_tokens, task.limits.timeout_s],
        "difficulty": task.difficulty,
        "rollouts": task.rollouts,
        "data": dict(task.data),
    }


def task_from_dict(data: Mapping[str, Any]) -> Task:
    """Inverse of ``task_to_dict``."""
    turns, tokens, timeout_s = data["limits"]
    return Task(
        id=data["id"],
        domain=data["domain"],
        world=data["world"],
        prompt=tuple(_message_from_dict(m) for m in data["prompt"]),
        thinking=data["thinking"],
        files=data["files"],
        limits=Limits(max_turns=turns, max_tokens=tokens, timeout_s=timeout_s),
        difficulty=data["difficulty"],
        rollouts=data.get("rollouts"),  # journals of before groups could differ in size have none
        data=data["data"],
    )


def _message_to_dict(message: Message) -> dict[str, Any]:
    calls = [[call.name, dict(call.arguments)] for call in message.tool_calls]
    optional = {"thinking": message.thinking, "tool_calls": calls}
    return {"role": message.role, "content": message.content, **{k: v for k, v in optional.items() if v}}


def _message_from_dict(data: Mapping[str, Any]) -> Message:
    return Message(
        role=data["role"],
        content=data["content"],
        thinking=data.get("thinking", ""),
        tool_calls=tuple(ToolCall(name=name, arguments=arguments) for name, arguments in data.get("tool_calls", ())),
    )


def _score_to_dict(score: Score | None) -> dict[str, Any] | None:
    if score is None:
        return None
    return {"value": score.value, "parts": dict(score.parts), "outcome": score.outcome, "valid": score.valid}


def _segment_to_dict(segment: Segment) -> dict[str, Any]:
    data: dict[str, Any] = {
        "ids": segment.ids,
        "sampled": _runs([int(s) for s in segment.sampled]),
        "versions": _runs(segment.versions),
    }
    if any(segment.logprobs):  # tokens that were given have none worth writing
        data["logprobs"] = segment.logprobs
    if segment.choices is not None:
        data["choices"] = _choices_to_list(segment.choices)
    return data


def _segment_from_dict(data: Mapping[str, Any]) -> Segment:
    ids = tuple(data["ids"])
    return Segment(
        ids=ids,
        sampled=tuple(map(bool, _unrun(data["sampled"]))),
        logprobs=tuple(data["logprobs"]) if "logprobs" in data else (0.0,) * len(ids),
        versions=_unrun(data["versions"]),
        choices=_choices_from_list(data["choices"]) if "choices" in data else None,
    )


def _choices_to_list(choices: Choices) -> list[Any]:
    slots, columns = (b64encode(zlib.compress(data)).decode() for data in (choices.slots, choices.columns))
    return [slots, choices.slot_shape, columns, choices.column_shape]


def _choices_from_list(data: Sequence[Any]) -> Choices:
    slots, slot_shape, columns, column_shape = data
    return Choices(
        slots=zlib.decompress(b64decode(slots)),
        slot_shape=tuple(slot_shape),
        columns=zlib.decompress(b64decode(columns)),
        column_shape=tuple(column_shape),
    )


def _runs(values: Sequence[int]) -> list[int]:
    """Run lengths, flat: ``[7, 7, 7, -1]`` is ``[7, 3, -1, 1]``."""
    out: list[int] = []
    for value in values:
        if out and out[-2] == value:
            out[-1] += 1
        else:
            out += (value, 1)
    return out


def _unrun(runs: Sequence[int]) -> tuple[int, ...]:
    out: list[int] = []
    for value, count in zip(runs[::2], runs[1::2], strict=True):
        out += [value] * count
    return tuple(out)
