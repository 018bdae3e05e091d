"""Messages to tokens and back, in the LongCat family's second-generation markup.

Encoding is append-only: the ids of a conversation are the ids of its beginning plus what the last message added, so
what was sampled is never encoded again. Reasoning of earlier turns is kept for the same reason (the family's
``save_history_reasoning_content``). The same markup as a Jinja template travels with the tokenizer
(``CHAT_TEMPLATE``); a test holds the two against each other token by token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.types import Message, Segment, Tool, ToolCall

PAD, BOS, EOS = "<longcat_pad>", "<longcat_s>", "</longcat_s>"
THINK, END_THINK = "<longcat_think>", "</longcat_think>"
CALL, END_CALL = "<longcat_tool_call>", "</longcat_tool_call>"
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
SPECIAL = (
    PAD, BOS, EOS, UNKNOWN, THINK, END_THINK, CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE,
    SYSTEM, USER, ASSISTANT, OBSERVATION, THINK_ON, THINK_OFF,
)  # fmt: skip
"""In the order of their ids: pad 0, bos 1, eos 2 as in the family."""
DECISIONS = (EOS, CALL, END_THINK)
"""What a model decides with: to end the turn, to call a tool, to stop thinking."""

CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text()

_ARGUMENT = re.compile(rf"\n{KEY}(?P<key>[^<\n]*){END_KEY}\n{VALUE}(?P<value>.*?){END_VALUE}", flags=re.DOTALL)

_LESS = "\ue000"
"""Stands for a sampled "<" while an answer is parsed: letters that spell markup are not markup."""


def _plain(text: str) -> str:
    return text.replace(_LESS, "<")


class ParseError(ValueError):
    """A malformed assistant turn. ``name`` is one of: unfinished, open_think, open_call, bad_call, bad_argument."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A small byte-pair tokenizer over printable ASCII, in which a run of letters is one word and every digit,
    space and sign stands alone, so that a value looks the same wherever it is copied to. Deterministic."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    split = pre_tokenizers.Split(Regex(r"[A-Za-z]+|[^A-Za-z]"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    ascii_text = "".join(chr(c) for c in range(32, 127)) + "\n\t"
    alphabet = [
        a for a, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(ascii_text)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(set("".join(alphabet))),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tool_line(tool: Tool) -> str:
    """One line of the system message."""
    arguments = ", ".join(k if t == "string" else f"{k}: {t}" for k, t in tool.parameters.items())
    return f"{tool.name}({arguments}) {tool.description}".rstrip()


def tool_dict(tool: Tool) -> dict[str, Any]:
    """The tool as ``apply_chat_template(tools=...)`` wants it."""
    properties = {k: {"type": t} for k, t in tool.parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": schema}}


class Mark(str):
    """A markup token. Only these become special ids: text that merely looks like markup, from a tool or a user, is
    encoded letter by letter and cannot forge a turn."""


class Chat:
    """Encodes and parses for one tokenizer that knows the markup of ``SPECIAL``."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocab = tokenizer.get_vocab()
        missing = [t for t in SPECIAL if t not in vocab]
        if missing:
            raise ValueError(f"the tokenizer lacks {missing[:3]}: make one with `posttrain.chat.train_tokenizer`")
        self.tokenizer = tokenizer
        self._special = {t: vocab[t] for t in SPECIAL}
        self._markup = frozenset(self._special.values())
        self.stop_ids: tuple[int, ...] = (self._special[EOS],)
        self.decision_ids: tuple[int, ...] = tuple(self._special[t] for t in DECISIONS)
        self._encode = lru_cache(maxsize=65536)(self._encode_text)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _ids(self, parts: Iterable[str]) -> tuple[int, ...]:
        out: list[int] = []
        for part in parts:
            out += (self._special[part],) if isinstance(part, Mark) else self._encode(part) if part else ()
        return tuple(out)

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool) -> tuple[int, ...]:
        """Ids of the first messages up to where the assistant begins."""
        if tools and messages[0].role != "system":
            messages = [Message(role="system", content=""), *messages]
        first, *others = messages
        parts = self._given(first, tools, thinking) + [p for m in others for p in self._given(m, (), thinking)]
        return self._ids(parts + _begin(thinking))

    def addition(self, messages: Sequence[Message], thinking: bool) -> tuple[int, ...]:
        """Ids that tool results or the user's next words add, up to where the assistant begins again."""
        return self._ids([p for m in messages for p in self._given(m, (), thinking)] + _begin(thinking))

    def answer(self, message: Message, thinking: bool) -> tuple[int, ...]:
        """Ids of an assistant message as the model would have sampled it."""
        return self._ids(_answer(message, thinking))

    def segments(
        self, prompt: Sequence[Message], rest: Sequence[Message], tools: Sequence[Tool], thinking: bool
    ) -> list[Segment]:
        """A whole written conversation, assistant turns marked as sampled (with log-prob 0 and version 0). ``rest``
        begins with an assistant turn; what comes after the last one is left out."""
        out = [Segment.given(self.opening(prompt, tools, thinking))]
        given: list[Message] = []
        for message in rest:
            if message.role != "assistant":
                given.append(message)
                continue
            if given or len(out) > 1:
                out.append(Segment.given(self.addition(given, thinking)))
                given = []
            ids = self.answer(message, thinking)
            n = len(ids)
            out.append(Segment(ids=ids, sampled=(True,) * n, logprobs=(0.0,) * n, versions=(0,) * n))
        return out

    def _given(self, message: Message, tools: Sequence[Tool], thinking: bool) -> list[str]:
        if message.role == "assistant":
            return [*_begin(thinking), *_answer(message, thinking)]
        if message.role == "system":
            return [Mark(SYSTEM), "\n".join([message.content, *map(tool_line, tools)])]
        return [Mark(USER if message.role == "user" else OBSERVATION), message.content]

    def decode(self, ids: Sequence[int]) -> str:
        """Text with the markup visible."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def plain(self, ids: Sequence[int]) -> str:
        """Text without markup."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def parse(self, ids: Sequence[int], tools: Sequence[Tool], thinking: bool) -> Message:
        """The assistant message that was sampled. Raises ParseError."""
        runs = groupby(ids, self._markup.__contains__)
        text = "".join(self.decode(r) if markup else self.decode(r).replace("<", _LESS) for markup, (*r,) in runs)
        if not text.endswith(EOS):
            raise ParseError("unfinished", "no end of turn within the token limit")
        text = text.removesuffix(EOS)
        thought = ""
        if thinking:
            thought, closed, text = text.partition(END_THINK)
            if not closed:
                raise ParseError("open_think", f"no {END_THINK}")
        content, *blocks = text.split(CALL)
        calls = tuple(_parse_call(block, tools) for block in blocks)
        if END_CALL in content or (calls and any(t in content for t in (KEY, VALUE))):
            raise ParseError("bad_call", f"{END_CALL} without {CALL}")
        content, thought = _plain(content.strip()), _plain(thought.strip())
        return Message(role="assistant", content=content, thinking=thought, tool_calls=calls)


def _begin(thinking: bool) -> list[str]:
    return [Mark(THINK_ON), Mark(ASSISTANT), Mark(THINK), "\n"] if thinking else [Mark(THINK_OFF), Mark(ASSISTANT)]


def _answer(message: Message, thinking: bool) -> list[str]:
    parts: list[str] = [message.thinking, Mark(END_THINK)] if thinking else []
    parts.append(message.content)
    for call in message.tool_calls:
        parts += [Mark(CALL), call.name]
        for key, value in call.arguments.items():
            raw = value if isinstance(value, str) else json.dumps(value)
            parts += ["\n", Mark(KEY), key, Mark(END_KEY), "\n", Mark(VALUE), raw, Mark(END_VALUE)]
        parts += ["\n", Mark(END_CALL)]
    return [*parts, Mark(EOS)]


def _parse_call(block: str, tools: Sequence[Tool]) -> ToolCall:
    body, closed, rest = block.partition(f"\n{END_CALL}")
    if not closed:
        raise ParseError("open_call", f"no {END_CALL}")
    if rest.strip():
        raise ParseError("bad_call", "text after a call")
    name = body.split("\n", 1)[0]
    if not name or "<" in name:
        raise ParseError("bad_call", f"not a tool name: {_plain(name)[:40]!r}")
    types = next((t.parameters for t in tools if t.name == name), {})
    arguments: dict[str, Any] = {}
    position = len(name)
    for match in _ARGUMENT.finditer(body, position):
        if match.start() != position:
            break
        key, value, position = _plain(match["key"]), _plain(match["value"]), match.end()
        if key in arguments:
            raise ParseError("bad_argument", f"{key} twice")
        arguments[key] = value if types.get(key, "string") == "string" else _from_json(key, value)
    if position != len(body):
        raise ParseError("bad_argument", f"cannot read {_plain(body)[position : position + 40]!r}")
    return ToolCall(name=_plain(name), arguments=arguments)


def _from_json(key: str, value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ParseError("bad_argument", f"{key} is not JSON: {value[:40]!r}") from error
