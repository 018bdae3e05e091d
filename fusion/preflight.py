"""What can be known to fail before anything is written: shapes of the model, sandboxes that this machine lacks."""

from __future__ import annotations

from pathlib import Path

from envs.sandbox import DockerConfig, probe
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
            if isinstance(world.sandbox, DockerConfig):
                from envs.sandbox.docker_engine import reap

                reap(world.sandbox.host)  # what an earlier run left behind when it was killed
    if isinstance(config.model, PretrainedModel):
        if not (config.model.path / "config.json").is_file():
            raise ConfigError(
                f"{path}: model.path: {config.model.path} holds no config.json; give the folder of a Hugging Face model"
            )
        return
    from huggingface_hub.errors import StrictDataclassError

    from posttrain.model import Longcat2Config

    try:
        model = Longcat2Config(**config.model.settings, vocab_size=config.model.vocab_size)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(f"{path}: model.settings: {error}") from None
    steps, there = config.engine.draft_steps, model.mtp_num_layers or 0
    if steps > there:
        raise ConfigError(
            f"{path}: engine.draft_steps: {steps}, but model.settings.mtp_num_layers is {there}: lower the one or "
            "raise the other"
        )
    if config.conversion is not None:
        from experts.conversion import sparse_config

        try:
            sparse_config(model, config.conversion)
        except ValueError as error:
            raise ConfigError(f"{path}: conversion: {error}") from None
