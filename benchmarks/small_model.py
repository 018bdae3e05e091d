"""The model of the benchmarks that hold a loop or an engine against another: one that a laptop trains."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from posttrain.chat import train_tokenizer

SIGNS = "0123456789+-*=() "
"""Of which prompts are made; each is a token."""


def make_model(folder: Path) -> None:
    """0.77 M random weights, and a tokenizer whose end token lies beyond the model's vocabulary."""
    rng = Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(500)]
    tokenizer = train_tokenizer([SIGNS, *words], vocab_size=640)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    tokenizer.save_pretrained(folder)
