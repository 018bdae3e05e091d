"""The work world: its users, habits and options, and what a tiny model can read of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from envs.work.chain import arguments_of, from_json
from envs.work.domain import load_domain
from envs.work.plan import Goal
from envs.work.users import Line, ScriptedUser, ScriptedUserConfig, compose
from envs.worlds.base import GOOD, SPLITS, empty, say
from envs.worlds.work import Work, WorkConfig, WorkSession
from posttrain.chat import Chat, train_tokenizer
from posttrain.markup.longcat import tool_line
from posttrain.types import Message, Task, ToolCall

AT_ONCE = ScriptedUserConfig(turns=0.0, asks=0.0)
TINY: dict[str, Any] = {"domains": ("library",), "tools": 5, "chain": 2, "rows": 4, "further": 0.0}


# users ----------------------------------------------------------------------------------------------------------------


GOALS = (
    Goal(step=1, says="bar {member}", slots={"member": "member ada"}, told=()),
    Goal(step=3, says="check a {size} bag for {booking}", slots={"size": "big", "booking": "it"}, told=("size",)),
)


def test_users_say_all_at_once_or_in_turns_and_keep_a_word_back() -> None:
    [one] = compose(GOALS, Random(0), AT_ONCE)
    assert (one.text, one.end, one.slot) == ("bar member ada, then check a big bag for it", 4, "")
    first, later = compose(GOALS, Random(0), ScriptedUserConfig(turns=1.0, asks=1.0))
    assert (first.text, first.end, first.slot) == ("bar member ada", 2, "")
    assert later.text == "now check some size bag for it"
    assert (later.end, later.slot, later.value, later.step) == (4, "size", "big", 3)
    twice = (GOALS[1], replace(GOALS[1], step=5))
    assert not any(p.slot for p in compose(twice, Random(0), ScriptedUserConfig(asks=1.0))), (
        "which size would be unclear"
    )


def test_users_answer_what_they_kept_back_and_leave_over_anything_else() -> None:
    parts = [
        {"text": "a", "end": 1, "slot": "size", "value": "big", "step": 0},
        {"text": "b", "end": 2, "slot": "", "value": "", "step": -1},
    ]
    user = ScriptedUser(parts)
    assert user.reply("Which SIZE?", done=False) == Line(text="size big", tells="big")
    assert user.reply("size please", done=False) == Line(text="size big", tells="big")
    assert user.reply("which color", done=False) is None
    assert user.reply("oversize", done=False) is None
    assert user.reply("done", done=True) == Line(text="b", tells="b")
    assert user.reply("", done=True) is None and not user.content
    assert user.reply("done", done=True) is None and user.content


def test_what_is_kept_back_is_not_told_and_has_to_be_asked_for() -> None:
    world = Work(WorkConfig(user=ScriptedUserConfig(turns=1.0, asks=1.0)))
    tasks = world.tasks("train", 40, 0)
    asked = [t for t in tasks if any(p["slot"] for p in t.data["parts"])]
    turns = [t for t in tasks if len(t.data["parts"]) == 2]
    assert len(asked) > 15 and len(turns) > 30

    async def play() -> None:
        for i, task in enumerate(asked):
            part = next(p for p in task.data["parts"] if p["slot"])
            assert f"some {part['slot']}" in part["text"]
            good = await world.act_out(task, GOOD, Random(i))
            assert f"which {part['slot']}" in [m.content for m in good]
            assert f"{part['slot']} {part['value']}" in [m.content for m in good if m.role == "user"]
            assert await world.score(task, world.script(task, "assumes", Random(i))) == 0.0
        for i, task in enumerate(turns):
            good = await world.act_out(task, GOOD, Random(i))
            assert any(m.role == "user" and m.content.startswith("now ") for m in good)
            first = from_json(task.data["steps"])[: task.data["parts"][0]["end"]]
            if not any(p["slot"] for p in task.data["parts"]):
                session = WorkSession(task.data)
                assert await session.reply(say("done")) is None, "nothing is done yet"
                answers: list[str] = []
                for step in first:
                    answers.append(
                        await session.call(ToolCall(name=step.tool, arguments=arguments_of(step, answers) or {}))
                    )
                reply = await session.reply(say("done"))
                assert reply is not None and reply.content == task.data["parts"][1]["text"]
                assert await session.grade([]) == 0.0, "half is nothing"

    asyncio.run(play())


# the world ------------------------------------------------------------------------------------------------------------


def test_good_habits_score_one_and_bad_ones_nothing() -> None:
    world = Work(WorkConfig())

    async def play() -> set[str]:
        seen: set[str] = set()
        for i, task in enumerate(world.tasks("demo", 60, 2)):
            assert await world.score(task, world.script(task, GOOD, Random(i))) == 1.0
            assert await world.score(task, empty()) == 0.0
            for habit in world.bad_habits(task):
                seen.add(habit)
                assert await world.score(task, world.script(task, habit, Random(i))) == 0.0, (habit, task)
        return seen

    assert asyncio.run(play()) == {"assumes", "claims", "guesses", "skips", "slips", "stops"}
    with pytest.raises(ValueError, match="no habit 'lazy'"):
        next(world.script(world.tasks("demo", 1, 0)[0], "lazy", Random(0)))


def test_requests_name_no_ids() -> None:
    for task in Work(WorkConfig()).tasks("train", 60, 1):
        ids = {row[0] for name in load_domain(task.data["domain"]).entities for row in task.data["rows"][name]}
        assert not ids & set(re.findall("[a-z]+", " ".join(p["text"] for p in task.data["parts"])))


def test_splits_share_no_request() -> None:
    world = Work(WorkConfig(**TINY))
    told = {s: {t.prompt[-1].content for seed in range(2) for t in world.tasks(s, 30, seed)} for s in SPLITS}
    assert not told["eval"] & told["train"] and not told["eval"] & told["demo"] and not told["demo"] & told["train"]


def test_options_are_used() -> None:
    world = Work(WorkConfig(domains=("bank", "farm"), tools=7, chain=3, rows=4, further=0.0, user=AT_ONCE))
    tasks = world.tasks("train", 30, 0)
    assert {t.data["domain"] for t in tasks} == {"bank", "farm"}
    assert {len(t.data["tools"]) for t in tasks} == {7}
    assert all(3 <= len(t.data["steps"]) <= 5 and len(t.data["parts"]) == 1 for t in tasks)
    more = Work(WorkConfig(domains=("bank",), tools=7, chain=3, rows=4, further=0.9)).tasks("train", 10, 0)
    assert max(len(t.data["tools"]) for t in more) > 10


# tiny -----------------------------------------------------------------------------------------------------------------


def _spoken(messages: Sequence[Message]) -> list[str]:
    called = [f"{c.name} {k} {v}" for m in messages for c in m.tool_calls for k, v in c.arguments.items()]
    return [*called, *(m.content for m in messages)]


def test_a_tiny_model_can_read_the_tiny_configuration() -> None:
    """A word is a token, an opening takes less than 200, a whole conversation less than 400."""
    world = Work(WorkConfig(**TINY))

    async def collect() -> list[tuple[Task, tuple[Any, ...], list[Message], list[str]]]:
        found: list[tuple[Task, tuple[Any, ...], list[Message], list[str]]] = []
        for i, task in enumerate(world.tasks("demo", 200, 0)):
            session = await world.open(task)
            lines = [tool_line(t) for t in session.tools]
            good = await world.act_out(task, GOOD, Random(i))
            shown = await world.demonstrate(task, Random(i))
            texts = [*lines, task.prompt[0].content, *_spoken(good), *_spoken(shown)]
            found.append((task, session.tools, good, texts))
            await session.close()
        return found

    told = asyncio.run(collect())
    texts = [t for *_, some in told for t in some]
    tokenizer = train_tokenizer(texts, 520)
    spoken = {w for t in texts for w in re.findall("[A-Za-z]+", t)}
    assert [w for w in spoken if len(tokenizer.encode(w, add_special_tokens=False)) > 1] == []
    chat = Chat(tokenizer)
    for task, tools, good, _ in told:
        segments = chat.segments(task.prompt, good, tools, False)
        assert len(segments[0].ids) < 200
        assert sum(len(s.ids) for s in segments) < 400
        assert all(len(chat.answer(m, False)) <= task.limits.max_tokens for m in good if m.role == "assistant")
        assert sum(m.role == "assistant" for m in good) <= task.limits.max_turns
