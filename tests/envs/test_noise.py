"""Noise leaves every task solvable and every grade as it was."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from envs import noise, words
from envs.noise import (
    AGAIN,
    CUT,
    MAX_LEVEL,
    NOTE,
    InstructionKind,
    Noise,
    NoiseConfig,
    NoisySession,
    ToolKind,
    noise_of,
    noisy_prompt,
)
from envs.worlds import make_world
from envs.worlds.base import GOOD, Script, ScriptedWorld, play, user
from envs.worlds.chains import ChainsConfig
from envs.worlds.code import CodeConfig
from envs.worlds.desk import DeskConfig
from envs.worlds.facts import FactsConfig
from envs.worlds.requests import RequestsConfig
from envs.worlds.rules import RulesConfig
from envs.worlds.search import Search, SearchConfig
from envs.worlds.work import WorkConfig
from posttrain.errors import SandboxError, ToolError
from posttrain.protocols import Session
from posttrain.types import Limits, Message, Task, Tool, ToolCall
from rewards.repetition import repeated_calls

INSTRUCTION: tuple[InstructionKind, ...] = ("ambiguity", "redundancy", "topic_shift", "typos")
TOOL: tuple[ToolKind, ...] = ("failure", "incomplete", "wording", "redundancy")
KINDS = ("chains", "code", "desk", "facts", "requests", "rules", "search", "tiny search", "work")


def world_of(kind: str) -> ScriptedWorld:
    match kind:
        case "search":
            return Search(SearchConfig(pages=300))
        case "tiny search":
            return Search(SearchConfig(pages=100, style="brief", obfuscate=0, snippet=0, results=3))
    configs = (ChainsConfig(), CodeConfig(), DeskConfig(), FactsConfig(), RequestsConfig(), RulesConfig(), WorkConfig())
    world = make_world(next(c for c in configs if c.type == kind), kind)
    assert isinstance(world, ScriptedWorld)
    return world


def persistent(script: Script) -> Script:
    """``script`` by somebody who does what noise says: tries a failed call again, asks for what was cut, and passes
    over what is beside the point."""
    turn = next(script)
    while True:
        heard = yield turn
        if turn.tool_calls:
            for _ in range(3):
                if heard.content.endswith(CUT) or (heard.content.startswith("error") and "again" in heard.content):
                    heard = yield turn
            lines = [line for line in heard.content.split("\n") if not line.startswith(NOTE)]
            heard = replace(heard, content=re.sub("^error[^:]*: ", "error: ", "\n".join(lines)))
        try:
            turn = script.send(heard)
        except StopIteration:
            return


async def act_out(world: ScriptedWorld, task: Task, habit: str, some: Noise, seed: int) -> tuple[list[Message], float]:
    noisy = noisy_prompt(task, some)
    session = NoisySession(await world.open(noisy), noisy, some)
    try:
        messages = await play(session, persistent(world.script(noisy, habit, Random(seed))))
        return messages, await session.grade([*noisy.prompt, *messages])
    finally:
        await session.close()


def drawn(level: int, i: int) -> Noise:
    some = noise_of(NoiseConfig(share=1.0), level, i, 8, seed=level)
    assert some is not None
    return some


# solvable -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("level", range(1, MAX_LEVEL + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_who_tries_again_solves_all(kind: str, level: int, always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the turns there are, and without a call so often that it is taken for a loop (four times)."""
    world = world_of(kind)
    if always:
        monkeypatch.setattr(noise, "CHANCE", (0.0, 1.0, 1.0, 1.0))

    async def run() -> None:
        for i, task in enumerate(world.tasks("train", 8, 0)):
            some = (
                drawn(level, i) if not always else Noise(level=level, seed=f"{i}", instruction=INSTRUCTION, tool=TOOL)
            )
            messages, grade = await act_out(world, task, GOOD, some, i)
            assert grade == 1.0
            mine = [m for m in messages if m.role == "assistant"]
            assert len(mine) <= noisy_prompt(task, some).limits.max_turns
            calls = [c for m in mine for c in m.tool_calls]
            assert all(calls.count(c) < 4 for c in calls)
            assert repeated_calls(messages) == 0.0, "trying again is charged to nobody"

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_bad_habits_fail_behind_noise_too(kind: str) -> None:
    world = world_of(kind)

    async def run() -> None:
        for i, task in enumerate(world.tasks("demo", 6, 0)):
            for habit in world.bad_habits(task):
                assert (await act_out(world, task, habit, drawn(3, i), i))[1] == 0.0, habit

    asyncio.run(run())


def test_without_trying_again_noise_costs_something() -> None:
    """Else it would be no noise: the script alone does not know what a cut answer is."""
    world = world_of("search")

    async def run() -> float:
        total = 0.0
        for i, task in enumerate(world.tasks("train", 20, 0)):
            some = replace(drawn(3, i % 8), tool=("failure", "incomplete"))
            session = NoisySession(await world.open(task), task, some)
            messages = await play(session, world.script(task, GOOD, Random(i)))
            total += await session.grade([*task.prompt, *messages])
        return total / 20

    assert asyncio.run(run()) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_noise_repeats_under_its_seed(kind: str) -> None:
    world = world_of(kind)
    task = world.tasks("train", 1, 0)[0]

    async def run() -> None:
        for i in range(4):
            assert noisy_prompt(task, drawn(3, i)) == noisy_prompt(task, drawn(3, i))
            assert await act_out(world, task, GOOD, drawn(3, i), 0) == await act_out(world, task, GOOD, drawn(3, i), 0)

    asyncio.run(run())


# instructions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", INSTRUCTION)
def test_the_request_stays_at_the_end_with_all_its_values(
    kind: str, of: InstructionKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "CHANCE", (0.0, 1.0, 1.0, 1.0))
    changed = 0
    for i, task in enumerate(world_of(kind).tasks("train", 30, 0)):
        noisy = noisy_prompt(task, Noise(level=3, seed=f"{i}", instruction=(of,), tool=()))
        assert noisy.prompt[:-1] == task.prompt[:-1] and noisy.prompt[-1].role == "user"
        before, after = task.prompt[-1].content, noisy.prompt[-1].content
        changed += before != after
        if of == "typos":
            assert sorted(after) == sorted(before)
            for old, new in zip(before.split(" "), after.split(" "), strict=True):
                assert old == new or not set(re.findall("[a-z]+", old)) & {*values(task)}, "a value was changed"
        else:
            assert after.endswith(f" {before}") and len(after) > len(before) + 10
    unspelt = of == "typos" and kind in ("chains", "code", "desk", "facts", "work")  # values are all that they have
    assert (changed == 0) == unspelt


def values(task: Task) -> list[str]:
    data = {k: v for k, v in task.data.items() if k != "key"}
    return re.findall("[a-z]+", json.dumps(data).lower())


def test_which_words_are_misspelt() -> None:
    def misspelt(kind: str) -> set[str]:
        found: set[str] = set()
        for i, task in enumerate(world_of(kind).tasks("train", 200, 0)):
            noisy = noise._misspelt(task.prompt[-1].content, task, 3, Random(i))
            pairs = zip(task.prompt[-1].content.split(" "), noisy.split(" "), strict=True)
            found |= {old for old, new in pairs if old != new}
        return found

    assert {kind: misspelt(kind) for kind in KINDS if "search" not in kind} == {
        "chains": set(),
        "code": set(),
        "desk": set(),
        "facts": set(),
        "requests": {"please", *words.CITIES},  # for whom or where changes nothing
        "rules": {"list", "name", "with"},
        "work": set(),
    }
    assert {"known", "trees"} <= misspelt("search")


def test_noise_speaks_no_word_that_is_a_value() -> None:
    told = [*noise._NOTES, *noise._AGAIN_WORDINGS, *noise._ERROR_WORDINGS, CUT]
    told += [text for texts in noise._PREFACES.values() for text in texts]
    said = {w for text in told for w in re.findall("[a-z]+", text)}
    lists = (words.THINGS, words.NAMES, words.CITIES, words.ORDERS, words.ITEMS, words.HARMLESS, words.HARMFUL)
    assert not said & {w for some in lists for w in some}
    assert not re.search("[0-9]", "".join(told))


def test_later_words_of_the_user_are_noisy_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "CHANCE", (0.0, 1.0, 1.0, 1.0))
    task, some = toy_task(), Noise(level=1, seed="s", instruction=("redundancy",), tool=())
    said = asyncio.run(NoisySession(Toy(), task, some).reply(Message(role="assistant", content="x")))
    assert said is not None and said.role == "user"
    assert said.content.endswith(" and now this") and said.content != " and now this"


def test_turns_that_noise_may_cost_are_given_back() -> None:
    task = toy_task()
    for level in range(1, MAX_LEVEL + 1):
        costs: dict[tuple[ToolKind, ...], int] = {(): 0, ("wording", "redundancy"): 0, ("failure",): 2 * level}
        for kinds, extra in costs.items():
            noisy = noisy_prompt(task, Noise(level=level, seed="s", instruction=(), tool=kinds))
            assert noisy.limits == replace(task.limits, max_turns=task.limits.max_turns + extra)
            assert noisy.data == task.data
    once = replace(task, limits=Limits(max_turns=1))
    assert noisy_prompt(once, drawn(3, 0)).limits == once.limits, "no second chance where there are no tools"


# tools ----------------------------------------------------------------------------------------------------------------


@dataclass
class Toy:
    """A session that counts what it does."""

    done: list[str] = field(default_factory=list)
    closed: int = 0
    graded: list[Message] = field(default_factory=list)
    tools: tuple[Tool, ...] = (Tool(name="put", description="", parameters={"what": "string"}),)

    async def call(self, call: ToolCall) -> str:
        if call.name != "put" or set(call.arguments) != {"what"}:
            raise ToolError("error: the toy's own words")
        what = str(call.arguments["what"])
        self.done.append(what)
        if what == "bad":
            raise ToolError("error: no room")
        if what == "broken":
            raise SandboxError("gone")
        return f"{what} was put on\nthe shelf, number {len(self.done)}"

    async def reply(self, message: Message) -> Message | None:
        return user("and now this")

    async def grade(self, messages: Sequence[Message]) -> float:
        self.graded = list(messages)
        return 0.5

    async def close(self) -> None:
        self.closed += 1


def toy_task() -> Task:
    return Task(id="x", domain="agent", world="toy", prompt=(user("put it"),), limits=Limits(max_turns=4))


def behind(*kinds: ToolKind, level: int = 3) -> tuple[Toy, NoisySession]:
    toy = Toy()
    return toy, NoisySession(toy, toy_task(), Noise(level=level, seed="s", instruction=(), tool=kinds))


def put(session: Session, what: str, name: str = "put", key: str = "what") -> str:
    try:
        return asyncio.run(session.call(ToolCall(name=name, arguments={key: what})))
    except ToolError as error:
        return str(error)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "CHANCE", (0.0, 1.0, 1.0, 1.0))


@pytest.mark.usefixtures("always")
def test_a_failed_call_was_not_made() -> None:
    toy, session = behind("failure")
    assert isinstance(session, Session)
    answer = asyncio.run(session.call(ToolCall(name="put", arguments={"what": "a"})))
    assert answer == AGAIN and toy.done == [], "said, not raised: rewards count what is raised as the agent's error"
    assert put(session, "a") == "a was put on\nthe shelf, number 1"
    assert put(session, "a") == "a was put on\nthe shelf, number 2", "not more than once a call"
    assert put(session, "b") == AGAIN and toy.done == ["a", "a"]


@pytest.mark.usefixtures("always")
def test_a_cut_result_is_whole_when_asked_for_again_and_the_call_is_not_made_twice() -> None:
    toy, session = behind("incomplete")
    assert put(session, "a") == "a was put on" + CUT and toy.done == ["a"]
    assert put(session, "a") == "a was put on\nthe shelf, number 1" and toy.done == ["a"]
    assert put(session, "a") == "a was put on\nthe shelf, number 2" and toy.done == ["a", "a"]
    assert put(session, "b") == "b was put on" + CUT
    assert put(session, "c") == "c was put on" + CUT
    assert put(session, "b").endswith("number 5"), "another call came between: what was kept may have changed"


@pytest.mark.usefixtures("always")
def test_a_call_fails_or_is_cut_but_not_both() -> None:
    toy, session = behind("failure", "incomplete")
    assert [put(session, "a"), put(session, "a")] == [AGAIN, "a was put on\nthe shelf, number 1"]
    assert toy.done == ["a"]


@pytest.mark.usefixtures("always")
def test_no_more_turns_are_lost_than_were_added() -> None:
    for level in (1, 2, 3):
        toy, session = behind("failure", level=level)
        answers = [put(session, str(i)) for i in range(20)]
        assert answers.count(AGAIN) == 2 * level and len(toy.done) == 20 - 2 * level


@pytest.mark.usefixtures("always")
def test_a_call_that_cannot_be_right_is_answered_by_the_session() -> None:
    _, session = behind("failure", "incomplete", "wording")
    assert put(session, "a", name="nothing") == "error: the toy's own words"
    assert put(session, "a", key="where") == "error: the toy's own words"


@pytest.mark.usefixtures("always")
def test_errors_keep_what_they_say() -> None:
    _, session = behind("wording")
    for _ in range(10):
        text = put(session, "bad")
        assert text.startswith("error") and text.endswith(": no room")
    texts = {put(behind("wording", "failure")[1], str(i)) for i in range(20)}
    assert len(texts) == 3 and all(t.startswith("error") and "again" in t for t in texts)


@pytest.mark.usefixtures("always")
def test_lines_beside_the_point_are_marked() -> None:
    _, session = behind("redundancy")
    seen: set[int] = set()
    for i in range(20):
        lines = put(session, "a").split("\n")
        at = next(n for n, line in enumerate(lines) if line.startswith(NOTE))
        del lines[at]
        assert "\n".join(lines) == f"a was put on\nthe shelf, number {i + 1}"
        seen.add(at)
    assert seen == {0, 2}, "before and after"


@pytest.mark.usefixtures("always")
def test_infrastructure_is_not_noise() -> None:
    toy, session = behind("wording", "redundancy")
    with pytest.raises(SandboxError, match="gone"):
        put(session, "broken")
    messages = [Message(role="assistant", content="x")]
    assert asyncio.run(session.grade(messages)) == 0.5 and toy.graded == messages
    asyncio.run(session.close())
    assert toy.closed == 1 and session.tools == toy.tools
