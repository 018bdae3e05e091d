"""Each part on examples worked by hand, and the sum."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from posttrain.errors import RewardError
from posttrain.protocols import Reward
from posttrain.types import Message, Rollout, StopReason, Task, ToolCall
from rewards import PARTS, RewardConfig, score
from rewards.calls import CallsPart
from rewards.outcome import OutcomePart
from rewards.repetition import RepetitionPart, repeated_calls, repeated_phrases


def rollout(*messages: Message, parse_errors: tuple[str, ...] = (), tool_errors: int = 0) -> Rollout:
    prompt = (Message(role="user", content="go"),)
    task = Task(id="t", domain="agent", world="desk", prompt=prompt)
    return Rollout(
        id="g/0",
        group="g",
        task=task,
        branches=(),
        messages=(*prompt, *messages),
        stop=StopReason.SCORED,
        parse_errors=parse_errors,
        tool_errors=tool_errors,
    )


def call(name: str, **arguments: object) -> Message:
    return Message(role="assistant", content="", tool_calls=(ToolCall(name=name, arguments=arguments),))


def tool(text: str) -> Message:
    return Message(role="tool", content=text)


def said(text: str, thinking: str = "") -> Message:
    return Message(role="assistant", content=text, thinking=thinking)


def test_every_part_is_a_reward_with_a_weight_of_its_name() -> None:
    assert all(isinstance(part, Reward) for part in PARTS)
    assert {part.name for part in PARTS} == set(RewardConfig.model_fields)


def test_outcome_is_what_the_grader_said() -> None:
    assert OutcomePart()(rollout(), 0.25) == 0.25


@pytest.mark.parametrize(
    ("calls", "parse_errors", "tool_errors", "expected"),
    [
        (0, (), 0, 1.0),
        (2, (), 0, 1.0),
        (4, (), 1, 0.75),
        (3, ("json",), 0, 0.75),  # three calls and one that could not be read
        (3, ("json",), 1, 0.5),
        (0, ("json",), 0, 0.0),
        (1, (), 1, 0.0),
    ],
)
def test_calls_by_hand(calls: int, parse_errors: tuple[str, ...], tool_errors: int, expected: float) -> None:
    messages = [m for _ in range(calls) for m in (call("find", customer="ada"), tool("ok"))]
    made = rollout(*messages, parse_errors=parse_errors, tool_errors=tool_errors)
    assert CallsPart()(made, 1.0) == pytest.approx(expected)


def test_a_call_made_again_with_the_same_answer_repeats() -> None:
    find, found = call("find", customer="ada"), tool("order opal")
    assert repeated_calls([find, found]) == 0.0
    assert repeated_calls([find, found, find, found]) == 0.5
    assert repeated_calls([find, found] * 4) == 0.75
    assert repeated_calls([find, found, call("find", customer="ben"), found]) == 0.0
    assert repeated_calls([]) == 0.0


def test_a_call_made_again_after_an_error_does_not_repeat() -> None:
    find = call("find", customer="ada")
    assert repeated_calls([find, tool("error: busy, again"), find, tool("order opal")]) == 0.0


def test_calls_of_one_message_meet_their_own_answers() -> None:
    two = Message(
        role="assistant",
        content="",
        tool_calls=(ToolCall(name="a", arguments={"x": 1, "y": 2}), ToolCall(name="a", arguments={"y": 2, "x": 1})),
    )
    assert repeated_calls([two, tool("1"), tool("2")]) == 0.0
    assert repeated_calls([two, tool("1"), tool("1")]) == 0.5, "the order of arguments is no difference"
    assert repeated_calls([two]) == 0.5, "cut off before the answers"


def test_phrases_by_hand() -> None:
    assert repeated_phrases("ash ash ash ash ash") == 0.0, "five words hold no phrase of six"
    assert repeated_phrases("a b c d e f g h") == 0.0
    assert repeated_phrases("a a a a a a a") == 0.5  # two phrases, both the same
    assert repeated_phrases("a b a b a b a b a b") == pytest.approx(3 / 5)  # five phrases, two kinds
    assert repeated_phrases("") == 0.0


def test_repetition_is_the_worse_of_calls_and_phrases() -> None:
    part = RepetitionPart()
    find, found = call("find", customer="ada"), tool("order opal")
    assert part(rollout(find, found, find, found, said("done")), 1.0) == 0.5
    assert part(rollout(said("done", "a a a a a a a")), 1.0) == pytest.approx(2 / 3)  # one phrase of three came before
    assert part(rollout(), 1.0) == 1.0


def test_the_agent_is_not_blamed_for_what_others_say() -> None:
    noise = "x " * 20
    assert RepetitionPart()(rollout(tool(noise), Message(role="user", content=noise), said("ok")), 1.0) == 1.0


def test_score_by_hand() -> None:
    find, found = call("find", customer="ada"), tool("order opal")
    made = rollout(find, found, find, found, tool_errors=1)
    got = score(made, 1.0, RewardConfig())
    assert got.parts == {"outcome": 1.0, "calls": 0.5, "repetition": 0.5}
    assert got.value == pytest.approx(1.0 - 0.1 * 0.5 - 0.1 * 0.5)
    assert got.outcome == 1.0 and got.valid
    assert score(made, 1.0, RewardConfig(calls=0.4, repetition=0.0)).value == pytest.approx(0.8)
    assert score(made, 0.0, RewardConfig()).value == 0.0


def test_tidiness_earns_nothing() -> None:
    assert score(rollout(said("sorry")), 0.0, RewardConfig()).value == 0.0


@given(
    st.floats(0, 1),
    st.tuples(*[st.floats(0, 1)] * 3),
    st.integers(0, 5),
    st.integers(0, 9),
    st.integers(0, 3),
)
def test_the_value_is_in_bounds_and_outcome_is_kept(
    outcome: float, weights: tuple[float, float, float], calls: int, errors: int, unread: int
) -> None:
    config = RewardConfig(outcome=weights[0], calls=weights[1], repetition=weights[2])
    messages = [m for _ in range(calls) for m in (call("find"), tool("x"))]
    made = rollout(*messages, parse_errors=("json",) * unread, tool_errors=errors)
    got = score(made, outcome, config)
    assert 0.0 <= got.value <= weights[0] * outcome + 1e-12
    assert got.outcome == outcome
    assert score(made, outcome, config) == got


@pytest.mark.parametrize("outcome", [math.nan, math.inf, -0.1, 1.1])
def test_a_grade_that_is_none_is_an_error_and_never_a_zero(outcome: float) -> None:
    with pytest.raises(RewardError, match="outcome of g/0"):
        score(rollout(), outcome, RewardConfig())


def test_a_weight_for_no_part_is_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        RewardConfig.model_validate({"call": 0.1})
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        RewardConfig(calls=2.0)
