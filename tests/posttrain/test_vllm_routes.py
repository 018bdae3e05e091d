"""Which replica a request goes to, on an engine whose servers do not run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from posttrain.engine.vllm import _SPILL, VllmEngine, _Replica
from posttrain.engine.vllm_routes import Routes
from posttrain.settings import VllmEngineConfig

REPLICAS = 4


@pytest.fixture
def engine(tmp_path: Path) -> VllmEngine:
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    return VllmEngine(VllmEngineConfig(type="vllm", replicas=REPLICAS), tmp_path, tmp_path)


def send(engine: VllmEngine, ids: list[int], name: str) -> _Replica:
    """As ``_advance`` does it, until the answer comes."""
    replica = engine._route(ids, None)
    engine._routes.note(ids, replica)
    replica.running[name] = None
    return replica


def test_conversations_spread_and_stay_where_they_began(engine: VllmEngine) -> None:
    """They share an opening, as markup with tools does; every turn adds an answer and what a tool said."""
    rng = Random(0)
    stem = [rng.randrange(1000) for _ in range(200)]
    talks = [[*stem, *(rng.randrange(1000) for _ in range(250))] for _ in range(32)]
    homes = [send(engine, ids, f"{n}") for n, ids in enumerate(talks)]
    assert set(Counter(homes).values()) == {32 // REPLICAS}
    for turn in range(3):
        rng.shuffle(order := [*range(32)])
        for n in order:
            del homes[n].running[f"{n}"]  # of all, so that who has least to do is no hint
            talks[n] += [rng.randrange(1000) for _ in range(400)]
            engine._routes.note(talks[n], homes[n])  # with its answer
            talks[n] += [rng.randrange(1000) for _ in range(120)]
        for n in order:
            assert send(engine, talks[n], f"{n}") is homes[n], (turn, n)


def test_a_group_goes_to_one_replica_until_that_has_too_much_to_do(engine: VllmEngine) -> None:
    ids = [*range(300)]
    first = send(engine, ids, "0")
    others = [send(engine, ids, f"{n}") for n in range(1, _SPILL + 1)]
    assert {*others} == {first}
    assert len(first.running) == _SPILL + 1
    assert send(engine, ids, "one more") is not first


def test_another_version_s_replicas_are_not_asked(engine: VllmEngine) -> None:
    ids = [*range(300)]
    first = send(engine, ids, "0")
    first.versions = {1: "elsewhere"}
    assert send(engine, ids, "1") is not first
    engine.newest = 1
    assert send(engine, ids, "2") is first


def test_less_than_half_of_a_request_is_no_reason() -> None:
    routes = Routes[str]()
    routes.note([*range(128)], "a")
    assert routes.find([*range(256)], "abc") == "a"
    assert routes.find([*range(128), *range(129)], "abc") is None
    assert routes.find([*range(63)], "abc") is None and routes.find([*range(256)], "bc") is None
    routes.note([*range(192)], "b")
    assert routes.find([*range(256)], "abc") == "b"


def test_what_was_read_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.engine.vllm_routes._MOST", 4)
    routes = Routes[str]()
    routes.note([*range(192)], "a")
    routes.note([*range(1000, 1128)], "b")
    assert routes.find([*range(1000, 1128)], "ab") == "b"
    assert routes.find([*range(192)], "ab") is None
