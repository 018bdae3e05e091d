"""Rewritten contexts: when, what the model reads then, and that every branch is what the sampler saw."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from envs.context import SUMMARISE, ContextConfig, Rewrite, due
from envs.episode import run_episode
from envs.worlds import DeskConfig, make_world
from experts.credit import samples_of
from posttrain.chat import Chat
from posttrain.engine.local import LocalEngine
from posttrain.markup.longcat import EOS
from posttrain.types import Completion, Limits, Message, Rollout, Segment, StopReason, Tool, ToolCall
from tests.envs.test_episode import ADD, Script, Toy, call, chat, play, score, task
from tests.posttrain.tiny import make_model, make_tokenizer, trainer_gap, trainer_of


@pytest.mark.parametrize(
    ("config", "tokens", "turns", "rewrites", "expected"),
    [
        ({}, 10**9, 10**9, 0, None),
        ({"summarise_above": 10}, 10, 9, 0, None),
        ({"summarise_above": 10}, 11, 0, 0, Rewrite.SUMMARISE),
        ({"discard_after": 3}, 99, 2, 0, None),
        ({"discard_after": 3}, 0, 3, 0, Rewrite.DISCARD),
        ({"summarise_above": 10, "discard_after": 3}, 11, 2, 0, Rewrite.SUMMARISE),
        ({"summarise_above": 10, "discard_after": 3}, 11, 3, 0, Rewrite.DISCARD),
        ({"summarise_above": 10, "rewrites": 2}, 11, 0, 1, Rewrite.SUMMARISE),
        ({"summarise_above": 10, "rewrites": 2}, 11, 0, 2, None),
    ],
)
def test_due(config: dict[str, int], tokens: int, turns: int, rewrites: int, expected: Rewrite | None) -> None:
    assert due(ContextConfig(**config), tokens=tokens, turns=turns, rewrites=rewrites) is expected


def test_wrong_limits_are_refused() -> None:
    for wrong in ({"summarise_above": 0}, {"discard_after": 0}, {"rewrites": -1}, {"sumarise_above": 5}):
        with pytest.raises(ValidationError):
            ContextConfig(**wrong)


def text(ids: Any) -> str:
    return chat().decode(list(ids))


def test_a_summary_ends_a_branch_and_begins_the_next() -> None:
    engine = Script([call("what"), f"add what{EOS}", f"done{EOS}"])
    rollout = play(engine, Toy(), context=ContextConfig(summarise_above=1, summary_tokens=9, rewrites=1))
    assert rollout.stop is StopReason.SCORED
    first, second = rollout.branches
    # What the sampler was given is the branch up to there, each time.
    ids = [i for s in first for i in s.ids]
    assert engine.given[1] == tuple(ids[: -len(first[-1].ids)])
    assert engine.given[2] == second[0].ids
    asked = chat().addition([Message(role="tool", content="added what"), SUMMARISE], False)
    assert first[-2].ids == asked and first[-1].sampled == (True,) * len(first[-1].ids)
    so_far = [*task().prompt, Message(role="user", content="so far: add what")]
    assert second[0].ids == chat().opening(so_far, (ADD,), False)
    assert [s.max_tokens for s in engine.sampling] == [20, 9, 20]
    assert [s.seed for s in engine.sampling] == [7, 8, 9]
    assert [(m.role, m.content) for m in rollout.messages[-2:]] == [("user", "so far: add what"), ("assistant", "done")]
    samples = samples_of(rollout, 1.0)
    assert [sum(s.sampled) for s in samples] == [
        len(first[1].ids) + len(first[3].ids),
        len(second[1].ids),
    ]


def test_all_is_forgotten_after_the_turns() -> None:
    """The world is not: its third call is its third."""
    world = Toy()
    engine = Script([call("what"), call("say"), call("more"), f"done{EOS}"])
    rollout = play(engine, world, context=ContextConfig(discard_after=2))
    assert rollout.stop is StopReason.SCORED and len(rollout.branches) == 2
    assert engine.given[2] == engine.given[0] == chat().opening(task().prompt, (ADD,), False)
    assert [c.arguments["what"] for c in world.calls] == ["what", "say", "more"]
    assert "added more" in text(engine.given[3]) and "added say" not in text(engine.given[3])


def test_turns_are_limited_over_all_branches() -> None:
    engine = Script([call(w) for w in ("what", "say", "more", "go", "done")])
    rollout = play(engine, Toy(), context=ContextConfig(discard_after=1))
    assert rollout.stop is StopReason.AGENT_TIMEOUT and len(rollout.branches) == 5


def test_no_room_for_the_summary_is_an_overflow() -> None:
    engine = Script([call("what"), ""])
    rollout = play(engine, Toy(), context=ContextConfig(summarise_above=1))
    assert rollout.stop is StopReason.CONTEXT_OVERFLOW and len(rollout.branches) == 1


def test_markup_in_a_summary_forges_no_turn() -> None:
    engine = Script([call("what"), f"{call('say')}", f"done{EOS}"])
    rollout = play(engine, Toy(), context=ContextConfig(summarise_above=1, rewrites=1))
    opening = rollout.branches[1][0].ids
    marks = [t for t in opening if chat().tokenizer.convert_ids_to_tokens(t) == "<longcat_tool_call>"]
    assert marks == []


class Hearing(Chat):
    """Takes whatever a random model says for a call."""

    def parse(self, ids: Sequence[int], tools: Sequence[Tool], thinking: bool) -> Message:
        call = ToolCall(name="find", arguments={"customer": self.plain(ids)})
        return Message(role="assistant", content="", tool_calls=(call,))


def test_log_probs_of_every_branch_are_those_of_its_own_tokens(tmp_path: Path) -> None:
    """With the real engine and the real trainer."""
    tokenizer = make_tokenizer()
    model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.save_pretrained(tmp_path)
    world = make_world(DeskConfig(), "desk")
    limits = Limits(max_turns=6, max_tokens=10, timeout_s=60)
    contexts = [ContextConfig(summarise_above=1, summary_tokens=12, rewrites=3), ContextConfig(discard_after=2)]

    async def go() -> list[Rollout]:
        engine = await LocalEngine.start(tmp_path, slots=8, max_context=1500, timeout_s=60)
        episodes = [
            run_episode(
                engine, world, Hearing(tokenizer), score, replace(one, limits=limits),
                rollout_id=f"s/0/{i}", group="s/0", seed=i, context=context,
            )
            for i, one in enumerate(world.tasks("train", 2, 0)) for context in contexts
        ]  # fmt: skip
        try:
            return [await episode for episode in episodes]
        finally:
            await engine.close()

    rollouts = asyncio.run(go())
    assert all(len(r.branches) > 1 for r in rollouts)
    pairs = [
        ([i for s in branch[:at] for i in s.ids], completion(segment))
        for rollout in rollouts for branch in rollout.branches
        for at, segment in enumerate(branch) if any(segment.sampled)
    ]  # fmt: skip
    assert len(pairs) >= 24
    assert trainer_gap(trainer_of(model), pairs) < 1e-4


def completion(segment: Segment) -> Completion:
    return Completion(ids=segment.ids, logprobs=segment.logprobs, versions=segment.versions, finish="stop")
