"""What a person gets to read for a mistake: one message with file, key and cure, status 2, and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMOKE = "configs/tiny/smoke.yaml"


def posttrain(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "posttrain.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


CASES = {
    "unknown key": (["--set", "cold_start.stps=3"], ["cold_start.stps", "Did you mean `cold_start.steps`"]),
    "wrong type": (["--set", "cold_start.steps=many"], ["cold_start.steps", "whole number"]),
    "no such world type": (["--set", "worlds.x={type: chess}"], ["worlds.x", "chess", "chains"]),
    "no such world": (["--set", "experts.agent.worlds.chess=1"], ["experts.agent.worlds", "chess", "`worlds` has"]),
    "share of no world": (["--set", "cold_start.shares.chess=1"], ["cold_start.shares", "chess", "`worlds` has"]),
    "mixed domains": (["--set", "experts.agent.worlds.chains=1"], ["experts.agent.worlds", "one domain"]),
    "model shape": (["--set", "model.settings.hidden_size=100"], ["model.settings", "hidden_size"]),
    "model setting": (["--set", "model.settings.rope_scaling=3"], ["model.settings"]),
    "budget": (["--set", "model.settings.index_topk=64"], ["model.settings", "index_topk=64", "raise index_topk"]),
    "not implemented": (["--set", "model.settings.norm_topk_prob=true"], ["model.settings", "norm_topk_prob"]),
    "drafts": (["--set", "engine.draft_steps=2"], ["engine.draft_steps", "mtp_num_layers"]),
    "nothing to replay": (
        ["--set", "fusion.trainer.replay_choices=true"],
        ["fusion.trainer.replay_choices", "engine.record_choices to true"],
    ),
    "index heads": (
        ["--set", "conversion={type: lsa, index_head_dim: 4}"],
        ["conversion", "index_head_dim=4", "qk_rope_head_dim=8"],
    ),
    "bad --set": (["--set", "seed"], ["--set seed", "KEY=VALUE"]),
    "no docker": (
        ["--set", "worlds.code.sandbox={type: docker}"],
        ["worlds.code.sandbox", "scripts/start-docker.sh", "sandbox.type: monty"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_message(case: str, tmp_path: Path) -> None:
    arguments, words = CASES[case]
    out = tmp_path / "run"
    done = posttrain(
        "run", SMOKE, "--out", str(out), *arguments, DOCKER_HOST="unix:///nonexistent/docker.sock", NO_COLOR="1"
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr + done.stdout
    for word in words:
        assert word in done.stderr, done.stderr
    assert not out.exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    done = posttrain("run", "configs/tiny/pipelin.yaml", "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and "configs/tiny/pipelin.yaml" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_expert_is_named(tmp_path: Path) -> None:
    done = posttrain("expert", SMOKE, "poetry", "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and "poetry" in done.stderr and "agent, reasoning, interaction" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    done = posttrain("run", SMOKE, "--out", str(tmp_path))
    assert done.returncode == 2 and str(tmp_path) in done.stderr and "--out" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_report_needs_a_run(tmp_path: Path) -> None:
    done = posttrain("report", str(tmp_path))
    assert done.returncode == 2 and "posttrain run CONFIG --out" in done.stderr


@pytest.mark.parametrize("config", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("tiny/*.yaml")))
def test_every_config_is_good(config: str) -> None:
    done = posttrain("run", config, "--check")
    assert (done.returncode, done.stdout.strip()) == (0, f"{config}: good")


def test_checking_needs_no_torch() -> None:
    code = (
        "import sys; from posttrain.cli import app\n"
        f"try: app(['run', {SMOKE!r}, '--check'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
