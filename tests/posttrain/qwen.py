"""A tokenizer like Qwen3's, small: its normaliser, its splits, every byte, and its added tokens, of which those of
thinking and tools are not special. And a model of Qwen3's shape that has more rows than the tokenizer has tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.markup import chatml
from tests.posttrain.tiny import make_model

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT = """The quick brown fox asks the desk: which room has 12 chairs?\n\n  Answer in one word, or call the tool.\n
{"name": "lookup", "arguments": {"name": "amber", "count": 12}}\n\n\n\n\tsorry, I cannot answer that. done.\n"""
_OTHERS = ("<|vision_start|>", "<|fim_prefix|>")
"""Added tokens that are no markup here: one special, one not."""


def template(name: str) -> str:
    """A chat template that TRL ships: ``qwen3`` is the stock one."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


@cache
def qwen_tokenizer(vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """With the stock chat template. ``vocab_size``: without the added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    for text in (*chatml.SPECIAL, *_OTHERS):
        token = AddedToken(text, normalized=False, special=text.startswith("<|") and text != _OTHERS[1])
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=chatml.TEXT_END,
        eos_token=chatml.END,
        chat_template=template("qwen3"),
        clean_up_tokenization_spaces=False,
    )


def save_qwen(folder: Path, seed: int = 0, **changes: object) -> None:
    """A tiny Qwen3 at random in ``folder``, whose vocabulary is padded to a multiple of 64, and its tokenizer."""
    tokenizer = qwen_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    shape = {"vocab_size": -(-len(tokenizer) // 64) * 64, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    make_model("qwen3", seed, **{**shape, **ids, **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
