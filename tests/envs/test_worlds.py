"""What is particular to one world: its options, its checkers, and the ways to cheat it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from envs import words
from envs.worlds import make_world
from envs.worlds.base import arguments, play, say, use
from envs.worlds.chains import Chains, ChainsConfig
from envs.worlds.desk import BUSY, Desk, DeskConfig, DeskSession
from envs.worlds.facts import Facts, FactsConfig
from envs.worlds.requests import Requests, RequestsConfig
from envs.worlds.rules import BASES, EXTRAS, Rules, RulesConfig, keeps, phrase, render, words_of
from posttrain.errors import ToolError
from posttrain.types import Limits, Message, Task, Tool, ToolCall


def test_no_word_means_two_things() -> None:
    assert words.overlap() == set()


# options of every world -----------------------------------------------------------------------------------------------


def test_a_config_says_how_long_a_turn_and_an_episode_may_be_and_whether_to_think() -> None:
    as_they_are = make_world(ChainsConfig(), "chains").tasks("eval", 1, 0)[0]
    assert (as_they_are.thinking, as_they_are.limits.max_tokens, as_they_are.limits.timeout_s) == (True, 48, 60.0)
    told = {"max_tokens": 2048, "episode_s": 5.0}
    for config, thinking in ((ChainsConfig(**told), True), (RulesConfig(**told, thinking=True), True)):
        task = make_world(config, "w").tasks("eval", 1, 0)[0]
        assert (task.thinking, task.limits) == (thinking, Limits(max_turns=1, max_tokens=2048, timeout_s=5.0))
    assert not make_world(ChainsConfig(thinking=False), "w").tasks("eval", 1, 0)[0].thinking


# arguments ------------------------------------------------------------------------------------------------------------

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text(),
    "integer": st.integers(),
    "boolean": st.booleans(),
    "number": st.floats() | st.integers(),
}


@given(st.data(), st.sampled_from(sorted(VALUES)), st.sampled_from(sorted(VALUES)))
def test_arguments_have_the_type_that_the_tool_asks(data: st.DataObject, wanted: Any, given_: str) -> None:
    tool = Tool(name="t", description="", parameters={"a": wanted})
    value = data.draw(VALUES[given_])
    call = ToolCall(name="t", arguments={"a": value})
    fits = (
        wanted == given_
        or (wanted == "number" and given_ == "integer")
        or (wanted == "integer" and given_ == "number" and isinstance(value, int))
    )
    if fits:
        assert arguments([tool], call)["a"] is value
    else:
        with pytest.raises(ToolError, match=f"a is {wanted}"):
            arguments([tool], call)


@given(st.none() | st.integers() | st.lists(st.text()) | st.dictionaries(st.text(), st.integers()))
def test_a_json_argument_takes_any_value(value: object) -> None:
    tool = Tool(name="t", description="", parameters={"a": "json"})
    assert arguments([tool], ToolCall(name="t", arguments={"a": value})) == {"a": value}


# chains ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "hops"), [(6, 5), (6, 1), (3, 3), (12, 9)])
def test_following_the_arrows_leads_to_the_answer(pairs: int, hops: int) -> None:
    """The table alone says it: read back from the prompt, as the model must."""
    world = Chains(ChainsConfig(pairs=pairs, max_hops=hops))
    depths: set[int] = set()
    for task in world.tasks("train", 200, 0):
        table, question = task.prompt[-1].content.split(";")
        arrows = dict(pair.split(">") for pair in table.split(" "))
        assert len(arrows) == pairs, "a word may point to one other only"
        at, n = question[:-1], int(question[-1])
        walked = [at]
        for _ in range(n):
            at = arrows[at]
            walked.append(at)
        assert walked == task.data["path"] and len(set(walked)) == n + 1
        assert task.difficulty == n
        depths.add(n)
    assert depths == set(range(1, hops + 1))


def test_the_end_of_the_path_is_not_always_a_dead_end() -> None:
    """Else walking to the end would do, and nobody would count."""
    tasks = Chains(ChainsConfig()).tasks("train", 300, 0)
    goes_on = [f"{t.data['path'][-1]}>" in t.prompt[-1].content for t in tasks]
    assert 0.3 < sum(goes_on) / 300 < 0.7


def test_more_hops_than_arrows_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_hops <= max_hops <= pairs"):
        ChainsConfig(pairs=3, max_hops=4)


# desk -----------------------------------------------------------------------------------------------------------------


def _desk(**options: Any) -> Task:
    return Desk(DeskConfig(**options)).tasks("eval", 1, 0)[0]


async def _act(session: DeskSession, calls: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    answers: list[str] = []
    for name, args in calls:
        try:
            answers.append(await session.call(ToolCall(name=name, arguments=args)))
        except ToolError as error:
            answers.append(str(error))
    return answers


def test_desk_grades_the_database_and_the_end() -> None:
    data = {
        "rows": [["opal", "ada", "lamp", "oslo"], ["ruby", "ben", "desk", "rome"]],
        "requests": [{"verb": "move", "order": "opal", "customer": "ada", "city": "lima"}],
        "busy": False,
    }
    right = ("move", {"order": "opal", "city": "lima"})

    def grade(*calls: tuple[str, dict[str, Any]], end: bool = True, word: str = "done") -> float:
        async def run() -> float:
            session = DeskSession(data)
            await _act(session, calls)
            message = say(word)
            if end:
                assert await session.reply(message) is None
            return await session.grade([message])

        return asyncio.run(run())

    assert grade(right) == 1.0
    assert grade(right, end=False) == 0.0, "the conversation did not end"
    assert grade(right, word="") == 0.0, "it ended without a word"
    assert grade() == 0.0
    assert grade(right, ("gift", {"order": "ruby"})) == 0.0, "another change"
    assert grade(("gift", {"order": "opal"})) == 0.0, "another verb"
    assert grade(("move", {"order": "ruby", "city": "lima"})) == 0.0, "another order"
    assert grade(("move", {"order": "opal", "city": "bern"})) == 0.0, "another city"
    assert grade(("move", {"order": "opal", "city": "bern"}), right) == 0.0, "a detour is a change too"
    assert grade(("find", {"customer": "zoe"}), ("gift", {"order": "moss"}), right) == 1.0, "errors change nothing"


def test_desk_is_busy_once() -> None:
    task = _desk(busy=1.0)
    customer = task.data["requests"][0]["customer"]
    answers = asyncio.run(_act(DeskSession(task.data), [("find", {"customer": customer})] * 2))
    assert answers[0] == BUSY
    assert answers[1].startswith(f"order {task.data['requests'][0]['order']} item ")


def test_desk_errors_say_what_is_wrong() -> None:
    calls = [
        ("find", {"customer": "nobody"}),
        ("gift", {"order": "' or 1=1 --"}),
        ("move", {"order": "opal", "city": "moon"}),
    ]
    answers = asyncio.run(_act(DeskSession(_desk(busy=0.0).data), calls))
    assert answers == ["error: no customer", "error: no order", "error: no city"]


def test_desk_asks_again_only_after_the_first_request_is_done() -> None:
    task = _desk(two=1.0, busy=0.0)
    world = Desk(DeskConfig(two=1.0, busy=0.0))

    async def run() -> None:
        good = await world.act_out(task, "good", Random(0))
        assert next(m.content for m in good if m.role == "user").startswith("now ")
        session = await world.open(task)
        assert await session.reply(say("done")) is None
        assert await session.grade([]) == 0.0

    asyncio.run(run())


def test_desk_options_are_used() -> None:
    tasks = Desk(DeskConfig(customers=3, two=0.0, busy=0.0)).tasks("train", 50, 0)
    assert all(len(t.data["rows"]) == 3 and len(t.data["requests"]) == 1 and not t.data["busy"] for t in tasks)


# rules ----------------------------------------------------------------------------------------------------------------

ANSWERS = [
    ({"listed": ["ash", "bay"], "base": "backwards"}, ["bay ash"], ["ash bay", "bay", "bay ash ash", "bay,ash", ""]),
    ({"listed": ["ash"], "base": "times", "n": 3}, ["ash ash ash"], ["ash", "ash ash", "ash ash ash ash", "ash3"]),
    (
        {"listed": ["ash", "bay", "cob"], "base": "some", "n": 2},
        ["ash bay", "cob ash", "bay cob"],
        ["ash", "ash ash", "ash bay cob", "ash fig", "ash  bay"],
    ),
    ({"listed": ["ash", "bay"], "base": "in_order", "commas": True}, ["ash,bay", "ash, bay"], ["ash bay", "ash,,bay"]),
    (
        {"listed": ["ash", "bay"], "base": "in_order", "extra": "end", "word": "fig"},
        ["ash bay fig"],
        ["ash bay", "fig ash bay", "ash fig bay", "ash bay fig.", "fig ash bay fig"],
    ),
    (
        {"listed": ["ash"], "base": "times", "n": 2, "extra": "start", "word": "fig", "commas": True},
        ["fig,ash,ash", "fig, ash,ash"],
        ["fig ash ash", "ash,ash,fig", "ash,ash", "fig,fig,ash,ash"],
    ),
]


@pytest.mark.parametrize(("rules", "right", "wrong"), ANSWERS)
def test_rules_by_hand(rules: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    assert [keeps(a, rules) for a in right] == [True] * len(right)
    assert [keeps(a, rules) for a in wrong] == [False] * len(wrong)


@st.composite
def rule_sets(draw: st.DrawFn) -> dict[str, Any]:
    *listed, word = draw(st.lists(st.sampled_from(words.THINGS), min_size=4, max_size=6, unique=True))
    rules: dict[str, Any] = {"listed": listed, "base": draw(st.sampled_from(sorted(BASES))), "word": word}
    rules["n"] = draw(st.integers(1, len(listed)))
    rules["commas"] = draw(st.booleans())
    rules["extra"] = draw(st.sampled_from([None, *sorted(EXTRAS)]))
    return rules


@given(rule_sets())
def test_what_is_rendered_keeps_the_rules(rules: dict[str, Any]) -> None:
    assert keeps(render(rules), rules)
    assert not keeps(phrase(rules), rules), "repeating the request is no answer"


@given(rule_sets(), rule_sets())
def test_an_answer_to_other_words_is_wrong(rules: dict[str, Any], other: dict[str, Any]) -> None:
    spare = [word for word in words.THINGS if word not in rules["listed"]]
    assert not keeps(render({**other, "listed": spare[: len(other["listed"])]}), rules)


@given(rule_sets(), st.text(max_size=20))
def test_any_text_can_be_checked(rules: dict[str, Any], text: str) -> None:
    keeps(text, rules)


@given(st.lists(st.sampled_from(words.THINGS), min_size=1), st.booleans())
def test_words_are_read_back(said: list[str], commas: bool) -> None:
    assert words_of(("," if commas else " ").join(said), commas) == said


@given(rule_sets(), st.integers(0, 5))
def test_one_word_less_breaks_a_rule_that_counts(rules: dict[str, Any], at: int) -> None:
    separator = "," if rules["commas"] else " "
    said = render(rules).split(separator)
    del said[at % len(said)]
    assert not keeps(separator.join(said), rules)


def test_every_kind_of_rule_is_asked() -> None:
    tasks = Rules(RulesConfig()).tasks("train", 200, 0)
    assert {t.data["base"] for t in tasks} == set(BASES)
    assert {t.data.get("extra") for t in tasks} == {None, *EXTRAS}
    assert 0.2 < sum(t.difficulty == 2 for t in tasks) / 200 < 0.4


# facts and requests ---------------------------------------------------------------------------------------------------


def test_facts_are_answered_from_the_list() -> None:
    tasks = Facts(FactsConfig(facts=4)).tasks("train", 300, 0)
    for task in tasks:
        table, asked = task.prompt[-1].content.split(";")
        listed = dict(fact.split(":") for fact in table.split(" "))
        assert len(listed) == len(set(listed.values())) == 4
        assert task.data["answer"] == listed.get(asked.removesuffix("?"), "unknown")
    assert 0.4 < sum(t.data["answer"] == "unknown" for t in tasks) / 300 < 0.6


@pytest.mark.parametrize("harmful", [0.0, 1.0])
def test_requests_are_decided_by_the_verb(harmful: float) -> None:
    world = Requests(RequestsConfig(harmful=harmful))
    for task in world.tasks("eval", 100, 0):
        verb, rest = task.prompt[-1].content.removeprefix("please ").removeprefix("now ").split(" the ")
        assert (verb in words.HARMFUL) == task.data["harmful"] == bool(harmful)
        assert task.data["form"] == f"ok {verb} {rest.split(' ')[0]}"


def test_saying_both_pleases_nobody() -> None:
    async def run() -> None:
        world = Requests(RequestsConfig())
        for task in world.tasks("eval", 20, 0):
            session = await world.open(task)
            both = say(f"cannot {task.data['form']}")
            assert await session.grade([both]) == 0.0

    asyncio.run(run())


# playing --------------------------------------------------------------------------------------------------------------


def test_a_script_hears_what_the_session_says() -> None:
    heard: list[Message] = []

    def script() -> Any:
        heard.append((yield use("find", customer="nobody")))
        heard.append((yield use("find", customer=7)))
        yield say("sorry")

    messages = asyncio.run(play(DeskSession(_desk(busy=0.0).data), script()))
    assert [m.content for m in heard] == ["error: no customer", "error: customer is string"]
    assert [m.role for m in messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
