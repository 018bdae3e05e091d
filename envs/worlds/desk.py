"""An order desk: find a customer's order, change it as asked, touch nothing else. The state is a SQLite database."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field

from envs.words import CITIES, ITEMS, NAMES, ORDERS
from envs.worlds.base import GOOD, Draft, Script, ScriptedWorld, WorldOptions, arguments, say, use, user
from posttrain.errors import ToolError, WorldError
from posttrain.types import Limits, Message, Task, Tool, ToolCall

BUSY = "error: busy, again"
DONE = "done"
SORRY = "sorry"

TOOLS = (
    Tool(name="find", description="order of a customer", parameters={"customer": "string"}),
    Tool(name="cancel", description="cancel an order", parameters={"order": "string"}),
    Tool(name="move", description="send an order to a city", parameters={"order": "string", "city": "string"}),
    Tool(name="gift", description="wrap an order", parameters={"order": "string"}),
)


class DeskConfig(WorldOptions):
    """Options of the order desk."""

    type: Literal["desk"] = "desk"
    customers: int = Field(default=6, ge=2, le=len(ORDERS))
    """Orders in the database, one a customer."""
    two: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of conversations with a second request."""
    busy: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of tasks whose first ``find`` fails once."""


class DeskSession:
    """A database of one's own. Grades on what changed in it, and on nothing that was said."""

    tools = TOOLS

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._wanted: list[dict[str, str]] = data["requests"]
        self._rows: list[list[str]] = data["rows"]
        self._made: list[tuple[str, str, str]] = []
        self._asked = 1
        self._ended = False
        self._busy: bool = data["busy"]
        self._db: sqlite3.Connection | None = sqlite3.connect(":memory:")
        self._db.execute("create table orders (id text primary key, customer text, item text, city text, status text)")
        self._db.executemany("insert into orders values (?,?,?,?,'open')", self._rows)

    async def call(self, call: ToolCall) -> str:
        """``find`` reads; the others change one order and answer ``ok``."""
        args = arguments(self.tools, call)
        match call.name:
            case "find":
                return self._find(args["customer"])
            case "cancel":
                return self._change(args["order"], "status", "cancelled")
            case "gift":
                return self._change(args["order"], "status", "gift")
            case _:
                return self._change(args["order"], "city", args["city"])

    def _change(self, order: str, column: Literal["status", "city"], value: str) -> str:
        if column == "city" and value not in CITIES:
            raise ToolError("error: no city")
        # The column is one of two constants of this file; the values are bound.
        if not self._open().execute(f"update orders set {column}=? where id=?", (value, order)).rowcount:
            raise ToolError("error: no order")
        self._made.append((order, column, value))
        return "ok"

    def _find(self, customer: str) -> str:
        if self._busy:
            self._busy = False
            raise ToolError(BUSY)
        row = self._open().execute("select id, item, city from orders where customer=?", (customer,)).fetchone()
        if row is None:
            raise ToolError("error: no customer")
        order, item, city = row
        return f"order {order} item {item} city {city}"

    async def reply(self, message: Message) -> Message | None:
        """The next request once the last one is done; a customer whose request was not done leaves."""
        if not self._matches(self._wanted[: self._asked]):
            return None
        if self._asked == len(self._wanted):
            self._ended = bool(message.content.strip())
            return None
        self._asked += 1
        return user(request(self._wanted[self._asked - 1], later=True))

    async def grade(self, messages: Sequence[Message]) -> float:
        """1 if exactly the asked changes were made and the agent then ended the conversation with a word.

        The text of ``messages`` counts for nothing: the session saw itself how the conversation ended.
        """
        return float(self._ended and self._matches(self._wanted))

    def _matches(self, wanted: Sequence[Mapping[str, str]]) -> bool:
        """Whether the changes made, and the rows they left, are those of ``wanted`` and no others."""
        changes = [_change(w) for w in wanted]
        rows = {order: {"city": city, "status": "open"} for order, _, _, city in self._rows}
        for order, column, value in changes:
            rows[order][column] = value
        left = self._open().execute("select id, city, status from orders")
        return self._made == changes and {o: {"city": c, "status": s} for o, c, s in left} == rows

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise WorldError("the desk's session is closed")
        return self._db

    async def close(self) -> None:
        """Drop the database; idempotent."""
        if self._db is not None:
            self._db.close()
            self._db = None


def _change(wanted: Mapping[str, str]) -> tuple[str, str, str]:
    match wanted["verb"]:
        case "move":
            return (wanted["order"], "city", wanted["city"])
        case "cancel":
            return (wanted["order"], "status", "cancelled")
        case _:
            return (wanted["order"], "status", "gift")


def request(wanted: Mapping[str, str], later: bool = False) -> str:
    """What the customer says."""
    to = f" to {wanted['city']}" if wanted["verb"] == "move" else ""
    return f"{'now ' if later else ''}{wanted['verb']} the order of {wanted['customer']}{to}"


class Desk(ScriptedWorld):
    """``move the order of ada to rome`` -> ``find(ada)`` -> ``order opal item lamp city oslo`` -> ``move(opal, rome)``
    -> ``ok`` -> ``done``; sometimes ``find`` is busy once, sometimes another request follows.
    """

    kind: ClassVar[str] = "desk"
    domain = "agent"
    limits = Limits(max_turns=9, max_tokens=48, timeout_s=60.0)

    def __init__(self, config: DeskConfig, name: str = "desk") -> None:
        super().__init__(name, config.habit)
        self.config = config

    def draft(self, rng: Random) -> Draft:
        """A database and one or two requests. The split hangs on the first request, which is all the model is told."""
        n = self.config.customers
        customers, orders = rng.sample(NAMES, n), rng.sample(ORDERS, n)
        rows = [(o, c, rng.choice(ITEMS), rng.choice(CITIES)) for o, c in zip(orders, customers, strict=True)]
        requests: list[dict[str, str]] = []
        for order, customer, _, city in rng.sample(rows, 1 + (rng.random() < self.config.two)):
            verb = rng.choice(("cancel", "move", "gift"))
            target = rng.choice([c for c in CITIES if c != city]) if verb == "move" else ""
            requests.append({"verb": verb, "order": order, "customer": customer, "city": target})
        busy = rng.random() < self.config.busy
        first = request(requests[0])
        return Draft(
            content=repr((requests, busy)),
            key=first,
            prompt=(user(first),),
            data={"rows": rows, "requests": requests, "busy": busy},
            difficulty=float(len(requests) + busy),
        )

    def bad_habits(self, task: Task) -> tuple[str, ...]:
        """``quits`` needs a busy desk."""
        return ("guesses", "claims", "malformed", *(["quits", "quits"] if task.data["busy"] else []))

    def script(self, task: Task, habit: str, rng: Random) -> Script:
        """The bad habits show in the first request."""
        wanted = task.data["requests"][0]
        match habit:
            case "good":
                for one in task.data["requests"]:
                    yield from _serve(one)
            case "guesses":
                order = rng.choice([o for o in ORDERS if o != wanted["order"]])
                yield _act(wanted, order)
                yield say(DONE)
            case "claims":
                yield say(DONE)
            case "malformed":
                yield use("find")
                yield say(SORRY)
            case "quits":
                yield use("find", customer=wanted["customer"])
                yield say(SORRY)
            case _:
                raise ValueError(f"no habit {habit!r}; {GOOD} or one of {self.bad_habits(task)}")

    async def open(self, task: Task) -> DeskSession:
        """A fresh database."""
        return DeskSession(task.data)


def _act(wanted: Mapping[str, str], order: str) -> Message:
    city = {"city": wanted["city"]} if wanted["verb"] == "move" else {}
    return use(wanted["verb"], order=order, **city)


def _serve(wanted: Mapping[str, str]) -> Script:
    """Find, again while the desk is busy; act on what was found; say so. Knows only what the desk answered."""
    found = yield use("find", customer=wanted["customer"])
    while found.content == BUSY:
        found = yield use("find", customer=wanted["customer"])
    yield _act(wanted, found.content.split()[1])
    yield say(DONE)
