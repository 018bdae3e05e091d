"""What every markup says of itself, and what they share to read a call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from posttrain.types import Message, Tool, ToolCall


class Mark(str):
    """A markup token. Only these become special ids: text that merely looks like markup, from a tool or a user, is
    encoded letter by letter and cannot forge a turn."""


class ParseError(ValueError):
    """A malformed assistant turn. ``name`` is one of: unfinished, open_think, open_call, bad_call, bad_argument."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name


class Markup(Protocol):
    """One family's. Implemented by modules. Functions give parts: text, and the ``Mark``s that stand in it."""

    NAME: str
    """For people."""
    SPECIAL: tuple[str, ...]
    """What a tokenizer must know."""
    END: str
    """Ends an assistant turn, and is sampled."""
    STOPS: tuple[str, ...]
    """Whatever ends sampling; a turn that ends otherwise than by ``END`` is unfinished."""
    THINK: str
    """Opens the thinking where the model opens it itself; empty: the prompt does."""
    END_THINK: str
    CALL: str
    END_CALL: str
    IN_CALL: tuple[str, ...]
    """Marks that mean nothing outside a call."""

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool) -> list[str]:
        """The first messages, and the tools that there are."""
        ...

    def given(self, messages: Sequence[Message], thinking: bool) -> list[str]:
        """What comes after an assistant turn: the rest of that turn which nobody samples, then ``messages``."""
        ...

    def begin(self, thinking: bool) -> list[str]:
        """Up to where the assistant's tokens begin."""
        ...

    def answer(self, message: Message, thinking: bool) -> list[str]:
        """The assistant's tokens."""
        ...

    def parse_call(self, block: str, tools: Sequence[Tool]) -> ToolCall:
        """What follows one ``CALL``, up to the next one. Raises ParseError."""
        ...


def tool_dict(tool: Tool) -> dict[str, Any]:
    """The tool as ``apply_chat_template(tools=...)`` wants it."""
    properties = {k: {} if t == "json" else {"type": t} for k, t in tool.parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": schema}}


_LESS = "\ue000"
"""Stands for a sampled "<" while an answer is parsed: letters that spell markup are not markup."""


def hidden(text: str) -> str:
    """``text`` in which nothing looks like markup."""
    return text.replace("<", _LESS)


def plain(text: str) -> str:
    """Undoes ``hidden``."""
    return text.replace(_LESS, "<")


def body_of(block: str, closing: str) -> str:
    """What stands before ``closing``, with nothing but space after it. Raises ParseError."""
    body, closed, rest = block.partition(closing)
    if not closed:
        raise ParseError("open_call", f"no {closing.strip()}")
    if rest.strip():
        raise ParseError("bad_call", "text after a call")
    return body


def from_json(text: str, name: str, what: str) -> Any:
    """The value that ``text`` holds. Raises ParseError ``name``; ``bad_argument`` for a key that is there twice."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except ParseError:
        raise
    except (ValueError, RecursionError) as error:
        raise ParseError(name, f"{what} is not JSON: {text[:40]!r}") from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise ParseError("bad_argument", f"{twice} twice")
    return out
