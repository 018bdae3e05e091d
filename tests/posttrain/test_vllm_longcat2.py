"""longcat2 in vLLM: out of one row of tokens, vLLM's blocks and ids kept by slot comes what transformers computes."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import PreTrainedModel

from fusion.served_teachers import ServedTeacher
from posttrain.engine.vllm import VllmEngine
from posttrain.engine.vllm_server import NAME, Server
from posttrain.errors import EngineError
from posttrain.types import Completion, Sampling, TeacherScores, Weights
from posttrain.weights import HeldOutlet
from tests.contracts.engines import needs_vllm, serve
from tests.model.longcat2_tiny import LSA, MTP, YARN, tiny
from tests.posttrain.tiny import all_logprobs, make_ids, trainer_gap, trainer_of

pytestmark = needs_vllm

TOLERANCE = 1e-4
Pairs = list[tuple[tuple[int, ...], Completion]]


async def crowd(engine: VllmEngine, seed: int) -> Pairs:
    """Prompts of all lengths, most of which begin alike, and long answers: more than there are blocks for."""
    rng = Random(seed)
    stem = make_ids(rng, 150)
    prompts = [(*stem[: rng.randint(1, 150)], *make_ids(rng, rng.randint(0, 20))) for _ in range(12)]
    asked = (engine.generate(p, Sampling(max_tokens=70, seed=i)) for i, p in enumerate(prompts))
    return list(zip(prompts, await asyncio.gather(*asked), strict=True))


async def scores(engine: VllmEngine, sequences: Pairs) -> list[TeacherScores]:
    teacher = ServedTeacher(engine._replicas[0].keeper, NAME, "t", asyncio.get_running_loop())
    ids = [(*prompt, *c.ids) for prompt, c in sequences]
    return await asyncio.to_thread(teacher.score, ids, [[True] * len(i) for i in ids])


async def counter(server: Server, name: str) -> float:
    found = re.findall(rf"^vllm:{name}_total\{{.*\}} (\S+)$", await server.get("/metrics"), re.MULTILINE)
    return sum(map(float, found))


def test_tokens_logprobs_and_scores_are_transformers_whatever_becomes_of_the_blocks(tmp_path: Path) -> None:
    """Blocks of 32 and too few of them: requests are pushed out and read again, prompts are found in the cache. The
    second and third weights come with a draft block and indexers, which have nothing to do here, the one through a
    folder and the other sent."""
    models = [tiny(0, rope_parameters=YARN), tiny(1, rope_parameters=YARN, **MTP)]
    models += [tiny(2, rope_parameters=YARN, **{**LSA, "index_topk": 240})]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    prompt, outlet = make_ids(Random(7), 45), HeldOutlet()

    async def use(engine: VllmEngine) -> list[tuple[Completion, Pairs, list[TeacherScores]]]:
        found = list[tuple[Completion, Pairs, list[TeacherScores]]]()
        for version in range(3):
            if version:
                where = str(tmp_path / "1") if version == 1 else outlet.put(trainer_of(models[2]))
                await engine.load(Weights(version=version, where=where))
            greedy = await engine.generate(prompt, Sampling(max_tokens=150, temperature=0))
            sampled = await crowd(engine, version)
            found.append((greedy, sampled, await scores(engine, sampled[:4])))
        server = engine._replicas[0].server
        assert await counter(server, "prefix_cache_hits") > 1000
        assert await counter(server, "num_preemptions") > 5
        return found

    found = serve(tmp_path / "0", use, weights="send", args=["--block-size", "32", "--num-gpu-blocks-override", "24"])
    for version, (greedy, sampled, scored) in enumerate(found):
        model: PreTrainedModel = models[version]
        best = all_logprobs(model, (*prompt, *greedy.ids))[len(prompt) - 1 : -1].max(dim=-1)
        assert greedy.ids == tuple(best.indices.tolist())
        assert greedy.logprobs == pytest.approx(best.values.tolist(), abs=TOLERANCE)
        assert trainer_gap(trainer_of(model), sampled) < TOLERANCE
        for (start, completion), got in zip(sampled, scored, strict=False):
            ids = torch.tensor((*start, *completion.ids))
            want_T = all_logprobs(model, ids.tolist())[:-1].gather(1, ids[1:, None])[:, 0]
            assert got.logprobs[1:] == pytest.approx(want_T.tolist(), abs=TOLERANCE)


def test_a_context_in_which_attention_would_be_sparse_is_refused_by_the_server(tmp_path: Path) -> None:
    tiny(0, **LSA).save_pretrained(tmp_path)

    async def use(engine: VllmEngine) -> None:
        raise AssertionError

    said = "it says `ValueError: longcat2 is not served with a context of 240: its attention is sparse beyond 14 tokens"
    with pytest.raises(EngineError, match=said):
        serve(tmp_path, use)
