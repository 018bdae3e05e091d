"""Which replicas a new version gets (DORA's re-partition, arXiv 2604.26256), on an engine whose servers do not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from posttrain.engine.vllm import VllmEngine
from posttrain.settings import VllmEngineConfig


@pytest.mark.parametrize(
    ("serving", "running", "kept", "free"),
    [
        # Half of the requests that there will be are of the version that is kept, so it keeps two of four: the busiest.
        ([0, 0, 0, 0], [1, 3, 2, 2], {0}, [0, 2]),
        # 2 : 10 : 11 of 4 replicas is 0.35 : 1.74 : 1.91, rounded 0 : 2 : 2, and who has requests has a replica.
        ([0, 1, 1, 1], [1, 2, 3, 4], {0, 1}, [1]),
        # Nothing runs on version 0 any more and it is not kept: its replica is free, and version 1 can spare one.
        ([0, 1, 1, 1], [0, 1, 1, 1], {1}, [0, 1]),
        ([0, 1], [3, 3], {0, 1}, []),
        ([4, 4, 4], [5, 5, 5], set[int](), [0, 1, 2]),
    ],
)
def test_a_new_version_gets_its_part_of_the_replicas(
    serving: Sequence[int], running: Sequence[int], kept: set[int], free: list[int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    engine = VllmEngine(VllmEngineConfig(type="vllm", replicas=len(serving)), tmp_path, tmp_path)
    engine.newest = max(serving)
    for replica, version, count in zip(engine._replicas, serving, running, strict=True):
        replica.versions = {version: "folder"}
        requests: Mapping[str, int | None] = {f"r{version}-{i}": version for i in range(count)}
        replica.running = dict(requests)
    found = engine._free(kept)
    assert sorted(engine._replicas.index(r) for r in found) == free
