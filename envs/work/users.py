"""Users: who asks for a chain, all at once or in turns, and may keep a word back until somebody asks for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.work.plan import Goal


class ScriptedUserConfig(BaseModel):
    """A user who follows a script, word by word."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["scripted"] = "scripted"
    turns: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of the requests with several goals that come in two turns."""
    asks: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of the requests that keep a word back, where they have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What the user says in one turn."""

    text: str
    end: int
    """Steps of the chain that are done when the user is content."""
    slot: str = ""
    """The parameter whose value is kept back."""
    value: str = ""
    step: int = -1
    """The step that takes it."""


def compose(goals: Sequence[Goal], rng: Random, config: ScriptedUserConfig) -> list[Part]:
    """The request for ``goals`` as its user says it."""
    cuts = [len(goals)]
    if len(goals) > 1 and rng.random() < config.turns:
        cuts.insert(0, rng.randrange(1, len(goals)))
    slots = [(i, s) for i, g in enumerate(goals) for s in g.told]
    names = [s for g in goals for s in g.slots]
    single = [(i, s) for i, s in slots if names.count(s) == 1]
    held = rng.choice(single) if single and rng.random() < config.asks else None
    parts: list[Part] = []
    begin = 0
    for cut in cuts:
        here = held if held and begin <= held[0] < cut else None
        text = ", then ".join(_sentence(goals[i], here[1] if here and here[0] == i else "") for i in range(begin, cut))
        part = Part(text=f"now {text}" if begin else text, end=goals[cut - 1].step + 1)
        if here:
            goal = goals[here[0]]
            part = replace(part, slot=here[1], value=goal.slots[here[1]], step=goal.step)
        parts.append(part)
        begin = cut
    return parts


def _sentence(goal: Goal, held: str) -> str:
    text = goal.says.format(**{**goal.slots, **({held: f"some {held}"} if held else {})})
    return re.sub(r"\b(a|the) some ", "some ", text)


class ScriptedUser:
    """Tells the next part once the last one is done, answers a question that names what was kept back, and leaves over
    anything else."""

    def __init__(self, parts: Sequence[Mapping[str, Any]]) -> None:
        self._parts = [Part(**p) for p in parts]
        self._at = 0
        self.content = False
        """Whether all was done, and said to be."""

    @property
    def part(self) -> int:
        """The part that is being served."""
        return self._at

    def reply(self, text: str, done: bool) -> str | None:
        """The next words, or None when the user leaves. ``done``: whether the part that is being served is."""
        part = self._parts[self._at]
        if not done:
            asked = part.slot and part.slot in re.findall(r"[a-z]+", text.lower())
            return f"{part.slot} {part.value}" if asked else None
        if self._at + 1 == len(self._parts):
            self.content = bool(text.strip())
            return None
        self._at += 1
        return self._parts[self._at].text
