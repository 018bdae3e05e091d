"""A model as a config describes it, started at random."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from posttrain.model import Longcat2Config, Longcat2ForCausalLM
from posttrain.settings import Longcat2Model, RandomModel


def at_random(config: Longcat2Model | RandomModel, special: dict[str, Any] | None = None) -> PreTrainedModel:
    """By torch's generator, in float32. ``special``: further fields of the model's config."""
    given = {"vocab_size": config.vocab_size, **config.settings, **(special or {})}
    if isinstance(config, Longcat2Model):
        return Longcat2ForCausalLM(Longcat2Config(**given))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.architecture, **given), dtype=torch.float32)
