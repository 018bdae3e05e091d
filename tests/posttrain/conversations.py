"""The two markups with a tokenizer each, and conversations at random."""

from __future__ import annotations

import string
import unicodedata
from typing import Any

import pytest
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from posttrain.chat import Chat
from posttrain.markup import chatml, longcat
from posttrain.markup.base import Markup, tool_dict
from posttrain.types import Message, Tool, ToolCall
from tests.posttrain.qwen import qwen_tokenizer, template
from tests.posttrain.tiny import make_tokenizer


class Family:
    """A markup, a tokenizer that knows it, and its append-only form as a template."""

    def __init__(self, markup: Markup, tokenizer: PreTrainedTokenizerFast, jinja: str) -> None:
        self.markup, self.tokenizer, self.jinja = markup, tokenizer, jinja
        self.chat, self.vocabulary = Chat(tokenizer), tokenizer.get_vocab()
        self.added = set(tokenizer.added_tokens_decoder)
        self.texts = [t.content for t in tokenizer.added_tokens_decoder.values()]

    def ids_of(self, *parts: str) -> list[int]:
        """Ids in which a part that is markup is markup."""
        special = self.markup.SPECIAL
        return [i for p in parts for i in ([self.vocabulary[p]] if p in special else self.chat._encode_text(p))]

    def by_template(
        self, messages: list[Message], tools: tuple[Tool, ...], thinking: bool, begin: bool
    ) -> dict[str, list[int]]:
        """Ids and assistant mask by the Jinja template."""
        out: Any = self.tokenizer.apply_chat_template(
            [as_dict(m) for m in messages],
            tools=[tool_dict(t) for t in tools] or None,
            chat_template=self.jinja,
            add_generation_prompt=begin,
            return_dict=True,
            return_assistant_tokens_mask=not begin,
            enable_thinking=thinking,
        )
        return out


LONGCAT = Family(longcat, make_tokenizer(), longcat.TEMPLATE)
QWEN = Family(chatml, qwen_tokenizer(), template("qwen3_training"))
both = pytest.mark.parametrize("family", [LONGCAT, QWEN], ids=["longcat", "chatml"])
TOOLS = (
    Tool(name="lookup", description="Find a record. ", parameters={"name": "string", "count": "integer"}),
    Tool(name="update", description="", parameters={"record": "string", "fields": "json", "sure": "boolean"}),
    Tool(name="items", description="Weigh things.", parameters={"type": "number"}),
    Tool(name="finish", description="End.", parameters={}),
)

anything = st.text(st.sampled_from(string.printable[:95] + "\n\t"), max_size=30)
"""Every text that both tokenizers can say."""
MARKUP = (*LONGCAT.texts, *QWEN.texts)
letters = anything.filter(lambda t: not any(s in t for s in MARKUP))
"""Text in which nothing looks like markup: what the Jinja template, which encodes one string, can be trusted with."""
forged = st.lists(st.one_of(st.sampled_from(MARKUP), anything), min_size=1, max_size=5).map("".join)
"""Text that tries to look like markup."""
normal = st.text(max_size=8).filter(lambda t: unicodedata.is_normalized("NFC", t))
"""Text that Qwen's tokenizer does not change."""
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | normal,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(normal, inner, max_size=3),
    max_leaves=6,
)


def values(kind: str, text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Arguments of one type; a string where JSON may stand would be written bare, so it is not drawn."""
    return {
        "string": text,
        "integer": st.integers(),
        "number": st.floats(allow_nan=False, allow_infinity=False),
        "boolean": st.booleans(),
        "json": json_values.filter(lambda v: not isinstance(v, str)),
    }[kind]


def calls(text: st.SearchStrategy[str]) -> st.SearchStrategy[ToolCall]:
    """Calls of the tools above with arguments of their types."""

    def of(tool: Tool) -> st.SearchStrategy[ToolCall]:
        arguments = st.fixed_dictionaries({k: values(t, text) for k, t in tool.parameters.items()})
        return st.builds(ToolCall, name=st.just(tool.name), arguments=arguments)

    return st.sampled_from(TOOLS).flatmap(of)


def answers(text: st.SearchStrategy[str]) -> st.SearchStrategy[Message]:
    """Assistant messages."""
    return st.builds(
        Message,
        role=st.just("assistant"),
        content=text,
        thinking=text,
        tool_calls=st.lists(calls(text), max_size=3).map(tuple),
    )


def given_messages(text: st.SearchStrategy[str]) -> st.SearchStrategy[Message]:
    """Messages that the model reads."""
    return st.builds(Message, role=st.sampled_from(["system", "user", "tool"]), content=text)


prompts = st.lists(given_messages(letters), min_size=1, max_size=3)
rests = st.lists(st.one_of(given_messages(letters), answers(letters)), max_size=5)
some_tools = st.sampled_from([(), TOOLS[:1], TOOLS])


def as_dict(message: Message) -> dict[str, Any]:
    """The message as transformers' templates take it."""
    if message.role != "assistant":
        return {"role": message.role, "content": message.content}
    functions = [{"name": c.name, "arguments": dict(c.arguments)} for c in message.tool_calls]
    out = {"role": "assistant", "content": message.content, "reasoning_content": message.thinking}
    return out | {"tool_calls": [{"type": "function", "function": f} for f in functions]} if functions else out
