"""Synchronous mode with a real model: what a run ends with does not depend on latencies or on a kill, bit for bit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.credit import GroupCredit, GroupCreditConfig
from posttrain.engine.local import LocalEngine
from posttrain.files import save_state
from posttrain.groups import derive_seed
from posttrain.journal import rollout_from_dict, rollout_to_dict
from posttrain.loop import Loop
from posttrain.protocols import Engine
from posttrain.settings import LoopConfig
from posttrain.types import Completion, Rollout, Sample, Sampling, Score, Segment, StopReason, Task
from tests.model.longcat2_tiny import tiny
from tests.posttrain.counting import Source
from tests.posttrain.small import TASK, InProcessEngine, copies, differing, make_trainer

CONFIG = LoopConfig(
    steps=4, groups_per_step=2, group_size=3, max_staleness=0, checkpoint_every=2, wait_s=60.0, max_running=2
)
Start = Callable[[Path], Awaitable[Engine]]


class Killed(Exception):
    """Stands for kill -9."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    return path


async def in_process(folder: Path) -> Engine:
    return InProcessEngine(folder)


async def own_process(folder: Path) -> Engine:
    return await LocalEngine.start(folder, slots=16, max_context=64, timeout_s=60.0)


def value(ids: Sequence[int]) -> float:
    """A reward that a tiny model can have or not: the share of even tokens."""
    return sum(i % 2 == 0 for i in ids) / max(1, len(ids))


@dataclass
class Life:
    """One process's worth of a run. ``slow`` draws the seconds that a tool takes, unseeded on purpose."""

    folder: Path
    state_path: Path
    slow: float = 0.0
    kill_at: int = 0
    kill_after: int = 0
    journal: list[dict[str, Any]] = field(default_factory=list)
    history: list[tuple[int, list[str], dict[str, float]]] = field(default_factory=list)
    played: list[str] = field(default_factory=list)

    def write(self, record: Rollout) -> None:
        self.journal.append(rollout_to_dict(record))
        if len(self.journal) == self.kill_after:
            raise Killed

    async def play(self, engine: Engine, task: Task, rollout_id: str, group: str, seed: int) -> Rollout:
        """Three turns of at most six tokens, or two for one rollout in three, with a tool call between them."""
        self.played.append(rollout_id)
        segments = [Segment.given((3, 4, 5 + int(group.rsplit("/", 1)[1])))]
        for turn in range(3 if seed % 3 else 2):
            ids = [i for s in segments for i in s.ids]
            done: Completion = await engine.generate(ids, Sampling(max_tokens=6, stop_ids=(2,), seed=seed + turn))
            segments.append(Segment.from_completion(done))
            if self.slow:
                await asyncio.sleep(random.random() * self.slow)
            segments.append(Segment.given((7, 8)))
        return finished(rollout_id, segments, task)

    def live(
        self, start: Start, state: Mapping[str, Any] | None = None, past: Sequence[Rollout] = ()
    ) -> dict[str, Tensor]:
        """Train to the end, or die; the weights."""
        trainer = make_trainer(steps=CONFIG.steps, lr=3e-2)
        if state is not None:
            trainer.restore(state["trainer"])

        def on_step(version: int, stats: dict[str, float], batch: Sequence[Any]) -> None:
            numbers = {k: v for k, v in stats.items() if not k.startswith("time/")}
            self.history.append((version, [r.id for g in batch for r in g.rollouts], numbers))
            if version == self.kill_at:
                raise Killed

        async def main() -> None:
            engine = await start(self.folder)
            try:
                loop = Loop(
                    CONFIG, name="s", seed=5, engine=engine, trainer=trainer, credit=GroupCredit(GroupCreditConfig()),
                    source=Source(), run_rollout=self.play, journal=self, on_step=on_step,
                    checkpoint=lambda s: save_state(s, self.state_path),
                )  # fmt: skip
                if state is not None:
                    loop.resume(state, past)
                await loop.run()
            finally:
                await engine.close()
                trainer.close()

        torch.manual_seed(0)
        asyncio.run(main())
        return copies(trainer.base)


async def by_hand(start: Start, folder: Path) -> dict[str, Tensor]:
    """The same training without a loop or an episode: turn by turn all who still play ask together, in the order of
    their seeds; then credit, a step, and the engine has the weights."""
    trainer, credit = make_trainer(steps=CONFIG.steps, lr=3e-2), GroupCredit(GroupCreditConfig())
    engine = await start(folder)
    try:
        for step in range(CONFIG.steps):
            await engine.load(trainer.publish())
            numbers = [CONFIG.groups_per_step * step + i for i in range(CONFIG.groups_per_step)]
            said = {f"s/{n}/{i}": [Segment.given((3, 4, 5 + n))] for n in numbers for i in range(CONFIG.group_size)}
            seeds = {name: derive_seed(5, name) for name in said}
            for turn in range(3):
                asking = sorted((name for name in said if turn < 2 or seeds[name] % 3), key=lambda name: seeds[name])
                requests = [
                    engine.generate(
                        [i for s in said[name] for i in s.ids],
                        Sampling(max_tokens=6, stop_ids=(2,), seed=seeds[name] + turn),
                    )
                    for name in asking
                ]
                for name, done in zip(asking, await asyncio.gather(*requests), strict=True):
                    said[name] += [Segment.from_completion(done), Segment.given((7, 8))]
            samples: list[Sample] = []
            for n in numbers:
                group = [finished(f"s/{n}/{i}", said[f"s/{n}/{i}"]) for i in range(CONFIG.group_size)]
                samples += credit(group)
            trainer.step(samples, len(said))
            trainer.version += 1
    finally:
        await engine.close()
        trainer.close()
    return copies(trainer.base)


def finished(name: str, segments: Sequence[Segment], task: Task = TASK) -> Rollout:
    """A rollout and its score."""
    score = Score(value=value([i for s in segments[1::2] for i in s.ids]))
    group = name.rpartition("/")[0]
    return Rollout(
        id=name, group=group, task=task, branches=(tuple(segments),), messages=(), stop=StopReason.SCORED, score=score
    )


ENGINES = [pytest.param(in_process, id="in process"), pytest.param(own_process, id="local", marks=pytest.mark.slow)]


@pytest.mark.parametrize("start", ENGINES)
def test_it_is_a_plain_synchronous_training(start: Start, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = asyncio.run(by_hand(start, folder))
    assert differing(expected, Life(folder, tmp_path / "state.pt", slow=0.003).live(start)) == set()


@pytest.mark.parametrize("start", ENGINES)
def test_latencies_change_nothing(start: Start, folder: Path, tmp_path: Path) -> None:
    quick, slow = (Life(folder, tmp_path / f"{i}.pt", slow=s) for i, s in enumerate((0.0, 0.01)))
    assert differing(quick.live(start), slow.live(start)) == set()
    assert quick.history == slow.history
    assert [r["id"] for r in quick.journal] != [r["id"] for r in slow.journal], "they did arrive in another order"
    assert differing(copies(tiny()), quick.live(in_process)) != set()


@pytest.mark.parametrize("kill_at", [1, 3])
def test_killed_and_resumed_is_as_if_nothing_had_happened(kill_at: int, folder: Path, tmp_path: Path) -> None:
    """Killed at 3, it goes on from the checkpoint of version 2 and takes what trained 3 from the journal; killed at 1,
    there is no checkpoint and everything comes from the journal. Later versions are sampled by a fresh engine."""
    whole = Life(folder, tmp_path / "whole.pt", slow=0.003)
    expected = whole.live(in_process)
    first = Life(folder, tmp_path / "killed.pt", slow=0.003, kill_at=kill_at)
    with pytest.raises(Killed):
        first.live(in_process)
    state = {"finished": [], "accepted": 0, "trainer": make_trainer(steps=CONFIG.steps, lr=3e-2).state()}
    if first.state_path.exists():
        state = torch.load(first.state_path, weights_only=True)
    second = Life(folder, first.state_path, slow=0.003)
    past = [rollout_from_dict(r) for r in first.journal]
    assert differing(expected, second.live(in_process, state, past)) == set()
    at = state["trainer"]["version"]
    assert at == (2 if kill_at == 3 else 0)
    assert first.history[:at] + second.history == whole.history
    assert not {r.id for r in past} & set(second.played), "nothing that was journalled is sampled again"
    assert len(second.played) == 6 * (CONFIG.steps - kill_at)


@pytest.mark.parametrize(
    ("start", "kill_after"),
    [
        pytest.param(in_process, 14, id="in process, 14"),
        pytest.param(in_process, 22, id="in process, 22"),
        pytest.param(own_process, 14, id="local, 14", marks=pytest.mark.slow),
    ],
)
def test_killed_between_two_rollouts_too(start: Start, kill_after: int, folder: Path, tmp_path: Path) -> None:
    """Of the six rollouts of version 2 (3) two (four) were journalled. Their last bits depend on who shared their
    batches, so all six are sampled again; the batch of version 2 that version 3 stands on is taken as it is."""
    whole = Life(folder, tmp_path / "whole.pt", slow=0.003)
    expected = whole.live(start)
    first = Life(folder, tmp_path / "killed.pt", slow=0.003, kill_after=kill_after)
    with pytest.raises(Killed):
        first.live(start)
    state = torch.load(first.state_path, weights_only=True)
    second = Life(folder, first.state_path, slow=0.003)
    past = [rollout_from_dict(r) for r in first.journal]
    assert differing(expected, second.live(start, state, past)) == set()
    assert first.history[:2] + second.history == whole.history
    assert len(second.played) == 12 - 6 * (kill_after == 22)
    again = {r["id"]: r["branches"] for r in second.journal}
    for record in first.journal[12 + 6 * (kill_after == 22) :]:
        assert again[record["id"]] == record["branches"], "the same again, log-probs included"
