"""The language of the work world's domains, their databases, and chains of calls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from pydantic import ValidationError

from envs.work import words
from envs.work.chain import Found, Step, Told, arguments_of, from_json, insert, run, to_json
from envs.work.database import Database, State, cells
from envs.work.domain import DOMAINS, load_domain, read_domain
from envs.work.generate import Size, environment
from envs.work.graph import edges
from envs.work.history import draw_arguments
from envs.work.language import Domain
from envs.worlds.work import WorkConfig
from posttrain.errors import ConfigError, ToolError, WorldError

# words and domains ----------------------------------------------------------------------------------------------------


def test_a_word_is_an_id_or_a_name_or_part_of_the_language() -> None:
    told = [w for pool in words.POOLS.values() for w in pool]
    assert len(told) == len(set(told)) and len(words.IDS) == len(set(words.IDS))
    assert not set(words.IDS) & set(told)
    pools = set(words.POOLS.values())
    for name in DOMAINS:
        domain = load_domain(name)
        columns = [c for e in domain.entities.values() for c in e.columns.values()]
        keys = {w for c in columns if c.kind == "key" for w in c.values}
        texts = [f"{o.name} {o.says} {o.description}" for o in domain.operations.values()]
        texts += [v for c in columns if c.kind != "key" and c.values not in pools for v in c.values]
        language = {w for t in texts for w in re.findall("[a-z]+", t)} | {c.name for c in columns}
        assert not language & {*words.IDS, *keys}, name


def test_ids_never_end() -> None:
    n = len(words.IDS)
    assert words.ids(n + 2)[n - 1 :] == [words.IDS[-1], f"{words.IDS[0]}2", f"{words.IDS[1]}2"]


def test_there_are_twenty_domains_with_dense_graphs() -> None:
    assert len(DOMAINS) == 20
    sizes = {name: len(load_domain(name).operations) for name in DOMAINS}
    assert min(sizes.values()) >= 60, sizes
    for name in DOMAINS:
        found = edges(name)
        assert {e.kind for e in found} == {"output", "effect"}
        assert len(found) >= 4 * sizes[name] - 20
        assert len(set(found)) == len(found)


def _shape(domain: Domain) -> str:
    """A domain without its nouns: what refers to what, and how many states, choices and amounts each table has."""
    number = {e: i for i, e in enumerate(domain.entities)}
    tables = [
        (sorted(number[c.entity] for c in e.columns.values() if c.kind == "ref"), len(e.columns))
        for e in domain.entities.values()
    ]
    return repr((tables, sorted((number[k.left], number[k.right]) for k in domain.links.values())))


def test_domains_differ_in_structure() -> None:
    assert len({_shape(load_domain(name)) for name in DOMAINS}) == 20


def test_edges_say_which_output_or_effect_is_needed() -> None:
    found = {(e.source, e.target): e.kind for e in edges("library")}
    assert found["find_member", "bar"] == "output"
    assert found["list_loan_by_member", "return"] == "output"
    assert found["bar", "admit"] == "effect"
    assert found["lose", "recover"] == "effect"
    assert ("return", "bar") not in found


LIBRARY = {
    "tables": {"member": {"alias": "key names", "state": "state in out"}, "loan": {"member": "ref member"}},
    "actions": {"bar": {"takes": "member", "needs": "member.state is in", "does": "member.state = out", "says": "x"}},
}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tables.member.state", "state in", "tables.member: state: no column: 'state in'"),
        ("tables.loan.member", "ref book", "tables.loan: 'book'"),
        ("actions.bar.takes", "book", "actions.bar: takes 'book': write a table, or a column"),
        ("actions.bar.needs", "member.state is away", "actions.bar: member.state is never away: in, out"),
        ("actions.bar.needs", "member.age is 3", "actions.bar: member.age leads nowhere: begin with one of member"),
        ("actions.bar.needs", "member.state was in", "actions.bar: no condition: 'member.state was in'"),
        ("actions.bar.does", "member.state < in", "actions.bar: no effect: 'member.state < in'"),
        ("actions.bar.does", "new loan; member.state = out", "actions.find_member"),
        ("actions.bar.dose", "member.state = out", "actions.bar: unknown key 'dose'"),
    ],
)
def test_a_mistake_in_a_domain_file_is_named(path: str, value: str, message: str) -> None:
    data = json.loads(json.dumps(LIBRARY))
    *way, last = path.split(".")
    place = data
    for key in way:
        place = place[key]
    place[last] = value
    if "find_member" in message:
        data["actions"]["find_member"] = data["actions"].pop("bar")
        message = "actions: an action has the name of another tool"
    with pytest.raises(ConfigError, match=re.escape(f"x.yaml: {message}")):
        read_domain("x", data, "x.yaml")


def test_a_domain_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ConfigError, match="no domain 'zoo': choose of airline, bank"):
        load_domain("zoo")
    with pytest.raises(ValidationError, match="no domain 'zoo': choose of airline, bank"):
        WorkConfig(domains=("zoo",))


# the database ---------------------------------------------------------------------------------------------------------


ROWS = {
    "member": [["opal", "ada", "rome", 3, "active"], ["ruby", "ben", "oslo", 0, "barred"]],
    "book": [["jade", "fox", "poem", "north", "in"], ["onyx", "owl", "novel", "east", "out"]],
    "loan": [["zinc", "opal", "onyx", "week", "open"]],
    "club": [["gold", "dawn", "monday", None]],
}


@pytest.fixture
def library() -> Database:
    return Database("library", ROWS, ["iron", "salt"])


def _call(database: Database, tool: str, **arguments: str) -> str:
    try:
        return database.call(database.domain.operations[tool], arguments)
    except ToolError as error:
        return str(error)


def test_tools_read_what_is_there(library: Database) -> None:
    assert _call(library, "find_member", alias="ada") == "opal"
    assert _call(library, "find_book", title="fox") == "jade genre poem"
    assert _call(library, "get_member", member="opal") == "opal alias ada city rome debt 3 state active"
    assert _call(library, "get_club", club="gold") == "gold topic dawn day monday leader none"
    assert _call(library, "list_loan_by_member", member="opal") == "zinc"
    assert _call(library, "list_book_by_state", state="lost") == "no rows"
    assert cells("jade genre poem; onyx genre novel") == [
        {"id": "jade", "genre": "poem"},
        {"id": "onyx", "genre": "novel"},
    ]
    assert [cells(a) for a in ("", "ok", "no rows", "error: no member x")] == [[], [], [], []]


def test_a_precondition_that_fails_is_named_and_nothing_changes(library: Database) -> None:
    before = library.snapshot()
    refused = {
        ("lend", "member=ruby book=jade term=week"): "error: member state is barred",
        ("lend", "member=opal book=onyx term=week"): "error: book state is out",
        ("lend", "member=opal book=jade term=day"): "error: no term day",
        ("lend", "member=opal book=gold term=week"): "error: no book gold",
        ("lend", "member=ada book=jade term=week"): "error: no member ada",
        ("lend", "member=\ud800 book=jade term=week"): "error: no member \ud800",
        ("lend", "member='' book=jade term=week"): "error: no member ''",
        ("pay", "member=opal amount=4"): "error: member debt is 3",
        ("pay", "member=opal amount=0"): "error: amount is 0",
        ("pay", "member=opal amount=-1"): "error: amount is a number",
        ("pay", "member=opal amount=1234567"): "error: amount is a number",
        ("settle", "member=opal debt=2"): "error: member debt is 3",
        ("set_member_city", "member=opal city=rome"): "error: member city is rome",
        ("new_member", "alias=ada city=rome"): "error: alias ada is taken",
        ("new_member", "alias=a;b city=rome"): "error: alias is a word",
        ("drop_member", "member=opal"): "error: member has loan",
        ("lead", "club=gold member=opal"): "error: no seat",
        ("find_member", "alias=kim"): "error: no member kim",
    }
    for (tool, arguments), message in refused.items():
        given = dict(a.split("=") for a in arguments.split())
        assert _call(library, tool, **given) == message, tool
    assert library.snapshot() == before


def test_tools_change_all_that_they_say(library: Database) -> None:
    assert _call(library, "lose", loan="zinc") == "ok"
    assert _call(library, "get_book", book="onyx").endswith("state lost")
    assert _call(library, "get_member", member="opal").endswith("debt 12 state active")
    assert _call(library, "lend", member="opal", book="jade", term="year") == "iron"
    assert _call(library, "get_loan", loan="iron") == "iron member opal book jade term year state open"
    assert _call(library, "join", member="opal", club="gold") == "ok"
    assert _call(library, "list_member_by_seat", club="gold") == "opal"
    assert _call(library, "lead", club="gold", member="opal") == "ok"
    assert _call(library, "get_club", club="gold").endswith("leader opal")
    assert _call(library, "drop_seat", member="opal", club="gold") == "ok"
    assert _call(library, "list_member_by_seat", club="gold") == "no rows"


def test_money_moves_and_is_never_made_up() -> None:
    rows = {
        "client": [["opal", "ada", "rome", "active"]],
        "branch": [["ruby", "oslo", 30]],
        "account": [["jade", "opal", "daily", "ruby", 10, "open"], ["onyx", "opal", "savings", "ruby", 5, "open"]],
    }
    bank = Database("bank", rows, [])
    assert _call(bank, "transfer", source="jade", target="jade", amount="1") == "error: source is jade"
    assert _call(bank, "transfer", source="jade", target="onyx", amount="11") == "error: source balance is 10"
    assert _call(bank, "transfer", source="jade", target="onyx", amount="7") == "ok"
    assert bank.query("select balance from account order by id") == [(3,), (12,)]
    assert _call(bank, "close", account="jade") == "error: account balance is 3"
    assert _call(bank, "empty", source="jade", target="onyx", balance="3") == "ok"
    assert _call(bank, "close", account="jade") == "ok"
    assert _call(bank, "borrow", account="onyx", owed="9") == "row0", "ids never run out"


def test_an_empty_reference_is_named() -> None:
    rows = {
        "room": [["jade", "alpha", "lake", 3, "dirty"]],
        "maid": [["opal", "ada", "ground", "here"]],
        "task": [["ruby", "jade", None, "clean", "open"]],
    }
    hotel = Database("hotel", rows, [])
    assert _call(hotel, "finish", task="ruby") == "error: task maid is none"
    assert _call(hotel, "clean", room="jade") == "error: room has open task"
    assert _call(hotel, "assign", task="ruby", maid="opal") == "ok"
    assert [_call(hotel, t, **a) for t, a in (("finish", {"task": "ruby"}), ("clean", {"room": "jade"}))] == [
        "ok",
        "ok",
    ]


def test_who_makes_rows_in_another_order_makes_the_same_state() -> None:
    def state(order: Sequence[str], hour: str) -> State:
        database = Database("library", {"room": [["jade", "alpha", "ground", "open"]]}, ["iron", "salt", "coal"])
        for alias in order:
            member = _call(database, "new_member", alias=alias, city="rome")
            assert _call(database, "keep", room="jade", member=member, hour=hour if alias == "ada" else "night")
        return database.snapshot()

    assert state(("ada", "ben"), "noon") == state(("ben", "ada"), "noon")
    assert state(("ada", "ben"), "noon") != state(("ada", "ben"), "night")


def test_scratch_undoes_and_closed_is_closed(library: Database) -> None:
    before = library.snapshot()
    with library.scratch():
        assert _call(library, "lend", member="opal", book="jade", term="year") == "iron"
        assert library.snapshot() != before
    assert library.snapshot() == before
    assert _call(library, "lend", member="opal", book="jade", term="year") == "iron", "the id is free again"
    library.close()
    library.close()
    with pytest.raises(WorldError, match="closed"):
        library.snapshot()


def test_drawn_arguments_are_accepted_and_their_absence_means_refusal() -> None:
    drawn = 0
    for name in DOMAINS:
        made = environment(name, 7, Size())
        database = Database(name, made.rows, made.spare)
        for operation in (o for o in database.domain.operations.values() if o.does):
            arguments = draw_arguments(database, operation, Random(3), 6)
            if arguments is None:
                continue
            drawn += 1
            with database.scratch():
                same = operation.name.startswith("set_") and operation.amounts  # may be drawn as it was
                assert same or not _call(database, operation.name, **arguments).startswith("error")
        database.close()
    assert drawn > 400


def test_nothing_is_drawn_where_nothing_can_be_done(library: Database) -> None:
    operations = library.domain.operations
    assert draw_arguments(library, operations["recover"], Random(0), 4) is None
    assert draw_arguments(library, operations["settle"], Random(0), 4) == {"member": "opal", "debt": "3"}
    drawn = {tuple((draw_arguments(library, operations["pay"], Random(i), 4) or {}).values()) for i in range(60)}
    assert drawn == {("opal", "1"), ("opal", "2"), ("opal", "3")}


# chains ---------------------------------------------------------------------------------------------------------------


RETURN = (
    Step(tool="find_member", arguments={"alias": Told(text="ada")}),
    Step(tool="list_loan_by_member", arguments={"member": Found(step=0)}),
    Step(tool="return", arguments={"loan": Found(step=1)}),
)


def test_a_chain_finds_what_it_is_not_told(library: Database) -> None:
    assert run(library, RETURN) == ["opal", "zinc", "ok"]
    assert from_json(json.loads(json.dumps(to_json(RETURN)))) == [*RETURN]
    assert arguments_of(RETURN[1], ["jade; zinc"]) is None, "two rows tell no id"
    told = replace(RETURN[1], arguments={"member": Found(step=0, where={"genre": "poem"})})
    assert arguments_of(told, ["jade genre poem; zinc genre novel"]) == {"member": "jade"}


def test_a_step_without_its_look_up_is_not_made(library: Database) -> None:
    assert run(library, [None, *RETURN[1:]]) == ["", "", ""]


def test_an_inserted_step_moves_the_others(library: Database) -> None:
    extra = Step(tool="get_book", arguments={"book": Told(text="jade")})
    for at in range(4):
        with library.scratch():
            answers = run(library, insert(RETURN, at, extra))
            assert [a for i, a in enumerate(answers) if i != at] == ["opal", "zinc", "ok"]
