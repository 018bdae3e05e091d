"""A real stage writes down the gaps of every step, once, however often it was cut short."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from envs.worlds import RequestsConfig, make_world
from experts import train as train_module
from posttrain.groups import Group
from posttrain.journal import read_journal
from posttrain.mismatch import Gaps, from_record, together
from posttrain.run import RunDir
from posttrain.settings import LocalEngineConfig
from tests.toy_stage import records, toy_stage, train


def run(folder: Path, name: str, steps: int, on_swap: Any = "keep", **loop: Any) -> RunDir:
    worlds = {"requests": make_world(RequestsConfig(), "requests")}
    engine = LocalEngineConfig(slots=8, max_context=128, on_swap=on_swap)
    return train(folder, name, toy_stage(folder, worlds, loop={"steps": steps, **loop}, engine=engine))


def gaps(run: RunDir) -> list[tuple[int, dict[int, Gaps]]]:
    return [(r["version"], from_record(r)) for r in read_journal(run.rollouts("expert-toy.mismatch"))]


@pytest.mark.slow
def test_a_stage_that_was_cut_short_writes_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint at 2, cut short after step 3 was written down. Synchronously the file is that of a calm run."""
    calm = run(tmp_path, "calm", 4, max_staleness=0)
    plain = train_module._Steps.on_step

    def deadly(steps: train_module._Steps, version: int, stats: dict[str, float], batch: Sequence[Group]) -> None:
        plain(steps, version, stats, batch)
        if version == 3:
            raise RuntimeError("cut short")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="cut short"):
        patched.setattr(train_module._Steps, "on_step", deadly)
        run(tmp_path, "cut", 4, max_staleness=0)
    cut = RunDir(tmp_path / "cut")
    assert [version for version, _ in gaps(cut)] == [1, 2, 3]
    assert gaps(run(tmp_path, "cut", 4, max_staleness=0)) == gaps(calm)
    assert [version for version, _ in gaps(calm)] == [1, 2, 3, 4]
    for (_, found), step in zip(gaps(calm), records(calm), strict=True):
        assert list(found) in ([0], []), "synchronous: the engine has the weights that are trained"
        assert sum(g.tokens for g in found.values()) == step["tokens"]
        assert all(g.mean == pytest.approx(step["gap_abs"]) and g.largest < 1e-4 for g in found.values())


@pytest.mark.slow
def test_an_asynchronous_stage_tells_the_engine_from_the_policy(tmp_path: Path) -> None:
    """The metric of a step is the mean over all staleness. Contexts are computed anew as weights change: with caches of
    older weights, staleness 0 would have the policy's movement in it too."""
    stage = run(tmp_path, "async", 8, on_swap="recompute", max_staleness=2, max_running=6)
    for (_, found), step in zip(gaps(stage), records(stage), strict=True):
        tokens = sum(g.tokens for g in found.values())
        assert tokens == step["tokens"] and max(found, default=0) <= step["staleness_max"] <= 2
        if tokens:
            assert sum(g.total for g in found.values()) / tokens == pytest.approx(step["gap_abs"], rel=1e-4)
            masked = step["dppo/masked"] + step["token_masked"]  # the same token may be in both
            assert sum(g.gated for g in found.values()) / tokens <= masked + 1e-9
    whole = together(found for _, found in gaps(stage))
    assert min(whole) == 0 and max(whole) >= 1
    assert whole[0].largest < 1e-4 < whole[max(whole)].mean
