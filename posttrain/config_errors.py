"""Turns pydantic's validation errors into sentences that name the file, the key, the nearest valid key and the cure."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from posttrain.config_layers import KeyPath, Layer, describe, dotted

_MOST = 8
"""Mistakes shown at once."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
}

_KINDS: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, slots=True)
class _Place:
    path: KeyPath
    """Keys as they stand in the YAML: pydantic's own union labels taken out."""
    owner: type[BaseModel] | None
    """The model whose field the last key is, if it is one's."""
    hint: Any
    """Annotation of the value; None if there is none."""


def explain(error: ValidationError, model: type[BaseModel], layer: Layer) -> str:
    """One paragraph a mistake, in the order of the model's fields."""
    lines: list[str] = []
    expected: dict[KeyPath, list[str]] = {}
    details = error.errors(include_url=False)
    for detail in details:
        place = _place(model, detail["loc"])
        if wanted := _wanted(detail):  # the arms of a plain union each complain: one sentence for all of them
            expected.setdefault(place.path, []).append(wanted)
    told: set[KeyPath] = set()
    for detail in details:
        place = _place(model, detail["loc"])
        if place.path in expected:
            if place.path not in told:
                told.add(place.path)
                lines.append(_wrong_value(place, detail, expected[place.path], layer))
        else:
            lines.append(_sentence(place, detail, layer))
    more = [f"... and {len(lines) - _MOST} more mistakes."] if len(lines) > _MOST else []
    return "\n".join(lines[:_MOST] + more)


def _sentence(place: _Place, detail: ErrorDetails, layer: Layer) -> str:
    key = dotted(place.path)
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(place, layer)
        case "missing":
            return _missing_key(place, layer)
        case "union_tag_invalid":
            given = str(detail.get("ctx", {}).get("tag"))
            where = layer.origin((*place.path, "type"))
            return f"{where}: unknown type {given!r} for `{key}`.{_suggest(given, _types(place.hint), 'Valid types')}"
        case "union_tag_not_found":
            valid = _types(place.hint)
            return f"{layer.origin(place.path)}: `{key}` needs the key `type`, one of: {', '.join(valid)}."
        case "value_error":
            reason = str(detail.get("ctx", {}).get("error", detail["msg"])).rstrip(".")
            return f"{layer.origin(place.path)}: {f'`{key}`: ' if key else ''}{reason}."
        case _:
            reason = detail["msg"].removeprefix("Input ")
            subject = f"`{key}`" if key else "the config"
            given = describe(detail["input"])
            return f"{layer.origin(place.path)}: {subject} {reason}, it is {given}. Change the value."


def _wanted(detail: ErrorDetails) -> str | None:
    if detail["type"] in ("literal_error", "enum"):
        return f"one of {detail.get('ctx', {}).get('expected')}"
    return _EXPECTED.get(detail["type"])


def _wrong_value(place: _Place, detail: ErrorDetails, expected: Sequence[str], layer: Layer) -> str:
    origin = layer.origin(place.path)
    given: Any = detail["input"]
    wanted = " or ".join(dict.fromkeys(expected))
    text = f"{origin}: `{dotted(place.path) or 'the config'}` must be {wanted}, it is {describe(given)}."
    if isinstance(given, str) and detail["type"] in ("literal_error", "enum"):
        options = [str(v) for arm in _arms(place.hint) if get_origin(arm) is Literal for v in get_args(arm)]
        close = difflib.get_close_matches(given, options, n=1)
        return f"{text} Did you mean {close[0]!r}?" if close else f"{text} Choose one of them."
    if isinstance(given, str) and "number" in wanted:
        return f"{text} Write a number, without quotes or a unit."
    if wanted == "text":
        return f"{text} Put the value in quotes."
    if wanted == "a list" and origin.from_command_line:
        return f"{text} A list is replaced as a whole: --set {dotted(place.path)}='[...]'."
    if wanted == "a mapping":
        keys = [k for arm in _arms(place.hint) for k in _fields(arm)]
        return f"{text} Write its keys below it: {', '.join(keys)}." if keys else f"{text} Write `key: value` below it."
    return f"{text} Change the value."


def _unknown_key(place: _Place, layer: Layer) -> str:
    given = str(place.path[-1])
    parent = place.path[:-1]
    valid = [dotted((*parent, name)) for name in _fields(place.owner)]
    text = f"{layer.origin(place.path)}: unknown key `{dotted(place.path)}`."
    close = difflib.get_close_matches(given, _fields(place.owner), n=1)
    if close:
        text += f" Did you mean `{dotted((*parent, close[0]))}`?"
    elif not valid:
        return f"{text} `{dotted(parent) or 'The config'}` has no keys: remove it."
    else:
        text += " Remove it or use a valid one."
    return f"{text} Valid keys there: {', '.join(valid)}."


def _missing_key(place: _Place, layer: Layer) -> str:
    parent = place.path[:-1]
    # A mapping's `type` decides which keys it needs, so whoever chose the type is told.
    origin = layer.origin((*parent, "type") if (*parent, "type") in layer.origins else parent)
    field = place.owner.model_fields.get(str(place.path[-1])) if place.owner else None
    about = "; ".join(part for part in (_kind(place.hint), field.description if field else None) if part)
    about = f" ({' '.join(about.split()).rstrip('.')})" if about else ""
    key, where = dotted(place.path), f"under `{dotted(parent)}`" if parent else "at the top level"
    return f"{origin}: the key `{key}` is missing{about}. Add it {where} or give --set {key}=VALUE."


def _suggest(given: str, valid: Sequence[str], title: str) -> str:
    close = difflib.get_close_matches(given, valid, n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" {title}: {', '.join(valid)}."


def _place(model: type[BaseModel], loc: Iterable[str | int]) -> _Place:
    """Follow ``loc`` through the annotations: union labels are no keys, everything else is."""
    path: list[str | int] = []
    owner: type[BaseModel] | None = None
    hint: Any = model
    for part in loc:
        arms = _arms(hint)
        if part == "[key]":
            continue
        if len(arms) > 1:
            hint = next((arm for arm in arms if part in _labels(arm)), None)
            continue
        arm = arms[0] if arms else None
        owner = None
        if _is_model(arm):
            owner = cast(type[BaseModel], arm)
            field = owner.model_fields.get(str(part))
            hint = field.annotation if field else None
        elif arm is None:
            continue
        else:
            args = [a for a in get_args(arm) if a is not Ellipsis]
            hint = args[min(int(part), len(args) - 1)] if isinstance(part, int) and args else (args or [None])[-1]
        path.append(part)
    return _Place(path=tuple(path), owner=owner, hint=hint)


def _arms(hint: Any) -> list[Any]:
    """Members of a union, unwrapped, without None; one member if ``hint`` is no union."""
    if hint is None or hint is type(None):
        return []
    if get_origin(hint) is Annotated:
        return _arms(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [arm for member in get_args(hint) for arm in _arms(member)]
    return [hint]


def _is_model(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _fields(hint: Any) -> list[str]:
    return list(cast(type[BaseModel], hint).model_fields) if _is_model(hint) else []


def _tags(arm: Any) -> list[str]:
    """The values of the field ``type`` that choose this member of a union."""
    if "type" not in _fields(arm):
        return []
    annotation = cast(type[BaseModel], arm).model_fields["type"].annotation
    return [str(value) for value in get_args(annotation)]


def _types(hint: Any) -> list[str]:
    return [tag for arm in _arms(hint) for tag in _tags(arm)]


def _labels(arm: Any) -> list[str]:
    """What pydantic calls this member of a union in an error's location."""
    return [*_tags(arm), getattr(arm, "__name__", str(arm))]


def _kind(hint: Any) -> str | None:
    arms = _arms(hint)
    if len(arms) != 1:
        return f"type: {' | '.join(_types(hint))}" if _types(hint) else None
    if get_origin(arms[0]) is Literal:
        return f"one of {', '.join(repr(v) for v in get_args(arms[0]))}"
    return "a mapping" if _is_model(arms[0]) else _KINDS.get(arms[0])
