"""Answer from a list, and say so when the list does not hold the answer."""

from __future__ import annotations

from random import Random
from typing import ClassVar, Literal

from pydantic import Field

from envs.words import CITIES, NAMES
from envs.worlds.base import GOOD, Draft, Script, ScriptedWorld, TextSession, WorldOptions, say, system, user
from posttrain.types import Limits, Task

UNKNOWN = "unknown"


class FactsConfig(WorldOptions):
    """Options of the list."""

    type: Literal["facts"] = "facts"
    facts: int = Field(default=5, ge=2, le=len(CITIES))
    """Facts shown, a city each."""
    unknown: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of questions that the list does not answer."""


class Facts(ScriptedWorld):
    """``ada:oslo ben:rome ...;ben?`` -> ``ben:rome``, or ``ben:unknown``."""

    kind: ClassVar[str] = "facts"
    domain = "interaction"
    limits = Limits(max_turns=1, max_tokens=24, timeout_s=60.0)

    def __init__(self, config: FactsConfig, name: str = "facts") -> None:
        super().__init__(name, config.habit)
        self.config = config

    def draft(self, rng: Random) -> Draft:
        """Distinct people, each in a city of their own, and one question."""
        people = rng.sample(NAMES, self.config.facts + 1)
        cities = rng.sample(CITIES, self.config.facts)
        listed = dict(zip(people, cities, strict=False))
        asked = people[-1] if rng.random() < self.config.unknown else rng.choice(people[:-1])
        question = " ".join(f"{who}:{where}" for who, where in listed.items()) + f";{asked}?"
        return Draft(
            content=question,
            key=question,
            prompt=(system("answer from the list"), user(question)),
            data={"asked": asked, "answer": listed.get(asked, UNKNOWN), "cities": cities},
            difficulty=float(self.config.facts),
        )

    def bad_habits(self, task: Task) -> tuple[str, ...]:
        """One for each half: making up an answer, and holding one back."""
        return ("invents",) if task.data["answer"] == UNKNOWN else ("unknowing",)

    def script(self, task: Task, habit: str, rng: Random) -> Script:
        """``invents`` names a city of the list."""
        asked, answer = task.data["asked"], task.data["answer"]
        match habit:
            case "good":
                yield say(f"{asked}:{answer}")
            case "unknowing":
                yield say(f"{asked}:{UNKNOWN}")
            case "invents":
                yield say(f"{asked}:{rng.choice(task.data['cities'])}")
            case _:
                raise ValueError(f"no habit {habit!r}; {GOOD} or one of {self.bad_habits(task)}")

    async def open(self, task: Task) -> TextSession:
        """Who and where, or ``unknown``, and nothing else."""
        return TextSession(lambda text: text == f"{task.data['asked']}:{task.data['answer']}")
