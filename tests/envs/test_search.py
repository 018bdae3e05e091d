"""The made-up encyclopaedia: its pages, its search, its questions, and that each has one answer."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from envs import words
from envs.search.corpus import Corpus, Style, parts, read
from envs.search.index import NEXT, Library
from envs.search.questions import Plan, draw, normal, phrase
from envs.worlds.base import GOOD, say
from envs.worlds.search import Search, SearchConfig
from posttrain.chat import Chat, train_tokenizer
from posttrain.errors import ToolError
from posttrain.markup.longcat import SPECIAL, tool_line
from posttrain.types import Message, Task, ToolCall

TINY: dict[str, Any] = {
    "pages": 600,
    "style": "brief",
    "hops": 2,
    "backward": 0.0,
    "obfuscate": 0,
    "results": 3,
    "snippet": 0,
}
ADDED = """search browse query title find pages read page a of year person town river lake book firm home tutor mayor
source port author scene seat head"""
"""All words of a tiny world beside names."""
CONFIGS = [
    {},
    {"obfuscate": 0, "hops": 1, "backward": 1.0},
    {"obfuscate": 1},
    {"obfuscate": 3, "hops": 3, "pages": 3000, "backward": 0.2},
    TINY,
    {**TINY, "pages": 60, "hops": 3, "backward": 0.3},
]


def _world(**options: Any) -> Search:
    return Search(SearchConfig(**options))


@cache
def _small(style: Style = "prose") -> Corpus:
    return Corpus(300, 1, style, 4)


# pages ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["prose", "brief"])
def test_a_page_says_the_facts_and_nothing_else_that_could_be_taken_for_one(style: Style) -> None:
    corpus = _small(style)
    for name, thing in corpus.things.items():
        told = dict(read(corpus.page(name), name, style))
        facts = {k: str(v) for k, v in thing.facts.items()}
        assert told.pop("kind") == thing.kind
        if style == "prose":
            assert told == facts
        else:
            assert told.items() <= facts.items() and "year" in told and len(told) >= 2
        assert not read(corpus.page(name), "nobody here", "prose")


def test_a_corpus_repeats_under_its_seed() -> None:
    def pages(seed: int) -> dict[str, str]:
        corpus = Corpus(200, seed, "prose", 2)
        return {name: corpus.page(name) for name in corpus.things}

    assert pages(3) == pages(3)
    assert not pages(3).items() & pages(4).items()


@pytest.mark.parametrize("pages", [40, 41, 600, 3000])
def test_there_are_as_many_pages_as_asked_and_no_two_names_have_the_same_words(pages: int) -> None:
    corpus = Corpus(pages, 0, "brief", 0)
    assert len(corpus.things) == pages == len({frozenset(n.split()) for n in corpus.things})
    for thing in corpus.things.values():
        assert thing.name not in thing.facts.values(), "nothing is related to itself"


@pytest.mark.parametrize("words", [1, 20, 80, 10_000])
def test_parts_hold_the_whole_page(words: int) -> None:
    page = _small().page(next(iter(_small().things)))
    pieces = parts(page, words)
    assert " ".join(pieces) == page
    assert all(len(p.split()) <= words or len(parts(p, 1)) == 1 for p in pieces)
    assert len(pieces) == (1 if words == 10_000 else len(pieces)) and (words > 20 or len(pieces) > 2)


def test_two_thousand_pages_are_made_and_indexed() -> None:
    started = time.monotonic()
    shelf = Library(Corpus(2000, 0, "prose", 4))
    print(f"2000 pages made and indexed in {time.monotonic() - started:.1f} s")
    assert len(shelf.corpus.things) == 2000


def test_worlds_that_say_the_same_share_a_library() -> None:
    one, other = _world(pages=60, obfuscate=0), _world(pages=60, obfuscate=0, hops=1)
    assert one.library is other.library
    assert one.library is not _world(pages=60, corpus_seed=1).library
    assert _world(pages=60, corpus_seed=1).library.corpus.things != one.library.corpus.things


# tools ----------------------------------------------------------------------------------------------------------------


def _call(world: Search, name: str, **arguments: str) -> str:
    async def run() -> str:
        session = await world.open(Task(id="x", domain="agent", world="search", prompt=(), data={"answer": "x"}))
        return await session.call(ToolCall(name=name, arguments=arguments))

    return asyncio.run(run())


def test_every_page_is_found_by_its_name() -> None:
    for options in (TINY, {"pages": 300}):
        shelf = _world(**options).library
        assert all(name in shelf.find(name, 3) for name in list(shelf.corpus.things)[::7])


def test_search_lists_titles_and_the_words_that_fit() -> None:
    world = _world(pages=300, results=4, snippet=6)
    thing = next(t for t in world.library.corpus.things.values() if t.kind == "person")
    lines = _call(world, "search", query=f"{thing.facts['trade']} {thing.name}").splitlines()
    assert len(lines) == 4 and lines[0].startswith(f"{thing.name}: ")
    assert str(thing.facts["trade"]) in lines[0], "the sentence with the word that was sought"
    assert all(len(line.split(": ")[1].removesuffix(" ...").split()) <= 6 for line in lines)
    bare = _call(_world(pages=300, results=2, snippet=0), "search", query=thing.name.upper() + "?!").splitlines()
    assert len(bare) == 2 and bare[0] == thing.name


def test_a_search_without_a_known_word_says_so() -> None:
    for query in ("", "?!", "xyzzy quux", "\x00", "ü" * 1000):
        with pytest.raises(ToolError, match="error: nothing found"):
            _call(_world(pages=60), "search", query=query)
    assert _call(_world(pages=60), "search", query="town " * 100_000)


def test_browse_shows_a_page_in_parts() -> None:
    world = _world(pages=300, part=40)
    name = next(iter(world.library.corpus.things))
    seen, at = [], f" {name.title()} "
    while at:
        text, _, at = _call(world, "browse", title=at).partition(f"\n{NEXT}")
        seen.append(text)
    assert len(seen) > 1 and " ".join(seen) == world.library.corpus.page(name)
    assert _call(world, "browse", title=f"{name} part 1") == _call(world, "browse", title=name)


@pytest.mark.parametrize("number", ["0", "99", "-1", "x", "1" * 500, "²"])
def test_browse_refuses_what_there_is_not(number: str) -> None:
    world = _world(pages=60)
    with pytest.raises(ToolError, match="error: no part"):
        _call(world, "browse", title=f"{next(iter(world.library.corpus.things))} part {number}")
    for title in ("", "moon", "part 2", "x" * 100_000):
        with pytest.raises(ToolError, match="error: no page"):
            _call(world, "browse", title=title)


# questions ------------------------------------------------------------------------------------------------------------


def _brute_force(facts: Mapping[str, Mapping[str, str]], plan: Mapping[str, Any]) -> set[str]:
    """All answers of ``plan``, by what the pages say and by trying every page at every step."""

    def described(name: str) -> bool:
        if plan["name"]:
            return name == plan["name"]
        for clue in plan["clues"]:
            value = facts[facts[name][clue["via"]] if clue["via"] else name][clue["fact"]]
            if value != clue["word"] if clue["word"] else not clue["low"] <= int(value) <= clue["high"]:
                return False
        return True

    at = {name for name in facts if facts[name]["kind"] == plan["kind"] and described(name)}
    for hop in plan["hops"]:
        if hop["back"]:
            at = {n for n in facts if facts[n]["kind"] == hop["kind"] and facts[n][hop["fact"]] in at}
        else:
            at = {facts[n][hop["fact"]] for n in facts if n in at}
    return at


@pytest.mark.parametrize("obfuscate", [0, 1, 2, 3])
def test_every_question_has_one_answer_and_does_not_tell_it(obfuscate: int) -> None:
    """By an evaluator that shares nothing with the generator but the pages: 75 questions each."""
    world = _world(obfuscate=obfuscate, hops=2 + obfuscate % 2)
    corpus = world.library.corpus
    facts = {name: read(corpus.page(name), name, "prose") for name in corpus.things}
    tasks = world.tasks("train", 75, 0)
    for task in tasks:
        assert _brute_force(facts, task.data["plan"]) == {task.data["answer"]}
        words = f" {normal(task.prompt[-1].content)} "
        assert f" {normal(task.data['answer'])} " not in words
        assert len(task.data["plan"]["hops"]) == world.config.hops
    assert any(h["back"] for t in tasks for h in t.data["plan"]["hops"])
    assert len({t.data["answer"] for t in tasks}) > 50


def test_brief_questions_have_one_answer_too() -> None:
    world = _world(**{**TINY, "backward": 0.3})
    corpus = world.library.corpus
    facts = {name: read(corpus.page(name), name, "brief") for name in corpus.things}
    for task in world.tasks("train", 100, 0):
        assert _brute_force(facts, task.data["plan"]) == {task.data["answer"]}


def test_obfuscation_hides_names_then_numbers_then_years() -> None:
    corpus = Corpus(1000, 0, "prose", 2)
    names = set(corpus.things)

    def texts(obfuscate: int) -> list[tuple[Plan, str]]:
        rng = Random(obfuscate)
        drawn = [draw(corpus, 2, obfuscate, 0.3, rng) for _ in range(200)]
        found = [(q.plan, phrase(q.plan, "prose")) for q in drawn if q is not None]
        assert len(found) > 100
        return found

    def named(text: str) -> bool:
        words = re.findall("[a-z]+", text)
        return any(f"{a} {b}" in names for a, b in pairwise(words))

    assert all(named(text) and not plan.clues for plan, text in texts(0))
    for level in (1, 2, 3):
        for plan, text in texts(level):
            assert not plan.name and not named(text)
            for clue in plan.clues:
                exact = clue.low == clue.high
                assert clue.word or exact == (level < (3 if clue.fact == "year" else 2))
            assert bool(re.search(r"the \d+0s", text)) == (level == 3 and any(c.fact == "year" for c in plan.clues))
            assert any(not c.word for c in plan.clues)


def test_a_neighbour_is_described_where_words_and_numbers_do_not_tell() -> None:
    corpus = Corpus(8000, 0, "prose", 0)
    rng = Random(0)
    drawn = [draw(corpus, 1, 3, 0.0, rng) for _ in range(300)]
    far = [q.plan for q in drawn if q is not None and any(c.via for c in q.plan.clues)]
    assert far and all(", and whose " in phrase(plan, "prose") for plan in far)


def test_the_same_question_in_other_words_stays_in_its_split() -> None:
    plain, hidden = _world(pages=60, obfuscate=0, hops=1), _world(pages=60, obfuscate=3, hops=1)
    split = {t.data["key"]: t.id for s in ("eval", "demo", "train") for t in plain.tasks(s, 20, 0)}
    again = {t.data["key"]: t.id for s in ("eval", "demo", "train") for t in hidden.tasks(s, 20, 0)}
    shared = split.keys() & again.keys()
    assert shared and all(split[k].split("/")[1] == again[k].split("/")[1] for k in shared)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Ada Fox", True),
        ("the ada  fox.", True),
        ("“ada-fox”", True),
        ("adafox", False),
        ("fox ada", False),
        ("it is ada fox", False),
        ("", False),
        ("ada", False),
    ],
)
def test_answers_are_compared_without_case_articles_and_punctuation(said: str, right: bool) -> None:
    async def run() -> float:
        session = await _world(pages=60).open(
            Task(id="x", domain="agent", world="search", prompt=(), data={"answer": "ada fox"})
        )
        return await session.grade([say(said)])

    assert asyncio.run(run()) == float(right)


# habits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CONFIGS)
def test_the_reference_solves_all_and_bad_habits_nothing(options: dict[str, Any]) -> None:
    """200 tasks over all configs in equal parts; a correct answer without a look counts, and no bad habit has one."""
    world = _world(**options)

    async def run() -> None:
        for i, task in enumerate(world.tasks("train", 34, 0)):
            messages = await world.act_out(task, GOOD, Random(i))
            assert sum(m.role == "assistant" for m in messages) <= task.limits.max_turns
            used = {c.name for m in messages for c in m.tool_calls}
            assert "search" in used and ("browse" in used or world.config.hops == 1)
            assert await world.score(task, world.script(task, GOOD, Random(i))) == 1.0
            assert await world.score(task, iter_say(task.data["answer"])) == 1.0
            for habit in world.bad_habits(task):
                assert await world.score(task, world.script(task, habit, Random(i))) == 0.0, habit
            lucky = await world.score(task, world.script(task, "snippet", Random(i)))
            assert lucky == float("snippet" not in world.bad_habits(task))

    asyncio.run(run())


def iter_say(text: str) -> Any:
    yield say(text)


def test_the_first_snippet_is_right_for_one_hop_at_times_and_hardly_ever_for_two() -> None:
    def share(**options: Any) -> float:
        return sum(t.data["lucky"] for t in _world(**options).tasks("train", 200, 0)) / 200

    assert 0.15 < share(hops=1, obfuscate=0, backward=0.0) < 0.45
    assert share() < 0.03


def test_the_reference_reads_the_answer_and_does_not_know_it() -> None:
    """Another answer in the task's data changes nothing in what it says."""
    world = _world(pages=300)
    task = world.tasks("train", 1, 0)[0]
    forged = Task(id="x", domain="agent", world="search", prompt=(), data={**task.data, "answer": "nobody"})
    assert asyncio.run(world.act_out(forged, GOOD, Random(0))) == asyncio.run(world.act_out(task, GOOD, Random(0)))
    assert asyncio.run(world.score(forged, world.script(forged, GOOD, Random(0)))) == 0.0


def test_a_page_that_is_gone_leaves_the_reference_without_an_answer() -> None:
    world = _world(pages=300)
    script = world.script(world.tasks("train", 1, 0)[0], GOOD, Random(0))
    turn = next(script)
    while turn.tool_calls:
        turn = script.send(Message(role="tool", content="error: no page"))
    assert turn == say("unknown")


# options --------------------------------------------------------------------------------------------------------------


def test_brief_pages_cannot_be_described() -> None:
    with pytest.raises(ValidationError, match="obfuscate: brief pages lack the words"):
        SearchConfig(style="brief", obfuscate=1)


def test_a_tiny_model_can_read_and_say_all_of_it() -> None:
    """Conversations are short, and every word is a token of its own in a vocabulary of this world alone."""
    world = _world(**TINY)
    shown = [(t, asyncio.run(world.act_out(t, GOOD, Random(0)))) for t in world.tasks("demo", 400, 0)]
    tools = asyncio.run(world.open(shown[0][0])).tools
    texts = [
        "\n".join([*map(tool_line, tools), *(m.content for m in (*task.prompt, *rest)), *_called(rest)])
        for task, rest in shown
    ]
    tokenizer = train_tokenizer(texts, 320)
    chat = Chat(tokenizer)
    lengths = [len(s) for s in (_ids(chat, task, rest, tools) for task, rest in shown)]
    said = {w for text in texts for w in re.findall("[A-Za-z]+", text)}
    print(f"{len(tokenizer)} tokens, {len(said)} words, longest conversation {max(lengths)} tokens")
    assert max(lengths) < 350
    assert all(len(tokenizer.encode(w, add_special_tokens=False)) == 1 for w in said)
    assert said - _house() == set(re.findall("[a-z]+", ADDED))
    assert len(SPECIAL) < len(tokenizer) <= 320


def _called(rest: list[Message]) -> list[str]:
    return [f"{c.name} {k} {v}" for m in rest for c in m.tool_calls for k, v in c.arguments.items()]


def _ids(chat: Chat, task: Task, rest: list[Message], tools: Any) -> list[int]:
    return [i for s in chat.segments(task.prompt, rest, tools, task.thinking) for i in s.ids]


def _house() -> set[str]:
    return {*words.NAMES, *words.THINGS, *words.CITIES, *words.ORDERS, *words.HARMLESS}
