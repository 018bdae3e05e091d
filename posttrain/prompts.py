"""What the rollouts of a group begin with is forwarded once: its keys and values are what all of them look back at.

A group's prompt is the same G times over, and in an agent's task longer than what is sampled; the gradients of all rows
flow into the one forward, so that the result is that of the plain form. Not for models that keep anything else of a
token than keys and values, nor where a forward may come only once before the gradient (several processes).

Shapes: B sequences, T tokens, P prompts of H tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from posttrain.types import Sample

_WORTH = 0.05
"""Share of all tokens that must be saved."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the sequences of a micro-batch continue."""

    ids_PH: Tensor
    """Token ids."""
    prompt_B: Tensor
    """Which of them, for every sequence."""

    def to(self, device: torch.device) -> Prompts:
        """The same elsewhere."""
        return Prompts(self.ids_PH.to(device), self.prompt_B.to(device))


def can_share(model: nn.Module) -> bool:
    """Whether all that a token leaves behind in ``model`` is its keys and values, in every layer."""
    config: Any = getattr(model, "config", None)
    if config is None or getattr(model, "_is_stateful", False) or getattr(model, "is_activation_checkpointing", False):
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def shared(samples: Sequence[Sample]) -> dict[tuple[int, ...], list[Sample]]:
    """Samples by what they have in common: all that was given before the first sampled token but its last token, whose
    logits are needed. Empty if that would save next to nothing."""
    found: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        first = sample.sampled.index(True)
        found.setdefault(sample.ids[: max(0, first - 1)], []).append(sample)
    saved = sum(len(prompt) * (len(rows) - 1) for prompt, rows in found.items())
    return found if saved >= _WORTH * sum(len(s.ids) for s in samples) else {}


def without(sample: Sample, prompt: int) -> Sample:
    """The sample from its token ``prompt`` on."""
    teachers, versions = sample.teacher_logprobs, sample.versions
    return replace(
        sample,
        ids=sample.ids[prompt:],
        sampled=sample.sampled[prompt:],
        logprobs=sample.logprobs[prompt:],
        advantages=sample.advantages[prompt:],
        teacher_logprobs=None if teachers is None else teachers[prompt:],
        versions=None if versions is None else versions[prompt:],
    )


def read(model: Any, prompts: Prompts) -> DynamicCache:
    """A cache in which every sequence has its prompt behind it; gradients flow back into one forward of each."""
    cache = DynamicCache()
    model(input_ids=prompts.ids_PH, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        layer.keys = layer.keys.index_select(0, prompts.prompt_B)
        layer.values = layer.values.index_select(0, prompts.prompt_B)
    return cache


def stack(prompts: Sequence[tuple[int, ...]]) -> Prompts:
    """Of equally long prompts, one for every sequence."""
    different = list(dict.fromkeys(prompts))
    places = torch.tensor([different.index(p) for p in prompts])
    return Prompts(torch.tensor(different), places)
