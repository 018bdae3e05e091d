"""What TRL's ``AsyncGRPOTrainer`` needs on a CPU: attention over packed segments, and a worker that makes its rollouts.

There are two workers. The plain one is what transformers gives: a thread that calls ``generate`` for one group after
the other. The batching one is what it becomes when one builds an engine for it, with this repository's ideas: a process
of its own (a thread fights the trainer for Python's lock) that samples a whole step's groups in one batch, by a bare
loop of forwards over a growing cache. Both let many groups wait at once, and take the newest weights before every
batch.

Shapes: B rows, T tokens, N and M tokens of a segment and of what it sees, V vocabulary.
"""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoTokenizer, DynamicCache
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from posttrain.model.checkpoint import load_any


class Work(Protocol):
    """What a worker does. It travels to another process, so it must be picklable."""

    @property
    def model(self) -> Path:
        """Folder."""
        ...

    @property
    def groups(self) -> int:
        """Of a step."""
        ...

    @property
    def size(self) -> int:
        """Rollouts of a group."""
        ...

    @property
    def tokens(self) -> int:
        """Of a completion."""
        ...

    @property
    def staleness(self) -> int:
        """In steps: what is older is dropped."""
        ...

    def text(self, group: int) -> str:
        """A group's prompt; all are of one length in tokens."""
        ...

    def wait_s(self, group: int, place: int) -> float:
        """Of an episode after its completion."""
        ...

    def reward(self, ids: Sequence[int]) -> float:
        """Of a completion."""
        ...


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, softmax_scale: float, **_: Any) -> Tensor:
    """flash-attention's ``flash_attn_varlen_func``, causal: tensors are ``[tokens, heads, size]``, of all segments."""
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for (a, b), (c, d) in zip(pairwise(bounds[0].tolist()), pairwise(bounds[1].tolist()), strict=True):
        shapes[b - a, d - c].append((a, c))
    mixed, places = [], []
    for (n, m), starts in shapes.items():
        first_B2 = torch.tensor(starts)
        place_BN, from_BM = first_B2[:, :1] + torch.arange(n), first_B2[:, 1:] + torch.arange(m)
        visible_NM = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        heads = [x.transpose(1, 2) for x in (q[place_BN], k[from_BM], v[from_BM])]
        out = scaled_dot_product_attention(*heads, attn_mask=visible_NM, scale=softmax_scale, enable_gqa=True)
        mixed.append(out.transpose(1, 2).flatten(0, 1))
        places.append(place_BN.flatten())
    return torch.cat(mixed)[torch.cat(places).argsort()]


class Shared(NamedTuple):
    """What trainer and worker have in common; of ``threading`` or of ``multiprocessing``."""

    weights: dict[str, Tensor]
    lock: Any
    """Around the weights."""
    version: list[int] | Any
    samples: Any
    """The trainer's queue."""
    stop: Any


class Worker:
    """Implements TRL's ``RolloutWorkerProtocol`` and ``WeightTransferProtocol``."""

    def __init__(self, work: Work, batching: bool) -> None:
        new, model = multiprocessing.get_context("spawn"), load_any(work.model, torch.float32)
        weights = {n: p.detach().clone().share_memory_() for n, p in model.named_parameters()}
        version = new.Array("i", [0])
        if batching:
            self._shared = Shared(weights, new.Lock(), version, new.Queue(), new.Event())
            self._worker = new.Process(target=make_samples, args=(work, self._shared, True), daemon=True)
        else:
            self._shared = Shared(weights, threading.Lock(), version, queue.Queue[Any](), threading.Event())
            self._worker = threading.Thread(target=make_samples, args=(work, self._shared, False), daemon=True)
        self.rollout_buffer, self.metrics_queue = self._shared.samples, queue.Queue[Any]()
        self.start = self._worker.start

    def stop(self) -> None:
        self._shared.stop.set()
        self._worker.join(10)

    def update_model_version(self, model_version: int) -> None:
        self._shared.version[0] = model_version

    def check_health(self, stale_after_s: float) -> None:
        if not self._worker.is_alive():
            raise RuntimeError("the rollout worker ended; see stderr")

    @torch.no_grad()
    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        with self._shared.lock:
            for name, tensor in iterator:
                self._shared.weights[name].copy_(tensor)

    def nothing(self) -> None:
        """A batch that is under way need not pause."""

    init_weight_transfer = pause = resume = destroy = nothing


def make_samples(work: Work, shared: Shared, batching: bool) -> None:
    """What the worker's process or thread does."""
    if batching:
        torch.set_num_threads(1)
        shared.samples.cancel_join_thread()
    at_once, draw = (work.groups, sample) if batching else (1, generate)
    model, tokenizer = load_any(work.model, torch.float32), AutoTokenizer.from_pretrained(work.model)
    owner = multiprocessing.parent_process() if batching else threading.main_thread()
    waiting: list[threading.Timer] = []
    for first in itertools.count(0, at_once):
        # What lies in the queue counts: ever more would lie there, and be too old when it is taken.
        while len(waiting) + shared.samples.qsize() / work.size > work.groups * work.staleness - at_once:
            time.sleep(0.002)
            waiting = [t for t in waiting if t.is_alive()]
            if shared.stop.is_set() or owner is None or not owner.is_alive():
                return
        version = shared.version[0]
        with shared.lock, torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(shared.weights[name])
        groups = range(first, first + at_once)
        prompts = [tokenizer.encode(work.text(g)) for g in groups for _ in range(work.size)]
        ids, logprobs = draw(model, torch.tensor(prompts), work.tokens)
        for place, group in zip(range(0, len(ids), work.size), groups, strict=True):
            rows = slice(place, place + work.size)
            made = to_trl(work, prompts[rows], ids[rows], logprobs[rows], group, version)
            # A group is there when its slowest episode is.
            last = max(work.wait_s(group, i) for i in range(work.size))
            waiting.append(threading.Timer(last, lambda made=made: [shared.samples.put(s) for s in made]))
            waiting[-1].daemon = True
            waiting[-1].start()


@torch.inference_mode()
def sample(model: Any, ids_BT: Tensor, tokens: int) -> tuple[list[list[int]], list[list[float]]]:
    """Completions of prompts of one length, and their log-probs."""
    cache, new_B1, ids, logprobs = DynamicCache(), ids_BT, [], []
    for _ in range(tokens):
        logits_BV = model(new_B1, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        logprobs_BV = logits_BV.log_softmax(-1)
        new_B1 = logprobs_BV.exp().multinomial(1)
        ids.append(new_B1)
        logprobs.append(logprobs_BV.gather(1, new_B1))
    return torch.cat(ids, 1).tolist(), torch.cat(logprobs, 1).tolist()


@torch.inference_mode()
def generate(model: Any, ids_BT: Tensor, tokens: int) -> tuple[list[list[int]], list[list[float]]]:
    """The same, as transformers does it."""
    asked = {"max_new_tokens": tokens, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), **asked, return_dict_in_generate=True, output_logits=True
    )
    ids_BN = out.sequences[:, ids_BT.shape[1] :]
    logprobs_BNV = torch.stack(out.logits, 1).log_softmax(-1)
    return ids_BN.tolist(), logprobs_BNV.gather(2, ids_BN[..., None])[..., 0].tolist()


def to_trl(
    work: Work, prompts: list[list[int]], ids: list[list[int]], logprobs: list[list[float]], group: int, version: int
) -> list[RolloutSample]:
    """A group as TRL's trainer takes it."""
    rewards = [work.reward(i) for i in ids]
    return [
        RolloutSample(
            prompt=[],
            completion=[],
            input_ids=np.array([*given, *new]),
            completion_mask=np.array([0] * len(given) + [1] * len(new)),
            old_log_probs=np.array([*[0.0] * len(given), *old], dtype=np.float32),
            advantage=value - statistics.fmean(rewards),
            model_version=version,
            group_id=group,
            metrics={"reward": value},
        )
        for given, new, old, value in zip(prompts, ids, logprobs, rewards, strict=True)
    ]
