"""A dense model becomes a sparse one: what is trained when, what is left alone, and the pipeline's stage around it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.config import LozaConversion, LsaConversion
from experts.conversion import convert, steps_of
from experts.demonstrations import Row
from experts.index_measures import IndexMeasures
from fusion.config import PipelineConfig
from fusion.pipeline import Pipeline
from posttrain.errors import UserError
from posttrain.model import Longcat2ForCausalLM
from posttrain.run import RunDir
from posttrain.threads import Stopped
from tests.model.longcat2_tiny import LSA, tiny
from tests.posttrain.tiny import make_tokenizer

FIELDS: dict[str, Any] = {**LSA, "batch_size": 4, "tokens_per_micro_batch": 128, "held_out": 6}
SIZES: dict[str, Any] = {"streaming_block_size": 4, "streaming_local_blocks": 2}
TO_LSA = LsaConversion(**FIELDS, warmup_steps=20, warmup_lr=0.05, sparse_steps=4, sparse_lr=1e-3)
TO_LOZA = LozaConversion(
    **SIZES, batch_size=4, tokens_per_micro_batch=128, held_out=6, steps=6, lr=0.5, finetune_steps=4, finetune_lr=1e-3
)
Reported = list[tuple[int, dict[str, float]]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model and a tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = make_tokenizer()
    tiny(seed=5, vocab_size=len(tokenizer) + (-len(tokenizer)) % 8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int) -> list[Row]:
    """Six conversations again and again, so that a few steps show on held-out ones; a prompt without labels first."""
    rng, out = Random(0), list[Row]()
    for _ in range(6):
        ids = [rng.randrange(3, 60) for _ in range(rng.randrange(20, 40))]
        out.append((ids, [-100] * 4 + ids[4:]))
    return [out[i % 6] for i in range(count)]


def run(dense: Path, config: LsaConversion | LozaConversion, folder: Path) -> tuple[Longcat2ForCausalLM, Reported]:
    reported: Reported = []

    def report(step: int, values: Mapping[str, float]) -> None:
        reported.append((step, dict(values)))

    convert(dense, rows(30), config, folder, 3, report, threading.Event())
    assert len(AutoTokenizer.from_pretrained(folder)) == len(make_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, Longcat2ForCausalLM)
    return model, reported


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".indexer." not in name}


def column(reported: Reported, name: str) -> list[float]:
    return [values[name] for _, values in reported if name in values]


def test_the_warm_up_trains_indexers_alone_and_the_kl_falls(dense: Path, tmp_path: Path) -> None:
    model, reported = run(dense, TO_LSA.model_copy(update={"sparse_steps": 0}), tmp_path / "model")
    before = weights(AutoModelForCausalLM.from_pretrained(dense))
    assert set(before) == set(weights(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    for owner in (0, 1):  # two layers, an indexer each
        start, end = column(reported, f"held_out/kl/{owner}")[:2]
        assert end < 0.8 * start
    losses = column(reported, "held_out/lm_dense")
    assert losses[0] == losses[1] == losses[2]
    assert [step for step, _ in reported] == [0, *range(1, 21), 20, 20]
    assert column(reported, "index_loss")[-1] < column(reported, "index_loss")[0]


def test_the_sparse_stage_trains_everything(dense: Path, tmp_path: Path) -> None:
    model, reported = run(dense, TO_LSA, tmp_path / "model")
    assert model.config.index_topk == LSA["index_topk"] and model.config.indexer_loss_coef == 1.0
    before = AutoModelForCausalLM.from_pretrained(dense)
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == {name for name, _ in before.named_parameters()}
    assert column(reported, "held_out/lm_sparse")[2] < column(reported, "held_out/lm_sparse")[0]
    assert [set(values) for _, values in reported[22:26]] == [{"loss", "index_loss"}] * 4
    assert [step for step, _ in reported[22:]] == [21, 22, 23, 24, 24]


def test_the_calibration_moves_alphas_alone_and_the_smallest_stream(dense: Path, tmp_path: Path) -> None:
    model, reported = run(dense, TO_LOZA.model_copy(update={"finetune_steps": 0}), tmp_path / "model")
    before = weights(AutoModelForCausalLM.from_pretrained(dense))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    alphas = [column(reported, f"alpha/{i}")[-1] for i in range(4)]
    smallest = sorted(sorted(range(4), key=lambda i: alphas[i])[:2])
    assert len(set(alphas)) == 4 and model.config.streaming_attentions == smallest
    assert model.config.streaming_block_size == 4 and model.config.streaming_local_blocks == 2
    assert len(column(reported, "held_out/lm_full")) == 1
    assert len(set(column(reported, "held_out/lm_streaming"))) == 1  # nothing was fine-tuned


def test_fine_tuning_takes_the_streaming_model_further(dense: Path, tmp_path: Path) -> None:
    _, reported = run(dense, TO_LOZA, tmp_path / "model")
    start, end = column(reported, "held_out/lm_streaming")
    assert end < start
    assert [step for step, _ in reported] == [0, *range(1, 7), 6, *range(7, 11), 10]


@pytest.mark.parametrize("config", [TO_LSA, TO_LOZA], ids=["lsa", "loza"])
def test_the_same_seed_gives_the_same_model_and_a_sparse_one_is_refused(
    config: LsaConversion | LozaConversion, dense: Path, tmp_path: Path
) -> None:
    one, other = run(dense, config, tmp_path / "one")[0], run(dense, config, tmp_path / "other")[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError, match="no longcat2 model with dense attention"):
        run(tmp_path / "one", TO_LSA, tmp_path / "twice")


def test_weights_that_do_not_fit_and_too_few_rows_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held_out: 30 of 30"):
        run(dense, TO_LOZA.model_copy(update={"held_out": 30}), tmp_path / "model")
    bare = Longcat2ForCausalLM.from_pretrained(dense)
    state = {name: tensor for name, tensor in bare.state_dict().items() if "layers.1.self_attn.0.o_proj" not in name}
    bare.save_pretrained(tmp_path / "bare", state_dict=state)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.0\.o_proj"):
        run(tmp_path / "bare", TO_LSA, tmp_path / "model")


def test_measures_of_an_indexer_by_hand() -> None:
    """A set as large as what is seen holds everything; forced tokens alone hold what attention gives them."""
    ids = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(0))

    def measure(**changes: Any) -> dict[str, float]:
        model = tiny(seed=5, **{**LSA, **changes})
        model.model.set_indexer_stage("dense")
        with torch.no_grad(), IndexMeasures(model.model) as measures:
            model(ids, use_cache=False)
        assert not any(m._forward_hooks for m in model.modules())
        return measures.values()

    assert set(measure(index_topk=30)) == {"kl/0", "kl/1"}  # nothing to choose
    assert 1 > measure(index_topk=29)["mass"] > 0.95  # one token of thirty left out, in the last row of each sequence
    forced = measure(index_topk=7)  # 2 sinks and 5 local tokens: nothing is free
    assert forced["mass"] == pytest.approx(forced["mass_best"], rel=1e-6)
    free = measure()
    assert forced["mass"] < free["mass"] < free["mass_best"] < 1
    model = tiny(seed=5, **LSA, indexer_loss_coef=1.0).train()
    model.model.set_indexer_stage("dense")
    assert free["kl/0"] + free["kl/1"] == pytest.approx(model(ids).index_loss.item(), rel=1e-5)


def test_the_pipeline_starts_from_the_converted_model(dense: Path, tmp_path: Path) -> None:
    """The stage is made once, experts stand on it, and another conversion is another start."""
    config = PipelineConfig.model_validate(
        {
            "model": {"type": "pretrained", "path": dense},
            "worlds": {"requests": {"type": "requests"}},
            "cold_start": None,
            "conversion": {"type": "loza", **SIZES, "steps": 2, "batch_size": 4, "held_out": 4},
            "experts": {"interaction": {"worlds": {"requests": 1.0}}},
        }
    )
    with RunDir.open(tmp_path / "run", config) as directory:

        def base(changed: PipelineConfig) -> tuple[Path, str]:
            pipeline = Pipeline(changed, directory, Progress(disable=True))
            try:
                return asyncio.run(pipeline.base()), pipeline.digests["base"]
            finally:
                pipeline.close()

        folder, digest = base(config)
        assert folder == directory.checkpoint("conversion")
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert len(model.config.streaming_attentions) == 2
        written = (folder / "config.json").stat().st_mtime_ns
        assert base(config) == (folder, digest)
        assert (folder / "config.json").stat().st_mtime_ns == written
        lines = directory.metrics_file.read_text().splitlines()
        assert [line.count('"stage":"conversion"') for line in lines] == [1] * 5  # two steps, three measures
        plain, without = base(config.model_copy(update={"conversion": None}))
        assert plain == dense and without != digest
        other = config.model_copy(
            update={"conversion": TO_LSA.model_copy(update={"warmup_steps": 1, "sparse_steps": 0})}
        )
        assert base(other)[1] != digest
        assert AutoModelForCausalLM.from_pretrained(folder).config.index_topk == LSA["index_topk"]


def test_steps_are_those_of_both_parts() -> None:
    assert steps_of(TO_LSA) == 24 and steps_of(TO_LOZA) == 10
    with pytest.raises(ValueError, match="index_topk: 6 is below"):
        LsaConversion(**{**FIELDS, "index_topk": 6})


@pytest.mark.parametrize("config", [TO_LSA, TO_LOZA])
def test_one_that_is_stopped_ends_before_its_next_step(
    config: LsaConversion | LozaConversion, dense: Path, tmp_path: Path
) -> None:
    stopped, steps = threading.Event(), list[int]()

    def report(step: int, values: Mapping[str, float]) -> None:
        steps.append(step)
        if step == 2:
            stopped.set()

    with pytest.raises(Stopped):
        convert(dense, rows(30), config, tmp_path / "model", 3, report, stopped)
    assert steps[-1] == 2 and not (tmp_path / "model").exists()
