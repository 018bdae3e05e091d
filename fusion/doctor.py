"""What this machine can run and why not: ``posttrain doctor``. Every probe is bounded; see ``posttrain.machine``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.sandbox import BubblewrapConfig, DockerConfig, MontyConfig, probe
from fusion.config import PipelineConfig, ServedTeachers
from fusion.preflight import preflight, preflight_worlds
from posttrain.errors import ConfigError
from posttrain.machine import PATIENCE_S, Finding, Probe, ask_torch, examine, find_vllm, gpus_of, machine_probes, once
from posttrain.settings import AloneConfig, TrainerConfig, VllmEngineConfig

if TYPE_CHECKING:
    from rich.table import Table

    from fusion.memory import Plan

_NEEDED = ("python", "torch")
"""Without these nothing runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found."""

    machine: list[Finding]
    config: Path | None = None
    needs: list[Finding] = field(default_factory=list[Finding])
    """What the config asks for."""
    plans: list[Plan] = field(default_factory=list)
    """Memory of the config's stages."""
    on_gpu: bool = False
    """Whether trainers would find a GPU."""

    @property
    def runs(self) -> bool:
        """Whether the config can run here; without one, whether anything can."""
        needed = [f for f in self.machine if f.name in _NEEDED] + self.needs
        return all(f.state != "missing" for f in needed)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "config": None if self.config is None else str(self.config),
            "runs": self.runs,
            "machine": [f.to_dict() for f in self.machine],
            "needs": [f.to_dict() for f in self.needs],
            "memory": [plan.to_dict() for plan in self.plans],
        }


def diagnose(
    path: Path | None = None, config: PipelineConfig | None = None, patience_s: float = PATIENCE_S
) -> Diagnosis:
    """Look at the machine, and at what ``config``, read from ``path``, needs of it. The machine takes ``patience_s`` at
    the most, and every need twice that, since it may have to import transformers."""
    said = once(partial(ask_torch, patience_s * 0.9))
    machine = examine(
        machine_probes(said) | {f"sandbox {c.type}": partial(_sandbox, c) for c in _SANDBOXES}, patience_s
    )
    if path is None or config is None:
        return Diagnosis(machine=machine)
    plans: list[Plan] = []
    needs: list[Finding] = []
    for name, asked in _needs(path, config, said, plans).items():  # in turn: transformers is no import for two threads
        needs += examine({name: asked}, 2 * patience_s)
    return Diagnosis(machine=machine, config=path, needs=needs, plans=plans, on_gpu=bool(gpus_of(said())))


_SANDBOXES = (MontyConfig(), BubblewrapConfig(), DockerConfig())


def _sandbox(config: MontyConfig | BubblewrapConfig | DockerConfig) -> Finding:
    there = {
        "monty": "answers",
        "bubblewrap": "makes its namespaces",
        "docker": "answers and has the image posttrain-base",
    }
    return _asked(f"sandbox {config.type}", partial(probe, config), there[config.type], f"sandbox.type {config.type}: ")


def _asked(name: str, question: Any, there: str, said_anyway: str) -> Finding:
    """What a check that raises ConfigError says: before the semicolon what is wrong, after it the cure."""
    try:
        question()
    except ConfigError as error:
        found, _, cure = str(error).removeprefix(said_anyway).partition("; ")
        return Finding(name=name, state="missing", found=found, cure=cure)
    return Finding(name=name, state="ok", found=there)


def _needs(path: Path, config: PipelineConfig, said: Any, plans: list[Plan]) -> dict[str, Probe]:
    alone = config.model_copy(update={"worlds": {}})
    probes: dict[str, Probe] = {
        "model": partial(_asked, "model", partial(preflight, path, alone), config.model.type, f"{path}: "),
        "engine": partial(_engine, config.engine, said),
        "precision": partial(_precision, config, said),
    }
    if isinstance(config.fusion.teachers, ServedTeachers):
        key = "fusion.teachers.engine"
        probes[key] = partial(_servers, key, config.fusion.teachers.engine, said)
    if any(not isinstance(trainer.parallel, AloneConfig) for trainer in _trainers(config).values()):
        probes["trainer ranks"] = partial(_ranks, config, said)
    if liger := [key for key, trainer in _trainers(config).items() if trainer.liger]:
        probes["liger"] = partial(_liger, liger[0], said)
    for name, world in config.worlds.items():
        sandbox = getattr(world, "sandbox", None)
        if sandbox is not None:
            key, question = f"worlds.{name}.sandbox", partial(preflight_worlds, path, {name: world})
            probes[key] = partial(_asked, key, question, sandbox.type, f"{path}: {key}: ")
    return {**probes, "memory estimate": partial(_memory, config, said, plans)}


def _engine(config: Any, said: Any) -> Finding:
    """The engine that the config names."""
    if config.type == "local":
        return Finding(name="engine", state="ok", found="local, on this machine's CPU")
    if config.type == "vllm":
        return _servers("engine", config, said)
    return Finding(name="engine", state="limited", found=f"{config.type}: not looked for", cure="start it and see")


def _servers(key: str, config: VllmEngineConfig, said: Any) -> Finding:
    """Whether vLLM's servers can be what the config says: their program, its build, their GPUs."""
    missing = partial(Finding, name=key, state="missing")
    if config.servers:
        return Finding(name=key, state="ok", found=f"vllm at {', '.join(config.servers)}, which is not asked")
    vllm, answer = find_vllm(config.command[0]), said()
    if vllm is None:
        cure = f"scripts/install-vllm.sh, or name another program in {key}.command"
        return missing(found=f"vllm: {config.command[0]} cannot be run", cure=cure)
    what, there = f"vllm: {vllm.version}, {vllm.program}", len(gpus_of(answer))
    for_gpus = config.threads is None and "error" not in answer  # of the error another finding tells
    if for_gpus and not there:
        cure = f"take a machine with a GPU, or set {key}.threads: a CPU then serves, slowly"
        return missing(found=f"vllm on a GPU ({key}.threads is null), and torch sees none", cure=cure)
    if for_gpus and vllm.for_cpus:
        cure = "rm -r .venv-vllm, then scripts/install-vllm.sh: it takes the build for GPUs if nvidia-smi finds one"
        return missing(found=f"{what}, which is built for CPUs, and {key}.threads is null: for a GPU", cure=cure)
    named = [int(d) for d in ",".join(config.devices).split(",") if d.strip().isdecimal()]
    if not named or not there:
        return Finding(name=key, state="ok", found=what)
    if os.environ.get("CUDA_VISIBLE_DEVICES"):  # torch counts those, and the servers are given others in their stead
        found, cure = f"{what}; whether its devices are there is not known", "ask without CUDA_VISIBLE_DEVICES"
        return Finding(name=key, state="limited", found=found, cure=cure)
    if max(named) >= there:
        cure = f"lower {key}.replicas, or name others in {key}.devices"
        wanted = f"for which there must be {max(named) + 1} GPUs, and there are {there}"
        return missing(found=f"vllm on the devices {', '.join(config.devices)}, {wanted}", cure=cure)
    return Finding(name=key, state="ok", found=f"{what}, on the devices {', '.join(config.devices)}")


def _trainers(config: PipelineConfig) -> dict[str, TrainerConfig]:
    """By the key of their stage."""
    found = {f"experts.{name}": c.trainer for name, c in config.experts.items()} | {"fusion": config.fusion.trainer}
    return found | ({"general": config.general.trainer} if config.general is not None else {})


def _ranks(config: PipelineConfig, said: Any) -> Finding:
    """Whether there is a GPU for every process of every trainer."""
    several = {k: t.parallel for k, t in _trainers(config).items() if not isinstance(t.parallel, AloneConfig)}
    key, parallel = max(several.items(), key=lambda item: max(item[1].devices or [item[1].processes - 1]))
    there, most = len(gpus_of(said())), f"{parallel.type}, {parallel.processes} of them"
    wanted = max(parallel.devices or [parallel.processes - 1]) + 1
    if not there:
        return Finding(name="trainer ranks", state="ok", found=f"{most}, on the CPU by gloo")
    if wanted > there:
        cure = f"lower {key}.trainer.parallel.processes, or name others in devices"
        found = f"{most}, for which there must be {wanted} GPUs, and there are {there}"
        return Finding(name="trainer ranks", state="missing", found=found, cure=cure)
    return Finding(name="trainer ranks", state="ok", found=f"{most}, with a GPU each")


def _liger(key: str, said: Any) -> Finding:
    """Whether its kernels can run; ``key`` is that of a stage that wants them."""
    missing, off = partial(Finding, name="liger", state="missing"), f"--set {key}.trainer.liger=false"
    if not gpus_of(said()):
        return missing(found="its kernels are for GPUs, and torch sees none", cure=off)
    if find_spec("liger_kernel") is None:
        return missing(found="the package liger-kernel is not there", cure=f"pip install liger-kernel, or {off}")
    return Finding(name="liger", state="ok", found="liger-kernel, on the GPU")


def _precision(config: PipelineConfig, said: Any) -> Finding:
    trainers = _trainers(config)
    half = [key for key, trainer in trainers.items() if trainer.mixed_precision == "bf16"]
    answer = said()
    where = "GPU" if gpus_of(answer) else "CPU"
    if half and not answer.get("bf16" if where == "GPU" else "amx"):
        able = "a GPU that has bf16, or a CPU with AMX; others emulate it, slowly"
        cure = f"{able}: --set '{half[0]}.trainer.mixed_precision=\"no\"'"
        return Finding(
            name="precision", state="limited", found=f"bf16, in which this {where} does not compute", cure=cure
        )
    return Finding(name="precision", state="ok", found=f"{'bf16' if half else 'float32'}, trained on the {where}")


def _memory(config: PipelineConfig, said: Any, plans: list[Plan]) -> Finding:
    """Fills ``plans``."""
    from fusion.memory import NoEstimate, largest, problems, room_here
    from fusion.memory import plans as made

    try:
        plans += made(config)
    except (NoEstimate, ConfigError, ValueError) as error:  # what is wrong with the model is said under that name
        return Finding(name="memory estimate", state="limited", found=f"no estimate: {error}", cure="")
    gpu = min((g.bytes for g in gpus_of(said())), default=None)
    room = room_here(gpu)
    plan = largest(plans, room)
    told = list(dict.fromkeys(text for p in plans for text in problems(p, room)))
    if told:
        found, _, cure = problems(plan, room)[0].partition(": ")
        return Finding(name="memory estimate", state="missing", found=found, cure=cure)
    return Finding(name="memory estimate", state="ok", found=f"{plan.stage} needs most: {plan.text(gpu is not None)}")


def table(found: Diagnosis) -> Table:
    """For a terminal."""
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "limited": "yellow", "missing": "red"}
    out = Table("what", "state", "found", "cure")
    for part in (found.machine, found.needs):
        for f in part:
            out.add_row(f.name, f"[{colours[f.state]}]{f.state}[/]", escape(f.found), escape(f.cure))
        out.add_section()
    return out


def lines(found: Diagnosis) -> list[str]:
    """For a file or a pipe: one a finding."""
    return [
        f"{f.name}: {f.state}: {f.found}" + (f" -> {f.cure}" if f.cure else "") for f in (*found.machine, *found.needs)
    ]


def verdict(found: Diagnosis) -> str:
    """The last line."""
    if found.config is None:
        return "for what a config needs of this: posttrain doctor CONFIG"
    lacking = ", ".join(f.name for f in (*found.machine, *found.needs) if f in found.needs and f.state == "missing")
    if found.runs:
        return f"{found.config}: can run here"
    return f"{found.config}: cannot run here, for want of {lacking or 'Python or torch'}"


def memory_lines(plans: list[Plan], on_gpu: bool) -> list[str]:
    """A line a stage."""
    from fusion.memory import gib

    return [f"{p.stage}: {gib(sum(p.needs(on_gpu)))}: {p.text(on_gpu)}" for p in plans]


__all__ = ["Diagnosis", "diagnose", "lines", "memory_lines", "table", "verdict"]
