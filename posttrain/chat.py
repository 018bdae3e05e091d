"""Messages to tokens and back, in the markup that the tokenizer knows (``posttrain.markup``).

Encoding is append-only: the ids of a conversation are the ids of its beginning plus what the last message added, so
what was sampled is never encoded again. Reasoning of earlier turns is kept for the same reason: LongCat calls that
``save_history_reasoning_content``, Qwen3's stock chat template would drop it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from copy import deepcopy
from functools import lru_cache
from itertools import groupby

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.errors import UserError
from posttrain.markup import chatml, longcat
from posttrain.markup.base import Mark, Markup, ParseError, hidden, plain
from posttrain.types import Message, Segment, Tool

_MARKUPS: tuple[Markup, ...] = (longcat, chatml)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A small byte-pair tokenizer over printable ASCII with LongCat's markup, in which a run of letters is one word and
    every digit, space and sign stands alone, so that a value looks the same wherever it is copied to. Deterministic."""
    tokenizer = Tokenizer(models.BPE(unk_token=longcat.UNKNOWN))
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
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in longcat.SPECIAL],
        initial_alphabet=sorted(set("".join(alphabet))),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=longcat.PAD,
        bos_token=longcat.BOS,
        eos_token=longcat.EOS,
        unk_token=longcat.UNKNOWN,
        chat_template=longcat.TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def markup_of(vocabulary: Collection[str], where: str = "") -> Markup:
    """The markup whose tokens are all in ``vocabulary``. Raises UserError, naming the folder ``where``."""
    lacking: list[str] = []
    for markup in _MARKUPS:
        missing = [t for t in markup.SPECIAL if t not in vocabulary]
        if not missing:
            return markup
        lacking.append(f"{missing[:3]} of {markup.NAME}")
    raise UserError(
        f"{where or 'tokenizer'}: the tokenizer lacks {' and '.join(lacking)}, and no other markup is known; give the "
        "folder of a LongCat-2.0 or Qwen3 model, or add the tokens of one of the two to this tokenizer and have a cold "
        "start teach the model what they mean"
    )


class Chat:
    """Encodes and parses for one tokenizer. Raises UserError if that knows no markup."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocab = tokenizer.get_vocab()
        self.tokenizer, self.markup = tokenizer, markup_of(vocab, tokenizer.name_or_path)
        self._special = {t: vocab[t] for t in self.markup.SPECIAL}
        self._marks = frozenset(self._special.values())
        self.stop_ids: tuple[int, ...] = tuple(self._special[t] for t in self.markup.STOPS)
        decisions = (self.markup.END, self.markup.CALL, self.markup.END_THINK)
        # To end the turn, to call a tool, to stop thinking.
        self.decision_ids: tuple[int, ...] = tuple(self._special[t] for t in decisions)
        self._letters = _letters(tokenizer)
        self._encode = lru_cache(maxsize=65536)(self._encode_text)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._letters.encode(text, add_special_tokens=False).ids)

    def _ids(self, parts: Iterable[str]) -> tuple[int, ...]:
        """Text from one mark to the next is encoded as a whole, whatever parts it came in."""
        out: list[int] = []
        for marks, (*together,) in groupby(parts, lambda part: isinstance(part, Mark)):
            out += [self._special[m] for m in together] if marks else self._encode("".join(together))
        return tuple(out)

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool) -> tuple[int, ...]:
        """Ids of the first messages up to where the assistant begins."""
        return self._ids([*self.markup.opening(messages, tools, thinking), *self.markup.begin(thinking)])

    def addition(self, messages: Sequence[Message], thinking: bool) -> tuple[int, ...]:
        """Ids that tool results or the user's next words add to an assistant turn, up to where it begins again."""
        return self._ids([*self.markup.given(messages, thinking), *self.markup.begin(thinking)])

    def answer(self, message: Message, thinking: bool) -> tuple[int, ...]:
        """Ids of an assistant message as the model would have sampled it."""
        return self._ids(self.markup.answer(message, thinking))

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

    def decode(self, ids: Sequence[int]) -> str:
        """Text with the markup visible."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def plain(self, ids: Sequence[int]) -> str:
        """Text without markup."""
        rest = [i for i in ids if i not in self._marks]  # a tokenizer need not call all of it special
        return str(self.tokenizer.decode(rest, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()

    def parse(self, ids: Sequence[int], tools: Sequence[Tool], thinking: bool) -> Message:
        """The assistant message that was sampled. Raises ParseError."""
        m = self.markup
        runs = groupby(ids, self._marks.__contains__)
        text = "".join(self.decode(r) if marks else hidden(self.decode(r)) for marks, (*r,) in runs)
        if not text.endswith(m.END):
            raise ParseError("unfinished", f"no {m.END} within the token limit")
        text = text.removesuffix(m.END)
        thought = ""
        if thinking:
            thought, closed, text = text.partition(m.END_THINK)
            if not closed:
                raise ParseError("open_think", f"no {m.END_THINK}")
            thought = thought.strip().removeprefix(m.THINK)
        content, *blocks = text.split(m.CALL)
        calls = tuple(m.parse_call(block, tools) for block in blocks)
        if m.END_CALL in content or (calls and any(t in content for t in m.IN_CALL)):
            raise ParseError("bad_call", f"{m.END_CALL} without {m.CALL}")
        return Message(
            role="assistant", content=plain(content.strip()), thinking=plain(thought.strip()), tool_calls=calls
        )


def _letters(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer as it reads what may be anyone's words: nothing in them is markup.

    transformers' ``split_special_tokens`` is not enough: it leaves tokens that were added without being called special,
    as ``<tool_call>`` and ``<think>`` are in Qwen3's tokenizer, and a tool could forge them."""
    letters = deepcopy(tokenizer.backend_tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    letters.add_special_tokens([AddedToken(t.content, special=True, normalized=False) for t in added])
    letters.encode_special_tokens = True
    letters.no_padding()
    letters.no_truncation()
    return letters


__all__ = ["Chat", "ParseError", "markup_of", "train_tokenizer"]
