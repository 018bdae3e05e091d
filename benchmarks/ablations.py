"""What each part of the architecture buys: ``python benchmarks/ablations.py [--seeds 0] [--only ngram,lsa,identity]``.

Every arm is the model of ``configs/tiny/pipeline.yaml`` with one part changed, trained from nothing on what the worlds
demonstrate, at the cold start's rates: the same rows in the same order for all arms of an ablation, no row twice. It
is then judged, decoding greedily, on tasks of the held-out split.

1. n-gram tables, on chains: those of the demo, tables in which hardly any n-gram meets another one, none.
2. LSA, on conversations of four chains, 150 tokens, of which a token attends to 32: dense attention, LSA whose indexers
   learn from the first step on, LSA whose indexers stay as they were drawn.
3. Identity slots, on chains, rules and facts: loss against the routed slots that a token uses, which the bias
   controller holds at a target. One routed slot for every token is what the same compute buys without identity slots.

Prints one table and draws it (``--out``). Needs the extra ``bench``."""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from envs.worlds import WorldConfig, make_world
from experts.demonstrations import Demonstration, Row, encode, texts
from fusion.config import PipelineConfig
from posttrain.chat import Chat, ParseError, train_tokenizer
from posttrain.config import load
from posttrain.model import Longcat2Config, Longcat2ForCausalLM
from posttrain.protocols import World
from posttrain.settings import Longcat2Model
from posttrain.types import Message, Task

PIPELINE = load(PipelineConfig, Path(__file__).parents[1] / "configs/tiny/pipeline.yaml")
PLAIN: dict[str, Any] = {
    **dict.fromkeys(("index_topk", "mtp_num_layers", "streaming_attentions", "moe_target_topk")),
    **dict.fromkeys(("indexer_loss_coef", "mtp_loss_coef", "router_aux_loss_coef", "z_loss_coef"), 0.0),
    **{"router_bias_update_rate": 0.0, "use_hi": False},
}
"""Switches that arms turn on one at a time, whatever the pipeline does."""
NO_TABLES: dict[str, Any] = dict.fromkeys(("oe_vocab_size_ratio", "oe_neighbor_num", "oe_split_num"))
LSA = {"index_topk": 32, "index_init_tokens": 2, "index_local_tokens": 8, "index_n_heads": 4, "index_head_dim": 16}
BIAS_RATE = 0.05
"""Of the bias controller: the target is reached within some dozen steps."""


@dataclass(frozen=True)
class Arm:
    """One model."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Over the pipeline's."""


@dataclass(frozen=True)
class Ablation:
    """Arms that see the same rows."""

    title: str
    arms: Sequence[Arm]
    worlds: Mapping[str, WorldConfig]
    looks: Sequence[int]
    """Steps after which a model is judged; the last one ends the training."""
    batch: int
    turns: int = 1
    """Tasks in a conversation."""
    exams: int = 0
    """Held-out conversations whose last answer the model must find."""


class Look(NamedTuple):
    """A model on held-out conversations."""

    loss: float
    """Mean cross entropy of what the assistant says."""
    routed: float
    """Mean of the routed slots a token and layer."""
    exact: float
    """Share of last answers that are right; nan where nothing was asked."""


@dataclass
class Result:
    """One arm under all seeds."""

    arm: str
    parameters: int = 0
    looks: list[list[Look]] = field(default_factory=list)
    """Of each seed."""

    def over_seeds(self, look: int, name: str) -> list[float]:
        """One figure of one look."""
        return [getattr(looks[look], name) for looks in self.looks]


class Data(NamedTuple):
    """Rows of one ablation and seed."""

    chat: Chat
    rows: list[Row]
    held_out: list[Row]
    exams: list[tuple[World, Task, list[int]]]


def ablations(quick: bool) -> dict[str, Ablation]:
    """All three, by the name that ``--only`` takes."""
    worlds = {n: PIPELINE.worlds[n].model_copy(update={"habit": 1.0}) for n in ("chains", "rules", "facts")}
    chains = {"chains": worlds["chains"]}
    return {
        "ngram": Ablation(
            "n-gram tables",
            (Arm("as in the demo"), Arm("25 times the rows", {"oe_vocab_size_ratio": 303.0}), Arm("none", NO_TABLES)),
            chains,
            looks=(10, 20) if quick else (100, 200, 400),
            batch=8 if quick else 32,
            exams=16 if quick else 200,
        ),
        "lsa": Ablation(
            "LSA, 32 tokens attended",
            (Arm("dense"), Arm("LSA", {**LSA, "indexer_loss_coef": 1.0}), Arm("LSA, random indexers", LSA)),
            chains,
            looks=(5, 10) if quick else (80, 160, 240),
            batch=4 if quick else 12,
            turns=4,
            exams=8 if quick else 100,
        ),
        "identity": Ablation(
            "identity slots",
            (
                Arm("2 of 4 routed slots", slots(0, 2, 2)),
                Arm("2 of 4 + 2 identity, target 1.33", slots(2, 2, 1.33)),
                Arm("2 of 4 + 2 identity, target 1", slots(2, 2, 1)),
                Arm("1 of 4 routed slots", slots(0, 1, 1)),
            ),
            worlds,
            looks=(10, 20) if quick else (100, 200),
            batch=8 if quick else 32,
        ),
    }


def slots(identity: int, topk: int, target: float) -> dict[str, Any]:
    """Fields of a MoE whose load is controlled."""
    return {
        "zero_expert_num": identity,
        "moe_topk": topk,
        "moe_target_topk": target,
        "router_bias_update_rate": BIAS_RATE,
    }


async def conversations(
    worlds: Mapping[str, World], split: str, count: int, turns: int, seed: int
) -> list[Demonstration]:
    """About ``count`` conversations, equally many a world, of ``turns`` tasks one after the other; the task that is
    returned is the last one, after the prompt of the first."""
    out: list[Demonstration] = []
    each = math.ceil(count / len(worlds))
    for world in worlds.values():
        tasks = world.tasks(split, each * turns, seed)
        for start in range(0, len(tasks), turns):
            first, *others = tasks[start : start + turns]
            rng = Random(f"{seed}/{first.id}")
            messages = await world.demonstrate(first, rng)
            for task in others:
                messages += [task.prompt[-1], *await world.demonstrate(task, rng)]
            session = await world.open(first)
            await session.close()
            out.append((replace((others or [first])[-1], prompt=first.prompt), session.tools, messages))
    Random(seed).shuffle(out)
    return out


def make_data(ablation: Ablation, seed: int) -> Data:
    """Fresh rows for every step, and held-out ones."""
    worlds = {name: make_world(config, name) for name, config in ablation.worlds.items()}
    shown = asyncio.run(
        conversations(worlds, "demo", ablation.batch * ablation.looks[-1] + len(worlds), ablation.turns, seed)
    )
    asked = asyncio.run(conversations(worlds, "eval", max(ablation.exams, 8 * ablation.batch), ablation.turns, seed))
    assert isinstance(PIPELINE.model, Longcat2Model)
    chat = Chat(train_tokenizer(texts(shown[:4000]), PIPELINE.model.vocab_size))
    held_out = encode(asked, chat)
    exams = []
    for (task, _, _), (ids, labels) in list(zip(asked, held_out, strict=True))[: ablation.exams]:
        given = max(i for i, label in enumerate(labels) if label == -100) + 1
        exams.append((worlds[task.world], task, ids[:given]))
    return Data(chat, encode(shown, chat), held_out, exams)


def batches(rows: Sequence[Row], size: int) -> Iterator[dict[str, Tensor]]:
    """Inputs of the model, padded on the right."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(len(ids) for ids, _ in part)
        yield {
            "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part]),
            "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in part]),
        }


def make_model(arm: Arm, seed: int) -> Longcat2ForCausalLM:
    """Untrained."""
    assert isinstance(PIPELINE.model, Longcat2Model)
    fields = {**PIPELINE.model.settings, **PLAIN, **arm.fields, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = Longcat2ForCausalLM(Longcat2Config(vocab_size=PIPELINE.model.vocab_size, **fields))
    model.freeze_idle()
    return model


def make_optimizer(model: Longcat2ForCausalLM) -> torch.optim.Optimizer:
    """As in the cold start, each parameter at its own rate."""
    config = PIPELINE.cold_start
    assert config is not None
    groups = []
    for name, parameter in model.named_parameters():
        scale = math.prod(factor for pattern, factor in config.lr_scales.items() if re.search(pattern, name))
        groups.append({"params": [parameter], "lr": config.lr * scale})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)


def train(ablation: Ablation, arm: Arm, data: Data, seed: int) -> tuple[int, list[Look]]:
    """Parameters of the arm, and how it does at every look."""
    model, looks, last = make_model(arm, seed), [], ablation.looks[-1]
    optimizer = make_optimizer(model)
    warmup = min(20, last // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, n - warmup) / (last - warmup)))
    )
    for step, batch in zip(range(1, last + 1), batches(data.rows, ablation.batch), strict=False):
        model.train()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        model.model.update_router_biases()
        if step in ablation.looks:
            looks.append(judge(model.eval(), data))
    return sum(p.numel() for p in model.parameters()), looks


@torch.no_grad()
def judge(model: Longcat2ForCausalLM, data: Data) -> Look:
    """Loss, load and exact answers on what is held out."""
    loss, labels, routed, tokens = 0.0, 0, 0, 0
    for batch in batches(data.held_out, 32):
        out = model(**batch, output_choices=True)
        count = int((batch["labels"] != -100).sum())
        loss, labels = loss + float(out.loss) * count, labels + count
        live = batch["attention_mask"].bool()
        used = torch.stack([(s < model.config.n_routed_experts).sum(dim=-1) for s in out.slots])
        routed, tokens = routed + int(used[:, live].sum()), tokens + int(live.sum()) * len(used)
    right = [asyncio.run(grade(data.chat, *exam)) for exam in answers(model, data)]
    return Look(loss / labels, routed / tokens, sum(right) / len(right) if right else math.nan)


def answers(model: Any, data: Data) -> Iterator[tuple[World, Task, list[int]]]:
    """What the model says greedily, in the place of each exam's prompt."""
    if not data.exams:
        return
    width = max(len(prompt) for _, _, prompt in data.exams)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for _, _, prompt in data.exams])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for _, _, prompt in data.exams])
    limit = max(task.limits.max_tokens for _, task, _ in data.exams)
    said = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=limit)
    for (world, task, _), row in zip(data.exams, said[:, width:].tolist(), strict=True):
        end = row.index(2) + 1 if 2 in row else len(row)
        yield world, task, row[:end]


async def grade(chat: Chat, world: World, task: Task, ids: list[int]) -> float:
    """What the world gives for an answer."""
    try:
        message: Message = chat.parse(ids, (), task.thinking)
    except ParseError:
        return 0.0
    session = await world.open(task)
    try:
        return await session.grade([*task.prompt, message])
    finally:
        await session.close()


def measure(ablation: Ablation, seeds: Sequence[int], console: Console) -> list[Result]:
    """All arms under all seeds; prints loss and share of exact answers at each look as they come."""
    results = [Result(arm.name) for arm in ablation.arms]
    for seed in seeds:
        data = make_data(ablation, seed)
        for arm, result in zip(ablation.arms, results, strict=True):
            started = time.monotonic()
            result.parameters, looks = train(ablation, arm, data, seed)
            result.looks.append(looks)
            took = f"{time.monotonic() - started:.0f} s"
            figures = "; ".join(f"{look.loss:.3f} {figure([look.exact])}".rstrip() for look in looks)
            console.print(
                f"{ablation.title}, seed {seed}, {arm.name}: {figures} ({took})", style="dim", highlight=False
            )
    return results


def show(found: Mapping[str, tuple[Ablation, list[Result]]], seeds: Sequence[int], console: Console) -> None:
    """The table: means over seeds, and half the range between them."""
    table = Table(title=f"on held-out tasks; {len(seeds)} seed(s), mean ± half the range")
    for name in ("part", "arm"):
        table.add_column(name)
    for name in ("parameters", "steps", "loss", "exact answers", "routed slots a token"):
        table.add_column(name, justify="right")
    for ablation, results in found.values():
        table.add_section()
        for result in results:
            for number, step in enumerate(ablation.looks):
                names = (ablation.title, result.arm, f"{result.parameters:,}") if number == 0 else ("", "", "")
                values = [figure(result.over_seeds(number, name)) for name in ("loss", "exact", "routed")]
                table.add_row(*names, str(step), *values)
    console.print(table)


def figure(values: Sequence[float]) -> str:
    """Mean and spread; nothing where there is no figure."""
    if any(math.isnan(v) for v in values):
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3f}{spread}"


def draw(found: Mapping[str, tuple[Ablation, list[Result]]], out: Path) -> None:
    """One panel a figure that matters; bands and bars span the seeds."""
    panels = [(key, name) for key in found for name in ("loss", "exact") if name == "loss" or found[key][0].exams]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    picture = Figure(figsize=(4.8 * columns, 4.0 * rows), layout="constrained")
    for place, (key, name) in enumerate(panels, 1):
        axes = picture.add_subplot(rows, columns, place)
        ablation, results = found[key]
        axes.set_title(ablation.title)
        axes.set_ylabel("held-out loss" if name == "loss" else "exact answers")
        if ablation.exams:
            _curves(axes, ablation, results, name)
        else:
            _points(axes, results)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(out, dpi=130)


def _curves(axes: Axes, ablation: Ablation, results: Sequence[Result], name: str) -> None:
    """A figure over steps."""
    for result in results:
        values = [result.over_seeds(number, name) for number in range(len(ablation.looks))]
        (line,) = axes.plot(ablation.looks, [sum(v) / len(v) for v in values], marker="o", label=result.arm)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(ablation.looks, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xlabel("optimizer steps")
    axes.set_ylim(0, 1.02) if name == "exact" else axes.set_yscale("log")


def _points(axes: Axes, results: Sequence[Result]) -> None:
    """Loss at the end over compute, a point a seed."""
    for result in results:
        axes.scatter(result.over_seeds(-1, "routed"), result.over_seeds(-1, "loss"), label=result.arm)
    axes.set_xlabel("routed slots a token and layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0", help="as in 0,1")
    parser.add_argument("--only", default="ngram,lsa,identity")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations.png"))
    parser.add_argument("--quick", action="store_true", help="a few steps each, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, chosen = [int(s) for s in options.seeds.split(",")], ablations(options.quick)
    console = Console(width=130)
    found = {}
    for key in options.only.split(","):
        found[key] = chosen[key], measure(chosen[key], seeds, console)
    show(found, seeds, console)
    draw(found, options.out)
    console.print(f"drawn in {options.out}", highlight=False)


if __name__ == "__main__":
    main()
