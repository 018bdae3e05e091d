"""What the contract does not say about the teacher that is a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.pipeline import asked_of_teachers
from fusion.teachers import ModelTeacher
from posttrain.chat import Chat
from posttrain.objective_settings import DistillLoss, SampledEstimator, TopkEstimator
from tests.model.longcat2_tiny import tiny
from tests.posttrain.tiny import make_tokenizer


@pytest.fixture
def teacher(tmp_path: Path) -> ModelTeacher:
    tiny().save_pretrained(tmp_path)
    return ModelTeacher(tmp_path, tokens_per_forward=24)


def test_forwards_hold_at_most_the_budget_longest_first(teacher: ModelTeacher) -> None:
    """Lengths 5, 12, 3, 12, 5, 40 under 24 padded tokens: 40 alone, 12 + 12, then 5 + 5 + 3."""
    shapes: list[tuple[int, ...]] = []
    teacher.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    lengths = (5, 12, 3, 12, 5, 40)
    scores = teacher.score([[3] * n for n in lengths], [[True] * n for n in lengths])
    assert shapes == [(1, 40), (2, 12), (3, 5)]
    assert tuple(len(s.logprobs) for s in scores) == lengths


def test_it_is_frozen_and_leaves_no_graph(teacher: ModelTeacher) -> None:
    seen: list[Any] = []
    teacher.model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    teacher.score([[3, 4, 5]], [[True] * 3])
    assert not seen[0].requires_grad and seen[0].dtype == torch.float32
    assert not teacher.model.training


def test_the_objective_says_what_teachers_are_asked(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    topk, likely = (TopkEstimator(type="topk", support=5, decision_tokens=d) for d in (True, False))
    asked = [asked_of_teachers(DistillLoss(estimator=e), tmp_path) for e in (SampledEstimator(), topk, likely)]
    assert asked == [(0, ()), (5, Chat(make_tokenizer()).decision_ids), (5, ())]
