"""Work: serve a request over a generated API environment. Twenty domains, twenty tools or more, one database each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from envs.work.chain import Found, Step, Steps, Told, from_json, known, run, to_json
from envs.work.corruptions import other_value
from envs.work.database import Database, State
from envs.work.domain import DOMAINS, load_domain
from envs.work.generate import Environment, Size, environment
from envs.work.model_user import ModelUser
from envs.work.users import ModelUserConfig, ScriptedUser, ScriptedUserConfig, UserConfig, compose, vocabulary
from envs.worlds.base import GOOD, Draft, Script, ScriptedWorld, WorldOptions, arguments, say, user
from posttrain.types import Limits, Message, Task, Tool, ToolCall

DONE = "done"


class WorkConfig(WorldOptions):
    """Options of the work world."""

    type: Literal["work"] = "work"
    domains: tuple[str, ...] = Field(default=DOMAINS, min_length=1)
    """Which domains; each is a file in ``envs/work/domains``."""
    tools: int = Field(default=20, ge=1, le=40)
    """The least number of tools offered; those of the chain are always among them."""
    chain: int = Field(default=5, ge=1, le=12)
    """The least number of calls that a request takes; it may take two more."""
    rows: int = Field(default=6, ge=3, le=10)
    """Rows a table. Fewer rows speak fewer words."""
    further: float = Field(default=0.3, ge=0.0, lt=1.0)
    """How likely a chain of tools that the request does not need joins the others, and after it another one."""
    user: UserConfig = ScriptedUserConfig()
    """Who asks."""

    @field_validator("domains")
    @classmethod
    def _known(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        for name in domains:
            if name not in DOMAINS:
                raise ValueError(f"no domain {name!r}: choose of {', '.join(DOMAINS)}")
        return domains


class WorkSession:
    """A database of one's own and a user. Grades on the state that is left, whatever led to it."""

    def __init__(self, data: Mapping[str, Any], speaker: ModelUser | None = None) -> None:
        self._operations = load_domain(data["domain"]).operations
        self.tools = tuple(_tool(data["domain"], t) for t in data["tools"])
        self._database = Database(data["domain"], data["rows"], data["spare"])
        others = vocabulary(load_domain(data["domain"])) if speaker else frozenset[str]()
        self._user, self._speaker = ScriptedUser(data["parts"], others), speaker
        self._patience_s = speaker.config.engine.timeout_s if speaker else 0.0
        """For the user's model, all its answers together: the agent's time is its own."""
        self._talk = [("you", self._user.parts[0].text)]
        self._wanted = _states(self._database, from_json(data["steps"]), [p["end"] for p in data["parts"]])

    async def call(self, call: ToolCall) -> str:
        """Rows for a tool that reads; ``ok``, or the id of a new row, for one that changes."""
        given = arguments(self.tools, call)
        return self._database.call(self._operations[call.name], given)

    async def reply(self, message: Message) -> Message | None:
        """The user's next words; None when the user leaves, served or not."""
        done = self._database.snapshot() == self._wanted[self._user.part]
        line = self._user.reply(message.content, done)
        if line is None:
            return None
        text = line.text
        if self._speaker is not None:
            self._talk.append(("agent", message.content))
            wanted, began = self._user.parts[self._user.part].text, time.monotonic()
            text = await self._speaker.say(wanted, self._talk, line, self._patience_s)
            self._patience_s -= time.monotonic() - began
            self._talk.append(("you", text))
        return user(text)

    async def grade(self, messages: Sequence[Message]) -> float:
        """1 if the user left content and the database is as the whole request wants it.

        The text of ``messages`` counts for nothing: the session saw itself how the conversation ended.
        """
        return float(self._user.content and self._database.snapshot() == self._wanted[-1])

    async def close(self) -> None:
        """Drop the database; idempotent."""
        self._database.close()


def _tool(domain: str, name: str) -> Tool:
    operation = load_domain(domain).operations[name]
    return Tool(name=name, description=operation.description, parameters=dict.fromkeys(operation.parameters, "string"))


def _states(database: Database, steps: Sequence[Step], ends: Sequence[int]) -> list[State]:
    """What the database holds after each part of the request, if nothing else happens."""
    states: list[State] = []
    answers: list[str] = []
    with database.scratch():
        for end in ends:
            answers = run(database, steps[:end], answers)
            states.append(database.snapshot())
    return states


class Work(ScriptedWorld):
    """``return the loan of member ada`` -> ``find_member(ada)`` -> ``opal`` -> ``list_loan_by_member(opal)`` ->
    ``jade`` -> ``return(jade)`` -> ``ok`` -> ``done``; sometimes the user must be asked, sometimes there is more to do.
    """

    kind: ClassVar[str] = "work"
    domain = "agent"

    def __init__(self, config: WorkConfig, name: str = "work") -> None:
        super().__init__(name, config.habit)
        self.config = config
        self._speaker = ModelUser(config.user) if isinstance(config.user, ModelUserConfig) else None
        # A user's model that is slow or stuck must not use up the agent's time: that would count as the agent's fault.
        waits_s = self._speaker.config.engine.timeout_s if self._speaker else 0.0
        self.limits = Limits(max_turns=2 * config.chain + 8, max_tokens=80, timeout_s=60.0 + waits_s)
        self.size = Size(tools=config.tools, chain=config.chain, rows=config.rows, further=config.further)

    def draft(self, rng: Random) -> Draft:
        """An environment and a request in it. The split hangs on what is said first, all that the model is told."""
        made = environment(rng.choice(self.config.domains), rng.getrandbits(32), self.size)
        return self.describe(made, rng)

    def describe(self, made: Environment, rng: Random) -> Draft:
        """The task that ``made`` poses, with a user whose ways ``rng`` draws."""
        parts = [asdict(p) for p in compose(made.goals, rng, self.config.user)]
        first = parts[0]["text"]
        data = {
            "domain": made.domain,
            "tools": made.tools,
            "rows": made.rows,
            "spare": made.spare,
            "steps": to_json(made.steps),
            "goals": [g.step for g in made.goals],
            "parts": parts,
        }
        asked = sum(bool(p["slot"]) for p in parts)
        return Draft(
            content=repr(data),
            key=first,
            prompt=(user(first),),
            data=data,
            difficulty=float(len(made.steps) + len(parts) - 1 + asked),
        )

    def bad_habits(self, task: Task) -> tuple[str, ...]:
        """``guesses`` and ``skips`` need an id that has to be found, ``assumes`` a word that is kept back."""
        steps = from_json(task.data["steps"])
        finds = any(isinstance(v, Found) for g in task.data["goals"] for v in steps[g].arguments.values())
        held = any(p["slot"] for p in task.data["parts"])
        return ("claims", "stops", "slips", *(("guesses", "skips") if finds else ()), *(("assumes",) if held else ()))

    def script(self, task: Task, habit: str, rng: Random) -> Script:
        """A bad habit is the reference chain with something wrong in it."""
        steps = from_json(task.data["steps"])
        goals: list[int] = task.data["goals"]
        match habit:
            case "good":
                yield from _follow(task, steps, rng)
            case "claims":
                yield say(DONE)
            case "stops":
                yield from _follow(task, [*steps[: goals[-1]], *[None] * (len(steps) - goals[-1])], rng)
            case "guesses":
                yield from _follow(task, [s if i in goals else None for i, s in enumerate(steps)], rng)
            case "skips":
                yield from _follow(task, _skipping(steps, goals), rng)
            case "slips":
                yield from _follow(task, _slipping(task, steps, goals[-1], rng), rng)
            case "assumes":
                yield from _follow(task, _assuming(task, steps, rng), rng, ask=False)
            case _:
                raise ValueError(f"no habit {habit!r}; {GOOD} or one of {self.bad_habits(task)}")

    async def open(self, task: Task) -> WorkSession:
        """A fresh database. Raises EngineError if the user's model cannot be had."""
        if self._speaker is not None:
            await self._speaker.start()  # here, where no clock of the agent's runs
        return WorkSession(task.data, self._speaker)


def _follow(task: Task, steps: Steps, rng: Random, ask: bool = True) -> Script:
    """Part by part: ask what was kept back, make the calls, say so. Knows only what it was told and answered; what it
    does not know, it guesses."""
    answers: list[str] = []
    for part in task.data["parts"]:
        heard = ""
        if part["slot"] and ask:
            reply = yield say(f"which {part['slot']}")
            # A model says it in words of its own: the value is known to the script, which only waits to be told.
            heard = part["value"] if part["value"] in reply.content else reply.content.split()[-1]
        while len(answers) < part["end"]:
            step = steps[len(answers)]
            if step is None:
                answers.append("")
                continue
            if heard and len(answers) == part["step"] and step.arguments[part["slot"]] == Told(text=part["value"]):
                step = replace(step, arguments={**step.arguments, part["slot"]: Told(text=heard)})
            given = {k: known(v, answers) or _guess(task, step.tool, k, rng) for k, v in step.arguments.items()}
            reply = yield Message(role="assistant", content="", tool_calls=(ToolCall(name=step.tool, arguments=given),))
            answers.append(reply.content)
        yield say(DONE)


def _guess(task: Task, tool: str, name: str, rng: Random) -> str:
    """An id that no row has, or any word that could stand there."""
    domain = load_domain(task.data["domain"])
    column = domain.operations[tool].parameters[name]
    if column.kind == "ref":
        return rng.choice(task.data["spare"])
    return other_value(domain, task.data["rows"], column, "", rng)


def _root(steps: Sequence[Step], value: Told | Found) -> tuple[int, str, str]:
    """Where the word stands that a look-up began with: step, parameter, word."""
    assert isinstance(value, Found)
    step = steps[value.step]
    for name, argument in step.arguments.items():
        if isinstance(argument, Told):
            return value.step, name, argument.text
    return _root(steps, next(iter(step.arguments.values())))


def _skipping(steps: Sequence[Step], goals: Sequence[int]) -> Steps:
    """The last look-up that a goal needs is left out, and the word that it began with used for an id."""
    found = ((g, n, v) for g in reversed(goals) for n, v in steps[g].arguments.items() if isinstance(v, Found))
    goal, name, value = next(found)
    word = Told(text=_root(steps, value)[2])
    changed: list[Step | None] = [*steps]
    changed[goal] = replace(steps[goal], arguments={**steps[goal].arguments, name: word})
    if value.step not in goals:
        changed[value.step] = None
    return changed


def _slipping(task: Task, steps: Sequence[Step], goal: int, rng: Random) -> Steps:
    """Another value than the user said: in the last goal, or where the look-up of its row begins."""
    given = steps[goal].arguments
    told = [(goal, n, v.text) for n, v in given.items() if isinstance(v, Told)]
    ids = load_domain(task.data["domain"]).operations[steps[goal].tool].ids
    return _with_other(task, steps, *(rng.choice(told) if told else _root(steps, given[ids[0]])), rng)


def _assuming(task: Task, steps: Sequence[Step], rng: Random) -> Steps:
    """Another value than the one that the user kept back."""
    part = next(p for p in task.data["parts"] if p["slot"])
    return _with_other(task, steps, part["step"], part["slot"], part["value"], rng)


def _with_other(task: Task, steps: Sequence[Step], at: int, name: str, right: str, rng: Random) -> Steps:
    domain = load_domain(task.data["domain"])
    column = domain.operations[steps[at].tool].parameters[name]
    wrong = Told(text=other_value(domain, task.data["rows"], column, right, rng))
    return [*steps[:at], replace(steps[at], arguments={**steps[at].arguments, name: wrong}), *steps[at + 1 :]]
