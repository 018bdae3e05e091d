"""A dense model becomes a sparse one: LSA by indexers that learn what attention looks at, or LoZA by a calibration.

One process and a plain loop: indexers alone, mixing scalars alone and everything on two losses are not what a
fine-tuning library does. The stage is short, so a run that was killed starts it again from its beginning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from experts.config import LozaConversion, LsaConversion
from experts.demonstrations import Row
from experts.index_measures import IndexMeasures
from posttrain import determinism
from posttrain.batch import Batch, pack
from posttrain.errors import UserError
from posttrain.model import Longcat2Config, Longcat2ForCausalLM
from posttrain.model.calibration import least, mixed
from posttrain.threads import Stopped
from posttrain.types import Sample

log = getLogger(__name__)

Report = Callable[[int, Mapping[str, float]], None]
"""Takes a step and its numbers; measures on held-out rows come under the step they follow."""
_Loss = Callable[[Longcat2ForCausalLM, Batch, int], tuple[Tensor, dict[str, float]]]
"""A micro-batch's part of a loss that is a mean over so many tokens, and what to report of it."""

_LSA = (
    "index_topk",
    "index_init_tokens",
    "index_local_tokens",
    "index_n_heads",
    "index_head_dim",
    "cli_factor",
    "indexer_loss_coef",
)
_LOZA = ("streaming_block_size", "streaming_sink_blocks", "streaming_local_blocks")
_RISE = 10
"""Steps over which a rate rises; then it falls linearly to a tenth."""


def steps_of(config: LsaConversion | LozaConversion) -> int:
    """Steps of both parts of the stage."""
    if isinstance(config, LsaConversion):
        return config.warmup_steps + config.sparse_steps
    return config.steps + config.finetune_steps


def convert(
    start: Path,
    rows: Sequence[Row],
    config: LsaConversion | LozaConversion,
    folder: Path,
    seed: int,
    report: Report,
    stopped: threading.Event,
) -> None:
    """Convert the model in ``start`` into ``folder``, tokenizer included. The first ``held_out`` rows are for measures,
    the others to learn from.

    Raises:
        UserError: not a dense longcat2 model, or too few rows.
        Stopped: ``stopped`` was set.
    """
    if len(rows) <= config.held_out:
        raise UserError(f"conversion.held_out: {config.held_out} of {len(rows)} conversations leave none to learn from")
    torch.set_num_threads(config.threads)
    if config.deterministic:
        determinism.enforce()
    torch.manual_seed(seed)
    dense = AutoConfig.from_pretrained(start)
    if not isinstance(dense, Longcat2Config) or dense.use_lsa or dense.streaming_attentions:
        raise UserError(f"conversion: {start} holds no longcat2 model with dense attention; set conversion to null")
    held = pack([_sample(row) for row in rows[: config.held_out]], config.tokens_per_micro_batch)
    work = _Work(start, dense, held, report)
    batches = _until(stopped, _batches(rows[config.held_out :], config, seed))
    model = _to_lsa(work, config, batches) if isinstance(config, LsaConversion) else _to_loza(work, config, batches)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)


def sparse_config(dense: Longcat2Config, config: LsaConversion | LozaConversion, **more: Any) -> Longcat2Config:
    """The dense model's config with what the conversion sets. Raises ValueError for sizes that do not fit together."""
    names = _LSA if isinstance(config, LsaConversion) else _LOZA
    return Longcat2Config(**{**dense.to_dict(), **{name: getattr(config, name) for name in names}, **more})


class _Work:
    """What both ways share: the dense model, the held-out rows and the report."""

    def __init__(self, start: Path, dense: Longcat2Config, held: list[Batch], report: Report) -> None:
        self.start, self.dense, self.held, self.report = start, dense, held, report

    def load(self, config: Longcat2Config) -> Longcat2ForCausalLM:
        """The dense weights under another config: nothing may be left over, and only indexers may start afresh."""
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would warn of the indexers, which are missing on purpose
        loaded: Any = Longcat2ForCausalLM.from_pretrained(
            self.start, config=config, dtype=torch.float32, output_loading_info=True
        )
        logging.set_verbosity(verbosity)
        model, info = loaded
        fresh = {name for name in model.state_dict() if ".indexer." in name}
        if set(info["missing_keys"]) != fresh or info["unexpected_keys"] or info["mismatched_keys"]:
            raise UserError(f"conversion: the weights in {self.start} are not those of a dense model: {info}")
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def lm_loss(self, model: Longcat2ForCausalLM) -> float:
        """Nats a token, on the held-out rows."""
        model.eval()
        count = sum(_labelled(batch) for batch in self.held)
        return sum(float(_lm_loss(model, batch.to(model.device), count)[0]) for batch in self.held)


# LSA


def _to_lsa(work: _Work, c: LsaConversion, batches: Iterator[list[Batch]]) -> Longcat2ForCausalLM:
    model = work.load(sparse_config(work.dense, c))
    indexers = [p for name, p in model.named_parameters() if ".indexer." in name]
    measures = [_measure(work, model, 0)]

    model.requires_grad_(False)
    for parameter in indexers:
        parameter.requires_grad_()
    model.model.set_indexer_stage("dense")
    for step, values in _learn(model.train(), _adam(c.warmup_lr, indexers), batches, c.warmup_steps, _index_loss):
        work.report(step, values)
    measures.append(_measure(work, model, c.warmup_steps))

    model.requires_grad_(True)
    model.freeze_idle()
    model.model.set_indexer_stage("sparse")
    others = [p for name, p in model.named_parameters() if ".indexer." not in name and p.requires_grad]
    # Two groups: what the indexers' gradients measure must not scale down the model's own.
    optimizer = _adam(c.sparse_lr, others, indexers)
    for step, values in _learn(model.train(), optimizer, batches, c.sparse_steps, _lm_loss):
        work.report(c.warmup_steps + step, values)
    measures.append(_measure(work, model, c.warmup_steps + c.sparse_steps))
    log.info("conversion: on held-out conversations, at the start -> after the warm-up -> after the sparse stage:")
    for name in measures[0]:
        log.info("conversion: %s %s", name.removeprefix("held_out/"), " -> ".join(f"{m[name]:.4f}" for m in measures))
    return model


def _measure(work: _Work, model: Longcat2ForCausalLM, step: int) -> dict[str, float]:
    """LM loss with dense and with sparse attention, and what the indexers make of the dense one."""
    model.model.set_indexer_stage("dense")
    with IndexMeasures(model.model) as index:
        dense = work.lm_loss(model)
    model.model.set_indexer_stage("sparse")
    values = {"held_out/lm_dense": dense, "held_out/lm_sparse": work.lm_loss(model)}
    values |= {f"held_out/{name}": value for name, value in index.values().items()}
    work.report(step, values)
    return values


# LoZA


def _to_loza(work: _Work, c: LozaConversion, batches: Iterator[list[Batch]]) -> Longcat2ForCausalLM:
    model = work.load(work.dense)
    full = work.lm_loss(model)
    work.report(0, {"held_out/lm_full": full})
    model.requires_grad_(False)
    # Halfway: what does not matter stays there. At 1 a trained model is near its optimum, where gradients say nothing.
    alphas_A = torch.full((work.dense.num_attentions,), 0.5, device=model.device, requires_grad=True)
    # SGD: Adam would let a small gradient climb as fast as a large one. Eval mode: the LM loss without auxiliary ones.
    optimizer = SGD([alphas_A], c.lr, momentum=0.9)
    with mixed(model.model, sparse_config(work.dense, c), alphas_A):
        for step, values in _learn(model.eval(), optimizer, batches, c.steps, _lm_loss):
            work.report(step, {**values, **{f"alpha/{i}": a for i, a in enumerate(alphas_A.tolist())}})
    streaming = least(alphas_A.detach(), c.share)
    log.info("conversion: alphas %s; streaming %s", " ".join(f"{a:.3f}" for a in alphas_A.tolist()), streaming)

    model = work.load(sparse_config(work.dense, c, streaming_attentions=streaming))
    before = work.lm_loss(model)
    work.report(c.steps, {"held_out/lm_streaming": before})
    model.freeze_idle()
    optimizer = _adam(c.finetune_lr, [p for p in model.parameters() if p.requires_grad])
    for step, values in _learn(model.train(), optimizer, batches, c.finetune_steps, _lm_loss):
        work.report(c.steps + step, values)
    after = work.lm_loss(model)
    work.report(c.steps + c.finetune_steps, {"held_out/lm_streaming": after})
    log.info("conversion: lm %.4f full -> %.4f streaming -> %.4f after fine-tuning", full, before, after)
    return model


# Learning


def _adam(lr: float, *groups: list[torch.nn.Parameter]) -> Optimizer:
    return AdamW([{"params": group} for group in groups], lr, (0.9, 0.95), weight_decay=0.0)


def _learn(
    model: Longcat2ForCausalLM, optimizer: Optimizer, batches: Iterator[list[Batch]], steps: int, loss_of: _Loss
) -> Iterator[tuple[int, dict[str, float]]]:
    """Take the steps, from 1 on; each is over when its number comes."""
    count_of = _real if loss_of is _index_loss else _labelled
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        micro_batches = next(batches)
        count, sums = sum(count_of(b) for b in micro_batches), dict[str, float]()
        for batch in micro_batches:
            loss, values = loss_of(model, batch.to(model.device), count)
            loss.backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        decay = min(1.0, (step + 1) / _RISE) * (1 - 0.9 * step / steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0, error_if_nonfinite=True)
            group["lr"] = peak * decay
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Frozen weights, frozen biases: what was counted is dropped.
        model.model.update_router_biases(decay if model.lm_head.weight.requires_grad else 0.0)
        yield step + 1, sums


def _until(stopped: threading.Event, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    for batch in batches:
        if stopped.is_set():
            raise Stopped
        yield batch


def _index_loss(model: Longcat2ForCausalLM, batch: Batch, count: int) -> tuple[Tensor, dict[str, float]]:
    out = model(input_ids=batch.ids_BT, attention_mask=batch.real_BT, use_cache=False, logits_to_keep=1)
    loss = out.index_loss * (_real(batch) / count)
    return loss, {"index_loss": loss.item()}


def _lm_loss(model: Longcat2ForCausalLM, batch: Batch, count: int) -> tuple[Tensor, dict[str, float]]:
    """Auxiliary losses included, in training mode."""
    labels_BT = batch.ids_BT.masked_fill(~batch.sampled_BT, -100)
    out = model(
        input_ids=batch.ids_BT,
        attention_mask=batch.real_BT,
        labels=labels_BT,
        use_cache=False,
        num_items_in_batch=count,
    )
    values = {"loss": out.loss.item() - (0.0 if out.aux_loss is None else out.aux_loss.item())}
    if out.index_loss is not None:
        values["index_loss"] = out.index_loss.item() * _labelled(batch) / count
    return out.loss, values


def _labelled(batch: Batch) -> int:
    return int(batch.sampled_BT.sum())


def _real(batch: Batch) -> int:
    return int(batch.real_BT.sum())


def _batches(rows: Sequence[Row], config: LsaConversion | LozaConversion, seed: int) -> Iterator[list[Batch]]:
    """A step's micro-batches, without end: all rows in a random order, then in another."""
    rng, pool = Random(seed), list[Row]()
    while True:
        while len(pool) < config.batch_size:
            pool += rng.sample(rows, len(rows))
        yield pack([_sample(row) for row in pool[: config.batch_size]], config.tokens_per_micro_batch)
        pool = pool[config.batch_size :]


def _sample(row: Row) -> Sample:
    ids, labels = row
    nothing = (0.0,) * len(ids)
    said = tuple(label != -100 for label in labels)
    return Sample(rollout="", domain="", ids=tuple(ids), sampled=said, logprobs=nothing, advantages=nothing)
