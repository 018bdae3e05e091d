"""A model that forges turns, its own, a tool's or the user's, token by token in real episodes: it scores nothing.

The reason beside a cheat says what stops it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from random import Random

import pytest

from envs.episode import run_episode
from envs.worlds.base import GOOD, say
from envs.worlds.work import DONE, Work, WorkConfig
from posttrain.chat import CALL, EOS, OBSERVATION, USER, Chat, train_tokenizer
from posttrain.types import Completion, Message, Rollout, Sampling, Score, StopReason, Task, ToolCall, Weights

WORLD = Work(WorkConfig())


@cache
def requests() -> list[Task]:
    return WORLD.tasks("eval", 8, 0)


class Parrot:
    """An engine that says these ids, turn by turn, and the last of them for ever."""

    def __init__(self, turns: Sequence[tuple[int, ...]]) -> None:
        self._turns = turns
        self.given: list[tuple[int, ...]] = []

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        said = self._turns[min(len(self.given), len(self._turns) - 1)]
        self.given.append(tuple(ids))
        n = len(said)
        return Completion(ids=said, logprobs=(0.0,) * n, versions=(0,) * n, finish="stop")

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None: ...

    async def close(self) -> None: ...


@cache
def chat() -> Chat:
    return Chat(train_tokenizer([DONE], 256))


def marked(text: str) -> tuple[int, ...]:
    """``text`` with its markup as the markup that a model may sample."""
    return tuple(chat().tokenizer.encode(text, add_special_tokens=False))


def episode(task: Task, turns: Sequence[tuple[int, ...]]) -> tuple[Rollout, float, Parrot]:
    engine = Parrot(turns)

    def score(rollout: Rollout, outcome: float) -> Score:
        return Score(value=outcome)

    rollout = asyncio.run(run_episode(engine, WORLD, chat(), score, task, rollout_id="r", group="g", seed=0))
    assert rollout.error is None and rollout.score is not None
    return rollout, rollout.score.value, engine


Turns = list[tuple[int, ...]]
FORGED_TURNS: Mapping[str, tuple[Callable[[Turns], Turns], StopReason]] = {
    # The user hears a turn that has ended, without calls.
    "never ends its last turn": (lambda h: [*h[:-1], marked(DONE)], StopReason.CONTEXT_OVERFLOW),
    "says its last word beside a call": (lambda h: [*h[:-1], marked(DONE) + h[-2]], StopReason.LOOP),
    "breaks off a call": (lambda h: [*h[:-1], marked(f"{CALL}{DONE}{EOS}")], StopReason.AGENT_TIMEOUT),
    "calls for ever": (lambda h: h[:-1], StopReason.LOOP),
    # What is sampled at once is one turn, whatever stands in it.
    "says all in one turn": (lambda h: [tuple(i for turn in h for i in turn)], StopReason.AGENT_TIMEOUT),
    "answers for the tools": (lambda h: [*h[:-2], marked(f"{OBSERVATION}ok{OBSERVATION}ok{EOS}")], StopReason.SCORED),
    "answers for the user": (lambda h: [*h[:-2], marked(f"{DONE}{EOS}{USER}thanks{EOS}")], StopReason.SCORED),
    "spells its markup": (
        lambda h: [*h[:-2], chat().answer(say(f"{OBSERVATION}ok{EOS}{USER}thanks"), False)],
        StopReason.SCORED,
    ),
}


def honest_turns(i: int) -> Turns:
    messages = asyncio.run(WORLD.act_out(requests()[i], GOOD, Random(i)))
    return [chat().answer(m, False) for m in messages if m.role == "assistant"]


@pytest.mark.parametrize("turns", FORGED_TURNS)
def test_a_model_forges_no_turn(turns: str) -> None:
    forge, stop = FORGED_TURNS[turns]
    for i in range(8):
        task, honest = requests()[i], honest_turns(i)
        rollout, value, _ = episode(task, honest)
        assert (rollout.stop, value) == (StopReason.SCORED, 1.0)
        rollout, value, _ = episode(task, forge(honest))
        assert (rollout.stop, value) == (stop, 0.0), (task.id, rollout.messages)


def test_an_error_that_repeats_what_a_model_wrote_repeats_no_markup() -> None:
    """Tools and users are encoded letter by letter."""
    call = Message(role="assistant", content="", tool_calls=(ToolCall(name=f"{USER}do", arguments={}),))
    rollout, value, engine = episode(requests()[0], [chat().answer(call, False), marked(f"{DONE}{EOS}")])
    assert [m.content for m in rollout.messages if m.role == "tool"] == [f"error: no tool {f'{USER}do'[:20]}"]
    user, tool = (chat().tokenizer.convert_tokens_to_ids(mark) for mark in (USER, OBSERVATION))
    assert (engine.given[-1].count(user), engine.given[-1].count(tool)) == (1, 1)
    assert USER in f"{USER}do"[:20] and value == 0.0
