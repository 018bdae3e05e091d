"""Model configs in files: our YAML of official field names, and the official ``config.json``, both ways."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from huggingface_hub.errors import StrictDataclassError

from posttrain.config_layers import KeyPath, Layer, describe, dotted, read_layers
from posttrain.errors import ConfigError
from posttrain.model.config import Longcat2Config
from posttrain.model.config_checks import ACCEPTED, ALIASES

NgramNames = Literal["oe", "lite"]
"""Whose names: those of LongCat-2.0 and Flash-Lite-Sparse (``oe_*``), or those of Flash-Lite and Flash."""

_MODEL_TYPES = ("longcat2", "longcat_flash", "longcat_flash_ngram")
_ARCHITECTURES = ("LongcatCausalLM", "LongcatFlashNgramForCausalLM", "LongcatFlashForCausalLM", "Longcat2ForCausalLM")
_ENGINE_HINTS = ("moe_impl", "moe_switch_token_num")
"""Official fields that tell an inference engine how to run and leave the function alone."""
_OURS = (
    "initializer_range use_cache pad_token_id latent_norm_eps index_k_norm_eps scale_identity_experts use_hi hi_ "
    "streaming_ moe_target_topk router_ mtp_loss_coef indexer_loss_coef z_loss_coef"
)
"""Beginnings of the fields that official files do not have: written only when not at their default."""

_FIELDS = {field.name: field for field in fields(Longcat2Config) if field.name in Longcat2Config.__annotations__}
_WHAT_IT_IS = ("architectures", "model_type")
_OTHER_SPELLINGS = ("rope_theta", "rope_scaling", "num_hidden_layers", "dtype")
_TAKEN = {*_FIELDS, *ALIASES.values(), *ACCEPTED, *_OTHER_SPELLINGS}
_KNOWN = {*_TAKEN, *_WHAT_IT_IS, *_ENGINE_HINTS, "torch_dtype"}
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}


def read_config(path: str | Path, **changes: Any) -> Longcat2Config:
    """The config in a YAML file, in a ``config.json``, or in a folder that holds one; ``changes`` lie on top.

    A field that nobody knows is refused in YAML and ignored in a ``config.json``, where other programs keep theirs.

    Raises:
        ConfigError: one line that names file, key and cure.
    """
    layer = read_layer(Path(path))
    _check_family(layer)
    if not layer.file.endswith(".json"):
        _refuse_unknown(layer)
    given = {"dtype": layer.data.get("torch_dtype"), **layer.data}
    if "index_topk" in changes:
        given.pop("attention_method", None)  # says again, in some files, what index_topk says
    given |= changes
    if given.get("quantization_config"):
        place = layer.origin(("quantization_config",))
        raise ConfigError(f"{place}: `quantization_config`: quantised weights are not read. Take the bf16 checkpoint.")
    settings = {key: _as_declared(key, value) for key, value in given.items() if key in _TAKEN}
    _check_rope(settings, layer)
    try:
        return Longcat2Config(**settings)
    except StrictDataclassError as error:
        raise ConfigError(_wrong_type(str(error), settings, layer)) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{_place(str(error), layer)}: {' '.join(str(error).split()).rstrip('.')}.") from None


def read_layer(path: Path) -> Layer:
    """What the file says, and where. Raises ConfigError."""
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise ConfigError(f"{path}: this folder holds no config.json. Give the folder of a model, or a YAML file.")
        path = file
    if path.suffix != ".json":
        return read_layers(path, ())
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}. Correct it there.") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {why}. Give a config.json, or a folder that holds one.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level must be a JSON object, it is {describe(data)}.")
    return Layer(data=data, origins={}, file=str(path))


def is_longcat(data: Mapping[str, Any]) -> bool:
    """Whether the fields of a ``config.json`` say that it is a model of this family; LongCat-2.0 has no model_type."""
    if data.get("model_type") is not None:
        return data["model_type"] in _MODEL_TYPES
    return any(name in _ARCHITECTURES for name in data.get("architectures") or ())


def official_config(config: Longcat2Config, dtype: str, names: NgramNames = "oe") -> dict[str, Any]:
    """An official ``config.json``, with those fields of ours that are not at their default.

    Args:
        dtype: of the weights, "bfloat16" for example.
    """
    rope = dict(config.rope_parameters or {})
    out: dict[str, Any] = {"architectures": ["LongcatCausalLM"]}
    if names == "lite" and config.use_ngram:
        out = {"architectures": ["LongcatFlashNgramForCausalLM"], "model_type": "longcat_flash_ngram"}
    elif names == "lite":
        out = {"architectures": ["LongcatFlashForCausalLM"], "model_type": "longcat_flash"}
    out |= {
        "torch_dtype": dtype,
        "attention_method": "LSA" if config.use_lsa else "MLA",
        "zero_expert_type": "identity",
        "norm_topk_prob": False,
        "router_bias": False,
        "rope_theta": rope.pop("rope_theta"),
    }
    if rope.pop("rope_type") == "yarn":
        kind = "deepseek_yarn" if names == "oe" else "yarn"
        out["rope_scaling"] = {"type": kind, "rope_type": kind, **rope}  # readers differ in which key they look for
    if config.mtp_num_layers:
        out |= {"mtp_replicate_modules": True, "mtp_disable_over_tokenizer": True}
    if config.use_lsa:
        out |= {"use_mla": 1, "index_k_norm_type": "rms", "dsa_mtp_cli": True}
    for name, value in _worth_saying(config):
        out[ALIASES[name] if names == "lite" and name.startswith("oe_") else name] = value
    return out


def _worth_saying(config: Longcat2Config) -> Iterator[tuple[str, Any]]:
    """What other readers expect to find, and what is not at its default."""
    switched = {"index": config.use_lsa, "indexer": config.use_lsa, "cli": config.use_lsa, "oe": config.use_ngram}
    for name, field in _FIELDS.items():
        value = getattr(config, name)
        if value is None or name == "rope_parameters":
            continue
        official = not name.startswith(tuple(_OURS.split())) and switched.get(name.partition("_")[0], True)
        if official or value != field.default:
            yield name, value


def _check_family(layer: Layer) -> None:
    stated = [key for key in _WHAT_IT_IS if layer.data.get(key) is not None]
    if (stated or layer.file.endswith(".json")) and not is_longcat(layer.data):
        said = ", ".join(f"{key}={layer.data[key]}" for key in stated) or "it has neither architectures nor model_type"
        raise ConfigError(
            f"{layer.origin(tuple(stated[:1]))}: {said}: this is no LongCat model. Give one with an architecture of "
            f"{', '.join(_ARCHITECTURES)}, or a model_type of {', '.join(_MODEL_TYPES)}."
        )


def _refuse_unknown(layer: Layer) -> None:
    for key in layer.data:
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, sorted(_KNOWN), n=1)
            cure = f"Did you mean `{near[0]}`?" if near else "Remove it, or give it its official name."
            raise ConfigError(f"{layer.origin((key,))}: the field `{key}` is unknown. {cure}")


def _as_declared(key: str, value: Any) -> Any:
    """``value``, or the float that a whole number stands for where only a float is declared."""
    types = _types(key)
    return float(value) if type(value) is int and float in types and int not in types else value


def _types(key: str) -> tuple[Any, ...]:
    """The types that a field is declared with; none for a key that is no field."""
    hint = _FIELDS[key].type if key in _FIELDS else None
    return tuple(get_origin(arm) or arm for arm in (get_args(hint) or (hint,)))


def _check_rope(settings: Mapping[str, Any], layer: Layer) -> None:
    """Types and signs, which the config itself takes on trust here."""
    numbers: dict[KeyPath, Any] = {("rope_theta",): settings["rope_theta"]} if "rope_theta" in settings else {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = settings.get(key) or {}
        if not isinstance(rope, dict):
            raise ConfigError(f"{layer.origin((key,))}: `{key}` must be a mapping, it is {describe(rope)}. Change it.")
        numbers |= {(key, name): value for name, value in rope.items() if name not in ("type", "rope_type")}
    for path, value in numbers.items():
        if value is not None and (type(value) not in (int, float) or value <= 0):
            place = f"{layer.origin(path)}: `{dotted(path)}`"
            raise ConfigError(f"{place} must be a number above 0, it is {describe(value)}. Change the value.")


def _wrong_type(message: str, settings: Mapping[str, Any], layer: Layer) -> str:
    """A sentence in place of ``huggingface_hub``'s message, which has two lines and speaks of Python's types."""
    found = re.search(r"field '(\w+)'", message)
    if found is None or found[1] not in _FIELDS:
        return f"{layer.file}: {' '.join(message.split())}"
    key = found[1]
    wanted = " or ".join(dict.fromkeys(_KINDS.get(kind, str(kind)) for kind in _types(key)))
    return f"{layer.origin((key,))}: `{key}` must be {wanted}, it is {describe(settings.get(key))}. Change the value."


def _place(message: str, layer: Layer) -> str:
    """Where that field of the file stands which the message names first."""
    at = {key: found.start() for key in layer.data if (found := re.search(rf"\b{re.escape(key)}\b", message))}
    if not at and re.search("rope|yarn", message):
        at = {key: 0 for key in ("rope_scaling", "rope_parameters") if key in layer.data}
    return str(layer.origin((min(at, key=lambda key: at[key]),)) if at else layer.file)
