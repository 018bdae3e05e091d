"""The one place that turns an engine's config into an engine."""

from __future__ import annotations

from pathlib import Path

from posttrain.engine.local import LocalEngine
from posttrain.settings import LocalEngineConfig


async def start_engine(config: LocalEngineConfig, folder: Path) -> LocalEngine:
    """The engine that the config names, serving the model in ``folder``."""
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
            )
