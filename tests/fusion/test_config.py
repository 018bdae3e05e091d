"""What the config says of teachers that cannot be, or cannot say what the objective asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.config import ModelTeachers, PipelineConfig, ServedTeachers
from posttrain.config import load
from posttrain.errors import ConfigError
from posttrain.objective_settings import DistillLoss, SampledEstimator, TopkEstimator

ROOT = Path(__file__).parents[2]
QWEN = ("model={type: random, architecture: qwen3, settings: {}, vocab_size: 680}",)
"""A model that vLLM serves, with three experts, sampled by the engine in process."""
ADAPTERS = tuple(f"experts.{name}.trainer.lora={{}}" for name in ("agent", "reasoning", "interaction"))


def config(*overrides: str, start: tuple[str, ...] = QWEN) -> PipelineConfig:
    return load(PipelineConfig, ROOT / "configs/tiny/pipeline.yaml", [*start, *overrides])


def served(**engine: object) -> str:
    inner = ", ".join(f"{key}: {value}" for key, value in {"type": "vllm", **engine}.items())
    return f"fusion.teachers={{type: served, engine: {{{inner}}}}}"


def topk(**estimator: object) -> str:
    inner = ", ".join(f"{key}: {value}" for key, value in {"type": "topk", **estimator}.items())
    return f"fusion.loss.estimator={{{inner}}}"


REFUSED = {
    "a loop that ends before its engine is replaced": (
        ["experts.agent.loop.wait_s=300"],
        "experts.agent.loop.wait_s: 300 s end the stage before engine.timeout_s, 300 s, tells that it does not "
        "answer; raise it, or lower that",
    ),
    "a loop that ends before a teacher's server is replaced": (
        [served(replicas=3, timeout_s=2000)],
        "fusion.loop.wait_s: 1200 s end the stage before fusion.teachers.engine.timeout_s, 2000 s",
    ),
    "earlier batches that are too old": (
        ["experts.agent.loop.reuse=0.5", "experts.agent.loop.max_staleness=0"],
        "reuse: with max_staleness 0 groups of earlier batches are too old; set it to 0",
    ),
    "too few servers": (
        [served()],
        "fusion.teachers.engine.replicas: there is one server a teacher; set it to 3",
    ),
    "too many servers": (
        [served(replicas=4)],
        "fusion.teachers.engine.replicas: there is one server a teacher; set it to 3",
    ),
    "a server an adapter": (
        [served(weights="lora", replicas=3), *ADAPTERS],
        "fusion.teachers.engine.replicas: there is one server a teacher; set it to 1",
    ),
    "servers that run already": (
        [served(replicas=3, servers="['http://127.0.0.1:8000']")],
        "fusion.teachers.engine.servers: teachers have servers of their own; leave it out",
    ),
    "weights that come": (
        [served(weights="send", replicas=3)],
        "fusion.teachers.engine.weights: teachers never change; use folder or lora",
    ),
    "no adapter": (
        [served(weights="lora"), *ADAPTERS[:2]],
        "experts.interaction.trainer.lora: fusion.teachers.engine.weights lora needs it",
    ),
    "adapters that are too large": (
        [served(weights="lora", max_lora_rank=8), *ADAPTERS],
        "fusion.teachers.engine.max_lora_rank: 8 is less than experts.agent.trainer.lora.rank",
    ),
    "too few log-probs": (
        [served(replicas=3, max_logprobs=31), topk()],
        "fusion.teachers.engine.max_logprobs: 31 is less than fusion.loss.estimator.support; set it to 32, or lower",
    ),
    "more than there are": (
        [topk(support=681)],
        "fusion.loss.estimator.support: model.vocab_size is 680; lower it",
    ),
    "a support for the sampled token": (
        ["fusion.loss.estimator={type: sampled, support: 8}"],
        "fusion.loss.estimator.support",
    ),
    "decisions without a support": (
        [topk(support=0)],
        "fusion.loss.estimator.support",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_contradiction_is_named_with_its_cure(case: str) -> None:
    overrides, words = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    assert words in str(caught.value)


def test_teachers_of_type_longcat2_are_served_as_they_can_be_or_teach_in_process() -> None:
    with pytest.raises(
        ConfigError, match=r"fusion.teachers.engine.eager: vllm cannot compile a longcat2; set it to true"
    ):
        config(served(replicas=3), start=())
    assert isinstance(config(served(replicas=3, eager="true"), start=()).fusion.teachers, ServedTeachers)
    assert isinstance(config(start=()).fusion.teachers, ModelTeachers)


@pytest.mark.parametrize(
    "overrides",
    [
        [served(replicas=3)],
        [served(weights="lora"), *ADAPTERS],
        [served(replicas=3, max_logprobs=32), topk()],
        [topk(support=680)],
        [topk(decision_tokens="false")],
    ],
    ids=str,
)
def test_what_fits_is_taken(overrides: list[str]) -> None:
    found = config(*overrides).fusion
    assert isinstance(found.teachers, ServedTeachers) == any("served" in o for o in overrides)
    assert isinstance(found.loss.estimator, TopkEstimator) == any("topk" in o for o in overrides)


def test_left_alone_only_the_sampled_token_is_judged_by_models_in_process() -> None:
    found = config(start=()).fusion
    assert found.loss == DistillLoss(estimator=SampledEstimator()) and found.teachers == ModelTeachers()
