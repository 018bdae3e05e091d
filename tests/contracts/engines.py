"""The engines that the contract is held against, each with its way for weights to come to it."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import peft
import pytest
import torch
from transformers import PreTrainedModel

from posttrain.engine.local import LocalEngine
from posttrain.engine.vllm import VllmEngine
from posttrain.protocols import Engine
from posttrain.settings import LoraConfig, VllmEngineConfig
from posttrain.trainer import Trainer
from posttrain.types import Completion, Sampling, Weights
from posttrain.weights import SHM, FolderOutlet, HeldOutlet, Outlet, SharedOutlet, SharedWeights, state_of
from tests.model.longcat2_tiny import MTP
from tests.posttrain.tiny import make_model, trainer_of

T = TypeVar("T")
SLOTS, MAX_CONTEXT = 8, 240
TRIES = 6
VLLM = Path(".venv-vllm/bin/vllm").resolve()
needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.exists(), reason="vLLM is not installed: scripts/install-vllm.sh does it"),
]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an engine is started and fed."""

    start: Callable[[Path], Coroutine[Any, Any, Engine]]
    kinds: tuple[str, ...]
    """Of models that it serves here."""
    publish: Callable[[PreTrainedModel, Path], tuple[str, Callable[[], None]]]
    """Weights put where the engine takes them from, in a new folder if it needs one, and how to take them away."""
    outlet: Callable[[Path], Outlet] = lambda work: SharedOutlet()
    """The trainer's."""
    moves: bool = False
    """Whether a request may go on at another server, where its random numbers are others."""
    exact: bool = True
    """Whether company changes not even the last bits, where batches are the same."""
    loras: tuple[LoraConfig | None, ...] = (None, LoraConfig(rank=4))
    """What the trainer may train."""
    marks: tuple[Any, ...] = ()


async def _local(folder: Path) -> Engine:
    return await LocalEngine.start(folder, slots=SLOTS, max_context=MAX_CONTEXT, timeout_s=120)


async def _compiled(folder: Path) -> Engine:
    return await LocalEngine.start(folder, slots=SLOTS, max_context=MAX_CONTEXT, timeout_s=300, compiling=True)


async def _drafting(folder: Path) -> Engine:
    return await LocalEngine.start(folder, slots=SLOTS, max_context=MAX_CONTEXT, timeout_s=120, draft_steps=3)


def vllm_config(**changes: Any) -> VllmEngineConfig:
    """For a tiny model in float32 on one core."""
    small: dict[str, Any] = {"slots": SLOTS, "max_context": MAX_CONTEXT, "threads": 1, "timeout_s": 300}
    small |= {"dtype": "float32", "kv_cache_gib": 0.0625, "eager": True}
    return VllmEngineConfig(**{"type": "vllm", "command": (str(VLLM),), **small, **changes})


def serve(folder: Path, use: Callable[[VllmEngine], Coroutine[Any, Any, T]], **changes: Any) -> T:
    """What ``use`` gives with a vLLM that serves the model in ``folder``."""

    async def scenario() -> T:
        engine = await VllmEngine.start(vllm_config(**changes), folder, folder / "work")
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(scenario())


def _vllm(**changes: Any) -> Callable[[Path], Coroutine[Any, Any, Engine]]:
    async def start(folder: Path) -> Engine:
        return await VllmEngine.start(vllm_config(**changes), folder, folder / "work")

    return start


def _shared(model: PreTrainedModel, folder: Path) -> tuple[str, Callable[[], None]]:
    shared = SharedWeights(state_of(model))
    shared.write(state_of(model))
    return SHM + shared.name, shared.close


def _whole(model: PreTrainedModel, folder: Path) -> tuple[str, Callable[[], None]]:
    model.save_pretrained(folder)
    return str(folder), lambda: None


def _adapter(model: Any, folder: Path) -> tuple[str, Callable[[], None]]:
    model.adapter.save_pretrained(folder)
    return str(folder), lambda: None


def _held(model: PreTrainedModel, folder: Path) -> tuple[str, Callable[[], None]]:
    outlet = HeldOutlet()
    return outlet.put(trainer_of(model)), outlet.close


WAYS: dict[str, Way] = {
    "local": Way(start=_local, kinds=("longcat2", "llama"), publish=_shared),
    "drafting": Way(start=_drafting, kinds=("longcat2-mtp",), publish=_shared),
    # Of one row or of several, next to each other or not: every such forward is kernels of its own.
    "compiled": Way(start=_compiled, kinds=("llama",), publish=_shared, exact=False, marks=(pytest.mark.slow,)),
    "vllm": Way(
        start=_vllm(replicas=3),
        kinds=("llama-32",),
        publish=_whole,
        outlet=FolderOutlet,
        exact=False,
        moves=True,
        marks=tuple(needs_vllm),
    ),
    "vllm-send": Way(
        start=_vllm(weights="send", replicas=3),
        kinds=("longcat2", "llama-32"),
        publish=_held,
        outlet=lambda work: HeldOutlet(),
        exact=False,
        moves=True,
        marks=tuple(needs_vllm),
    ),
    "vllm-lora": Way(
        start=_vllm(weights="lora", max_loras=3, max_lora_rank=8),
        kinds=("llama-32-lora",),
        publish=_adapter,
        outlet=lambda work: FolderOutlet(work, adapters=True),
        exact=False,
        loras=(LoraConfig(rank=4),),
        marks=tuple(needs_vllm),
    ),
}


def model_of(kind: str, seed: int = 0) -> PreTrainedModel:
    """``make_model``, and the kinds that an engine here asks for."""
    match kind:
        case "longcat2-mtp":
            return make_model("longcat2", seed, **MTP)
        case "llama-32":  # vLLM has no attention on a CPU for heads of 8
            return make_model("llama", seed, head_dim=32)
        case "llama-32-lora":
            return with_adapter(seed) if seed else make_model("llama", head_dim=32)
    return make_model(kind, seed)


def with_adapter(seed: int) -> PreTrainedModel:
    """The base model with an adapter added in, which is there alone too."""
    spec = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")
    adapter = peft.get_peft_model(make_model("llama", head_dim=32), spec)
    torch.manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged: Any = copy.deepcopy(adapter).merge_and_unload()
    merged.adapter = adapter
    return merged.eval()


async def replayed(comes_about: Callable[[T], bool], scene: Callable[[int], Coroutine[Any, Any, T]]) -> list[T]:
    """What a scene gave in every try, of which the last alone came about. An engine goes on between two messages to
    it, so on a busy machine requests may be through before the next one, or others overtake them: then it is played
    again, six times at most. It is told which try it is, from 1 on, and itself asserts what must hold in all of them.
    """
    got = list[T]()
    while not got or not comes_about(got[-1]):
        assert len(got) < TRIES, f"the scene never came about, at last with {str(got[-1])[:500]}"
        got.append(await scene(len(got) + 1))
    return got


@dataclass
class Bench:
    """An engine, and the weights that it has now."""

    runner: asyncio.Runner
    way: Way
    engine: Engine
    kind: str
    folder: Path
    model: PreTrainedModel
    version: int = 0
    work: itertools.count[int] = field(default_factory=itertools.count)
    ready: dict[int, tuple[str, Callable[[], None]]] = field(default_factory=dict)
    """Models that are published and not yet taken, by identity."""

    def trainer(self) -> Trainer:
        return trainer_of(self.model)

    def run(self, *requests: tuple[tuple[int, ...], Sampling]) -> list[Completion]:
        """All at once."""

        async def together() -> list[Completion]:
            return await asyncio.gather(*(self.engine.generate(ids, sampling) for ids, sampling in requests))

        return self.runner.run(together())

    def until(self, comes_about: Callable[[T], bool], scene: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What a scene gives when it comes about: see ``replayed``."""
        return self.runner.run(replayed(comes_about, lambda _: scene()))[-1]

    def load(self, model: PreTrainedModel, where: str) -> None:
        self.runner.run(self.engine.load(Weights(version=self.version + 1, where=where)))
        self.model, self.version = model, self.version + 1

    async def take(self, model: PreTrainedModel, keep: Collection[int] = ()) -> int:
        """The same in the engine's own way, while others wait for it. Returns the version."""
        where, forget = self.ready.pop(id(model), None) or self.way.publish(model, self.new_folder())
        await self.engine.load(Weights(version=self.version + 1, where=where), keep)
        forget()
        self.model, self.version = model, self.version + 1
        return self.version

    def another(self) -> PreTrainedModel:
        """A model that no version had."""
        return model_of(self.kind, seed=self.version + 10)

    def others(self, count: int) -> list[PreTrainedModel]:
        """So many of them, published beforehand, since an engine goes on while a model is written."""
        found = [model_of(self.kind, seed=self.version + 100 * (n + 1)) for n in range(count)]
        self.ready |= {id(m): self.way.publish(m, self.new_folder()) for m in found}
        return found

    def new_folder(self) -> Path:
        return self.folder / f"weights-{next(self.work)}"

    def alone(self, model: PreTrainedModel, folder: Path, use: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """What ``use`` gives with an engine that never had another model than this; if even that is not exact, with
        this engine when it has nothing else to do."""

        async def scenario() -> T:
            if not self.way.exact:
                await self.take(model)
                return await use(self.engine)
            model.save_pretrained(folder)
            engine = await self.way.start(folder)
            try:
                return await use(engine)
            finally:
                await engine.close()

        return self.runner.run(scenario())
