"""Users: who asks for a chain, all at once or in turns, and may keep a word back until somebody asks for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.work.language import Domain
from envs.work.plan import Goal
from posttrain.settings import LocalEngineConfig


class _UserConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    turns: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of the requests with several goals that come in two turns."""
    asks: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of the requests that keep a word back, where they have one."""


class ScriptedUserConfig(_UserConfig):
    """A user who follows a script, word by word."""

    type: Literal["scripted"] = "scripted"


class ModelUserConfig(_UserConfig):
    """A user whose words are a model's. What it wants, when it is content and when it leaves stays scripted."""

    type: Literal["model"] = "model"
    path: Path
    """Hugging Face folder of a causal LM with a chat template."""
    engine: LocalEngineConfig = LocalEngineConfig(slots=32, max_context=1024)
    """What serves it, beside the policy's own."""
    temperature: float = Field(default=0.7, ge=0.0)
    """Of its words."""
    max_tokens: int = Field(default=64, ge=1)
    """Of one answer."""
    tries: int = Field(default=3, ge=1)
    """Answers drawn until one says what it must and no more; after them the script speaks."""


UserConfig = Annotated[ScriptedUserConfig | ModelUserConfig, Field(discriminator="type")]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What the user says next."""

    text: str
    """As the script has it."""
    tells: str
    """What must be in it, however it is said: all but the small words, so that what is asked for stays the same."""
    keeps: str = ""
    """A value that must not be in it."""
    others: frozenset[str] = frozenset()
    """Words that would change what is asked for."""

    def said_by(self, text: str) -> bool:
        """Whether ``text`` tells as much, in the same order (from one to another is not from the other to the one),
        and no more."""
        words, wanted, kept = _words(text), _words(self.tells), set(_words(self.keeps))
        rest = iter(words)
        if not all(w in rest for w in wanted):
            return False
        known = {*wanted, *_words(self.text)}
        if any(w not in known and (w in self.others or w.isdigit() or w in _DENIALS) for w in words):
            return False
        said, needed = Counter(words), Counter(wanted)
        return not (kept and all(said[w] > needed[w] for w in kept))


_SMALL = re.compile("a|an|the|of|for|to|in|on|at|by|with|and|then|now|some|it|its|is|from|as")


_DENIALS = frozenset(("no", "not", "never", "nor", "neither", "without", "except", "but", "t"))
"""``t`` is what is left of ``don't``."""


def vocabulary(domain: Domain) -> frozenset[str]:
    """The words that requests in ``domain`` differ by: values, and what is to be done."""
    values = [v for e in domain.entities.values() for c in e.columns.values() for v in c.values]
    says = [re.sub(r"{\w+}", " ", o.says) for o in domain.operations.values()]
    return frozenset(w for text in (*values, *says) for w in _words(text))


def _words(text: str) -> list[str]:
    return [w for w in re.findall(r"[a-z0-9]+", text.lower()) if not _SMALL.fullmatch(w)]


def compose(goals: Sequence[Goal], rng: Random, config: ScriptedUserConfig | ModelUserConfig) -> list[Part]:
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

    def __init__(self, parts: Sequence[Mapping[str, Any]], others: frozenset[str] = frozenset()) -> None:
        self.parts = [Part(**p) for p in parts]
        self._others = others
        self._at = 0
        self.content = False
        """Whether all was done, and said to be."""

    @property
    def part(self) -> int:
        """The part that is being served."""
        return self._at

    def reply(self, text: str, done: bool) -> Line | None:
        """The next words, or None when the user leaves. ``done``: whether the part that is being served is."""
        part = self.parts[self._at]
        if not done:
            asked = part.slot and part.slot in re.findall(r"[a-z]+", text.lower())
            return self._line(f"{part.slot} {part.value}", part.value) if asked else None
        if self._at + 1 == len(self.parts):
            self.content = bool(text.strip())
            return None
        self._at += 1
        after = self.parts[self._at]
        return self._line(after.text, after.text, after.value)

    def _line(self, text: str, tells: str, keeps: str = "") -> Line:
        return Line(text=text, tells=tells, keeps=keeps, others=self._others)
