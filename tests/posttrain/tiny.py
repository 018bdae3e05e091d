"""Small random models of several families, a small tokenizer, and what an engine's log-probs are held against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from posttrain.batch import pack
from posttrain.chat import train_tokenizer
from posttrain.objective_settings import ClippedLoss
from posttrain.settings import TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Completion, Sample
from tests.model.longcat2_tiny import SHAPE as LONGCAT2_SHAPE
from tests.model.longcat2_tiny import tiny as longcat2_tiny

VOCAB: int = LONGCAT2_SHAPE["vocab_size"]
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}  # fmt: skip
_TEXT = """The quick brown fox asks the desk: which room has 12 chairs? Answer in one word, or call the tool.
lookup(name, count) finds a record; update(record, fields: json) changes it. error: no such record
{"name": "amber", "rooms": [3, 14, 159], "open": true, "note": null} sorry, I cannot answer that. done"""


def make_model(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in eval mode: longcat2 with n-gram embedding, or any family of transformers."""
    if kind == "longcat2":
        return longcat2_tiny(seed, **changes)
    config = AutoConfig.for_model(kind, **{**_SHAPE, **_CHANGES.get(kind, {}), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # zero at first, when nobody would miss it
            buffer.normal_(std=0.2)
    return model


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Trained on a few sentences."""
    return train_tokenizer(_TEXT.splitlines(), vocab_size=256)


def make_ids(rng: Random, length: int) -> tuple[int, ...]:
    """Random ids without pad, but with eos, at which n-gram look-back stops."""
    return tuple(rng.randrange(1, VOCAB) for _ in range(length))


def trainer_of(model: PreTrainedModel, config: TrainerConfig | None = None) -> Trainer:
    """The real trainer around ``model``."""
    return Trainer(model, config or TrainerConfig(tokens_per_micro_batch=1024), ClippedLoss(), total_steps=1)


def trainer_gap(trainer: Trainer, pairs: Sequence[tuple[Sequence[int], Completion]]) -> float:
    """Largest difference between the log-probs that came with completions and those the trainer computes."""
    samples = [
        Sample(
            rollout=f"g/{i}",
            domain="d",
            ids=(*ids, *c.ids),
            sampled=(False,) * len(ids) + (True,) * len(c.ids),
            logprobs=(0.0,) * len(ids) + c.logprobs,
            advantages=(0.0,) * (len(ids) + len(c.ids)),
        )
        for i, (ids, c) in enumerate(pairs)
    ]
    gaps = [
        (trainer._logprobs(batch, False)[0] - batch.behaviour_BT[batch.sampled_BT]).abs().max().item()
        for batch in pack(samples, trainer.config.tokens_per_micro_batch)
    ]
    return max(gaps)


@torch.no_grad()
def next_logprobs(model: PreTrainedModel, ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs ``[V]`` of the token after ``ids`` by one full forward."""
    logits_V = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return torch.log_softmax(logits_V.float() / temperature, dim=-1)


@torch.no_grad()
def all_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Log-probs ``[T, V]`` after every token of ``ids`` by one full forward."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float(), dim=-1)
