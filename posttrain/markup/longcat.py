"""The LongCat family's second-generation markup. As a Jinja template it travels with the tokenizer (``TEMPLATE``); a
test holds the two against each other token by token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.markup.base import Mark, ParseError, body_of, from_json, plain
from posttrain.types import Message, Tool, ToolCall

NAME: str = "LongCat"
PAD, BOS, EOS = "<longcat_pad>", "<longcat_s>", "</longcat_s>"
OPEN_THINK = "<longcat_think>"
END_THINK: str = "</longcat_think>"
CALL: str = "<longcat_tool_call>"
END_CALL: str = "</longcat_tool_call>"
KEY, END_KEY = "<longcat_arg_key>", "</longcat_arg_key>"
VALUE, END_VALUE = "<longcat_arg_value>", "</longcat_arg_value>"
SYSTEM, USER, ASSISTANT, OBSERVATION = (
    "<longcat_system>",
    "<longcat_user>",
    "<longcat_assistant>",
    "<longcat_observation>",
)
THINK_ON, THINK_OFF = " /think_on", " /think_off"
UNKNOWN = "<longcat_unk>"
SPECIAL: tuple[str, ...] = (
    PAD, BOS, EOS, UNKNOWN, OPEN_THINK, END_THINK, CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE,
    SYSTEM, USER, ASSISTANT, OBSERVATION, THINK_ON, THINK_OFF,
)  # fmt: skip
"""In the order of their ids: pad 0, bos 1, eos 2 as in the family."""
END: str = EOS
STOPS: tuple[str, ...] = (EOS,)
THINK: str = ""
IN_CALL: tuple[str, ...] = (KEY, VALUE)

TEMPLATE = (Path(__file__).parent / "longcat.jinja").read_text()

_ARGUMENT = re.compile(rf"\n{KEY}(?P<key>[^<\n]*){END_KEY}\n{VALUE}(?P<value>.*?){END_VALUE}", flags=re.DOTALL)


def tool_line(tool: Tool) -> str:
    """One line of the system message."""
    arguments = ", ".join(k if t == "string" else f"{k}: {t}" for k, t in tool.parameters.items())
    return f"{tool.name}({arguments}) {tool.description}".rstrip()


def opening(messages: Sequence[Message], tools: Sequence[Tool], thinking: bool) -> list[str]:
    """See ``Markup``. Tools stand in the first system message."""
    if tools and messages[0].role != "system":
        messages = [Message(role="system", content=""), *messages]
    first, *others = messages
    if first.role != "system":
        return given(messages, thinking)
    return [Mark(SYSTEM), "\n".join([first.content, *map(tool_line, tools)]), *given(others, thinking)]


def given(messages: Sequence[Message], thinking: bool) -> list[str]:
    """See ``Markup``."""
    out: list[str] = []
    for message in messages:
        if message.role == "assistant":
            out += [*begin(thinking), *answer(message, thinking)]
        else:
            mark = {"system": SYSTEM, "user": USER}.get(message.role, OBSERVATION)
            out += [Mark(mark), message.content]
    return out


def begin(thinking: bool) -> list[str]:
    """See ``Markup``."""
    if thinking:
        return [Mark(THINK_ON), Mark(ASSISTANT), Mark(OPEN_THINK), "\n"]
    return [Mark(THINK_OFF), Mark(ASSISTANT)]


def answer(message: Message, thinking: bool) -> list[str]:
    """See ``Markup``."""
    parts: list[str] = [message.thinking, Mark(END_THINK)] if thinking else []
    parts.append(message.content)
    for call in message.tool_calls:
        parts += [Mark(CALL), call.name]
        for key, value in call.arguments.items():
            raw = value if isinstance(value, str) else json.dumps(value)
            parts += ["\n", Mark(KEY), key, Mark(END_KEY), "\n", Mark(VALUE), raw, Mark(END_VALUE)]
        parts += ["\n", Mark(END_CALL)]
    return [*parts, Mark(EOS)]


def parse_call(block: str, tools: Sequence[Tool]) -> ToolCall:
    """See ``Markup``. A string stands bare; whatever else the tool's schema says is JSON."""
    body = body_of(block, f"\n{END_CALL}")
    name = body.split("\n", 1)[0]
    if not name or "<" in name:
        raise ParseError("bad_call", f"not a tool name: {plain(name)[:40]!r}")
    types = next((t.parameters for t in tools if t.name == name), {})
    arguments: dict[str, Any] = {}
    position = len(name)
    for match in _ARGUMENT.finditer(body, position):
        if match.start() != position:
            break
        key, value, position = plain(match["key"]), plain(match["value"]), match.end()
        if key in arguments:
            raise ParseError("bad_argument", f"{key} twice")
        is_text = types.get(key, "string") == "string"
        arguments[key] = value if is_text else from_json(value, "bad_argument", key)
    if position != len(body):
        raise ParseError("bad_argument", f"cannot read {plain(body)[position : position + 40]!r}")
    return ToolCall(name=plain(name), arguments=arguments)
