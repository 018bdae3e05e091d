"""What the stages of a run will take of memory, and what to lower where that is more than there is.

Experts, general RL and fusion: trainer, engine, teachers, and the weights that travel; vLLM's servers are taken to be
on the trainer's GPU, unless they have threads of a CPU, or other devices, each of which is counted by itself. The cold
start: its processes, at the longest conversations that the engine may hold; without activations where it computes them
twice. The conversion and a model that plays users are not counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experts.config import ColdStartConfig, ExpertConfig
from fusion.config import FusionConfig, PipelineConfig, ServedTeachers, domains_of
from posttrain import memory
from posttrain.activations import NoEstimate
from posttrain.machine import memory_here, shared_free
from posttrain.objective_settings import ClippedLoss
from posttrain.settings import AloneConfig, TrainerConfig, VllmEngineConfig

log = logging.getLogger(__name__)

_GIB = 2**30
_CPU_SERVER = 768 << 20
"""What a vLLM server on a CPU takes beside weights and cache: 650 MiB were measured (vLLM 0.32, configs/tiny)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One stage. Bytes by part."""

    stage: str
    """Its key in the config."""
    trainer: Mapping[str, int]
    """Of one rank. On the GPU if there is one, with the servers that vLLM starts there."""
    ranks: int = 1
    """Of the trainer, with a GPU each."""
    apart: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])
    """Of the servers that vLLM starts on other GPUs, by device."""
    host: Mapping[str, int]
    """Never there."""
    shared: int = 0
    """Of ``host``, what lies in /dev/shm."""
    keys: Mapping[str, str]
    """Part to what lowers it."""
    note: str = ""
    """What is not in it."""

    def needs(self, on_gpu: bool) -> tuple[int, int]:
        """Bytes of the trainer's GPU and of the machine."""
        trainer, host = sum(self.trainer.values()), sum(self.host.values())
        apart = sum(sum(parts.values()) for parts in self.apart.values())
        return (trainer, host) if on_gpu else (0, self.ranks * trainer + apart + host)

    def devices(self) -> list[tuple[str, Mapping[str, int]]]:
        """Those apart, alike ones together."""
        alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for device, parts in self.apart.items():
            alike.setdefault(tuple(parts.items()), []).append(device)
        return [(", ".join(names), dict(parts)) for parts, names in alike.items()]

    def text(self, on_gpu: bool) -> str:
        """One line: where how much goes."""
        where = "on the GPU" if on_gpu else "on the CPU"
        if self.ranks > 1:
            where = f"on each of {self.ranks} GPUs" if on_gpu else f"{self.ranks} times on the CPU"
        parts = [f"{name} {gib(size)}" for name, size in self.host.items()]
        there = [f"trainer {where} {_sum(self.trainer)}"]
        there += [f"on device {names} {_sum(of_one)}" for names, of_one in self.devices()]
        note = f"; {self.note}" if self.note else ""
        return f"{', '.join(there + parts)}{note}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        parts = {"trainer": dict(self.trainer), "host": dict(self.host)}
        several: dict[str, Any] = {"ranks": self.ranks} if self.ranks > 1 else {}
        apart = {"apart": {device: dict(of_one) for device, of_one in self.apart.items()}} if self.apart else {}
        return {"stage": self.stage, **several, **parts, **apart, "shared": self.shared, "note": self.note}


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What there is, in bytes."""

    host: int
    gpu: int | None = None
    """Of the smallest one; None: no GPU."""
    shared: int | None = None
    """In /dev/shm; None: the system has none."""


def plans(config: PipelineConfig) -> list[Plan]:
    """Every stage of training. Raises NoEstimate."""
    found = [_cold_start(config, config.cold_start)] if config.cold_start is not None else []
    found += [_learner(config, f"experts.{name}", c, 0) for name, c in config.experts.items()]
    found.append(_learner(config, "fusion", config.fusion, len(domains_of(config))))
    if config.general is not None:
        found.append(_learner(config, "general", config.general, 0))
    return found


def _cold_start(config: PipelineConfig, c: ColdStartConfig) -> Plan:
    tokens = c.batch_size // c.micro_batches * _longest(config)
    trainer = TrainerConfig(optimizer=c.optimizer, tokens_per_micro_batch=tokens)
    one = memory.trainer_memory(config.model, trainer, ClippedLoss(), _longest(config))
    if c.gradient_checkpointing:
        one["activations"] = 0
    if c.processes > 1:
        one["gradients"] *= 2  # and the buckets in which they are summed
    return Plan(
        stage="cold_start",
        trainer={part: c.processes * size for part, size in one.items()},
        host={"programs": (1 + c.processes) * memory.TRAINING_PROGRAM},
        keys={
            "activations": "cold_start.micro_batches (raise it)",
            "log-probs": "cold_start.micro_batches (raise it)",
            "optimizer": "cold_start.processes",
            "gradients": "cold_start.processes",
            "weights": "cold_start.processes",
        },
        note="activations are not counted" if c.gradient_checkpointing else "",
    )


def _learner(config: PipelineConfig, stage: str, c: ExpertConfig | FusionConfig, teachers: int) -> Plan:
    parallel = c.trainer.parallel
    ranks = 1 if isinstance(parallel, AloneConfig) else parallel.processes
    own = [0] if isinstance(parallel, AloneConfig) else parallel.devices or range(ranks)
    trainer = memory.trainer_memory(config.model, c.trainer, c.loss, _longest(config))
    versions = c.loop.max_staleness + 1 if c.loop.versions == "pinned" else 1
    host, notes = {"programs": memory.TRAINING_PROGRAM} | memory.host_memory(config.model, c.trainer), list[str]()
    here = {**dict.fromkeys(map(str, own), trainer), "": trainer, "cpu": host}
    placed = dict(here)
    if isinstance(config.engine, VllmEngineConfig):
        _place(config, "engine", config.engine, placed, notes)
        if config.engine.weights == "lora":
            trainer.pop("merged adapters", None)  # they travel alone
    else:
        try:
            engine = memory.engine_memory(config.model, config.engine, versions)
            host["programs"] += memory.ENGINE_PROGRAM
            host |= {f"engine's {part}": size for part, size in engine.items()}
            host["published"] = memory.weight_bytes(config.model)
        except NoEstimate as error:
            notes.append(f"engine: no estimate is made here ({error})")
    if isinstance(c, FusionConfig) and isinstance(c.teachers, ServedTeachers):
        _place(config, "teachers", c.teachers.engine, placed, notes)
    elif teachers:
        host |= memory.teacher_memory(config.model, teachers)
    served = isinstance(config.engine, VllmEngineConfig)
    batch, adapters = f"{stage}.trainer.tokens_per_micro_batch", f"{stage}.trainer.lora (set it)"
    smaller = "model (a smaller one)"
    return Plan(
        stage=stage,
        trainer=trainer,
        ranks=ranks,
        apart={device: parts for device, parts in placed.items() if device not in here},
        host=host,
        shared=host.get("published", 0),
        keys={
            "activations": batch,
            "log-probs": batch,
            "gradients": adapters,
            "optimizer": adapters,
            "reference": f"{stage}.loss.kl (0)",
            "support": f"{stage}.loss.estimator.support",
            "engine's weights": smaller if served else f"{stage}.loop.max_staleness" if versions > 1 else "",
            "engine's cache": "engine.kv_cache_gib" if served else "engine.slots",
            "engine's choices": "engine.slots",
            "engine's prefill": "engine.max_context",
            "weights": smaller,
            "teachers": "experts (fewer)",
            "teachers' weights": smaller,
            "teachers' cache": "fusion.teachers.engine.kv_cache_gib",
        },
        note="; ".join(notes),
    )


def _place(
    config: PipelineConfig, who: str, engine: VllmEngineConfig, placed: dict[str, dict[str, int]], notes: list[str]
) -> None:
    """Add what servers take to what is on their devices: "" is the trainer's GPU, "cpu" is none. Notes those of which
    that is not known."""
    if engine.servers or "," in "".join(engine.devices):
        notes.append(f"{who}: {'not started here' if engine.servers else 'servers on several devices'}, not counted")
        return
    try:
        one = memory.served_memory(config.model, engine.model_copy(update={"replicas": 1}))
    except NoEstimate as error:
        notes.append(f"{who}: no estimate is made here ({error})")
        return
    devices = engine.devices or [""] * engine.replicas
    if engine.threads is not None:
        one["programs"], devices = _CPU_SERVER, ["cpu"] * engine.replicas
    for device in devices:
        there = placed.setdefault(device, {})
        for part, size in one.items():
            name = ("teachers' " if who == "teachers" else "engine's ") + part
            there[name] = there.get(name, 0) + size


def _longest(config: PipelineConfig) -> int:
    return getattr(config.engine, "max_context", 0) or 1


def room_here(gpu: int | None) -> Room:
    """Of this machine, whose smallest GPU has so many bytes."""
    return Room(host=memory_here()[0], gpu=gpu, shared=shared_free())


def largest(found: Sequence[Plan], room: Room) -> Plan:
    """The stage that fills most of the machine."""
    return max(found, key=lambda plan: max(share for share, _ in _shares(plan, room)))


def problems(plan: Plan, room: Room) -> list[str]:
    """What does not fit, with the keys to lower, the largest part first."""
    return [text for share, text in _shares(plan, room) if share > 1]


def _shares(plan: Plan, room: Room) -> list[tuple[float, str]]:
    gpu, host = plan.needs(room.gpu is not None)
    there = Counter(plan.host)
    if room.gpu is None:
        there += Counter({part: plan.ranks * size for part, size in plan.trainer.items()})
        there += sum(map(Counter, plan.apart.values()), Counter[str]())
    found = [(host / room.host, _too_much(plan, there, "memory", host, room.host))]
    if room.gpu is not None:
        found.append((gpu / room.gpu, _too_much(plan, plan.trainer, "the GPU's memory", gpu, room.gpu)))
        for names, parts in plan.devices():
            need, what = sum(parts.values()), f"the memory of device {names}"
            found.append((need / room.gpu, _too_much(plan, parts, what, need, room.gpu)))
    if room.shared is not None and plan.shared:
        cure = "enlarge it: mount -o remount,size=, or docker run --shm-size="
        text = f"{plan.stage} needs {gib(plan.shared)} of /dev/shm, and {gib(room.shared)} are free: {cure}"
        found.append((plan.shared / max(room.shared, 1), text))
    return found


def _too_much(plan: Plan, parts: Mapping[str, int], what: str, need: int, there: int) -> str:
    order = sorted((part for part in parts if plan.keys.get(part)), key=lambda part: -parts[part])
    keys = list(dict.fromkeys(plan.keys[part] for part in order if parts[part] > 0.05 * need))
    return f"{plan.stage} needs about {gib(need)} of {what}, and there are {gib(there)}: lower {', '.join(keys[:4])}"


def _sum(parts: Mapping[str, int]) -> str:
    return f"{gib(sum(parts.values()))} ({', '.join(f'{name} {gib(size)}' for name, size in parts.items())})"


def gib(size: int) -> str:
    """``1.25 GiB``, or MiB below a tenth of one."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.0f} MiB"


def foretell(config: PipelineConfig) -> None:
    """Log one line on the stage that needs most, and a warning for what does not fit."""
    import torch

    count = torch.cuda.device_count()
    gpu = min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=None)
    room = room_here(gpu)
    try:
        found = plans(config)
    except NoEstimate as error:
        log.info("memory: no estimate: %s", error)
        return
    plan = largest(found, room)
    log.info("memory: %s needs most, by estimate: %s", plan.stage, plan.text(gpu is not None))
    for text in dict.fromkeys(problem for plan in found for problem in problems(plan, room)):
        log.warning("memory: by estimate %s", text)


__all__ = ["Plan", "Room", "foretell", "gib", "largest", "plans", "problems", "room_here"]
