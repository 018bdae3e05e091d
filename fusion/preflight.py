"""What can be known to fail before anything is written: shapes of the model, sandboxes that this machine lacks."""

from __future__ import annotations

from pathlib import Path

from envs.sandbox import probe
from envs.worlds import CodeConfig
from fusion.config import PipelineConfig
from posttrain.errors import ConfigError
from posttrain.settings import PretrainedModel


def preflight(path: Path, config: PipelineConfig) -> None:
    """Raises ConfigError naming file, key and cure."""
    for name, world in config.worlds.items():
        if isinstance(world, CodeConfig):
            try:
                probe(world.sandbox)
            except ConfigError as error:
                raise ConfigError(f"{path}: worlds.{name}.sandbox: {error}") from None
    if isinstance(config.model, PretrainedModel):
        if not (config.model.path / "config.json").is_file():
            raise ConfigError(
                f"{path}: model.path: {config.model.path} holds no config.json; give the folder of a Hugging Face model"
            )
        return
    from posttrain.model import Longcat2Config

    try:
        Longcat2Config(**config.model.settings, vocab_size=config.model.vocab_size)
    except Exception as error:  # transformers' strict dataclasses raise their own kinds
        raise ConfigError(f"{path}: model.settings: {error}") from None
