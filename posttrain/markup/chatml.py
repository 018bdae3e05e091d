"""ChatML with Hermes' tool calls, as Qwen3's own chat template writes them.

In one thing it differs from the stock template, which leaves out the think blocks of earlier turns, empty ones as well:
here they stay, since what was sampled, and what it was sampled after, is what is trained on. TRL's
``qwen3_training.jinja`` is the same form as a template; tests hold this module against both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby

from posttrain.markup.base import Mark, ParseError, body_of, from_json, plain, tool_dict
from posttrain.types import Message, Tool, ToolCall

NAME: str = "ChatML (Qwen3)"
START, TEXT_END = "<|im_start|>", "<|endoftext|>"
END: str = "<|im_end|>"
THINK: str = "<think>"
END_THINK: str = "</think>"
CALL: str = "<tool_call>"
END_CALL: str = "</tool_call>"
RESPONSE, END_RESPONSE = "<tool_response>", "</tool_response>"
SPECIAL: tuple[str, ...] = (TEXT_END, START, END, CALL, END_CALL, RESPONSE, END_RESPONSE, THINK, END_THINK)
"""In the order of their ids."""
STOPS: tuple[str, ...] = (END, TEXT_END)
IN_CALL: tuple[str, ...] = ()

_TURN_END = [Mark(END), "\n"]


def _tools(tools: Sequence[Tool]) -> list[str]:
    schemas = "".join(f"\n{json.dumps(tool_dict(t), ensure_ascii=False)}" for t in tools)
    return [
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{schemas}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within ",
        Mark(CALL),
        Mark(END_CALL),
        " XML tags:\n",
        Mark(CALL),
        '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
        Mark(END_CALL),
    ]


def opening(messages: Sequence[Message], tools: Sequence[Tool], thinking: bool) -> list[str]:
    """See ``Markup``. Tools stand in the first system message."""
    out: list[str] = []
    if tools:
        out = [Mark(START), "system\n"]
        if messages[0].role == "system":
            out += [messages[0].content, "\n\n"]
            messages = messages[1:]
        out += [*_tools(tools), *_TURN_END]
    return out + _messages(messages, thinking)


def given(messages: Sequence[Message], thinking: bool) -> list[str]:
    """See ``Markup``."""
    return ["\n", *_messages(messages, thinking)]


def _messages(messages: Sequence[Message], thinking: bool) -> list[str]:
    """What tools answered at once is one turn, the user's."""
    out: list[str] = []
    for from_tools, together in groupby(messages, lambda m: m.role == "tool"):
        if from_tools:
            out += [Mark(START), "user"]
            for message in together:
                out += ["\n", Mark(RESPONSE), f"\n{message.content}\n", Mark(END_RESPONSE)]
            out += _TURN_END
            continue
        for message in together:
            if message.role == "assistant":
                out += [*begin(thinking), *answer(message, thinking), "\n"]
            else:
                out += [Mark(START), f"{message.role}\n{message.content}", *_TURN_END]
    return out


def begin(thinking: bool) -> list[str]:
    """See ``Markup``. The model opens its thinking itself; that there is none is given."""
    opened = [Mark(START), "assistant\n"]
    return opened if thinking else [*opened, Mark(THINK), "\n\n", Mark(END_THINK), "\n\n"]


def answer(message: Message, thinking: bool) -> list[str]:
    """See ``Markup``."""
    thought = message.thinking.strip("\n")
    parts: list[str] = [Mark(THINK), f"\n{thought}\n", Mark(END_THINK), "\n\n"] if thinking else []
    parts.append(message.content.lstrip("\n"))
    for number, call in enumerate(message.tool_calls):
        said = json.dumps(dict(call.arguments), ensure_ascii=False)
        between = "\n" if number or message.content else ""
        parts += [between, Mark(CALL), f'\n{{"name": "{call.name}", "arguments": {said}}}\n', Mark(END_CALL)]
    return [*parts, Mark(END)]


def parse_call(block: str, tools: Sequence[Tool]) -> ToolCall:
    """See ``Markup``. Arguments have the types that JSON gives them; a session compares them with the schema."""
    body = plain(body_of(block, END_CALL))
    call = from_json(body, "bad_call", "a call")
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        raise ParseError("bad_call", f"not an object of name and arguments: {body.strip()[:40]!r}")
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or not name:
        raise ParseError("bad_call", f"not a tool name: {name!r:.40}")
    if not isinstance(arguments, dict):
        raise ParseError("bad_argument", f"arguments of {name[:40]} are no object")
    return ToolCall(name=name, arguments=arguments)
