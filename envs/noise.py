"""Noise on what users say and tools answer, in which every task stays solvable, and the schedule that raises it.

A user may be vague, wordy, off the point or careless, but says in the end what is wanted, and no word that the task's
data hold is misspelt. A tool may fail before it ran, show half of what it found, word its errors otherwise or add
lines beside the point; what is to be done about it stands in the text. Nothing waits, nothing is graded otherwise.

Sources: LongCat-Flash-Thinking-2601 (arXiv 2601.16725, robust RL), NoisyAgent (arXiv 2605.27209: noise on a part of
each group, its level raised as the gap between clean and noisy scores closes).
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.worlds.base import arguments
from posttrain.errors import ToolError
from posttrain.protocols import Session
from posttrain.types import Message, Task, Tool, ToolCall

InstructionKind = Literal["ambiguity", "redundancy", "topic_shift", "typos"]
ToolKind = Literal["failure", "incomplete", "wording", "redundancy"]

CHANCE = (0.0, 0.3, 0.5, 0.7)
"""Of a kind to show where it can, by level."""
MAX_LEVEL = len(CHANCE) - 1

AGAIN = "error: no answer, again"
"""What a call that noise made fail says: that trying again is right."""
CUT = " ... cut: call again at once for all"
"""Ends a result of which the rest is kept for the very next call."""
NOTE = "note: "
"""Begins a line that a tool adds beside the point."""

_PREFACES: Mapping[InstructionKind, tuple[str, ...]] = {
    "ambiguity": ("you know what to do. to be exact:", "do the usual thing. i mean:", "can you do it? that is:"),
    "redundancy": ("hello, i hope all is well.", "thank you for your time.", "i have waited for a while."),
    "topic_shift": (
        "the weather is fine here. back to what i need:",
        "did you see the game? never mind, here it is:",
        "my cousin says hello. but this is why i write:",
    ),
}
_AGAIN_WORDINGS = ("error from the server: busy, try again", "error: out of time, again please", AGAIN)
_ERROR_WORDINGS = ("error from the server", "error, it says", "error")
_NOTES = ("this tool was updated", "thank you for your patience", "logs are kept for a week", "others like this tool")


class NoiseConfig(BaseModel):
    """Which noise, on how many rollouts, and when there is more of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instruction: tuple[InstructionKind, ...] = ("ambiguity", "redundancy", "topic_shift", "typos")
    """Kinds of what users say."""
    tool: tuple[ToolKind, ...] = ("failure", "incomplete", "wording", "redundancy")
    """Kinds of what tools answer."""
    share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Of a group's rollouts, how many are noisy."""
    start: int = Field(default=1, ge=0, le=MAX_LEVEL)
    """First level: how many kinds show together, and how often."""
    gap: float = Field(default=0.1, gt=0.0)
    """The level rises once noisy scores are less than this below clean ones, ..."""
    patience: int = Field(default=3, ge=1)
    """... update after update, this many in a row."""
    window: int = Field(default=64, ge=1)
    """Latest scores that a mean is taken over; until there are so many, nothing is concluded."""

    @model_validator(mode="after")
    def _some(self) -> NoiseConfig:
        if not self.instruction and not self.tool:
            raise ValueError("instruction, tool: name a kind of noise in one of them")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The noise of one rollout."""

    level: int
    seed: str
    instruction: tuple[InstructionKind, ...]
    tool: tuple[ToolKind, ...]

    @property
    def extra_turns(self) -> int:
        """Turns that it may cost."""
        return 2 * self.level if {"failure", "incomplete"} & {*self.tool} else 0


def noise_of(config: NoiseConfig, level: int, rollout_index: int, group_size: int, seed: int) -> Noise | None:
    """The noise of a rollout, None if it is one of the clean ones of its group. ``seed`` is the group's."""
    noisy = Random(f"noise/{seed}").sample(range(group_size), round(config.share * group_size))
    if not level or rollout_index not in noisy:
        return None
    own = f"noise/{seed}/{rollout_index}"
    rng = Random(own)
    return Noise(
        level=level,
        seed=own,
        instruction=tuple(rng.sample(config.instruction, min(level, len(config.instruction)))),
        tool=tuple(rng.sample(config.tool, min(level, len(config.tool)))),
    )


def noisy_prompt(task: Task, noise: Noise) -> Task:
    """``task`` as a noisy user puts it, with the turns that noise may cost on top of its own."""
    at = max(i for i, m in enumerate(task.prompt) if m.role == "user")
    said = replace(task.prompt[at], content=_noisy_words(task.prompt[at].content, task, noise, "prompt"))
    # A task of one turn has no tools that could fail, and a second turn would be a second chance.
    extra = noise.extra_turns if task.limits.max_turns > 1 else 0
    return replace(
        task,
        prompt=(*task.prompt[:at], said, *task.prompt[at + 1 :]),
        limits=replace(task.limits, max_turns=task.limits.max_turns + extra),
    )


def _noisy_words(text: str, task: Task, noise: Noise, where: str) -> str:
    """Ends with what was said, for what counts may be its last word."""
    rng = Random(f"{noise.seed}/{where}")
    for kind in noise.instruction:
        if rng.random() >= CHANCE[noise.level]:
            continue
        text = _misspelt(text, task, noise.level, rng) if kind == "typos" else f"{rng.choice(_PREFACES[kind])} {text}"
    return text


def _misspelt(text: str, task: Task, most: int, rng: Random) -> str:
    """Two letters change places in up to ``most`` words: of four letters or more, between spaces, not in the data."""
    data = {k: v for k, v in task.data.items() if k != "key"}  # the key may be the prompt itself
    kept = {w.lower() for w in re.findall("[A-Za-z]+", json.dumps(data))}
    free = [m for m in re.finditer(r"(?<!\S)[A-Za-z]{4,}(?=[\s,.?!]|$)", text) if m[0].lower() not in kept]
    for m in sorted(rng.sample(free, min(most, len(free))), key=lambda m: -m.start()):
        i = m.start() + rng.randrange(1, len(m[0]) - 2)
        text = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return text


class NoisySession:
    """A session behind noise. A call that fails was not made; one whose result was cut is not made again."""

    def __init__(self, session: Session, task: Task, noise: Noise) -> None:
        self._session, self._task, self._noise = session, task, noise
        self._calls: Counter[str] = Counter()
        self._turns_to_lose = noise.extra_turns
        self._whole: tuple[str, str] | None = None
        """The call whose result was just cut, and all of the result."""
        self._replies = 0

    @property
    def tools(self) -> tuple[Tool, ...]:
        """Those of the session."""
        return self._session.tools

    @property
    def profile(self) -> str:
        """That of the session, if it runs code."""
        return getattr(self._session, "profile", "")

    async def call(self, call: ToolCall) -> str:
        """The session's answer, some noise on it. Raises what the session raises."""
        key = json.dumps([call.name, dict(call.arguments)], sort_keys=True, default=repr)
        whole, self._whole = self._whole, None
        if whole is not None and whole[0] == key:
            return whole[1]
        try:
            arguments(self.tools, call)
        except ToolError:
            return await self._session.call(call)  # a call that cannot be right is not to be tried again
        rng = Random(f"{self._noise.seed}/{key}/{self._calls[key]}")
        self._calls[key] += 1
        first = self._calls[key] == 1
        if first and self._loses_turn("failure", rng):
            # An answer and no ToolError, which rewards count: the agent is not to pay for what noise did.
            return rng.choice(_AGAIN_WORDINGS) if self._shows("wording", rng) else AGAIN
        try:
            text = await self._session.call(call)
        except ToolError as error:
            raise ToolError(self._reworded(str(error), rng)) from error
        words = [m.start() for m in re.finditer(r"\S+", text)]
        if first and len(words) > 3 and self._loses_turn("incomplete", rng):
            self._whole = (key, text)
            return text[: words[len(words) // 2]].rstrip() + CUT
        if self._shows("redundancy", rng):
            lines = [text, NOTE + rng.choice(_NOTES)]
            return "\n".join(lines if rng.random() < 0.5 else lines[::-1])
        return text

    def _shows(self, kind: ToolKind, rng: Random) -> bool:
        return kind in self._noise.tool and rng.random() < CHANCE[self._noise.level]

    def _loses_turn(self, kind: ToolKind, rng: Random) -> bool:
        """Whether ``kind`` shows, where that costs a turn; not more often than turns were added."""
        if not self._turns_to_lose or not self._shows(kind, rng):
            return False
        self._turns_to_lose -= 1
        return True

    def _reworded(self, text: str, rng: Random) -> str:
        if not self._shows("wording", rng):
            return text
        return f"{rng.choice(_ERROR_WORDINGS)}: {text.removeprefix('error: ')}"

    async def reply(self, message: Message) -> Message | None:
        """What the session's user says, as a noisy one says it."""
        said = await self._session.reply(message)
        self._replies += 1
        if said is None:
            return None
        return replace(said, content=_noisy_words(said.content, self._task, self._noise, f"reply/{self._replies}"))

    async def grade(self, messages: Sequence[Message]) -> float:
        """The session's own grade."""
        return await self._session.grade(messages)

    async def close(self) -> None:
        """Close the session; idempotent as that is."""
        await self._session.close()


class NoiseScheduler:
    """Keeps clean and noisy scores, and raises the level when they have come close."""

    def __init__(self, config: NoiseConfig) -> None:
        self.config = config
        self.level = config.start
        self._below = 0
        """Updates in a row in which the gap was small."""
        self._clean: deque[float] = deque(maxlen=config.window)
        self._noisy: deque[float] = deque(maxlen=config.window)

    @property
    def gap(self) -> float | None:
        """Mean clean score minus mean noisy score, None until the windows are full. At level 0 nothing is noisy, and
        there is no gap."""
        if len(self._clean) < self.config.window:
            return None
        if self.level == 0:
            return 0.0
        if len(self._noisy) < self.config.window:
            return None
        return sum(self._clean) / len(self._clean) - sum(self._noisy) / len(self._noisy)

    def update(self, clean: Sequence[float], noisy: Sequence[float]) -> int:
        """Take in scores of rollouts at the present level; returns the level of the next ones."""
        self._clean.extend(clean)
        self._noisy.extend(noisy)
        gap = self.gap
        self._below = self._below + 1 if gap is not None and gap < self.config.gap else 0
        if self._below >= self.config.patience and self.level < MAX_LEVEL:
            self.level += 1
            self._below = 0
            self._clean.clear()
            self._noisy.clear()
        return self.level

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"level": self.level, "below": self._below, "clean": [*self._clean], "noisy": [*self._noisy]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; a start that was raised since then holds."""
        if state["level"] < self.config.start:
            return  # its scores are of a level that is past
        self.level = state["level"]
        self._below = state["below"]
        self._clean = deque(state["clean"], maxlen=self.config.window)
        self._noisy = deque(state["noisy"], maxlen=self.config.window)
