"""What the worlds share: splits by content, habits, and playing a script against a real session.

A world draws contents, names its habits and writes each habit as a *script*: a generator that yields assistant
messages and is sent what the session answered. Demonstrations, the reference and the empty solution are all scripts
played against real sessions, so none of them can say what the world would not.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from posttrain.errors import ConfigError, ToolError
from posttrain.protocols import Session
from posttrain.types import Limits, Message, Task, Tool, ToolCall

SPLITS: Mapping[str, range] = {"eval": range(0, 2), "demo": range(2, 5), "train": range(5, 10)}
"""Which tenths of all contents belong to a split."""

Script = Generator[Message, Message, None]
"""Yields assistant messages; is sent the last tool or user message that followed."""

GOOD = "good"


class WorldOptions(BaseModel):
    """What every world can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    habit: float = Field(default=0.45, ge=0.0, le=1.0)
    """Share of demonstrations that show the good habit."""
    thinking: bool | None = None
    """Whether the model thinks before it speaks; null: as the world has it, which is made for a small model."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens sampled a turn, thinking included; null: what the demonstrations need."""
    episode_s: float | None = Field(default=None, gt=0.0)
    """Seconds of an episode, without the engine's; null: the world's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A task before it has an id."""

    content: str
    """What makes the task new: contents that are equal never meet in one split."""
    key: str
    """What assigns the split; tasks with the same key share it, whatever else differs."""
    prompt: tuple[Message, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    """What the sandbox holds at the start."""
    data: Mapping[str, Any] = field(default_factory=dict)
    difficulty: float = 0.0


def bucket(kind: str, key: str) -> int:
    """The tenth that ``key`` falls in, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{kind}|{key}".encode()).digest()[:4], "big") % 10


def system(text: str) -> Message:
    return Message(role="system", content=text)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def say(text: str, thinking: str = "") -> Message:
    """An assistant message without calls."""
    return Message(role="assistant", content=text, thinking=thinking)


def use(name: str, **arguments: Any) -> Message:
    """An assistant message that is one call."""
    return Message(role="assistant", content="", tool_calls=(ToolCall(name=name, arguments=arguments),))


def said(messages: Sequence[Message]) -> str | None:
    """The agent's last words, or None if the conversation does not end with them."""
    if not messages or messages[-1].role != "assistant" or messages[-1].tool_calls:
        return None
    return messages[-1].content.strip()


_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "json": (object,),
}


def arguments(tools: Sequence[Tool], call: ToolCall) -> dict[str, Any]:
    """The call's arguments, checked against its tool. Raises ToolError in words that name the cure."""
    tool = next((t for t in tools if t.name == call.name), None)
    if tool is None:
        raise ToolError(f"error: no tool {call.name[:20]}")
    for name in tool.parameters:
        if name not in call.arguments:
            raise ToolError(f"error: need {name}")
    for name, value in call.arguments.items():
        if name not in tool.parameters:
            raise ToolError(f"error: no {name[:20]}")
        kind = tool.parameters[name]
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number")):
            raise ToolError(f"error: {name} is {kind}")
    return dict(call.arguments)


class TextSession:
    """A session of a world without tools: one answer, judged by ``judge``."""

    tools: tuple[Tool, ...] = ()

    def __init__(self, judge: Callable[[str], float]) -> None:
        self._judge = judge

    async def call(self, call: ToolCall) -> str:
        """Always a ToolError: there is nothing to call."""
        arguments(self.tools, call)
        raise ToolError("error: no tools")

    async def reply(self, message: Message) -> Message | None:
        """None: one answer ends it."""
        return None

    async def grade(self, messages: Sequence[Message]) -> float:
        """What the judge gives the answer that the conversation ends with; 0 without one."""
        text = said(messages)
        return 0.0 if text is None else float(self._judge(text))

    async def close(self) -> None:
        """Nothing to free."""


async def play(session: Session, script: Script) -> list[Message]:
    """What a conversation would hold after the prompt if the model spoke ``script``.

    A ToolError becomes its own text, as it does for a model; anything else escapes.
    """
    messages: list[Message] = []
    try:
        turn = next(script)
        while True:
            messages.append(turn)
            if turn.tool_calls:
                for call in turn.tool_calls:
                    messages.append(Message(role="tool", content=await _observe(session, call)))
            else:
                answer = await session.reply(turn)
                if answer is None:
                    return messages
                messages.append(answer)
            turn = script.send(messages[-1])
    except StopIteration:
        return messages


async def _observe(session: Session, call: ToolCall) -> str:
    try:
        return await session.call(call)
    except ToolError as error:
        return str(error)


def empty() -> Script:
    """The solution that does nothing."""
    yield say("")


class ScriptedWorld(ABC):
    """A world whose demonstrations are scripts, one a habit."""

    kind: ClassVar[str]
    """The config's ``type``: splits hang on it, not on ``name``, so two worlds of a kind never leak into each other."""
    domain: str
    thinking: bool = False
    limits: Limits

    def __init__(self, name: str, habit: float) -> None:
        self.name = name
        self.habit = habit

    def obey(self, options: WorldOptions) -> None:
        """Take what ``options`` says of every world's episodes."""
        given = {"max_tokens": options.max_tokens, "timeout_s": options.episode_s}
        self.limits = replace(self.limits, **{k: v for k, v in given.items() if v is not None})
        if options.thinking is not None:
            self.thinking = options.thinking

    @property
    def split_kind(self) -> str:
        """What the splits hang on."""
        return self.kind

    @abstractmethod
    def draft(self, rng: Random) -> Draft | None:
        """One random content, or None if this draw is no task."""

    @abstractmethod
    def bad_habits(self, task: Task) -> tuple[str, ...]:
        """The habits that fail this task; never empty."""

    @abstractmethod
    def script(self, task: Task, habit: str, rng: Random) -> Script:
        """What ``habit`` says. ``good`` always solves the task."""

    @abstractmethod
    async def open(self, task: Task) -> Session:
        """A fresh session. Raises SandboxError if it cannot be had."""

    def tasks(self, split: str, n: int, seed: int) -> list[Task]:
        """``n`` tasks of ``split``, no content twice. Raises ConfigError for a split that is none or holds too few."""
        if split not in SPLITS:
            raise ConfigError(f"split {split!r} of {self.name}: choose one of {', '.join(sorted(SPLITS))}")
        rng = Random(f"{self.kind}/{split}/{seed}")
        seen: set[str] = set()
        found: list[Task] = []
        draws = 0
        while len(found) < n:
            draws += 1
            if draws > 200 * n + 10_000:
                raise ConfigError(f"{self.name} has about {len(found)} tasks for {split}, not {n}: ask for fewer")
            draft = self.draft(rng)
            if draft is None or draft.content in seen or bucket(self.split_kind, draft.key) not in SPLITS[split]:
                continue
            seen.add(draft.content)
            found.append(self.make_task(f"{self.name}/{split}/{len(found):06d}", draft))
        return found

    def make_task(self, task_id: str, draft: Draft) -> Task:
        """The task that ``draft`` describes."""
        return Task(
            id=task_id,
            domain=self.domain,
            world=self.name,
            prompt=draft.prompt,
            thinking=self.thinking,
            files=draft.files,
            limits=self.limits,
            difficulty=draft.difficulty,
            data=json.loads(json.dumps({**draft.data, "key": draft.key})),
        )

    def draw_habit(self, task: Task, rng: Random) -> str:
        """``good`` at the configured share whatever the task, else a bad habit that can fail it."""
        return GOOD if rng.random() < self.habit else rng.choice(self.bad_habits(task))

    async def demonstrate(self, task: Task, rng: Random) -> list[Message]:
        """One demonstration, in the habit that ``rng`` draws."""
        return await self.act_out(task, self.draw_habit(task, rng), rng)

    async def act_out(self, task: Task, habit: str, rng: Random) -> list[Message]:
        """What ``habit`` says and what a real session answers."""
        session = await self.open(task)
        try:
            return await play(session, self.script(task, habit, rng))
        finally:
            await session.close()

    async def score(self, task: Task, script: Script) -> float:
        """The grade of ``script``, played in a session of its own."""
        session = await self.open(task)
        try:
            messages = await play(session, script)
            return await session.grade([*task.prompt, *messages])
        finally:
            await session.close()

    async def check(self) -> dict[str, float]:
        """Mean grades of the reference and of the empty solution over a dozen tasks."""
        tasks = self.tasks("eval", 12, 0)
        reference = [await self.score(t, self.script(t, GOOD, Random(i))) for i, t in enumerate(tasks)]
        nothing = [await self.score(t, empty()) for t in tasks]
        return {"reference": sum(reference) / len(tasks), "empty": sum(nothing) / len(tasks)}
