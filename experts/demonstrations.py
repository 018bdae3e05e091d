"""What the cold start is shown: conversations that the worlds write, as rows of token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random

from datasets import Dataset

from envs.episode import transcript
from experts.config import ColdStartConfig
from posttrain.chat import Chat
from posttrain.markup.longcat import tool_line
from posttrain.protocols import World
from posttrain.types import Message, Task, Tool

Demonstration = tuple[Task, tuple[Tool, ...], list[Message]]


async def demonstrations(worlds: Mapping[str, World], config: ColdStartConfig, seed: int) -> list[Demonstration]:
    """Conversations of all worlds by share, in a fixed order."""
    out: list[Demonstration] = []
    weights = {name: config.shares.get(name, 1.0) for name in sorted(worlds)}
    for name, weight in weights.items():
        world = worlds[name]
        for task in world.tasks("demo", math.ceil(config.demonstrations * weight / sum(weights.values())), seed):
            session = await world.open(task)
            tools = session.tools
            await session.close()
            out.append((task, tools, await world.demonstrate(task, Random(f"{seed}/{task.id}"))))
    Random(seed).shuffle(out)
    return out


def texts(demos: list[Demonstration]) -> list[str]:
    """What a tokenizer is trained on: everything that is said, tools included."""
    return [
        transcript([*task.prompt, *rest]) + "\n" + "\n".join(tool_line(t) for t in tools) for task, tools, rest in demos
    ]


Row = tuple[list[int], list[int]]
"""Token ids, and labels that are -100 wherever the assistant did not speak."""


def encode(demos: list[Demonstration], chat: Chat) -> list[Row]:
    """Demonstrations as rows."""
    rows: list[Row] = []
    for task, tools, rest in demos:
        segments = chat.segments(task.prompt, rest, tools, task.thinking)
        ids = [i for s in segments for i in s.ids]
        rows.append((ids, [i if m else -100 for s in segments for i, m in zip(s.ids, s.sampled, strict=True)]))
    return rows


def dataset(clean: list[Row], mixed: list[Row], config: ColdStartConfig, seed: int) -> Dataset:
    """Rows in the order of training: batches of ``clean`` ones for ``clean_steps``, then of ``mixed`` ones.

    Every batch is a random mixture of the worlds; inside a batch, micro-batches hold similar lengths, so that little
    is padded, and those that processes work on side by side are equally long, so that none waits."""
    rng, ordered = Random(seed), []
    for rows, steps in ((clean, config.clean_steps), (mixed, config.steps - config.clean_steps)):
        pool: list[Row] = []
        for _ in range(steps):
            while len(pool) < config.batch_size:
                pool += rng.sample(rows, len(rows))
            batch, pool = pool[: config.batch_size], pool[config.batch_size :]
            by_length = sorted(batch, key=lambda row: len(row[0]))
            width = config.batch_size // config.micro_batches * config.processes
            for i in range(0, config.batch_size, width):
                ordered += [
                    row for p in range(config.processes) for row in by_length[i : i + width][p :: config.processes]
                ]
    return Dataset.from_dict({"input_ids": [r[0] for r in ordered], "labels": [r[1] for r in ordered]})
