"""What is said of a longcat2 that vLLM shall serve before a server is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion.config import PipelineConfig
from fusion.preflight import preflight
from posttrain.config import load
from posttrain.errors import ConfigError
from tests.model.longcat2_tiny import LSA, NGRAM, SHAPE, tiny
from tests.posttrain.tiny import make_tokenizer

CONFIG = """
model: {type: longcat2, vocab_size: 680, settings: SETTINGS}
engine: {type: vllm, max_context: 240, eager: true}
worlds: {chains: {type: chains}}
experts: {reasoning: {worlds: {chains: 1}}}
""".replace("SETTINGS", json.dumps({k: v for k, v in {**SHAPE, **NGRAM}.items() if k != "vocab_size"}))
TEACHERS = "fusion.teachers={type: served, engine: {type: vllm, max_context: 240, eager: true}}"
LORA = ("engine.weights=lora", "experts.reasoning.trainer.lora={rank: 8}", "fusion.trainer.lora={rank: 8}")
STREAMING = "model.settings.streaming_attentions=[1]"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    return path


def lsa(topk: int) -> tuple[str, ...]:
    return tuple(f"model.settings.{key}={value}" for key, value in {**LSA, "index_topk": topk}.items())


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (TEACHERS,),
        lsa(240),
        (*lsa(241), TEACHERS),
        (STREAMING, "model.settings.streaming_block_size=30"),  # the first block and the last seven
        ("model.settings.mtp_num_layers=3",),
        ("conversion={type: loza, streaming_block_size: 30}",),
    ],
)
def test_what_vllm_serves_of_longcat2(changes: tuple[str, ...], path: Path) -> None:
    preflight(path, load(PipelineConfig, path, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            lsa(239),
            "engine.max_context: .* contexts of up to 239 tokens only, .* at most 239, or take engine.type local",
        ),
        (
            (*lsa(240), TEACHERS),
            "fusion.teachers.engine.max_context: .* at most 239, or take fusion.teachers.type model",
        ),
        ((STREAMING, "model.settings.streaming_block_size=29"), "engine.max_context: .* set it to at most 232"),
        (("conversion={type: loza, streaming_block_size: 20}",), "engine.max_context: .* set it to at most 160"),
        (
            ("conversion={type: lsa, index_topk: 200, index_local_tokens: 9, index_init_tokens: 1}",),
            "engine.max_context: .* set it to at most 200",
        ),
        (("engine.eager=false",), "engine.eager: vllm cannot compile a longcat2; set it to true"),
        (("engine.threads=1", "engine.dtype=bfloat16"), "engine.dtype: on a CPU a longcat2 is served in float32"),
        ((TEACHERS.replace("true", "false"),), "fusion.teachers.engine.eager: .* set it to true"),
        (LORA, "engine.weights: vllm takes no adapters for a longcat2; set it to folder"),
        (("engine.draft_steps=1",), "unknown key `engine.draft_steps`"),
        (("engine.record_choices=true",), "unknown key `engine.record_choices`"),
        (("fusion.trainer.replay_choices=true",), "to replay; set engine.record_choices to true, which"),
    ],
)
def test_what_it_does_not_is_refused_with_a_cure(changes: tuple[str, ...], message: str, path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(path, load(PipelineConfig, path, changes))


def test_a_folder_is_looked_into(path: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny(0, vocab_size=len(tokenizer), **LSA).save_pretrained(tmp_path / "model")
    model = f"model={{type: pretrained, path: {tmp_path / 'model'}}}"
    with pytest.raises(ConfigError, match=r"c.yaml: engine.max_context: .* set it to at most 14"):
        preflight(path, load(PipelineConfig, path, [model]))
    preflight(path, load(PipelineConfig, path, [model, "engine.max_context=14"]))
