"""A folder like Qwen3's, tokenizer and padded vocabulary included, through every stage on a CPU."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion.config import PipelineConfig
from fusion.pipeline import Pipeline
from fusion.preflight import preflight
from posttrain.config import load
from posttrain.errors import ConfigError
from posttrain.journal import read_journal, rollout_from_dict
from posttrain.run import RunDir
from tests.posttrain.qwen import qwen_tokenizer, save_qwen

TINY = """
model: {{type: pretrained, path: {model}}}
engine: {{type: local, slots: 8, max_context: 1024}}
worlds:
  requests: {{type: requests, max_tokens: 24}}
  work: {{type: work, domains: [library], tools: 3, chain: 2, rows: 3, further: 0, max_tokens: 16}}
cold_start: {cold_start}
experts:
  interaction: {{worlds: {{requests: 1}}, train_tasks: 8, loop: {loop}}}
  agent: {{worlds: {{work: 1}}, train_tasks: 8, loop: {loop}}}
fusion: {{train_tasks: 8, loop: {{steps: 1, groups_per_step: 4, max_running: 8}}}}
evaluation: {{tasks: 2}}
"""
LOOP = "{steps: 1, groups_per_step: 2, group_size: 2, max_running: 4, max_staleness: 0}"


def config_of(folder: Path, cold_start: str) -> PipelineConfig:
    """In ``folder``, with a model beside it."""
    if not (folder / "model").exists():
        save_qwen(folder / "model")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(model=folder / "model", cold_start=cold_start, loop=LOOP))
    config = load(PipelineConfig, path)
    preflight(path, config)
    return config


def carried_out(
    config: PipelineConfig, out: Path, what: Callable[[Pipeline], Coroutine[Any, Any, Any]]
) -> tuple[RunDir, Any]:
    """``what`` of the pipeline, in this process."""
    with RunDir.open(out, config) as run:
        pipeline = Pipeline(config, run, Progress(disable=True))
        try:
            return run, asyncio.run(what(pipeline))
        finally:
            pipeline.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "cold_start", ["null", "{demonstrations: 12, steps: 2, batch_size: 4, micro_batches: 2, checkpoint_every: 1}"]
)
def test_every_stage(tmp_path: Path, cold_start: str) -> None:
    run, found = carried_out(config_of(tmp_path, cold_start), tmp_path / "run", lambda p: p.evaluation())
    assert set(found["domains"]) == {"agent", "interaction"}
    tokenizer = qwen_tokenizer()
    played = [
        rollout_from_dict(r) for name in ("interaction", "agent") for r in read_journal(run.rollouts(f"expert-{name}"))
    ]
    assert len(played) == 8 and all(r.valid for r in played)
    for rollout in played:
        opening, *_ = rollout.branches[0]
        text = str(tokenizer.decode(list(opening.ids)))
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert ("<tools>" in text) == (rollout.task.world == "work")
        assert not any(opening.sampled)
    before = load_file(tmp_path / "model/model.safetensors")
    for name in ("expert-interaction", "expert-agent", "fusion", *(["base"] if cold_start != "null" else [])):
        folder = run.checkpoint(name)
        model, again = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == before["model.embed_tokens.weight"].shape[0] == 384 > len(again)
        assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template


def test_a_folder_that_cannot_be_used_is_refused_with_the_cure(tmp_path: Path) -> None:
    config = config_of(tmp_path, "null")
    folder = tmp_path / "model"

    def refused() -> str:
        with pytest.raises(ConfigError) as caught:
            preflight(Path("c.yaml"), config)
        assert str(caught.value).startswith(f"c.yaml: model.path: {folder}")
        return str(caught.value)

    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "vocab_size": 360}))
    assert "has 374 tokens, and the model rows for 360; enlarge the model's embedding" in refused()
    (folder / "config.json").write_text(json.dumps(settings))
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<tool_response>", "<tool_answer>"))
    assert "['<tool_response>'] of ChatML (Qwen3)" in refused()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "mystery"}))
    assert "has no tokenizer" in refused()
    (folder / "config.json").unlink()
    assert f"hf download OWNER/NAME --local-dir {folder}" in refused()
