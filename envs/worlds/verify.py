"""Verify: say whether an answer to another world's question is right. Practice for judging one's own."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from envs.worlds.base import GOOD, Draft, Script, ScriptedWorld, TextSession, WorldOptions, say, user
from envs.worlds.chains import Chains, ChainsConfig
from envs.worlds.facts import Facts, FactsConfig
from envs.worlds.requests import Requests, RequestsConfig
from envs.worlds.rules import Rules, RulesConfig
from posttrain.types import Limits, Message, Task

RIGHT, WRONG = "right", "wrong"
Judged = ChainsConfig | FactsConfig | RequestsConfig | RulesConfig
"""Worlds whose answers can be read without their tools."""


class VerifyConfig(WorldOptions):
    """Options of verification."""

    type: Literal["verify"] = "verify"
    of: Annotated[Judged, Field(discriminator="type")]
    """The world that is judged, as it stands in ``worlds``."""


def question(prompt: Sequence[Message], answer: str) -> tuple[Message, ...]:
    """What the model is asked about ``answer``."""
    asked = "\n".join(m.content for m in prompt)
    return (user(f"{asked}\nanswer {answer}\n{RIGHT} or {WRONG}"),)


class Verify(ScriptedWorld):
    """``list ash fig backwards`` ``answer ash fig`` ``right or wrong`` -> ``wrong``."""

    kind: ClassVar[str] = "verify"
    limits = Limits(max_turns=1, max_tokens=24, timeout_s=60.0)

    def __init__(self, config: VerifyConfig, name: str = "verify") -> None:
        super().__init__(name, config.habit)
        self._inner = _world(config.of)
        self.domain = self._inner.domain

    @property
    def split_kind(self) -> str:
        """The judged world's: nothing of its held-out tasks is told here."""
        return self._inner.kind

    def draft(self, rng: Random) -> Draft | None:
        """A question of the judged world, and what one of its habits answers."""
        inner = self._inner.draft(rng)
        if inner is None:
            return None
        task = self._inner.make_task("", inner)
        right = rng.random() < 0.5
        habit = GOOD if right else rng.choice(self._inner.bad_habits(task))
        answer = next(self._inner.script(task, habit, rng)).content
        prompt = question(inner.prompt, answer)
        data = {"right": right, "weight": 1.0}
        return Draft(content=prompt[0].content, key=inner.key, prompt=prompt, data=data, difficulty=inner.difficulty)

    def bad_habits(self, task: Task) -> tuple[str, ...]:
        """Praises or doubts everything: whichever is wrong here."""
        return ("doubts",) if task.data["right"] else ("praises",)

    def script(self, task: Task, habit: str, rng: Random) -> Script:
        """One word."""
        match habit:
            case "good":
                yield say(RIGHT if task.data["right"] else WRONG)
            case "praises":
                yield say(RIGHT)
            case "doubts":
                yield say(WRONG)
            case _:
                raise ValueError(f"no habit {habit!r}; {GOOD} or one of {self.bad_habits(task)}")

    async def open(self, task: Task) -> TextSession:
        """The task's weight for the verdict that fits; also for the model's own answers (``experts.verification``)."""
        verdict = RIGHT if task.data["right"] else WRONG
        return TextSession(lambda text: task.data["weight"] * (text == verdict))


def _world(config: Judged) -> ScriptedWorld:
    match config:
        case ChainsConfig():
            return Chains(config)
        case FactsConfig():
            return Facts(config)
        case RequestsConfig():
            return Requests(config)
        case RulesConfig():
            return Rules(config)
