"""The process behind ``LocalEngine``: one model, many requests, one forward a token for all of them.

A request gets a slot of the cache and keeps it until it ends. A slot that is free still holds what it computed, so the
next turn of a conversation continues where its last one stopped (same weights only), and rollouts of one prompt share
one prefill. New weights are taken between two tokens; running requests go on with the cache they have, and every token
is stamped with the version that sampled it.

Shapes: B rows in a forward, T tokens a row, S visible columns, V vocabulary.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.engine.cache import SlotCache
from posttrain.types import Completion, Sampling
from posttrain.weights import read_into

_COLUMN_STEP = 32
_PREFILL_TOKENS = 8192
"""Padded tokens one prefill forward may hold: bounds its memory."""


@dataclass(slots=True, kw_only=True)
class Request:
    id: int
    ids: tuple[int, ...]
    sampling: Sampling


@dataclass(slots=True, kw_only=True)
class Slot:
    index: int
    context: list[int] = field(default_factory=list)
    """Every token whose keys are in the cache, plus the one sampled last."""
    request: Request | None = None
    version: int = -1
    """Weights that computed the row; -1 after it was continued under newer ones."""
    freed_at: int = 0
    uniforms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def sampled(self) -> int:
        """Tokens sampled for the running request."""
        return len(self.logprobs)


class Scheduler:
    """Continuous batching over a ``SlotCache``. Deterministic: the same calls give the same tokens."""

    def __init__(self, model: nn.Module, num_slots: int, max_context: int) -> None:
        window = getattr(model.config, "sliding_window", None)
        if window is not None and window < max_context:
            raise ValueError(f"sliding-window attention is not implemented: set max_context to at most {window}")
        self.model, self.max_context = model.eval(), max_context
        self.cache = SlotCache(num_slots, max_context)
        self.slots = [Slot(index=i) for i in range(num_slots)]
        self.free = list(self.slots)
        self.pending: deque[Request] = deque()
        self.version = 0
        self.clock = 0
        self.done: list[tuple[int, Completion]] = []

    @property
    def busy(self) -> bool:
        """Whether a call of ``step`` would do something."""
        return bool(self.pending) or len(self.free) < len(self.slots)

    def set_version(self, version: int) -> None:
        """The weights have changed: what was computed is not continued by new requests."""
        self.version = version
        for slot in self.slots:
            slot.version = -1
        for slot in self.free:
            slot.freed_at = 0  # who takes which row must not depend on earlier weights: a resumed run has not seen them

    @torch.inference_mode()
    def step(self) -> None:
        """Admit what fits, then one token for everything that runs. Finished requests land in ``done``."""
        self._admit()
        running = [s for s in self.slots if s.request is not None]
        if running:
            self._decode(running)

    def _admit(self) -> None:
        batch: list[tuple[Slot, int]] = []
        while self.pending and self.free:
            request = self.pending.popleft()
            if len(request.ids) + 1 > self.max_context or request.sampling.max_tokens < 1:
                self.done.append((request.id, Completion(ids=(), logprobs=(), versions=(), finish="length")))
                continue
            slot, known = self._choose(request)
            self._start(slot, request)
            batch.append((slot, known))
        leaders: dict[tuple[int, ...], Slot] = {}
        followers: list[tuple[Slot, Slot]] = []
        work: list[tuple[Slot, int]] = []
        for slot, known in batch:
            ids = tuple(slot.context)
            if known == 0 and ids in leaders:
                followers.append((slot, leaders[ids]))
                continue
            if known == 0:
                leaders[ids] = slot
            work.append((slot, known))
        self._prefill(work, followers)

    def _choose(self, request: Request) -> tuple[Slot, int]:
        """The free slot that already holds the longest beginning of the request, else the one freed longest ago."""
        best, known = None, 0
        for slot in self.free:
            n = len(slot.context) - 1
            fits = slot.version == self.version and known < n < len(request.ids)
            if fits and tuple(slot.context[:n]) == request.ids[:n]:
                best, known = slot, n
        slot = best or min(self.free, key=lambda s: (s.freed_at, s.index))
        self.free.remove(slot)
        return slot, known

    def _start(self, slot: Slot, request: Request) -> None:
        slot.context, slot.request, slot.version = list(request.ids), request, self.version
        slot.logprobs, slot.versions = [], []
        room = min(request.sampling.max_tokens, self.max_context - len(request.ids))
        slot.uniforms = np.random.Generator(np.random.PCG64(request.sampling.seed)).random(room)

    def _prefill(self, work: Sequence[tuple[Slot, int]], followers: Sequence[tuple[Slot, Slot]]) -> None:
        by_leader: dict[int, list[Slot]] = {}
        for follower, leader in followers:
            by_leader.setdefault(leader.index, []).append(follower)
        # Similar lengths together, so that little is padded.
        order = sorted(work, key=lambda w: (len(w[0].context) - w[1], w[0].index))
        while order:
            count = 1
            while (
                count < len(order) and (count + 1) * (len(order[count][0].context) - order[count][1]) <= _PREFILL_TOKENS
            ):
                count += 1
            chunk, order = order[:count], order[count:]
            logits_BV = self._forward([s for s, _ in chunk], [s.context[known:] for s, known in chunk])
            slots, rows = [s for s, _ in chunk], list(range(len(chunk)))
            for row, (leader, _) in enumerate(chunk):
                copies = by_leader.get(leader.index, [])
                if copies:
                    targets = torch.tensor([s.index for s in copies])
                    self.cache.copy_row(leader.index, targets, len(leader.context))
                    slots += copies
                    rows += [row] * len(copies)
            self._sample(slots, logits_BV[rows])

    def _decode(self, running: Sequence[Slot]) -> None:
        count = running[-1].index + 1
        if count <= 2 * len(running):
            # Rows 0..count-1 as they lie; idle ones among them compute into the trash column and are ignored.
            live = {s.index for s in running}
            slots = self.slots[:count]
            tokens = [[s.context[-1]] if s.index in live else [0] for s in slots]
            logits_BV = self._forward(slots, tokens, live)
            self._sample(running, logits_BV[[s.index for s in running]])
        else:
            self._sample(running, self._forward(running, [[s.context[-1]] for s in running]))

    def _forward(self, slots: Sequence[Slot], tokens: Sequence[Sequence[int]], live: set[int] | None = None) -> Tensor:
        """Logits ``[B, V]`` after the last of ``tokens``, the not yet cached end of each slot's context."""
        lengths = [len(t) for t in tokens]
        width = max(lengths)
        ids_BT = torch.zeros(len(slots), width, dtype=torch.long)
        columns_BT = torch.full((len(slots), width), self.cache.trash_column)
        positions_BT = torch.zeros(len(slots), width, dtype=torch.long)
        end = 1
        for row, (slot, new) in enumerate(zip(slots, tokens, strict=True)):
            if live is not None and slot.index not in live:
                continue
            n, stop = len(new), len(slot.context)
            ids_BT[row, :n] = torch.tensor(new)
            positions_BT[row, :n] = columns_BT[row, :n] = torch.arange(stop - n, stop)
            end = max(end, stop)
        visible = min(-(-end // _COLUMN_STEP) * _COLUMN_STEP, self.cache.max_columns)
        hidden_B1TS = torch.arange(visible) > positions_BT[:, None, :, None]
        # Additive, because transformers' eager attention adds whatever mask it is given.
        mask_B1TS = torch.zeros(hidden_B1TS.shape).masked_fill_(hidden_B1TS, torch.finfo(torch.float32).min)
        rows_B = torch.tensor([s.index for s in slots])
        self.cache.place(rows_B, columns_BT, visible, all(s.index == row for row, s in enumerate(slots)))
        out = self.model(
            input_ids=ids_BT,
            attention_mask=mask_B1TS,
            position_ids=positions_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if width > 1 else 1,
        )
        return out.logits[torch.arange(len(slots)), torch.tensor(lengths) - 1].float()

    def _sample(self, slots: Sequence[Slot], logits_BV: Tensor) -> None:
        requests = [s.request for s in slots if s.request is not None]
        temperature_B = torch.tensor([r.sampling.temperature for r in requests])
        greedy_B = temperature_B == 0
        scaled_BV = logits_BV / torch.where(greedy_B, 1.0, temperature_B)[:, None]
        logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
        cdf_BV = logprobs_BV.double().exp().cumsum(-1)
        uniform_B = torch.tensor([s.uniforms[s.sampled] for s in slots], dtype=torch.float64)
        drawn_B = torch.searchsorted(cdf_BV, (uniform_B * cdf_BV[:, -1])[:, None], right=True)[:, 0]
        token_B = torch.where(greedy_B, logprobs_BV.argmax(-1), drawn_B.clamp_max(logits_BV.shape[-1] - 1))
        chosen_B = logprobs_BV.gather(1, token_B[:, None])[:, 0]
        for slot, request, token, logprob in zip(slots, requests, token_B.tolist(), chosen_B.tolist(), strict=True):
            slot.context.append(token)
            slot.logprobs.append(logprob)
            slot.versions.append(self.version)
            if token in request.sampling.stop_ids:
                self._finish(slot, request, "stop")
            elif slot.sampled == len(slot.uniforms):
                self._finish(slot, request, "length")

    def _finish(self, slot: Slot, request: Request, finish: str) -> None:
        completion = Completion(
            ids=tuple(slot.context[-slot.sampled :]),
            logprobs=tuple(slot.logprobs),
            versions=tuple(slot.versions),
            finish="stop" if finish == "stop" else "length",
        )
        self.done.append((request.id, completion))
        self.clock += 1
        slot.request, slot.freed_at = None, self.clock
        self.free.append(slot)


def load_model(folder: str) -> nn.Module:
    """Any causal LM in a Hugging Face folder, ours included."""
    from transformers import AutoModelForCausalLM

    import posttrain.model  # noqa: F401  (registers longcat2 with the Auto classes)

    return AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.float32)


def _read(pipe: Connection, inbox: SimpleQueue[tuple[Any, ...]]) -> None:
    """Empties the pipe at all times: an owner that writes while this process writes would wait forever."""
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        inbox.put(("close",))


def main(pipe: Connection, folder: str, num_slots: int, max_context: int, threads: int) -> None:
    """Serve requests from ``pipe`` until it closes. A closed pipe means that the owner is gone, however it went."""
    torch.set_num_threads(threads)
    scheduler = Scheduler(load_model(folder), num_slots, max_context)
    pipe.send(("ready",))
    inbox: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), daemon=True).start()
    try:
        while True:
            while not scheduler.busy or not inbox.empty():
                kind, *rest = inbox.get()
                if kind == "generate":
                    scheduler.pending.extend(rest[0])
                elif kind == "load":
                    key, weights = rest
                    read_into(scheduler.model, weights.where)
                    scheduler.set_version(weights.version)
                    pipe.send(("loaded", key))
                elif kind == "close":
                    return
            scheduler.step()
            if scheduler.done:
                pipe.send(("done", scheduler.done))
                scheduler.done = []
    except (ConnectionError, KeyboardInterrupt):
        return
