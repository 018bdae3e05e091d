"""Where the values of a config come from: YAML files that extend one another, and ``--set`` on top.

Every key keeps its origin (file and line, or the ``--set`` that gave it), so that a mistake is reported where it was
made and not where it was noticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from posttrain.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a config down to one value."""

_MERGE_TAG = "tag:yaml.org,2002:merge"
_STR_TAG = "tag:yaml.org,2002:str"
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_KEY = re.compile(r"^[^\s.=]+(\.[^\s.=]+)*$")


def dotted(path: KeyPath) -> str:
    """``("experts", 0, "lr")`` as a person writes it: ``experts.0.lr``."""
    return ".".join(str(part) for part in path)


@dataclass(frozen=True, slots=True)
class Origin:
    source: str
    """File, or the whole ``--set KEY=VALUE``."""
    line: int | None = None
    """Line in the file, from 1."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line}"

    @property
    def from_command_line(self) -> bool:
        """True for a value given by ``--set``."""
        return self.source.startswith("--set ")


@dataclass(frozen=True, slots=True)
class Layer:
    data: dict[str, Any]
    """Plain JSON values."""
    origins: dict[KeyPath, Origin]
    """Origin of every key in ``data``. May hold stale entries for keys that a later layer replaced."""
    file: str
    """The config that was asked for, for mistakes that no key can be blamed for."""

    def origin(self, path: KeyPath) -> Origin:
        """Origin of ``path``, or of its nearest ancestor that has one."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return Origin(self.file)


class Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-5`` as a number and leaves dates as text."""


class Dumper(yaml.SafeDumper):
    """Quotes whatever ``Loader`` would not read back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write shared values out: a resolved config has no anchors."""
        return True


_sides: tuple[Any, ...] = (Loader, Dumper)  # Any: the stubs of PyYAML leave these methods without types
for _side in _sides:
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
# Without a resolver for timestamps a date is text.
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in Loader.yaml_implicit_resolvers.items()
}


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``: mappings merge key by key, everything else (lists too) is replaced.

    A mapping whose ``type`` changes starts afresh, since the keys of another implementation mean nothing to it.
    """
    if "type" in base and "type" in top and base["type"] != top["type"]:
        return dict(top)
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(_mapping(below), _mapping(value)) if _both_mappings(below, value) else value
    return merged


def read_layers(path: Path, overrides: Sequence[str]) -> Layer:
    """The file at ``path`` over what it extends, and ``overrides`` (``a.b=value``) over both. Raises ConfigError."""
    layer = _read_chain(str(path), ())
    sets = [_parse_override(override) for override in overrides]
    top: dict[str, Any] = {}
    for keys, value, _ in sets:
        nested: dict[str, Any] = {keys[-1]: value}
        for key in reversed(keys[:-1]):
            nested = {key: nested}
        top = merge(top, nested)
    origins = dict(layer.origins)
    for keys, value, origin in sets:
        for end in range(1, len(keys)):  # parents that the file does not have, or has as something else
            if not isinstance(_get(layer.data, keys[:end]), dict):
                origins[keys[:end]] = origin
        origins.update(dict.fromkeys(_paths(value, keys), origin))
    return Layer(data=merge(layer.data, top), origins=origins, file=layer.file)


def _read_chain(file: str, above: tuple[str, ...]) -> Layer:
    """``file`` over everything it extends; ``above`` are the files that led here."""
    seen = [os.path.realpath(f) for f in above]
    if os.path.realpath(file) in seen:
        circle = " -> ".join([*above, file])
        raise ConfigError(f"{above[-1]}: `extends` goes in a circle: {circle}. Remove one of them.")
    layer = _read_file(file, above)
    if "extends" not in layer.data:
        return layer
    target = layer.data.pop("extends")
    origin = layer.origins.pop(("extends",))
    if not isinstance(target, str) or not target:
        raise ConfigError(f"{origin}: `extends` must be the path of one YAML file, relative to {file}.")
    base = _read_chain(os.path.normpath(os.path.join(os.path.dirname(file), target)), (*above, file))
    return Layer(data=merge(base.data, layer.data), origins={**base.origins, **layer.origins}, file=file)


def _read_file(file: str, above: tuple[str, ...]) -> Layer:
    why = f" (`extends` in {above[-1]})" if above else ""
    cure = "Correct `extends`: it is relative to the file it stands in." if above else "Give the path of a YAML config."
    try:
        text = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file{why}.{_neighbours(file)} {cure}") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is a directory, not a file{why}.{_neighbours(file)} {cure}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start}){why}. {cure}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}{why}. {cure}") from None
    value, origins = _parse(text, file)
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: the top level must be a mapping (`key: value` lines), it is {describe(value)}.")
    return Layer(data=cast(dict[str, Any], value), origins=origins, file=file)


def _neighbours(file: str) -> str:
    """The YAML files that lie where the missing one was looked for."""
    folder = Path(file) if Path(file).is_dir() else Path(file).parent
    names = sorted(str(p) for p in folder.glob("*.y*ml"))[:6] if folder.is_dir() else []
    return f" There are: {', '.join(names)}." if names else ""


def _parse_override(override: str) -> tuple[tuple[str, ...], Any, Origin]:
    key, equals, text = override.partition("=")
    origin = Origin(f"--set {override}")
    if not equals or not _KEY.match(key):
        raise ConfigError(f"{origin}: is not KEY=VALUE. Write for example --set train.lr=1e-3, no space at the `=`.")
    if key == "extends":
        raise ConfigError(f"{origin}: `extends` belongs in a file. Write a YAML file that extends the other.")
    value, _ = _parse(text, str(origin))
    return tuple(key.split(".")), value, origin


def _parse(text: str, source: str) -> tuple[Any, dict[KeyPath, Origin]]:
    """The value of one YAML document and the line of every key in it."""
    origins: dict[KeyPath, Origin] = {}
    try:
        loader: Any = Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, {}
            _Walk(loader, source, origins).node(node, ())
            return loader.construct_document(node), origins
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}.") from None


class _Walk:
    """Visits a YAML tree before it is built: notes lines, refuses what a config may not hold."""

    def __init__(self, loader: Loader, source: str, origins: dict[KeyPath, Origin]) -> None:
        self.loader = loader
        self.source = source
        self.origins = origins
        self.open: set[int] = set()
        self.flat: set[int] = set()

    def node(self, node: yaml.Node, path: KeyPath) -> None:
        """Visit ``node``, the value of ``path``."""
        if id(node) in self.open:
            raise self.mistake(node, f"`{dotted(path)}` contains itself; write it out")
        if node.tag not in _PLAIN_TAGS:
            raise self.mistake(node, f"`{dotted(path)}` has the tag {node.tag}; only plain values are allowed")
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self.mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.note(item, (*path, index))
                self.node(item, (*path, index))
        self.open.remove(id(node))

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> None:
        """Visit the pairs of a mapping, those of a ``<<`` first."""
        if id(node) not in self.flat:
            self.flat.add(id(node))
            first: dict[str, int] = {}
            for key, _ in node.value:
                if key.tag not in (_STR_TAG, _MERGE_TAG):
                    raise self.mistake(key, f"a key under `{dotted(path) or 'the top'}` is not text; put it in quotes")
                if key.value in first:
                    message = f"the key `{dotted((*path, key.value))}` stands twice (first on line {first[key.value]})"
                    raise self.mistake(key, f"{message}; keep one")
                first[key.value] = key.start_mark.line + 1
            self.loader.flatten_mapping(node)
        for key, value in node.value:
            self.note(key, (*path, key.value))
            self.node(value, (*path, key.value))

    def note(self, node: yaml.Node, path: KeyPath) -> None:
        """Remember the line of ``path``."""
        self.origins[path] = Origin(self.source, node.start_mark.line + 1)

    def mistake(self, node: yaml.Node, message: str) -> ConfigError:
        """Error at the line of ``node``."""
        return ConfigError(f"{self.source}, line {node.start_mark.line + 1}: {message}.")


def describe(value: object) -> str:
    """A value as an error message shows it."""
    match value:
        case None:
            return "empty (null)"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value[:60]!r}"
        case dict():
            return "a mapping"
        case _:
            return "a list"


def _both_mappings(left: object, right: object) -> bool:
    return isinstance(left, Mapping) and isinstance(right, Mapping)


def _mapping(value: object) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value)


def _get(data: object, keys: Sequence[str]) -> object:
    for key in keys:
        data = cast(dict[str, object], data).get(key) if isinstance(data, dict) else None
    return data


def _paths(value: object, path: KeyPath) -> list[KeyPath]:
    """``path`` and every path below it."""
    if isinstance(value, dict):
        items: list[tuple[str | int, object]] = list(cast(dict[str | int, object], value).items())
    elif isinstance(value, list):
        items = list(enumerate(cast(list[object], value)))
    else:
        items = []
    return [path, *(p for key, item in items for p in _paths(item, (*path, key)))]
