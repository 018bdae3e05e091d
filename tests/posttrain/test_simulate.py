"""The simulator: closed forms, conservation, DORA's properties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.errors import UserError
from posttrain.journal import Journal, rollout_to_dict
from posttrain.simulate import Outcome, Simulation, simulate
from posttrain.simulate_devices import Request
from posttrain.simulate_draws import Sampler
from posttrain.simulate_settings import (
    Constant,
    EngineLoad,
    FromRun,
    Lognormal,
    Measured,
    SimulationConfig,
    TrainerLoad,
    WorldLoad,
)
from posttrain.types import Message
from tests.posttrain.small import rollout

TAIL = Lognormal(median=1.0, p99=20.0)


def plan(
    *, loop: dict[str, Any] | None = None, engines: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None,
    world: dict[str, Any] | None = None, worlds: dict[str, WorldLoad] | None = None, **top: Any,
) -> SimulationConfig:  # fmt: skip
    """Plenty of engines, one world of one turn of ten tokens, a second of environment, half a second of training."""
    one = WorldLoad(**{"tokens": Constant(value=10.0), "latency": Constant(value=1.0), **(world or {})})
    stage = {"steps": 20, "groups_per_step": 4, "group_size": 2, "max_running": 12, "max_staleness": 2, **(loop or {})}
    spec: dict[str, Any] = {
        "loop": stage,
        "engines": EngineLoad(
            **{"count": 8, "capacity": 16, "speed": [(1, 20.0)], "prefill": 100.0, **(engines or {})}
        ),
        "trainer": TrainerLoad(**{"step_s": 0.5, **(trainer or {})}),
        "worlds": worlds or {"w": one},
        **top,
    }
    return SimulationConfig(**spec)


def run(spec: SimulationConfig) -> Outcome:
    return Simulation(spec).run()


# Closed forms


def test_synchronously_a_step_is_the_sum_of_its_parts() -> None:
    """Two turns of (10 tokens + prompt of 100) at 20 tokens a second and 1 s, 80 tokens of 1 ms, 0.5 s, 0.2 s."""
    spec = plan(
        loop={"max_staleness": 0, "steps": 7},
        world={"turns": Constant(value=2.0), "prompt_tokens": 100, "answer_tokens": 50},
        trainer={"token_s": 0.001, "publish_s": 0.2},
    )
    found = run(spec)
    sampling = (10 + 1) / 20 + (10 + 0.5) / 20
    step = sampling + 2.0 + 0.5 + 4 * 2 * 20 * 0.001 + 0.2
    assert found.seconds == pytest.approx(7 * step)
    assert found.steps_per_hour == pytest.approx(3600 / step)
    assert found.tokens_per_s == pytest.approx(4 * 2 * 20 / step)
    assert found.trainer_idle == pytest.approx((sampling + 2.0) / step)
    assert found.staleness == {0: 28} and found.mixed == 0.0
    assert found.engines_busy == pytest.approx(sampling / step), "eight requests on eight devices"
    assert found.load_ratio == pytest.approx(sampling / step / 16)
    assert found.requests == 7 * 4 * 2 * 2


def test_a_loaded_device_is_as_slow_as_measured() -> None:
    """Eight requests of ten tokens on one device for four: twice four at 5 tokens a second each."""
    spec = plan(
        loop={"max_staleness": 0, "steps": 3, "groups_per_step": 8, "group_size": 1},
        engines={"count": 1, "capacity": 4, "speed": [(1, 20.0), (5, 0.1)]},
        trainer={"step_s": 0.0},
        world={"latency": Constant(value=0.0)},
    )
    speed = 20.0 + 3 / 4 * (0.1 - 20.0)
    found = run(spec)
    assert found.seconds == pytest.approx(3 * 2 * 10 / speed)
    assert found.load_ratio == pytest.approx(1.0) and found.engines_busy == pytest.approx(1.0)


def test_a_device_that_empties_grows_faster() -> None:
    """Requests of 10 and 30 tokens: together at 10 tokens a second, then the longer one alone at 20."""
    spec = plan(
        loop={"max_staleness": 0, "steps": 1, "groups_per_step": 1, "group_size": 2},
        engines={"count": 1, "speed": [(1, 20.0), (2, 10.0)], "prefill": 1e9},
        trainer={"step_s": 0.0}, world={"latency": Constant(value=0.0)},
    )  # fmt: skip
    simulation = Simulation(spec)
    simulation._samplers["w"] = (Sampler(Constant(value=1.0)), _Given([10.0, 30.0]), Sampler(Constant(value=0.0)))
    assert simulation.run().seconds == pytest.approx(10 / 10 + 20 / 20)


class _Given(Sampler):
    """These values, one a row."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(Constant(value=0.0))
        self.values = values

    def draw(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        return np.array(self.values).reshape(shape)


def test_in_lockstep_every_turn_takes_as_long_as_the_slowest() -> None:
    """Two turns each; latencies of 1, 5 and of 4, 2 seconds: 4 + 5 in step, and 6 for either alone."""
    for lockstep, seconds in ((True, 4 + 5), (False, 6)):
        spec = plan(
            loop={"max_staleness": 0, "steps": 1, "groups_per_step": 1, "group_size": 2},
            engines={"speed": [(1, 1e9)], "lockstep": lockstep}, trainer={"step_s": 0.0},
        )  # fmt: skip
        simulation = Simulation(spec)
        waits = _Given([1.0, 5.0, 4.0, 2.0])
        simulation._samplers["w"] = (Sampler(Constant(value=2.0)), Sampler(Constant(value=1.0)), waits)
        assert simulation.run().seconds == pytest.approx(seconds)


def test_a_trainer_that_is_the_bottleneck_never_waits() -> None:
    found = run(plan(loop={"steps": 40}, trainer={"step_s": 5.0}, warmup=5))
    assert found.trainer_idle == 0.0
    assert found.steps_per_hour == pytest.approx(3600 / 5.0)


# Distributions


def test_a_lognormal_has_its_median_and_its_99th_percentile() -> None:
    found = Sampler(Lognormal(median=0.2, p99=5.0)).draw(np.random.default_rng(0), 200_000)
    assert np.quantile(found, [0.5, 0.99]) == pytest.approx([0.2, 5.0], rel=0.03)
    cut = Sampler(Lognormal(median=0.2, p99=5.0, most=1.0)).draw(np.random.default_rng(0), 1000)
    assert cut.max() == 1.0


def test_a_run_gives_what_its_rollouts_took(tmp_path: Path) -> None:
    (tmp_path / ".posttrain").touch()
    (tmp_path / "rollouts").mkdir()
    spoken = [Message(role=role, content="so") for role in ("assistant", "tool", "assistant")]
    with Journal(tmp_path / "rollouts" / "expert-agent.jsonl") as journal:
        for name, score in (("s/0/0", 1.0), ("s/0/1", None)):  # the second is not valid
            kept = rollout(name, values=(5,) * 6, versions=(0,) * 6, score=score)
            journal.write(rollout_to_dict(replace(kept, messages=tuple(spoken[: 3 if score else 1]), wall_s=5.0)))

    def values(what: Any, **more: Any) -> list[float]:
        spec = FromRun(run=tmp_path, stage="expert-agent", what=what, **more)
        return Sampler(spec).draw(np.random.default_rng(0), 3).tolist()

    assert values("turns") == [2.0] * 3
    assert values("tokens") == [3.0] * 3
    assert values("seconds", world="toy") == [2.5] * 3
    with pytest.raises(UserError, match=r"expert-agent.jsonl: holds no valid rollout of world moon"):
        values("turns", world="moon")
    with pytest.raises(UserError, match=r"fusion.jsonl: there is no such journal; the run has expert-agent"):
        Sampler(FromRun(run=tmp_path, stage="fusion", what="turns"))
    with pytest.raises(UserError, match="is not the directory of a run"):
        Sampler(FromRun(run=tmp_path / "rollouts", stage="expert-agent", what="turns"))


# Conservation


MODES = [
    {"versions": v, "stragglers": s, "max_staleness": k, "filter_silent": f, "reuse": r}
    for v in ("pinned", "inflight") for s in ("drain", "evict")
    for k, f, r in ((0, False, 0.0), (2, True, 0.5), (3, False, 0.0))
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize("resident", ["one", "all"])
def test_every_request_ends(mode: dict[str, Any], resident: str) -> None:
    """Of long-tailed stages with few devices: turns asked for are sampled, given up, or under way; groups likewise."""
    spec = plan(
        loop={**mode, "steps": 30, "max_running": 14},
        engines={
            "count": 5, "capacity": 3, "capacity_old": 2, "resident": resident, "on_swap": "recompute",
            "rebalance_s": 3.0,
        },
        world={"turns": TAIL, "latency": TAIL, "tokens": Lognormal(median=20.0, p99=200.0), "silent": 0.3},
    )  # fmt: skip
    simulation = Simulation(spec)
    fleet, books, share_out = simulation.fleet, simulation.books, simulation.fleet.repartition

    def repartition(now: float, requests: Mapping[int, int]) -> None:
        before = sorted(map(id, fleet.under_way()))
        share_out(now, requests)
        assert sorted(map(id, fleet.under_way())) == before, "none lost, none twice"

    fleet.repartition = repartition  # pyright: ignore[reportAttributeAccessIssue]
    found = simulation.run()
    assert (found.moved > 0) == (mode["versions"] == "pinned" and resident == "one" and mode["max_staleness"] > 0)
    open_turns = list(fleet.under_way())
    assert len(open_turns) == len({id(r) for r in open_turns})
    assert fleet.asked == fleet.answered + fleet.withdrawn + len(open_turns) and found.requests == fleet.asked
    assert all(r.live for r in open_turns)
    assert sum(len(pool) for pool in fleet.pools.values()) == 5
    assert all(load == len(d.heap) for p in fleet.pools.values() for load, ds in enumerate(p.by_load) for d in ds)
    assert set(simulation.groups) == {*books.running, *books.shelf}
    trained = 4 * 30 - found.reused
    assert simulation._next == trained + found.filtered + len(simulation.groups) + len(simulation._again)
    assert max(found.staleness) <= spec.loop.max_staleness and found.staleness and 0 < found.load_ratio <= 1
    assert sum(found.staleness.values()) == 4 * 30
    assert found.resident_versions <= (spec.loop.max_staleness + 1 if mode["versions"] == "pinned" else 1)
    assert 0 < found.engines_busy <= 1 and 0 <= found.trainer_idle < 1
    assert (found.filtered > 0) == mode["filter_silent"]
    assert (found.reused > 0) <= (mode["reuse"] > 0)
    if mode["stragglers"] == "drain":
        assert found.evicted == fleet.withdrawn == 0
    if mode["versions"] == "pinned":
        assert found.mixed == 0.0 and found.recomputed_tokens == 0.0
    elif spec.loop.max_staleness:
        assert found.mixed > 0.2 and found.recomputed_tokens > 0
    rollouts: Counter[int] = Counter(
        r.version for g in simulation.groups.values() for r in g.requests if r.turn < len(r.tokens)
    )
    assert simulation.rollouts == rollouts


def test_pinned_turns_run_on_devices_of_their_version_alone() -> None:
    """Seen at every event of a stage with re-partitions, and capacity is kept at all of them."""
    spec = plan(
        loop={"versions": "pinned", "steps": 25, "max_running": 12, "max_staleness": 3},
        engines={"count": 6, "capacity": 4, "capacity_old": 2, "rebalance_s": 1.0},
        world={"turns": Constant(value=3.0), "latency": TAIL, "tokens": Lognormal(median=20.0, p99=200.0)},
    )
    simulation = Simulation(spec)
    fleet, plain, seen = simulation.fleet, simulation.fleet.fire, Counter[int]()

    def fire(now: float, device: Any) -> list[Request]:
        ended = plain(now, device)
        assert all(r.version == d.pool.version for d in fleet.devices for _, _, r in d.heap)
        assert all(len(d.heap) <= 4 for d in fleet.devices)
        seen[len(fleet.pools)] += 1
        return ended

    fleet.fire = fire  # pyright: ignore[reportAttributeAccessIssue]
    found = simulation.run()
    assert found.moved > 0 and found.mixed == 0.0 and found.resident_versions >= 3
    assert max(seen) >= 3


def test_equal_configs_give_equal_results_and_seeds_other_ones() -> None:
    world = {"turns": TAIL, "latency": TAIL, "tokens": Lognormal(median=20.0, p99=100.0)}
    spec = plan(world=world, loop={"versions": "pinned", "stragglers": "evict"})
    assert run(spec) == run(spec)
    assert run(spec) != run(spec.model_copy(update={"seed": 1}))


# What asynchrony buys


def test_on_long_tails_it_is_faster_and_on_constant_latencies_of_a_slow_fleet_it_is_not() -> None:
    tails = simulate(plan(loop={"steps": 60}, world={"latency": TAIL}, trainer={"step_s": 1.0}, warmup=10))
    assert tails.speedup > 1.5
    assert tails.planned.staleness_mean > 0 and tails.synchronous.staleness_mean == 0
    # One device, as fast in all for any load: what limits is its tokens a second.
    slow = simulate(
        plan(
            loop={"steps": 40, "groups_per_step": 8, "max_running": 24},
            engines={"count": 1, "capacity": 16, "speed": [(n, 160.0 / n) for n in range(1, 17)]},
            world={"latency": Constant(value=0.01), "tokens": Constant(value=100.0)},
            trainer={"step_s": 0.01}, warmup=10,
        )
    )  # fmt: skip
    assert slow.speedup == pytest.approx(1.0, abs=0.03)
    assert slow.planned.engines_busy > 0.99


@pytest.mark.parametrize("running", [4, 8, 16, 28])
def test_mean_staleness_is_what_is_in_the_system_over_the_batch(running: int) -> None:
    """Little's law, far from the bound K = 12, generation being the bottleneck. Between two publications the shelf
    fills up from 0 to B - 1 groups, none of which a publication finds there."""
    spec = plan(
        loop={"steps": 260, "groups_per_step": 4, "group_size": 1, "max_running": running, "max_staleness": 12},
        world={"latency": Lognormal(median=1.0, p99=4.0)}, trainer={"step_s": 0.02}, warmup=60,
    )  # fmt: skip
    found = run(spec)
    assert found.groups_in_system >= running * 0.9
    assert found.staleness_mean == pytest.approx((found.groups_in_system - 1.5) / 4, rel=0.05)
    assert max(found.staleness) <= 12


def test_drain_waits_and_evict_does_not() -> None:
    """K = 1: one latency in fifty is forty times the others."""
    world = {"latency": Measured(values=[1.0] * 49 + [40.0])}
    drain, evict = (
        run(plan(loop={"steps": 99, "max_staleness": 1, "versions": "pinned", "stragglers": s}, world=world, warmup=5))
        for s in ("drain", "evict")
    )
    assert drain.evicted == 0 and evict.evicted > 5
    assert evict.steps_per_hour > 2 * drain.steps_per_hour
    assert evict.trainer_idle < drain.trainer_idle
    assert max(drain.staleness) == max(evict.staleness) == 1


def test_a_cache_that_is_made_anew_costs_time() -> None:
    """Generation is the bottleneck; contexts are long; weights change often."""
    world = {"turns": Constant(value=4.0), "answer_tokens": 500, "prompt_tokens": 1000, "latency": Constant(value=0.1)}
    kept, anew = (
        run(plan(world=world, engines={"count": 2, "capacity": 8, "on_swap": on_swap}, trainer={"step_s": 0.1}))
        for on_swap in ("keep", "recompute")
    )
    assert kept.recomputed_tokens == 0 < anew.recomputed_tokens
    assert anew.steps_per_hour < 0.97 * kept.steps_per_hour
    assert kept.mixed > 0.5


def test_older_versions_are_filled_up_less() -> None:
    """The paper's second phase lowers the request-load ratio."""
    world = {"turns": Constant(value=5.0), "latency": Lognormal(median=0.1, p99=3.0), "tokens": TAIL}
    loop = {"versions": "pinned", "max_running": 24, "max_staleness": 5, "steps": 40}
    full, less = (
        run(plan(loop=loop, world=world, engines={"count": 4, "capacity": 8, "capacity_old": old, "speed": [(1, 2.0)]}))
        for old in (None, 2)
    )
    assert less.load_ratio < full.load_ratio


def test_worlds_have_their_shares() -> None:
    fast = WorldLoad(share=3.0, tokens=Constant(value=10.0), latency=Constant(value=0.5))
    slow = WorldLoad(share=1.0, tokens=Constant(value=10.0), latency=Lognormal(median=3.0, p99=12.0))
    loop = {"quotas": True, "steps": 100, "groups_per_step": 8, "max_running": 30, "max_staleness": 4}
    found = run(plan(loop=loop, worlds={"fast": fast, "slow": slow}))
    assert found.worlds == pytest.approx({"fast": 0.75, "slow": 0.25}, abs=0.02)


# Mistakes, and the command
