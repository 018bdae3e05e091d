"""Generated environments are sound, and of all chains only the valid ones score."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest

from envs.work import words
from envs.work.chain import Found, Step, Steps, Told, arguments_of, insert, run
from envs.work.corruptions import corruptions
from envs.work.database import Database
from envs.work.domain import DOMAINS, load_domain
from envs.work.generate import Environment, Size, environment, final_state
from envs.work.graph import grow, seed_chain
from envs.work.history import draw_arguments
from envs.work.language import Operation
from envs.work.users import ScriptedUserConfig
from envs.worlds.base import say
from envs.worlds.work import Work, WorkConfig, WorkSession
from posttrain.errors import ConfigError, ToolError
from posttrain.types import ToolCall

ROOT = Path(__file__).parents[2]
SIZE = Size()
AT_ONCE = ScriptedUserConfig(turns=0.0, asks=0.0)


# environments ---------------------------------------------------------------------------------------------------------


def _sound(made: Environment) -> Database:
    """The environment's database, found consistent before and after the chain. The caller closes it."""
    database = Database(made.domain, made.rows, made.spare)
    assert not database.query("pragma foreign_key_check")
    with database.scratch():
        answers = run(database, made.steps)
        assert not any(a.startswith("error") or not a for a in answers)
        assert not database.query("pragma foreign_key_check")
        for entity in database.domain.entities.values():
            for row in database.rows()[entity.name]:
                for column, value in zip(entity.columns.values(), row[1:], strict=True):
                    assert column.kind != "amount" or value >= 0
                    assert column.kind not in ("state", "choice") or value in column.values
    return database


def test_what_operations_keep_true_is_true_at_the_start() -> None:
    for seed in range(20):
        rows = environment("library", seed, SIZE).rows
        lent = Counter(loan[2] for loan in rows["loan"] if loan[4] != "closed")
        assert {b[0] for b in rows["book"] if b[4] == "out"} == set(lent) and set(lent.values()) <= {1}
        busy = Counter(s[3] for s in environment("garage", seed, SIZE).rows["smith"])
        jobs = [j for j in environment("garage", seed, SIZE).rows["job"] if j[6] == "open" and j[2] is not None]
        assert busy["busy"] == len(jobs)


def test_every_tool_stands_on_tools_that_are_there() -> None:
    """Growth began at the chain; each id that any tool takes is told by a tool that needs less."""
    for name in DOMAINS:
        domain = load_domain(name)
        for seed in range(3):
            made = environment(name, seed, SIZE)
            assert len(made.tools) >= 20 and len(set(made.tools)) == len(made.tools)
            assert {s.tool for s in made.steps} <= set(made.tools)
            left, told = [domain.operations[t] for t in made.tools], set[str]()
            while left:
                able = [o for o in left if set(o.takes) <= told]
                assert able, (name, seed, [o.name for o in left])
                told |= {o.gives for o in able}
                left = [o for o in left if o not in able]


def test_growth_adds_only_what_can_be_done() -> None:
    domain = load_domain("library")

    def no_loans(operation: Operation) -> bool:
        return "loan" not in (*operation.takes, operation.reads) and operation.name != "lend"

    tools = grow(domain, ["find_member", "bar"], 30, no_loans, Random(0))
    assert tools[:2] == ["find_member", "bar"] and len(tools) == 30
    assert not any("loan" in t for t in tools) and "return" not in tools
    assert "collect" not in grow(domain, ["find_member", "bar"], 8, no_loans, Random(1)), "no tool tells a hold yet"
    for seed in range(20):
        chain = seed_chain(domain, ["find_member", "bar"], no_loans, Random(seed))
        assert domain.operations[chain[-1]].does
        told = {"member"}
        for tool in chain:
            assert set(domain.operations[tool].takes) <= told, chain
            told.add(domain.operations[tool].gives)


def test_sizes_are_kept() -> None:
    for chain in (1, 2, 5, 8):
        size = Size(tools=6, chain=chain, rows=4, further=0.0)
        made = [environment("library", seed, size) for seed in range(12)]
        assert {len(m.steps) for m in made} <= {chain, chain + 1, chain + 2}
        assert all(len(m.tools) == max(6, len({s.tool for s in m.steps})) for m in made)
        assert max(len(rows) for m in made for rows in m.rows.values()) <= 6
    with pytest.raises(ConfigError, match="library has no environment with tools=200"):
        environment("library", 0, Size(tools=200))


def test_chains_use_every_tool_that_changes_something() -> None:
    """Over 60 seeds of one domain nearly every one is somebody's goal."""
    writes = [o.name for o in load_domain("library").operations.values() if o.does]
    made = [environment("library", seed, SIZE) for seed in range(60)]
    used = {m.steps[g.step].tool for m in made for g in m.goals}
    assert len(used) >= 0.9 * len(writes)


DIGEST = """
import hashlib, json
from random import Random
from envs.work.domain import DOMAINS
from envs.work.generate import Size, environment
from envs.worlds.work import Work, WorkConfig
world = Work(WorkConfig())
drafts = [world.describe(environment(d, s, Size()), Random(s)) for d in DOMAINS for s in range(3)]
print(hashlib.sha256(json.dumps([[d.key, d.data] for d in drafts]).encode()).hexdigest())
"""


def test_the_same_seed_gives_the_same_environment_in_another_process() -> None:
    def digest(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DIGEST]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=True).stdout

    first = digest("1")
    assert len(first.strip()) == 64 and first == digest("2")


# what scores ----------------------------------------------------------------------------------------------------------


async def _grade(data: Any, steps: Steps) -> float:
    """The grade of calls one after the other, then ``done``. A call whose arguments nobody told is not made."""
    session = WorkSession(data)
    answers: list[str] = []
    try:
        for step in steps:
            filled = arguments_of(step, answers) if step else None
            if step is None or filled is None:
                answers.append("")
                continue
            try:
                answers.append(await session.call(ToolCall(name=step.tool, arguments=filled)))
            except ToolError as error:
                answers.append(str(error))
        assert await session.reply(say("done")) is None
        return await session.grade([])
    finally:
        await session.close()


async def _corrupt(names: Sequence[str], seeds: range) -> tuple[Counter[str], Counter[str]]:
    """Plays every single mistake: how many were tried, and how many changed what is left."""
    world = Work(WorkConfig(user=AT_ONCE))
    tried, real = Counter[str](), Counter[str]()
    for name in names:
        for seed in seeds:
            made = environment(name, seed, SIZE)
            assert len(made.tools) >= 20
            database = _sound(made)
            wanted = final_state(database, made.steps)
            data = world.describe(made, Random(seed)).data
            assert await _grade(data, made.steps) == 1.0
            assert await _grade(data, [None] * len(made.steps)) == 0.0
            for wrong in corruptions(database, made.steps, made.tools, SIZE.rows, Random(seed)):
                same = final_state(database, wrong.steps) == wanted
                tried[wrong.kind] += 1
                real[wrong.kind] += not same
                assert await _grade(data, wrong.steps) == float(same), (name, seed, wrong)
            database.close()
    return tried, real


def test_every_mistake_fails_in_one_environment_of_each_domain() -> None:
    tried, real = asyncio.run(_corrupt(DOMAINS, range(1)))
    assert set(tried) == {"dropped", "value", "tool", "extra"}
    assert real["dropped"] == tried["dropped"] >= 100, "every step is needed"
    assert real.total() >= 0.95 * tried.total()


@pytest.mark.slow
@pytest.mark.long
def test_every_mistake_fails_in_two_thousand_environments() -> None:
    started = time.process_time()
    for name in DOMAINS:
        for seed in range(100):
            environment(name, seed, SIZE)
    assert time.process_time() - started < 120
    tried, real = asyncio.run(_corrupt(DOMAINS, range(100)))
    assert tried.total() > 40_000
    assert real["dropped"] == tried["dropped"]
    assert real.total() >= 0.95 * tried.total(), (tried, real)


def _orders(database: Database, made: Environment) -> list[list[int]]:
    """Other orders of the goals that leave the same rows, ids of new rows aside: compared row by row in SQL."""

    def rows(order: Sequence[int]) -> list[Any] | None:
        with database.scratch():
            answers = [""] * len(made.steps)
            for goal in order:
                for i in range(goal + 1):
                    step = made.steps[i]
                    if (i == goal or i not in goals) and (filled := arguments_of(step, answers)):
                        try:
                            answers[i] = database.call(database.domain.operations[step.tool], filled)
                        except ToolError:
                            return None
            new = {a for g in goals if (a := answers[g]) != "ok"}
            if not all(answers[g] for g in goals):
                return None
            return sorted(
                (table, *("new" if v in new else str(v) for v in row))
                for table, rows in database.rows().items()
                for row in rows
            )

    goals = [g.step for g in made.goals]
    right = rows(goals)
    return [list(o) for o in permutations(goals) if list(o) != goals and rows(o) == right]


def _reordered(made: Environment, order: Sequence[int]) -> list[Step]:
    """The chain with its goals in another order, each after the look-ups it needs."""
    moved: dict[int, int] = {}
    steps: list[Step] = []

    def add(i: int) -> None:
        if i in moved:
            return
        needed = [v.step for v in made.steps[i].arguments.values() if isinstance(v, Found)]
        for n in needed:
            add(n)
        values = {
            k: replace(v, step=moved[v.step]) if isinstance(v, Found) else v for k, v in made.steps[i].arguments.items()
        }
        moved[i] = len(steps)
        steps.append(replace(made.steps[i], arguments=values))

    for goal in order:
        add(goal)
    return steps


def test_any_valid_chain_scores() -> None:
    """Independent goals in another order, and reads anywhere between."""

    async def play() -> Counter[str]:
        world, seen = Work(WorkConfig(user=AT_ONCE)), Counter[str]()
        for name in DOMAINS:
            for seed in range(4):
                made = environment(name, seed, SIZE)
                data = world.describe(made, Random(seed)).data
                database = Database(name, made.rows, made.spare)
                for order in _orders(database, made):
                    seen["orders"] += 1
                    assert await _grade(data, _reordered(made, order)) == 1.0, (name, seed, order)
                steps, rng = list(made.steps), Random(seed)
                reads = [t for t in made.tools if database.domain.operations[t].reads]
                for tool in rng.sample(reads, 3):
                    arguments = draw_arguments(database, database.domain.operations[tool], rng, SIZE.rows)
                    told = {k: Told(text=v) for k, v in (arguments or {}).items()}
                    if told:
                        seen["reads"] += 1
                        steps = insert(steps, rng.randint(0, len(steps)), Step(tool=tool, arguments=told))
                assert await _grade(data, steps) == 1.0, (name, seed)
                database.close()
        return seen

    seen = asyncio.run(play())
    assert seen["orders"] > 80 and seen["reads"] > 200


def test_a_detour_that_is_undone_and_failed_calls_cost_nothing() -> None:
    made = environment("library", 0, SIZE)
    data = Work(WorkConfig(user=AT_ONCE)).describe(made, Random(0)).data

    async def play() -> list[float]:
        grades: list[float] = []
        for calls, word in (([], "done"), ([], ""), ([], None)):
            session = WorkSession({**data, "tools": [*load_domain("library").operations]})
            member = made.rows["member"][0]
            city = next(c for c in words.POOLS["cities"] if c != member[2])
            with pytest.raises(ToolError, match="no member nobody"):
                await session.call(ToolCall(name="bar", arguments={"member": "nobody"}))
            for place in (city, member[2]):
                arguments = {"member": member[0], "city": place}
                await session.call(ToolCall(name="set_member_city", arguments=arguments))
            answers: list[str] = [*calls]
            for step in made.steps:
                filled = arguments_of(step, answers)
                answers.append(await session.call(ToolCall(name=step.tool, arguments=filled or {})))
            if word is not None:
                assert await session.reply(say(word)) is None
            grades.append(await session.grade([]))
            await session.close()
        return grades

    assert asyncio.run(play()) == [1.0, 0.0, 0.0], "it has to be said that it is done"


def test_tools_that_are_not_offered_do_not_exist() -> None:
    task = Work(WorkConfig()).tasks("eval", 1, 0)[0]
    session = WorkSession(task.data)
    hidden = next(t for t in load_domain(task.data["domain"]).operations if t not in task.data["tools"])
    with pytest.raises(ToolError, match=f"no tool {hidden[:20]}"):
        asyncio.run(session.call(ToolCall(name=hidden, arguments={})))
