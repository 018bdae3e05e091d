"""One episode with an engine that reads from a script and a world small enough to see through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any

import pytest

from envs.episode import run_episode, transcript
from posttrain.chat import Chat, train_tokenizer
from posttrain.errors import EngineError, RewardError, SandboxError, ToolError
from posttrain.markup.longcat import CALL, END_CALL, END_KEY, END_VALUE, EOS, KEY, VALUE
from posttrain.types import (
    Choices,
    Completion,
    Culprit,
    Limits,
    Message,
    Rollout,
    Sampling,
    Score,
    StopReason,
    Task,
    Tool,
    ToolCall,
    Weights,
)

ADD = Tool(name="add", description="adds", parameters={"what": "string"})
CALL_ADD = f"{CALL}add\n{KEY}what{END_KEY}\n{VALUE}x{END_VALUE}\n{END_CALL}{EOS}"
LIMITS = Limits(max_turns=5, max_tokens=20, timeout_s=10.0)


@cache
def chat() -> Chat:
    return Chat(train_tokenizer(["add what done say more go error no such thing"] * 3, 256))


def call(what: str) -> str:
    return CALL_ADD.replace("x", what)


def ids_of(text: str) -> tuple[int, ...]:
    """Markup in ``text`` as the model would sample it."""
    return tuple(chat().tokenizer.encode(text, add_special_tokens=False))


@dataclass
class Script:
    """An engine that says these texts one after the other, or raises, or runs a function."""

    turns: Sequence[str | Exception | Callable[[], Any]]
    given: list[tuple[int, ...]] = field(default_factory=list)
    sampling: list[Sampling] = field(default_factory=list)
    records: bool = False

    async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        turn = self.turns[len(self.given)]
        self.given.append(tuple(ids))
        self.sampling.append(sampling)
        if isinstance(turn, Exception):
            raise turn
        if not isinstance(turn, str):
            await turn()
            raise AssertionError("never comes here")
        said, n = ids_of(turn), len(self.given)
        stop = "stop" if turn.endswith(EOS) else "length"
        read = len(ids) + len(said) - 1
        choices = Choices(slots=bytes(2 * read), slot_shape=(1, 1)) if self.records else None
        logprobs, versions = (-0.5 * n,) * len(said), (n,) * len(said)
        return Completion(ids=said, logprobs=logprobs, versions=versions, finish=stop, choices=choices)

    async def load(self, weights: Weights, keep: Collection[int] = ()) -> None: ...

    async def close(self) -> None: ...


@dataclass
class Toy:
    """World and session in one. ``raises`` names the method that fails and with what."""

    replies: Sequence[str] = ()
    raises: dict[str, Exception] = field(default_factory=dict)
    hangs: str = ""
    name: str = "toy"
    domain: str = "agent"
    tools: tuple[Tool, ...] = (ADD,)
    calls: list[ToolCall] = field(default_factory=list)
    heard: list[Message] = field(default_factory=list)
    graded: list[list[Message]] = field(default_factory=list)
    opened: int = 0
    closed: int = 0

    async def _at(self, where: str) -> None:
        if where == self.hangs:
            await asyncio.sleep(60)
        if where in self.raises:
            raise self.raises[where]

    async def open(self, task: Task) -> Toy:
        await self._at("open")
        self.opened += 1
        return self

    async def call(self, call: ToolCall) -> str:
        self.calls.append(call)
        await self._at("call")
        return f"added {call.arguments['what']}"

    async def reply(self, message: Message) -> Message | None:
        await self._at("reply")
        self.heard.append(message)
        if len(self.heard) > len(self.replies):
            return None
        return Message(role="user", content=self.replies[len(self.heard) - 1])

    async def grade(self, messages: Sequence[Message]) -> float:
        assert self.closed == 0, "graded while the session is open"
        await self._at("grade")
        self.graded.append(list(messages))
        return 0.75

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.closed += 1
        await self._at("close")

    def tasks(self, split: str, n: int, seed: int) -> list[Task]:
        return []

    async def demonstrate(self, task: Task, rng: Random) -> list[Message]:
        return []

    async def check(self) -> dict[str, float]:
        return {}


def task(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "id": "t/0", "domain": "agent", "world": "toy", "thinking": False, "limits": LIMITS,
        "prompt": (Message(role="user", content="go"),),
    }  # fmt: skip
    return Task(**fields | changes)


def score(rollout: Rollout, outcome: float) -> Score:
    return Score(value=outcome / 3, outcome=outcome)


def play(
    engine: Script, world: Toy, task_: Task | None = None, scorer: Any = score, seed: int = 7, **more: Any
) -> Rollout:
    fixed: dict[str, Any] = {"rollout_id": "s/1/2", "group": "s/1", "seed": seed, "temperature": 0.5}
    done = asyncio.run(run_episode(engine, world, chat(), scorer, task_ or task(), **fixed, **more))
    assert world.closed == world.opened, "whatever is opened is closed, once"
    return done


# How it ends


def test_scored() -> None:
    world = Toy()
    rollout = play(Script([call("what"), f"done{EOS}"]), world)
    assert (rollout.stop, rollout.error, rollout.valid) == (StopReason.SCORED, None, True)
    assert rollout.score == Score(value=0.25, outcome=0.75)
    assert (rollout.id, rollout.group, rollout.task) == ("s/1/2", "s/1", task())
    assert world.calls == [ToolCall(name="add", arguments={"what": "what"})]
    assert [(m.role, m.content) for m in rollout.messages] == [
        ("user", "go"), ("assistant", ""), ("tool", "added what"), ("assistant", "done"),
    ]  # fmt: skip
    assert world.graded == [list(rollout.messages)]
    assert (rollout.parse_errors, rollout.tool_errors) == ((), 0)
    assert 0 < rollout.wall_s < 10


def test_the_user_goes_on_until_there_is_nothing_to_say() -> None:
    rollout = play(Script([f"no{EOS}", f"say{EOS}", f"done{EOS}"]), Toy(replies=("more", "more go")))
    assert rollout.stop is StopReason.SCORED
    assert [m.content for m in rollout.messages] == ["go", "no", "more", "say", "more go", "done"]


def test_the_last_turn_alone_keeps_what_the_model_chose() -> None:
    """It covers the whole branch but the last token, which the model has not read."""
    rollout = play(Script([f"no{EOS}", f"say{EOS}", f"done{EOS}"], records=True), Toy(replies=("more", "more go")))
    (branch,) = rollout.branches
    *before, last = branch
    assert last.choices is not None and last.choices.positions == sum(len(s.ids) for s in branch) - 1
    assert [s.choices for s in before] == [None] * 5


def test_out_of_turns_is_the_agent_s_own_doing() -> None:
    engine = Script([call("what"), call("go"), call("no")])
    rollout = play(engine, Toy(), task(limits=replace(LIMITS, max_turns=3)))
    assert (rollout.stop, rollout.valid) == (StopReason.AGENT_TIMEOUT, True)
    assert len(engine.given) == 3
    assert rollout.branches[0][-1].sampled[-1], "nothing is appended that nobody will answer"


def test_out_of_wall_clock_is_scored_with_what_there_is() -> None:
    world = Toy(hangs="call")
    rollout = play(Script([call("what")]), world, task(limits=replace(LIMITS, timeout_s=0.05)))
    assert (rollout.stop, rollout.valid) == (StopReason.AGENT_TIMEOUT, True)
    assert rollout.sampled_tokens == len(ids_of(call("what")))
    assert rollout.wall_s < 5


def test_the_same_call_four_times_is_a_loop() -> None:
    world = Toy()
    rollout = play(Script([call("what"), call("go"), call("what"), call("what"), call("what")]), world)
    assert (rollout.stop, rollout.valid) == (StopReason.LOOP, True)
    assert len(world.calls) == 5


def test_an_answer_cut_by_the_limit_is_an_overflow() -> None:
    rollout = play(Script([call("what"), "say more"]), Toy())
    assert (rollout.stop, rollout.valid) == (StopReason.CONTEXT_OVERFLOW, True)
    assert rollout.parse_errors == ("unfinished",)
    assert rollout.messages[-1].content == "say more"


def test_no_room_for_another_answer_is_an_overflow() -> None:
    rollout = play(Script([call("what"), ""]), Toy())
    assert (rollout.stop, rollout.valid) == (StopReason.CONTEXT_OVERFLOW, True)
    assert rollout.messages[-1].role == "tool"


def test_the_engine_s_time_is_not_the_episode_s() -> None:
    """Each answer takes longer than the whole episode may: new weights, other requests, a new server."""

    class Slow(Script):
        async def generate(self, ids: Sequence[int], sampling: Sampling) -> Completion:
            await asyncio.sleep(0.6)
            return await super().generate(ids, sampling)

    rollout = play(Slow([call("what"), f"done{EOS}"]), Toy(), task(limits=replace(LIMITS, timeout_s=0.5)))
    assert (rollout.stop, rollout.valid, len(rollout.messages)) == (StopReason.SCORED, True, 4)


def test_time_of_tools_adds_up_over_the_turns() -> None:
    """Three calls of 0.4 s in an episode of 1 s: the third does not end."""

    class Slow(Toy):
        async def call(self, call: ToolCall) -> str:
            await asyncio.sleep(0.4)
            return await super().call(call)

    world = Slow()
    turns = [call("what"), call("go"), call("no"), f"done{EOS}"]
    rollout = play(Script(turns), world, task(limits=replace(LIMITS, timeout_s=1.0)))
    assert (rollout.stop, rollout.valid) == (StopReason.AGENT_TIMEOUT, True)
    assert len(world.calls) <= 2 and len(world.graded) == 1


def test_an_engine_that_fails_late_is_the_engine_s_fault() -> None:
    async def late() -> None:
        await asyncio.sleep(0.2)
        raise EngineError("waited 0.2 s for a completion")

    world = Toy()
    rollout = play(Script([call("what"), late]), world, task(limits=replace(LIMITS, timeout_s=0.1)))
    assert (rollout.stop, rollout.score) == (StopReason.MODEL_API, None)
    assert rollout.error is not None and rollout.error.culprit is Culprit.ENGINE and world.graded == []


def test_a_session_that_does_not_close_is_left_to_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("envs.episode._CLOSE_S", 0.1)
    rollout = play(Script([call("what"), f"done{EOS}"]), Toy(hangs="close"))
    assert (rollout.stop, rollout.valid) == (StopReason.SCORED, True)
    assert "s/1/2: its session is not closed after 0.1 s and is left to itself" in caplog.text


def test_without_a_sampled_token_there_was_no_model_call() -> None:
    world = Toy()
    rollout = play(Script([""]), world)
    assert (rollout.stop, rollout.score, rollout.valid) == (StopReason.NO_MODEL_CALL, None, False)
    assert world.graded == []


@pytest.mark.parametrize(
    ("where", "error", "stop", "culprit", "text"),
    [
        ("open", SandboxError("no daemon"), StopReason.INFRASTRUCTURE, Culprit.SANDBOX, "no daemon"),
        ("call", SandboxError("it died"), StopReason.INFRASTRUCTURE, Culprit.SANDBOX, "it died"),
        ("open", KeyError("seed"), StopReason.INFRASTRUCTURE, Culprit.WORLD, "KeyError: 'seed'"),
        ("call", OSError("disk"), StopReason.INFRASTRUCTURE, Culprit.WORLD, "OSError: disk"),
        ("call", TimeoutError("slow"), StopReason.INFRASTRUCTURE, Culprit.WORLD, "TimeoutError: slow"),
        ("reply", ValueError("lost"), StopReason.INFRASTRUCTURE, Culprit.WORLD, "ValueError: lost"),
        ("grade", ZeroDivisionError("0/0"), StopReason.VERIFIER_ERROR, Culprit.REWARD, "ZeroDivisionError: 0/0"),
        ("open", ToolError("huh"), StopReason.INFRASTRUCTURE, Culprit.WORLD, "ToolError: huh"),
        ("grade", ToolError("huh"), StopReason.INFRASTRUCTURE, Culprit.WORLD, "ToolError: huh"),
        ("grade", SandboxError("it died"), StopReason.INFRASTRUCTURE, Culprit.SANDBOX, "it died"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__ if isinstance(v, Exception) else None,
)
def test_what_breaks_names_its_culprit_and_has_no_score(
    where: str, error: Exception, stop: StopReason, culprit: Culprit, text: str
) -> None:
    rollout = play(Script([call("what"), f"done{EOS}"]), Toy(raises={where: error}))
    assert (rollout.stop, rollout.score, rollout.valid) == (stop, None, False)
    assert rollout.error is not None
    assert (rollout.error.culprit, rollout.error.message) == (culprit, text)
    assert text not in [m.content for m in rollout.messages], "infrastructure is never text for the model"


def test_the_engine_breaks_in_the_second_turn() -> None:
    rollout = play(Script([call("what"), EngineError("died")]), Toy())
    assert (rollout.stop, rollout.score) == (StopReason.MODEL_API, None)
    assert rollout.error is not None and rollout.error.culprit is Culprit.ENGINE
    assert rollout.sampled_tokens == len(ids_of(call("what"))), "what was sampled is kept, for people"


def test_a_reward_that_raises_is_the_verifier_s_error() -> None:
    def broken(rollout: Rollout, outcome: float) -> Score:
        raise RewardError("not a number")

    rollout = play(Script([f"done{EOS}"]), Toy(), scorer=broken)
    assert (rollout.stop, rollout.score) == (StopReason.VERIFIER_ERROR, None)


def test_a_score_that_says_invalid_is_kept_and_not_valid() -> None:
    rollout = play(Script([f"done{EOS}"]), Toy(), scorer=lambda r, o: Score(value=0.0, valid=False))
    assert rollout.stop is StopReason.SCORED and rollout.score is not None and not rollout.valid


def test_a_session_that_cannot_be_closed_does_not_spoil_the_rollout(caplog: pytest.LogCaptureFixture) -> None:
    for error in (SandboxError("already gone"), OSError("already gone")):
        rollout = play(Script([f"done{EOS}"]), Toy(raises={"close": error}))
        assert rollout.stop is StopReason.SCORED and rollout.valid
    assert len([r for r in caplog.records if "s/1/2" in r.message and "already gone" in r.message]) == 2


@pytest.mark.parametrize("where", ["generate", "call", "reply", "grade"])
def test_cancelled_anywhere_it_closes_the_session(where: str) -> None:
    first = lambda: asyncio.sleep(60)  # noqa: E731
    engine = Script([first if where == "generate" else call("what"), f"done{EOS}"])
    world = Toy(hangs=where)

    async def main() -> None:
        episode = asyncio.create_task(
            run_episode(engine, world, chat(), score, task(), rollout_id="a/0/0", group="a/0", seed=0)
        )
        await asyncio.sleep(0.02)
        episode.cancel()
        with pytest.raises(asyncio.CancelledError):
            await episode

    asyncio.run(main())
    assert (world.opened, world.closed, world.graded) == (1, 1, [])


# What the model reads


@pytest.mark.parametrize(("text", "read"), [("no such thing", "error: no such thing"), ("error: no", "error: no")])
def test_a_tool_error_is_text_for_the_model(text: str, read: str) -> None:
    engine = Script([call("what"), f"done{EOS}"])
    rollout = play(engine, Toy(raises={"call": ToolError(text)}))
    assert rollout.stop is StopReason.SCORED and rollout.tool_errors == 1
    assert rollout.messages[2] == Message(role="tool", content=read)
    assert read in chat().decode(engine.given[1])


@pytest.mark.parametrize(
    ("said", "name"),
    [(f"{CALL}add{EOS}", "open_call"), (f"{CALL}\n{END_CALL}{EOS}", "bad_call"), (f"say{END_CALL}{EOS}", "bad_call")],
)
def test_a_malformed_call_becomes_an_observation(said: str, name: str) -> None:
    engine, world = Script([said, f"done{EOS}"]), Toy()
    rollout = play(engine, world)
    assert rollout.stop is StopReason.SCORED and rollout.parse_errors == (name,)
    assert rollout.messages[1] == Message(role="assistant", content=said)
    assert rollout.messages[2] == Message(role="tool", content=f"error: {name}")
    assert chat().decode(engine.given[1]).count(f"error: {name}") == 1
    assert world.calls == []


@pytest.mark.parametrize("thinking", [False, True])
def test_tokens_in_are_tokens_out(thinking: bool) -> None:
    """At every turn the engine is given exactly what was given before, what it said, and what was added."""
    think = "say</longcat_think>" if thinking else ""
    said = [think + call("what"), f"{think}{CALL}add{EOS}", f"{think}no{EOS}", f"{think}done{EOS}"]
    engine = Script(said)
    rollout = play(engine, Toy(replies=("more",)), task(thinking=thinking))
    (segments,) = rollout.branches
    assert rollout.stop is StopReason.SCORED and len(segments) == 8
    context: list[int] = []
    for turn, (given, spoken) in enumerate(zip(segments[::2], segments[1::2], strict=True)):
        context += given.ids
        assert engine.given[turn] == tuple(context)
        assert spoken.ids == ids_of(said[turn])
        n = len(spoken.ids)
        assert (spoken.sampled, spoken.logprobs) == ((True,) * n, (-0.5 * (turn + 1),) * n)
        assert spoken.versions == (turn + 1,) * n
        assert not any(given.sampled) and set(given.versions) == {-1} and not any(given.logprobs)
        context += spoken.ids
    assert context[: len(segments[0].ids)] == list(chat().opening(task().prompt, (ADD,), thinking))
    assert rollout.oldest_version == 1
    assert [(s.seed, s.temperature, s.max_tokens, s.stop_ids) for s in engine.sampling] == [
        (7 + t, 0.5, 20, chat().stop_ids) for t in range(4)
    ]


def test_two_calls_in_one_turn_are_answered_in_order() -> None:
    both = call("what").removesuffix(EOS) + call("go")
    rollout = play(Script([both, f"done{EOS}"]), Toy())
    assert [m.content for m in rollout.messages[2:4]] == ["added what", "added go"]


def test_transcript_is_for_reading() -> None:
    messages = [
        Message(role="user", content="go"),
        Message(role="assistant", content="", thinking="hm", tool_calls=(ToolCall(name="add", arguments={"a": 1}),)),
        Message(role="tool", content="added"),
    ]
    assert transcript(messages) == "[user] go\n[thinks] hm\n[calls] add(a=1)\n[tool] added"
