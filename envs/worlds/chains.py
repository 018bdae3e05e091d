"""Follow arrows: look up a word, look up what it points to, and so on. The thinking is where the hops are made."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from envs.words import THINGS
from envs.worlds.base import GOOD, Draft, Script, ScriptedWorld, TextSession, WorldOptions, say, system, user
from posttrain.types import Limits, Task


class ChainsConfig(WorldOptions):
    """Options of the arrows."""

    type: Literal["chains"] = "chains"
    min_hops: int = Field(default=1, ge=1)
    """The fewest hops asked."""
    max_hops: int = Field(default=5, ge=1, le=9)
    """The most hops asked."""
    pairs: int = Field(default=6, ge=1, le=16)
    """Arrows shown, in shuffled order."""

    @model_validator(mode="after")
    def _fits(self) -> ChainsConfig:
        if not self.min_hops <= self.max_hops <= self.pairs:
            raise ValueError("min_hops <= max_hops <= pairs must hold: every hop needs an arrow of its own")
        return self


class Chains(ScriptedWorld):
    """``ash>fig elm>ash ...;elm2`` -> thinks ``elm1ash2fig``, says ``fig``.

    The step after ``ash2`` looks like ``ash>`` of the table, so one look-up pattern serves every hop, and the digit
    says when to stop.
    """

    kind: ClassVar[str] = "chains"
    domain = "reasoning"
    thinking = True
    limits = Limits(max_turns=1, max_tokens=48, timeout_s=60.0)

    def __init__(self, config: ChainsConfig, name: str = "chains") -> None:
        super().__init__(name, config.habit)
        self.config = config

    def draft(self, rng: Random) -> Draft:
        """A path of the asked length plus arrows beside it, some of which go on from its end."""
        hops = rng.randint(self.config.min_hops, self.config.max_hops)
        spare = self.config.pairs - hops
        words = rng.sample(THINGS, hops + 1 + spare)
        path, others = words[: hops + 1], words[hops + 1 :]
        arrows = list(pairwise(path))
        keys = [path[-1], *others[1:]] if spare and rng.random() < 0.5 else others
        for key in keys:
            arrows.append((key, rng.choice([w for w in THINGS if w != key])))
        rng.shuffle(arrows)
        table = " ".join(f"{a}>{b}" for a, b in arrows)
        question = f"{table};{path[0]}{hops}"
        return Draft(
            content=question,
            key=question,
            prompt=(system("follow the arrows"), user(question)),
            data={"path": path, "words": sorted({w for pair in arrows for w in pair})},
            difficulty=float(hops),
        )

    def bad_habits(self, task: Task) -> tuple[str, ...]:
        """Answering the first hop is right when one hop was asked."""
        return ("early", "guess") if len(task.data["path"]) == 2 else ("first", "early", "guess")

    def script(self, task: Task, habit: str, rng: Random) -> Script:
        """``early`` makes one hop too few, ``first`` and ``guess`` do not think."""
        path: list[str] = task.data["path"]
        match habit:
            case "good":
                yield say(path[-1], _steps(path))
            case "early":
                yield say(path[-2], _steps(path[:-1]))
            case "first":
                yield say(path[1])
            case "guess":
                yield say(rng.choice([w for w in task.data["words"] if w != path[-1]]))
            case _:
                raise ValueError(f"no habit {habit!r}; {GOOD} or one of {self.bad_habits(task)}")

    async def open(self, task: Task) -> TextSession:
        """The answer is the last word of the path; the thinking is not graded."""
        return TextSession(lambda text: text == task.data["path"][-1])


def _steps(path: list[str]) -> str:
    return path[0] + "".join(f"{i}{word}" for i, word in enumerate(path[1:], 1))
