"""Find the answer to a question of several steps in a made-up encyclopaedia, by searching and reading pages."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from envs.search.corpus import Style, read
from envs.search.index import NEXT, Library, library
from envs.search.lexicon import FILLERS
from envs.search.questions import Hop, Plan, draw, normal, phrase
from envs.worlds.base import GOOD, Draft, Script, ScriptedWorld, WorldOptions, arguments, said, say, system, use, user
from posttrain.errors import ToolError
from posttrain.types import Limits, Message, Task, Tool, ToolCall

UNKNOWN = "unknown"
T = TypeVar("T")

TOOLS = (
    Tool(name="search", description="find pages", parameters={"query": "string"}),
    Tool(name="browse", description="read a page", parameters={"title": "string"}),
)


class SearchConfig(WorldOptions):
    """Options of the encyclopaedia and of what is asked."""

    type: Literal["search"] = "search"
    pages: int = Field(default=2000, ge=40, le=20000)
    """Pages of the encyclopaedia."""
    corpus_seed: int = 0
    """Of the encyclopaedia: worlds with the same seed, pages, style and fillers share one."""
    style: Style = "prose"
    """``prose``: sentences. ``brief``: fields, up to 600 pages in the words of the other worlds and twenty more."""
    fillers: int = Field(default=4, ge=0, le=len(FILLERS))
    """Sentences of a prose page that tell nothing."""
    hops: int = Field(default=2, ge=1, le=4)
    """Facts to follow from the start to the answer."""
    backward: float = Field(default=0.3, ge=0.0, le=1.0)
    """Chance of a hop to go from a value to who has it, which takes a search."""
    obfuscate: int = Field(default=2, ge=0, le=3)
    """1: a description stands for the start's name; 2: also ranges for numbers; 3: also periods for years."""
    results: int = Field(default=5, ge=1, le=20)
    """Pages that a search lists."""
    snippet: int = Field(default=12, ge=0, le=40)
    """Words shown of each."""
    part: int = Field(default=80, ge=10)
    """Words that ``browse`` shows at once, to the end of a sentence."""

    @model_validator(mode="after")
    def _describable(self) -> SearchConfig:
        if self.style == "brief" and self.obfuscate:
            raise ValueError("obfuscate: brief pages lack the words that describe a thing; 0, or style: prose")
        return self


class SearchSession:
    """Reads a library that all sessions share, and judges the last word."""

    tools = TOOLS

    def __init__(self, shelf: Library, config: SearchConfig, answer: str) -> None:
        self._library, self._config, self._answer = shelf, config, answer

    async def call(self, call: ToolCall) -> str:
        """``search`` gives a line a page, ``browse`` a page or a part of it."""
        return use_tool(self._library, self._config, call)

    async def reply(self, message: Message) -> Message | None:
        """None: one answer ends it."""
        return None

    async def grade(self, messages: Sequence[Message]) -> float:
        """1 if the last word is the answer, whatever its case, articles and punctuation."""
        text = said(messages)
        return float(text is not None and normal(text) == normal(self._answer))

    async def close(self) -> None:
        """Nothing to free: the library stays."""


def use_tool(shelf: Library, config: SearchConfig, call: ToolCall) -> str:
    """What a tool answers. Raises ToolError."""
    args = arguments(TOOLS, call)
    if call.name == "search":
        return shelf.search(args["query"], config.results, config.snippet)
    return shelf.browse(args["title"], config.part)


class Search(ScriptedWorld):
    """``who is the author of fox lamp?`` -> searches, reads -> ``ada owl``."""

    kind: ClassVar[str] = "search"
    domain = "agent"

    def __init__(self, config: SearchConfig, name: str = "search") -> None:
        super().__init__(name, config.habit)
        self.config = config
        # A page may have several parts, and what is described or sought backwards takes several pages.
        turns = 4 + 3 * config.hops + (2 * config.results if config.obfuscate or config.backward else 0)
        self.limits = Limits(max_turns=turns, max_tokens=96 if config.style == "prose" else 48, timeout_s=60.0)

    @property
    def library(self) -> Library:
        """Made when it is first needed."""
        c = self.config
        return library(c.pages, c.corpus_seed, c.style, c.fillers)

    def draft(self, rng: Random) -> Draft | None:
        """A question that the reference solves: what the search never brings up is not asked."""
        c = self.config
        question = draw(self.library.corpus, c.hops, c.obfuscate, c.backward, rng)
        if question is None:
            return None
        plan, answer = question.plan, normal(question.answer)
        if normal(self._dry(_solve(plan, c.style))) != answer:
            return None
        rule = () if c.style == "brief" else (system("answer with the name, word or number alone"),)
        # However the start is told, it is the same question.
        key = repr((question.start, [(h.kind, h.fact, h.back) for h in plan.hops]))
        return Draft(
            content=key,
            key=key,
            prompt=(*rule, user(phrase(plan, c.style))),
            data={
                "plan": plan.to_json(),
                "answer": question.answer,
                "lucky": normal(self._dry(_first_snippet(plan, c.style))) == answer,
            },
            difficulty=float(c.hops + c.obfuscate),
        )

    def _dry(self, script: Script) -> str:
        """What ``script`` says last, without a session; nothing if it takes too many turns."""
        turn = next(script)
        for _ in range(self.limits.max_turns - 1):
            if not turn.tool_calls:
                return turn.content
            try:
                answer = use_tool(self.library, self.config, turn.tool_calls[0])
            except ToolError as error:
                answer = str(error)
            turn = script.send(Message(role="tool", content=answer))
        return "" if turn.tool_calls else turn.content

    def bad_habits(self, task: Task) -> tuple[str, ...]:
        """Believing the first snippet may be right by luck."""
        return ("early", "guesses", "unknowing", *([] if task.data["lucky"] else ["snippet"]))

    def script(self, task: Task, habit: str, rng: Random) -> Script:
        """``good`` knows the structure of the question, and reads the answer."""
        plan, style = Plan.from_json(task.data["plan"]), self.config.style
        match habit:
            case "good":
                yield from _solve(plan, style)
            case "early":
                yield from _solve(replace(plan, hops=plan.hops[:-1]), style)
            case "snippet":
                yield from _first_snippet(plan, style)
            case "guesses":
                yield say(rng.choice(self._others(plan.hops[-1], task.data["answer"])))
            case "unknowing":
                yield say(UNKNOWN)
            case _:
                raise ValueError(f"no habit {habit!r}; {GOOD} or one of {self.bad_habits(task)}")

    def _others(self, hop: Hop, answer: str) -> list[str]:
        """What the question's last hop could also lead to."""
        things = self.library.corpus.things.values()
        values = {t.name if hop.back else str(t.facts[hop.fact]) for t in things if t.kind == hop.kind}
        return sorted(v for v in values if normal(v) != normal(answer))

    async def open(self, task: Task) -> SearchSession:
        """A session on the shared library."""
        return SearchSession(self.library, self.config, task.data["answer"])


Steps = Generator[Message, Message, T]
"""Part of a script that comes to a value."""


class _Reader:
    """Somebody who reads pages for facts and remembers them."""

    def __init__(self, style: Style) -> None:
        self._style: Style = style
        self._known: dict[str, dict[str, str]] = {}
        self._unread: dict[str, str] = {}
        """Title to the title under which its page goes on; empty if there is no more."""

    def search(self, query: str) -> Steps[list[str]]:
        """The titles found."""
        found = yield use("search", query=query)
        return [] if found.content.startswith("error") else [line.split(":")[0] for line in found.content.splitlines()]

    def page(self, title: str, need: set[str]) -> Steps[Mapping[str, str]]:
        """Facts of ``title``, read on until all of ``need`` are known or the page ends."""
        facts = self._known.setdefault(title, {})
        at = self._unread.get(title, title)
        while at and not need <= facts.keys():
            text = (yield use("browse", title=at)).content
            text, _, at = text.partition(f"\n{NEXT}")
            facts |= read(text, title, self._style)
        self._unread[title] = at
        return facts

    def start(self, plan: Plan) -> Steps[str | None]:
        """The thing that the question starts from."""
        for title in (yield from self.search(_sought(plan))):
            if title == plan.name or (not plan.name and (yield from self._is_described(title, plan))):
                return title
        return None

    def _is_described(self, title: str, plan: Plan) -> Steps[bool]:
        facts = yield from self.page(title, {"kind"})
        if facts.get("kind") != plan.kind:
            return False
        for clue in plan.clues:
            facts = yield from self.page(title, {clue.via or clue.fact})
            if clue.via and clue.via in facts:
                facts = yield from self.page(facts[clue.via], {clue.fact})
            value = facts.get(clue.fact, "0")
            if value != clue.word if clue.word else not clue.low <= int(value) <= clue.high:
                return False
        return True

    def hop(self, at: str, hop: Hop) -> Steps[str | None]:
        """Where ``hop`` leads from ``at``."""
        if not hop.back:
            return (yield from self.page(at, {hop.fact})).get(hop.fact)
        # A brief page has the fact's own word; a sentence of prose may have any other.
        words = (hop.kind, hop.fact, at) if self._style == "brief" else (hop.kind, at)
        for title in (yield from self.search(" ".join(words))):
            facts = yield from self.page(title, {"kind"})
            if facts.get("kind") == hop.kind and (yield from self.page(title, {hop.fact})).get(hop.fact) == at:
                return title
        return None


def _sought(plan: Plan) -> str:
    """The words that a search for the start should have."""
    exact = [c.word or str(c.low) for c in plan.clues if not c.via and (c.word or c.low == c.high)]
    return plan.name or " ".join([plan.kind, *exact])


def _solve(plan: Plan, style: Style) -> Script:
    """Find the start, follow the facts, say what they lead to."""
    reader = _Reader(style)
    at = yield from reader.start(plan)
    for hop in plan.hops:
        at = at and (yield from reader.hop(at, hop))
    yield say(at or UNKNOWN)


def _first_snippet(plan: Plan, style: Style) -> Script:
    """Search once for all that is asked, and believe the first line."""
    fact = plan.hops[-1].fact
    found = yield use("search", query=f"{fact} {_sought(plan)}")
    title, _, snippet = found.content.split("\n")[0].partition(": ")
    yield say(read(snippet, title, style).get(fact, title))
