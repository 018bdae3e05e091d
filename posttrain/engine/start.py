"""The one place that turns an engine's config into an engine, and into where the trainer puts weights for it."""

from __future__ import annotations

from pathlib import Path

import torch

from posttrain.engine.local import LocalEngine
from posttrain.engine.vllm import VllmEngine
from posttrain.settings import EngineConfig, LocalEngineConfig, VllmEngineConfig
from posttrain.weights import FolderOutlet, HeldOutlet, Outlet, SharedOutlet


async def start_engine(config: EngineConfig, folder: Path, work: Path) -> LocalEngine | VllmEngine:
    """The engine that the config names, serving the model in ``folder``. ``work`` is a folder for what it writes."""
    match config:
        case LocalEngineConfig():
            return await LocalEngine.start(
                folder,
                slots=config.slots,
                max_context=config.max_context,
                threads=config.threads,
                timeout_s=config.timeout_s,
                draft_steps=config.draft_steps,
                record_choices=config.record_choices,
                on_swap=config.on_swap,
                compiling=config.compile,
            )
        case VllmEngineConfig():
            return await VllmEngine.start(config, folder, work)


def weights_outlet(config: EngineConfig, work: Path, versions: int) -> Outlet:
    """Where that engine takes weights from. ``versions``: as many as may be served side by side."""
    match config:
        case LocalEngineConfig():
            return SharedOutlet()
        case VllmEngineConfig():
            if config.weights == "send":
                dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
                return HeldOutlet(last=versions + 1, dtype=dtype)
            return FolderOutlet(work, last=versions + 1, adapters=config.weights == "lora")
