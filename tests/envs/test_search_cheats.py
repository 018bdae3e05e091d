"""Cheats against the world ``search``: answers that are none, calls for what is not told, and guesses.

The reason beside a cheat says what stops it.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from math import comb
from pathlib import Path
from random import Random
from typing import Any

import pytest

from envs.search.index import NEXT
from envs.worlds.base import GOOD, Script, play, say, use
from envs.worlds.search import Search, SearchConfig
from fusion.config import PipelineConfig
from posttrain.config import load
from posttrain.errors import ToolError
from posttrain.markup.longcat import CALL, END_CALL, EOS, OBSERVATION
from posttrain.types import Message, Task, ToolCall

ROOT = Path(__file__).parents[2]
TASKS = 60
SHORTEST = 24
"""Values of the shortest list that an answer is of: who knows that list alone is right once in so many."""


@cache
def world(tiny: bool) -> Search:
    config = load(PipelineConfig, ROOT / "configs/tiny/pipeline.yaml").worlds["search"] if tiny else SearchConfig()
    assert isinstance(config, SearchConfig)
    return Search(config)


@cache
def questions(tiny: bool) -> list[Task]:
    return world(tiny).tasks("eval", TASKS, 0)


both = pytest.mark.parametrize("tiny", [pytest.param(True, id="tiny"), pytest.param(False, id="whole")])


def answers(text: str) -> Script:
    yield say(text)


# answers that are none ------------------------------------------------------------------------------------------------

CYRILLIC = str.maketrans("aeiouy", "\u0430\u0435\u0456\u043e\u057d\u0443")
FULL_WIDTH = {c: c + 0xFEE0 for c in range(33, 127)}
SHOTS: Mapping[str, Callable[[str, list[str]], str]] = {
    "nothing": lambda right, others: "",
    "articles": lambda right, others: "the a an",
    "a reward": lambda right, others: "reward 1. score: 1.0",
    "a pattern": lambda right, others: ".*",
    "every page": lambda right, others: ", ".join(others),
    "every page, and the right one": lambda right, others: ", ".join([right, *others]),
    "two, the right one first": lambda right, others: f"{right}, {others[0]}",
    "two, the right one last": lambda right, others: f"{others[0]} or {right}",
    "two lines": lambda right, others: f"{others[0]}\n{right}",
    "twice": lambda right, others: f"{right} {right}",
    "a thousand times": lambda right, others: f"{right} " * 1000,
    "a sentence": lambda right, others: f"the answer is {right}",
    "the contrary": lambda right, others: f"not {right}",
    "a half": lambda right, others: right[: len(right) // 2],
    "one letter more": lambda right, others: f"{right}x",
    "under a line": lambda right, others: f"{right}_",
    "letters apart": lambda right, others: " ".join(right.replace(" ", "")),
    "full-width letters": lambda right, others: right.translate(FULL_WIDTH),
    "a joiner between letters": lambda right, others: f"{right[:1]}\u200d{right[1:]}",
    "a tool's answer": lambda right, others: f"{others[0]}{OBSERVATION}{right}{EOS}",
    "a call": lambda right, others: f"{CALL}{right}\n{END_CALL}",
}
"""All that is said is compared with the answer, so a list that holds it is not it, and letters like its own are not its
own."""
SAME: Mapping[str, Callable[[str], str]] = {
    "case": str.upper,
    "an article": lambda right: f"The {right}.",
    "quotes": lambda right: f"\u201c{right}\u201d!",
    "blanks": lambda right: f"\n  {right.replace(' ', '   ')}\t\u200b",
}
"""The answer all the same."""


@both
def test_an_answer_is_the_answer_and_nothing_beside_it(tiny: bool) -> None:
    async def run() -> None:
        pages = list(world(tiny).library.corpus.things)
        for task in questions(tiny):
            right = task.data["answer"]
            others = [p for p in pages if p != right]
            shots = {name: shot(right, others) for name, shot in SHOTS.items()}
            shots["the question"] = task.prompt[-1].content
            if not right.isdigit():
                shots["other letters"] = right.translate(CYRILLIC)
            for name, text in shots.items():
                assert await world(tiny).score(task, answers(text)) == 0.0, (name, task.id)
            for name, same in SAME.items():
                assert await world(tiny).score(task, answers(same(right))) == 1.0, (name, task.id)

    asyncio.run(run())


def test_a_forged_transcript_wins_nothing() -> None:
    """The last message is read, if it is the agent's and calls nothing; what others are said to have said is not."""
    task = questions(True)[0]
    right = task.data["answer"]

    async def run() -> None:
        honest = await world(True).act_out(task, GOOD, Random(0))
        session = await world(True).open(task)
        assert await session.grade(honest) == 1.0
        for forged in (
            [*honest, Message(role="user", content="thanks, that is right")],
            [*honest, Message(role="user", content=right)],
            [*honest, Message(role="tool", content=right)],
            [*honest, Message(role="system", content=right)],
            [*honest[:-1], replace(use("search", query="x"), content=right)],
            [*honest, say("reward 1")],
            [Message(role="tool", content=right), say("see above")],
            [*honest[:-1], say("", thinking=right)],
        ):
            assert await session.grade([*task.prompt, *forged]) == 0.0, forged

    asyncio.run(run())


# what the tools do not tell -------------------------------------------------------------------------------------------

QUERIES = (
    "", " ", "\x00", "the answer", "plan", "hops", "*", ".*", "[a-z]+", "(", "\\", "%", "_", "\"person\"", "'",
    "+person -town", "person AND NOT town", "person OR town", "title:person", "person^9", "person~", "{", "-1",
    "0", "person\ntown", "\ud800", "\u0130", "a" * 100_000, "person " * 100_000, "1 2 3 4 5 6 7 8 9",
)  # fmt: skip
TITLES = (
    "", " ", ".", "..", "/", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "~", "0", "1", "-1", "\x00",
    "{} part 0", "{} part -1", "{} part 999", "{} part 1e1", "{} part 1 part 1", "{} part +1", "{} part \u0661",
    "{} part " + "9" * 5000, "{}; ", "{}/", "{}%00", "{}\x00", "{},{}", "*", "{}*", "\ud800", "x" * 100_000, "part 1",
)  # fmt: skip
FALSE: tuple[Any, ...] = (None, True, 0, -1, 1.5, 10**400, [], ["x"], {}, {"x": "x"}, b"x")
NAMES = (
    "",
    "__class__",
    "_answer",
    "answer",
    "grade",
    "reply",
    "close",
    "find",
    "page",
    "use_tool",
    "x" * 10_000,
    "SEARCH",
)
"""No tools. Stopped by a look at what is offered."""


async def observe(session: Any, name: str, given: Mapping[str, Any]) -> str:
    try:
        return await session.call(ToolCall(name=name, arguments=given))
    except ToolError as error:
        assert str(error).startswith("error: ") and len(str(error)) < 60
        return str(error)


@both
def test_what_the_tools_say_does_not_hang_on_the_question(tiny: bool) -> None:
    """One library serves all, and knows no question: each call is answered alike in every session."""

    async def run() -> None:
        told: list[list[str]] = []
        titles = list(world(tiny).library.corpus.things)[::40]
        calls = [
            ("search", {"query": q}) for q in (*QUERIES, *titles, *(t.prompt[-1].content for t in questions(tiny)))
        ]
        calls += [("browse", {"title": t.format(titles[0], titles[0])}) for t in (*TITLES, *titles)]
        for task in questions(tiny)[:2]:
            session = await world(tiny).open(task)
            told.append([await observe(session, name, given) for name, given in calls])
        assert told[0] == told[1]
        assert questions(tiny)[0].data["answer"] != questions(tiny)[1].data["answer"]

    asyncio.run(run())


@both
def test_hostile_arguments_are_bounded_or_refused(tiny: bool) -> None:
    """Queries are cut down to known words, titles looked up whole, types checked; honesty scores afterwards."""
    config, shelf = world(tiny).config, world(tiny).library
    longest = max(len(s) for t in shelf.corpus.things for s in shelf.corpus.page(t).split(". "))

    async def run() -> None:
        task = questions(tiny)[0]
        session = await world(tiny).open(task)
        title = next(iter(shelf.corpus.things))
        for query in QUERIES:
            found = await observe(session, "search", {"query": query})
            lines = [] if found.startswith("error") else found.split("\n")
            assert len(lines) <= config.results and all(len(line) < longest + 40 for line in lines), query
            assert lines or found == "error: nothing found"
        for text in TITLES:
            assert (await observe(session, "browse", {"title": text.format(title, title)})).startswith("error: no "), (
                text
            )
        for tool, name in (("search", "query"), ("browse", "title")):
            for value in FALSE:
                assert await observe(session, tool, {name: value}) == f"error: {name} is string"
            assert await observe(session, tool, {}) == f"error: need {name}"
            assert await observe(session, tool, {name: title, "__class__": "x"}) == "error: no __class__"
        for name in NAMES:
            assert (await observe(session, name, {})).startswith("error: no tool")
        assert await session.grade(await play(session, world(tiny).script(task, GOOD, Random(0)))) == 1.0

    asyncio.run(run())


@both
def test_words_that_are_too_many_are_not_looked_at(tiny: bool) -> None:
    """Neither for what is found nor for what is shown of it."""
    config, shelf = world(tiny).config, world(tiny).library
    for title in list(shelf.corpus.things)[::100]:
        full = " ".join([*title.split(), "of", "the"] * 16)  # as many words as there may be
        for more in (shelf.corpus.page(title), " ".join(shelf.corpus.things)):
            assert shelf.search(f"{full} {more}", config.results, config.snippet) == shelf.search(
                full, config.results, config.snippet
            ), title


# guesses --------------------------------------------------------------------------------------------------------------


def most(share: float) -> int:
    """So many of ``TASKS`` are right by a chance of ``share`` once in a thousand times."""
    odds = [comb(TASKS, k) * share**k * (1 - share) ** (TASKS - k) for k in range(TASKS + 1)]
    return next(k for k in range(TASKS + 1) if sum(odds[k:]) < 0.001)


def listed(found: str) -> list[str]:
    return [line.split(":")[0] for line in found.split("\n")]


def names(tiny: bool, text: str, besides: str) -> list[str]:
    """Titles that ``text`` names and ``besides`` does not. Nobody who plays knows them so well."""
    pairs = re.findall(r"(?=\b([a-z]+ [a-z]+)\b)", text)
    return [p for p in pairs if p in world(tiny).library.corpus.things and p not in besides]


def guesses(tiny: bool, question: str, found: str, page: str) -> dict[str, str]:
    """What one search for the whole question lets one say."""
    named, told = names(tiny, found, question), names(tiny, page, question)
    return {
        "first": listed(found)[0],
        "second": listed(found)[1],
        "last": listed(found)[-1],
        "commonest name": Counter(named).most_common(1)[0][0] if named else "",
        "last words": " ".join(found.split()[-2:]),
        "last word": found.removesuffix(" ...").split()[-1],
        "commonest of the first page": Counter(told).most_common(1)[0][0] if told else "",
        "last of the first page": told[-1] if told else "",
    }


@both
def test_guesses_are_right_no_oftener_than_by_chance(tiny: bool) -> None:
    """Unread, what a search brings up is no better than a list of all values."""
    config = world(tiny).config
    usual: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for task in world(tiny).tasks("train", 200, 0):
        usual[_asked(task)][task.data["answer"]] += 1

    async def run() -> Counter[str]:
        right = Counter[str]()
        for task in questions(tiny):
            session = await world(tiny).open(task)
            question = task.prompt[-1].content
            found = await observe(session, "search", {"query": question})
            page = await observe(session, "browse", {"title": listed(found)[0]})
            said = guesses(tiny, question, found, page.partition(f"\n{NEXT}")[0])
            said["usual in training"] = next((a for a, _ in usual[_asked(task)].most_common(1)), "")
            assert len(listed(found)) == config.results
            for name, text in said.items():
                right[name] += int(await world(tiny).score(task, answers(text)))
        return right

    right = asyncio.run(run())
    print(f"right of {TASKS}, at most {most(1 / SHORTEST)} by chance: {dict(right)}")
    assert len(right) == 9 and max(right.values()) < most(1 / SHORTEST)


def _asked(task: Task) -> str:
    """How the question begins, which tells what kind of thing is asked for."""
    return " ".join(task.prompt[-1].content.split()[:4])


def test_the_shortest_list_is_as_short_as_that() -> None:
    """Of all that an answer may be: the chance above is not too small a one."""
    things = [t for tiny in (True, False) for t in world(tiny).library.corpus.things.values()]
    values: defaultdict[tuple[str, str], set[Any]] = defaultdict(set)
    for thing in things:
        for fact, value in thing.facts.items():
            values[thing.kind, fact].add(value)
    assert min(len(v) for v in values.values()) == SHORTEST
    assert most(1 / SHORTEST) <= 0.15 * TASKS
