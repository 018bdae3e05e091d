"""What can be known to fail before anything is written: models, their tokenizers, sandboxes that this machine lacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from envs.sandbox import DockerConfig, probe
from envs.work.users import ModelUserConfig
from envs.worlds import WorkConfig, WorldConfig
from fusion.config import PipelineConfig, served_longcat
from posttrain.errors import ConfigError, UserError
from posttrain.settings import LocalEngineConfig, PretrainedModel, RandomModel

if TYPE_CHECKING:
    from posttrain.model import Longcat2Config


def preflight_worlds(path: Path, worlds: Mapping[str, WorldConfig]) -> None:
    """Raises ConfigError for a sandbox that this machine cannot have; removes containers of killed runs."""
    engines: set[str | None] = set()
    for name, world in worlds.items():
        if isinstance(world, WorkConfig) and isinstance(world.user, ModelUserConfig):
            _model_user(f"{path}: worlds.{name}.user.path", world.user.path)
        sandbox = getattr(world, "sandbox", None)
        if sandbox is None:
            continue
        try:
            probe(sandbox)
        except ConfigError as error:
            raise ConfigError(f"{path}: worlds.{name}.sandbox: {error}") from None
        if isinstance(sandbox, DockerConfig):
            engines |= set(sandbox.engines)
    if engines:
        from envs.sandbox.docker_engine import reap

        for engine in engines:
            reap(engine)


def _model_user(key: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}: {folder} holds no config.json; give the folder of a Hugging Face model")
    from transformers import AutoTokenizer

    try:
        template = AutoTokenizer.from_pretrained(folder).chat_template
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {folder} has no tokenizer ({error}); save one beside the model") from None
    if not template:
        raise ConfigError(f"{key}: the tokenizer in {folder} has no chat template; give a model that was made to chat")


def preflight(path: Path, config: PipelineConfig) -> None:
    """Raises ConfigError naming file, key and cure."""
    preflight_worlds(path, config.worlds)
    if isinstance(config.model, PretrainedModel):
        _pretrained(f"{path}: model.path", config.model.path)
        from posttrain.model.config_files import is_longcat, read_config, read_layer

        if is_longcat(read_layer(config.model.path).data):
            _served_longcat(path, config, read_config(config.model.path))
        return
    if isinstance(config.model, RandomModel):
        _known(path, config.model)
        return
    from huggingface_hub.errors import StrictDataclassError

    from posttrain.model import Longcat2Config

    try:
        model = Longcat2Config(**config.model.settings, vocab_size=config.model.vocab_size)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(f"{path}: model.settings: {error}") from None
    steps = config.engine.draft_steps if isinstance(config.engine, LocalEngineConfig) else 0
    there = model.mtp_num_layers or 0
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
    _served_longcat(path, config, model)


def _served_longcat(path: Path, config: PipelineConfig, model: Longcat2Config) -> None:
    try:
        served_longcat(config, model.dense_context)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _pretrained(key: str, folder: Path) -> None:
    """Raises ConfigError for a folder without a model, or whose tokenizer cannot be used with it."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{key}: {folder} holds no config.json; give the folder of a Hugging Face model, or fetch one there: "
            f"hf download OWNER/NAME --local-dir {folder}"
        )
    from transformers import AutoTokenizer

    from posttrain.chat import markup_of

    try:
        vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {folder} has no tokenizer ({error}); save one beside the model") from None
    try:
        markup_of(vocabulary, str(folder))
    except UserError as error:
        raise ConfigError(f"{key}: {error}") from None
    rows, most = json.loads((folder / "config.json").read_text()).get("vocab_size"), max(vocabulary.values()) + 1
    if rows is not None and rows < most:  # more is good: Qwen3 pads its embedding
        raise ConfigError(
            f"{key}: {folder}: the tokenizer has {most} tokens, and the model rows for {rows}; enlarge the model's "
            "embedding (resize_token_embeddings) and save it again"
        )


def _known(path: Path, config: RandomModel) -> None:
    """Raises ConfigError for an architecture or settings that transformers does not know."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = ", ".join(get_close_matches(config.architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)) or "qwen3, llama"
        raise ConfigError(f"{path}: model.architecture: `{config.architecture}` is no causal LM; near are: {near}")
    known = AutoConfig.for_model(config.architecture)
    for key in config.settings:
        if not hasattr(known, key):
            near = ", ".join(get_close_matches(key, vars(known))) or "none"
            raise ConfigError(
                f"{path}: model.settings.{key}: {config.architecture} has no such field; near are: {near}"
            )
