"""The simulator as its user has it: the command, the cluster of the docs, and the real loop beside it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config import load
from posttrain.errors import ConfigError
from posttrain.protocols import Engine
from posttrain.scheduler import Ticket
from posttrain.settings import LoopConfig
from posttrain.simulate import Simulation, simulate, table
from posttrain.simulate_draws import Sampler
from posttrain.simulate_settings import (
    Constant,
    EngineLoad,
    SimulationConfig,
    TrainerLoad,
    WorldLoad,
)
from posttrain.types import Rollout, Sampling, Task
from tests.posttrain.counting import Counting, config
from tests.posttrain.small import rollout

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loop.attempts=2", "loop.attempts: is not simulated"),
        ("warmup=60", "warmup: leaves none of the 60 steps"),
        ("engines.speed=[[4, 1.0], [1, 2.0]]", "speed: must be pairs of requests, ascending"),
        ("engines.capacity_old=99", "capacity_old: is above the capacity of 64"),
        ("worlds.desk.latency={type: lognormal, median: 2.0, p99: 1.0}", "p99: is 1, below the median"),
    ],
)
def test_a_mistake_is_named(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SimulationConfig, ROOT / "configs/simulate/laptop.yaml", [override])
    assert words in str(caught.value)


def test_the_command_prints_and_writes_without_torch(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    arguments = ["simulate", "configs/simulate/laptop.yaml", "--set", "loop.steps=12", "--out", str(out)]
    code = (
        "import sys; from posttrain.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert "speed-up" in done.stdout and "request-load ratio" in done.stdout
    found = simulate(load(SimulationConfig, ROOT / "configs/simulate/laptop.yaml", ["loop.steps=12"]))
    assert json.loads(out.read_text()) == json.loads(json.dumps(found.to_dict()))
    assert len(table(found).rows) > 15


def test_the_cluster_config_is_of_thousands_of_engines_and_32000_environments() -> None:
    """As they start."""
    spec = load(SimulationConfig, ROOT / "configs/simulate/cluster.yaml", ["loop.steps=1", "warmup=0"])
    assert spec.engines.count >= 2000 and spec.loop.max_running * spec.loop.group_size == 32_000
    simulation = Simulation(spec)
    simulation._start()
    assert len(list(simulation.fleet.under_way())) == 32_000


@pytest.mark.slow
def test_the_cluster_takes_its_first_steps() -> None:
    """All environments at once, each of them asked for turns until the step that waits for the slowest is taken."""
    spec = load(SimulationConfig, ROOT / "configs/simulate/cluster.yaml", ["loop.steps=2", "warmup=0"])
    simulation, under_way = Simulation(spec), list[int]()
    plain = simulation.books.start

    def start(*group: Any) -> Ticket:
        under_way.append(simulation.rollouts.total() + spec.loop.group_size)
        return plain(*group)

    simulation.books.start = start  # pyright: ignore[reportAttributeAccessIssue]
    found, fleet = simulation.run(), simulation.fleet
    assert found.steps == simulation.books.version == 2 and max(under_way) == 32_000
    assert sum(found.staleness.values()) == 2 * 512 and max(found.staleness) <= spec.loop.max_staleness
    assert fleet.asked == fleet.answered + len(list(fleet.under_way())) and found.requests == fleet.asked > 32_000
    assert 1_800 < found.groups_in_system <= (spec.loop.max_staleness + 2) * 512
    assert found.resident_versions == 2 and found.moved > 0 and found.evicted == 0
    assert found.engines_busy > 0.9 and 0 < found.trainer_idle < 1


# Reality


class Had(Sampler):
    """Latencies of rollouts that were really played. Groups are drawn in the order of their numbers."""

    def __init__(self, groups: np.ndarray) -> None:
        super().__init__(Constant(value=0.0))
        self._groups = iter(groups)

    def draw(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        group = next(self._groups)
        assert group.shape == shape
        return group


@pytest.mark.slow
@pytest.mark.parametrize(("k", "running"), [(0, 4), (1, 6), (3, 16)])
def test_the_real_loop_takes_as_long(k: int, running: int) -> None:
    """Real asyncio, a long tail of latencies, two turns: steps a second within 15 % of the simulator's, which is given
    each sleep and each step as long as it was: machines are late. What else runs on the machine makes a loop slower and
    never faster, so it may try three times."""
    steps, b, g, step_s = 40, 4, 3, 0.03
    c = config(
        steps=steps, groups_per_step=b, group_size=g, max_running=running, max_staleness=k, checkpoint_every=steps
    )
    shape = ((steps + k + 1) * b, g, 2)
    asked = np.minimum(0.02 * np.exp(np.random.default_rng(5).standard_normal(shape)), 0.4)

    def real() -> tuple[float, np.ndarray, list[float]]:
        """Steps a second, latencies of all groups, and seconds of every step."""
        had, stepped = asked.copy(), list[float]()

        async def play(engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
            number, index = (int(x) for x in rollout_id.split("/")[1:])
            versions = list[int]()
            for turn in range(2):
                versions += (await engine.generate((3, 4), Sampling(seed=seed + turn))).versions
                began = time.monotonic()
                await asyncio.sleep(float(asked[number, index, turn]))
                had[number, index, turn] = time.monotonic() - began
            return rollout(rollout_id, versions=versions)

        def step() -> float:
            """Sleeps itself, so as to know for how long."""
            began = time.monotonic()
            time.sleep(step_s)
            stepped.append(time.monotonic() - began)
            return 0.0

        parts = Counting(c, latency=lambda: 0.0, step_s=step)
        loop = parts.settle()
        loop.run_rollout = play
        parts.run(loop)
        took = sum(x["time/wait_s"] + x["time/step_s"] + x["time/publish_s"] for x in parts.logged)
        return steps / took, had, stepped

    def planned(had: np.ndarray, stepped: list[float]) -> float:
        stage = {n: getattr(c, n) for n in ("steps", "groups_per_step", "group_size", "max_running", "max_staleness")}
        load = WorldLoad(turns=Constant(value=2.0), tokens=Constant(value=1.0), latency=Constant(value=0.0))
        spec = SimulationConfig(
            loop=LoopConfig(**stage),
            engines=EngineLoad(count=100, capacity=100, speed=[(1, 1e6)], lockstep=True),
            trainer=TrainerLoad(step_s=stepped[0]),
            worlds={"w": load},
        )

        def next_step(version: int) -> None:
            trainer = TrainerLoad(step_s=stepped[min(version, steps - 1)])
            simulation.config = simulation.config.model_copy(update={"trainer": trainer})

        simulation = Simulation(spec, next_step)
        turns, tokens, _ = simulation._samplers["w"]
        simulation._samplers["w"] = turns, tokens, Had(had)
        return steps / simulation.run().seconds

    found: list[tuple[float, float]] = []
    for _ in range(3):
        speed, had, stepped = real()
        expected = planned(had, stepped)
        if speed == pytest.approx(expected, rel=0.15):
            return
        found.append((speed, expected))
    pytest.fail(f"steps a second, had and planned: {found}")
