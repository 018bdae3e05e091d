"""One episode: ask, parse, act, append, until the conversation is over; then grade while the session is still open.

A context that is rewritten opens a branch: a token sequence of its own, whose log-probs are those the sampler had.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from envs.context import SUMMARISE, ContextConfig, Rewrite, due, rewritten
from envs.noise import Noise, NoisySession, noisy_prompt
from posttrain.chat import Chat, ParseError
from posttrain.errors import EpisodeError, RewardError, ToolError, WorldError, boundary
from posttrain.protocols import Engine, Session, World
from posttrain.types import (
    Completion,
    Culprit,
    Failure,
    Message,
    Rollout,
    Sampling,
    Score,
    Segment,
    StopReason,
    Task,
    ToolCall,
)
from posttrain.waits import waiting

log = logging.getLogger(__name__)

T = TypeVar("T")
Scorer = Callable[[Rollout, float], Score]

_KEEP = ContextConfig()
_CLOSE_S = 120.0
"""Bound on the end of a session, in seconds."""
_SAME_CALLS = 4
"""The same call this often in one episode is a loop."""
_STOP_OF: dict[Culprit, StopReason] = {
    Culprit.ENGINE: StopReason.MODEL_API,
    Culprit.SANDBOX: StopReason.INFRASTRUCTURE,
    Culprit.WORLD: StopReason.INFRASTRUCTURE,
    Culprit.REWARD: StopReason.VERIFIER_ERROR,
}


@dataclass(slots=True)
class _State:
    branches: list[list[Segment]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    parse_errors: list[str] = field(default_factory=list)
    tool_errors: int = 0
    calls: list[ToolCall] = field(default_factory=list)
    answers: int = 0
    """What the model was asked for, turns and summaries."""
    turns: int = 0
    """Turns of the present branch."""

    @property
    def ids(self) -> list[int]:
        return [i for s in self.branches[-1] for i in s.ids]

    @property
    def sampled(self) -> bool:
        return any(any(s.sampled) for branch in self.branches for s in branch)

    def begin(self, ids: Sequence[int]) -> None:
        """Open a branch with what the model is given."""
        self.branches.append([Segment.given(ids)])
        self.turns = 0

    def add(self, segment: Segment) -> None:
        """Append to the present branch."""
        if segment.choices is not None:  # those of the turns before are among them
            self.branches[-1] = [replace(s, choices=None) for s in self.branches[-1]]
        self.branches[-1].append(segment)


@dataclass(frozen=True, slots=True)
class _Asker:
    """Samples the next tokens of the present branch."""

    engine: Engine
    chat: Chat
    seed: int
    temperature: float
    clock: asyncio.Timeout
    """Of the episode."""

    async def __call__(self, state: _State, max_tokens: int) -> Completion:
        sampling = Sampling(
            temperature=self.temperature,
            max_tokens=max_tokens,
            stop_ids=self.chat.stop_ids,
            seed=self.seed + state.answers,
        )
        state.answers += 1
        with waiting(f"the engine, turn {state.answers}"), _stopped(self.clock):
            completion = await self.engine.generate(state.ids, sampling)
        if completion.ids:
            state.add(Segment.from_completion(completion))
        return completion


@contextmanager
def _stopped(clock: asyncio.Timeout) -> Iterator[None]:
    """The block takes none of the episode's time. How long the engine takes is the doing of its other requests, of new
    weights and of its own health; it has a bound of its own, and what breaks it is no fault of the agent's."""
    now, end = asyncio.get_running_loop().time, clock.when()
    if end is None or clock.expired():  # and whoever was cancelled for it went on
        raise TimeoutError
    left = end - now()
    clock.reschedule(None)
    try:
        yield
    finally:
        clock.reschedule(now() + left)


async def run_episode(
    engine: Engine,
    world: World,
    chat: Chat,
    score: Scorer,
    task: Task,
    *,
    rollout_id: str,
    group: str,
    seed: int,
    temperature: float = 1.0,
    context: ContextConfig = _KEEP,
    noise: Noise | None = None,
) -> Rollout:
    """Play ``task``. Never raises for what happens inside: a failure becomes the rollout's ``error`` and culprit."""
    started, asked = time.monotonic(), task
    if noise is not None:
        task = noisy_prompt(task, noise)
    state = _State(messages=list(task.prompt))
    session: Session | None = None

    def rollout(stop: StopReason, error: Failure | None = None) -> Rollout:
        return Rollout(
            id=rollout_id,
            group=group,
            task=asked,
            branches=tuple(tuple(branch) for branch in state.branches) or ((),),
            messages=tuple(state.messages),
            stop=stop,
            error=error,
            parse_errors=tuple(state.parse_errors),
            tool_errors=state.tool_errors,
            noise=0 if noise is None else noise.level,
            sandbox=getattr(session, "profile", ""),
            wall_s=time.monotonic() - started,
        )

    try:
        with waiting(f"a session of {task.world}"), boundary(Culprit.WORLD):
            session = await _within(task, world.open(task), WorldError, "a session")
        if noise is not None:
            session = NoisySession(session, task, noise)
        try:
            async with asyncio.timeout(task.limits.timeout_s) as clock:
                stop = await _converse(_Asker(engine, chat, seed, temperature, clock), session, task, state, context)
        except TimeoutError:
            stop = StopReason.AGENT_TIMEOUT
        if not state.sampled:
            return rollout(StopReason.NO_MODEL_CALL)
        finished = rollout(stop)
        with waiting(f"the grader of {task.world}"), boundary(Culprit.REWARD):
            outcome = await _within(task, session.grade(state.messages), RewardError, "the grader")
            return replace(finished, score=score(finished, outcome))
    except EpisodeError as error:
        return rollout(_STOP_OF[error.culprit], Failure(culprit=error.culprit, message=str(error)))
    except ToolError as error:  # raised where no tool was called: the world's mistake
        return rollout(StopReason.INFRASTRUCTURE, Failure(culprit=Culprit.WORLD, message=f"ToolError: {error}"))
    finally:
        if session is not None:
            await _close(session, rollout_id)


async def _within(task: Task, awaited: Awaitable[T], error: type[EpisodeError], what: str) -> T:
    """``awaited`` in the episode's time, or ``error``: that is no time-out of the agent's."""
    clock = asyncio.timeout(task.limits.timeout_s)
    try:
        async with clock:
            return await awaited
    except TimeoutError as late:
        if not clock.expired():
            raise
        raise error(f"waited {task.limits.timeout_s:g} s for {what} of {task.world}") from late


async def _close(session: Session, rollout_id: str) -> None:
    """Close, even if the caller is cancelled meanwhile. What the episode came to does not change by a failure here."""
    closing = asyncio.ensure_future(session.close())
    try:
        with waiting("its session to close"), boundary(Culprit.WORLD):
            done, _ = await asyncio.wait({closing}, timeout=_CLOSE_S)
            if done:
                await closing
            else:
                log.warning("%s: its session is not closed after %g s and is left to itself", rollout_id, _CLOSE_S)
    except (EpisodeError, ToolError) as error:
        log.warning("%s: its session could not be closed (%s: %s)", rollout_id, error.__class__.__name__, error)


async def _converse(ask: _Asker, session: Session, task: Task, state: _State, context: ContextConfig) -> StopReason:
    chat = ask.chat
    state.begin(chat.opening(task.prompt, session.tools, task.thinking))
    for turn in range(task.limits.max_turns):
        completion = await ask(state, task.limits.max_tokens)
        if not completion.ids:
            return StopReason.CONTEXT_OVERFLOW
        state.turns += 1
        try:
            message = chat.parse(completion.ids, session.tools, task.thinking)
        except ParseError as error:
            state.parse_errors.append(error.name)
            state.messages.append(Message(role="assistant", content=chat.decode(completion.ids)))
            if error.name == "unfinished":
                return StopReason.CONTEXT_OVERFLOW
            added = [Message(role="tool", content=f"error: {error.name}")]
        else:
            state.messages.append(message)
            if message.tool_calls:
                added = [await _act(session, call, state) for call in message.tool_calls]
            else:
                with waiting("the user"), boundary(Culprit.WORLD):
                    reply = await session.reply(message)
                if reply is None:
                    return StopReason.SCORED
                added = [reply]
        state.messages += added
        if any(state.calls.count(c) >= _SAME_CALLS for c in state.calls[-1:]):
            return StopReason.LOOP
        if turn + 1 < task.limits.max_turns and not await _go_on(ask, session, task, state, context, added):
            return StopReason.CONTEXT_OVERFLOW
    return StopReason.AGENT_TIMEOUT


async def _go_on(
    ask: _Asker, session: Session, task: Task, state: _State, context: ContextConfig, added: list[Message]
) -> bool:
    """Append what followed the turn, or rewrite the context; False if there is no room for a summary."""
    given = ask.chat.addition(added, task.thinking)
    tokens = len(state.ids) + len(given)
    rewrite = due(context, tokens=tokens, turns=state.turns, rewrites=len(state.branches) - 1)
    if rewrite is None:
        state.add(Segment.given(given))
        return True
    summary = None
    if rewrite is Rewrite.SUMMARISE:
        state.add(Segment.given(ask.chat.addition([*added, SUMMARISE], False)))
        completion = await ask(state, context.summary_tokens)
        if not completion.ids:
            return False
        summary = ask.chat.plain(completion.ids)
    messages = rewritten(task, summary)
    # For people and rewards: what was said stays, then what the model was left with.
    state.messages += messages[len(task.prompt) :]
    state.begin(ask.chat.opening(messages, session.tools, task.thinking))
    return True


async def _act(session: Session, call: ToolCall, state: _State) -> Message:
    state.calls.append(call)
    try:
        with waiting(f"the tool {call.name}, turn {state.answers}"), boundary(Culprit.WORLD):
            return Message(role="tool", content=await session.call(call))
    except ToolError as error:
        state.tool_errors += 1
        text = str(error)
        return Message(role="tool", content=text if text.startswith("error") else f"error: {text}")


def transcript(messages: Sequence[Message]) -> str:
    """A conversation for people to read."""
    lines: list[str] = []
    for message in messages:
        if message.thinking:
            lines.append(f"[thinks] {message.thinking}")
        if message.content:
            lines.append(f"[{message.role}] {message.content}")
        for call in message.tool_calls:
            arguments = ", ".join(f"{k}={v!r}" for k, v in call.arguments.items())
            lines.append(f"[calls] {call.name}({arguments})")
    return "\n".join(lines)
