"""Reading a config: YAML that may extend other YAML, ``--set`` on top, checked by pydantic. Imports no torch.

``load`` reads and checks, ``dump`` writes what a run resolved to, ``digest`` names it. A mistake is a ConfigError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.config_errors import explain
from posttrain.config_layers import Dumper, merge, read_layers
from posttrain.errors import ConfigError


class Config(BaseModel):
    """Base of every config class: immutable, no unknown keys, no value converted except int to float.

    A string literal under a field is its description. Members of a union are told apart by a ``Literal`` field called
    ``type``: ``Annotated[A | B, Field(discriminator="type")]``.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


_C = TypeVar("_C", bound=Config)


def load(model: type[_C], path: str | Path, overrides: Sequence[str] = ()) -> _C:
    """The config in the YAML file ``path``, with ``overrides`` (``a.b.c=VALUE``, VALUE in YAML) on top.

    ``extends: FILE`` at the top of a file, relative to it, puts the file over another one: mappings merge, lists are
    replaced, a mapping whose ``type`` changes starts afresh. Raises ConfigError, nothing else, for any mistake.
    """
    layer = read_layers(Path(path), overrides)
    try:
        # By way of JSON: strict, and yet a list can be a tuple and a text an enum or a path.
        return model.model_validate_json(json.dumps(layer.data))
    except ValidationError as error:
        raise ConfigError(explain(error, model, layer)) from None


def dump(config: Config) -> str:
    """YAML that ``load`` reads back as an equal config; nothing is left to a default."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, width=110)


def digest(value: object) -> str:
    """sha256 (hex) of the canonical JSON of a config, or of JSON values that may hold configs and paths."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a digest needs JSON values, not {type(value).__name__}")


__all__ = ["Config", "digest", "dump", "load", "merge"]
