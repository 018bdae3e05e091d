"""The process behind ``LocalEngine``: one model, many requests, one forward a token for all of them (or a few tokens,
with drafts: see ``speculative``).

A request gets a slot of the cache and keeps it until it ends. A slot that is free still holds what it computed, so the
next turn of a conversation continues where its last one stopped (same weights only), and rollouts of one prompt share
one prefill. New weights are taken between two tokens; running requests go on with the cache they have, and every token
is stamped with the version that sampled it.

Shapes: B rows in a forward, N tokens drawn from one, V vocabulary.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.engine.cache import SlotCache
from posttrain.engine.recorder import Recorder
from posttrain.engine.sampling import draw
from posttrain.engine.slots import Request, Slot, lay_out
from posttrain.engine.speculative import DraftCounts, Drafter
from posttrain.types import Completion
from posttrain.weights import read_into

_PREFILL_TOKENS = 8192
"""Padded tokens one prefill forward may hold: bounds its memory."""


class Scheduler:
    """Continuous batching over a ``SlotCache``. Deterministic: the same calls give the same tokens."""

    def __init__(
        self, model: Any, num_slots: int, max_context: int, draft_steps: int = 0, record_choices: bool = False
    ) -> None:
        window = getattr(model.config, "sliding_window", None)
        if window is not None and window < max_context:
            raise ValueError(f"sliding-window attention is not implemented: set max_context to at most {window}")
        pages = model.config.hi_min_tokens if getattr(model.config, "use_hi", False) else max_context + 1
        if pages <= max_context:
            raise ValueError(
                f"engine.max_context: {max_context}, but from {pages} tokens on (hi_min_tokens) this model's prefills "
                "choose by pages, and this engine does not: lower the one, or set the model's use_hi to false"
            )
        self.model, self.max_context = model.eval(), max_context
        self.cache = SlotCache(num_slots, max_context)
        self.drafter = Drafter(model, self.cache, draft_steps) if draft_steps else None
        self.recorder = Recorder(model.config, self.cache) if record_choices else None
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

    @property
    def counts(self) -> DraftCounts:
        """What came of drafts so far."""
        return self.drafter.counts if self.drafter is not None else DraftCounts()

    def set_version(self, version: int) -> None:
        """The weights have changed: what was computed is not continued by new requests."""
        self.version = version
        for slot in self.slots:
            slot.version = -1
        for slot in self.free:
            slot.freed_at = 0  # who takes which row must not depend on earlier weights: a resumed run has not seen them

    @torch.inference_mode()
    def step(self) -> None:
        """Admit what fits, then one forward for everything that runs. Finished requests land in ``done``."""
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
            self._start(slot, request, known)
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

    def _start(self, slot: Slot, request: Request, known: int) -> None:
        if not known:
            slot.states = slot.states[:0]
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
            slots, rows = [s for s, _ in chunk], list(range(len(chunk)))
            logits_BV = self._read_prompts(slots, [known for _, known in chunk])
            for row, (leader, _) in enumerate(chunk):
                copies = by_leader.get(leader.index, [])
                if copies:
                    self._share(leader, copies)
                    slots += copies
                    rows += [row] * len(copies)
            self._sample(slots, [[]] * len(slots), logits_BV[rows])

    def _read_prompts(self, slots: Sequence[Slot], known: Sequence[int]) -> Tensor:
        """Logits ``[B, V]`` after the contexts, whose first columns are known."""
        tokens = [s.context[k:] for s, k in zip(slots, known, strict=True)]
        out = self._forward(slots, tokens, known)
        every_B, last_B = torch.arange(len(slots)), torch.tensor([len(t) - 1 for t in tokens])
        if self.drafter is not None:
            states = [out.last_hidden_state[row, : len(t)] for row, t in enumerate(tokens)]
            self.drafter.prefill(slots, states, max(len(s.context) for s in slots))
        return out.logits[every_B, last_B].float()

    def _share(self, leader: Slot, copies: Sequence[Slot]) -> None:
        """Give ``copies`` what was computed for the same context."""
        targets = torch.tensor([s.index for s in copies])
        self.cache.copy_row(leader.index, targets, len(leader.context))
        if self.recorder is not None:
            self.recorder.copy_row(leader.index, targets, len(leader.context))
        for slot in copies:
            slot.states = leader.states

    def _decode(self, running: Sequence[Slot]) -> None:
        count = running[-1].index + 1
        # Rows 0..count-1 as they lie; idle ones among them compute into the trash column and are ignored.
        slots = self.slots[:count] if count <= 2 * len(running) else running
        drafts = self.drafter.propose(slots) if self.drafter is not None else [[]] * len(slots)
        tokens = [[s.context[-1], *d] if s.request is not None else [] for s, d in zip(slots, drafts, strict=True)]
        out = self._forward(slots, tokens, [len(s.context) - 1 for s in slots])
        rows = [row for row, slot in enumerate(slots) if slot.request is not None]
        drafts = [drafts[row] for row in rows]
        places = [(row, place) for row, draft in zip(rows, drafts, strict=True) for place in range(len(draft) + 1)]
        logits_NV = out.logits[[row for row, _ in places], [place for _, place in places]].float()
        sampled = self._sample(running, drafts, logits_NV)
        if self.drafter is not None:
            for slot, row, draft, taken in zip(running, rows, drafts, sampled, strict=True):
                self.drafter.judged(slot, draft, out.last_hidden_state[row], taken)

    def _forward(self, slots: Sequence[Slot], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Any:
        """The model's output for ``tokens`` at the columns from ``starts`` on; a slot without tokens is idle."""
        rows = lay_out(self.cache, slots, tokens, starts)
        out = self.model(
            input_ids=rows.ids_BT,
            attention_mask=rows.mask_B1TS,
            position_ids=rows.positions_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if rows.ids_BT.shape[1] > 1 else 1,
            **({"output_choices": True} if self.recorder is not None else {}),
        )
        if self.recorder is not None:
            self.recorder.write(out)
        return out

    def _sample(self, slots: Sequence[Slot], drafts: Sequence[Sequence[int]], logits_NV: Tensor) -> list[list[int]]:
        """Extend each slot by the policy's own tokens, from the logits after its context and after each of its drafts:
        as long as they are the drafts, and one more. Returns them."""
        places = [(slot, place) for slot, draft in zip(slots, drafts, strict=True) for place in range(len(draft) + 1)]
        token_N, logprob_N = draw(logits_NV, [slot for slot, _ in places], [place for _, place in places])
        drawn = iter(zip(token_N.tolist(), logprob_N.tolist(), strict=True))
        taken: list[list[int]] = []
        for slot, draft in zip(slots, drafts, strict=True):
            own = [next(drawn) for _ in range(len(draft) + 1)]
            right = 0
            while right < len(draft) and draft[right] == own[right][0]:
                right += 1
            taken.append(self._extend(slot, own[: right + 1]))
        return taken

    def _extend(self, slot: Slot, drawn: Sequence[tuple[int, float]]) -> list[int]:
        """Add tokens with their log-probs until the request ends; returns those that were added."""
        request = slot.request
        assert request is not None
        taken: list[int] = []
        for token, logprob in drawn:
            taken.append(token)
            slot.context.append(token)
            slot.logprobs.append(logprob)
            slot.versions.append(self.version)
            if token in request.sampling.stop_ids:
                self._finish(slot, request, "stop")
                break
            if slot.room == 0:
                self._finish(slot, request, "length")
                break
        return taken

    def _finish(self, slot: Slot, request: Request, finish: Literal["stop", "length"]) -> None:
        completion = Completion(
            ids=tuple(slot.context[-slot.sampled :]),
            logprobs=tuple(slot.logprobs),
            versions=tuple(slot.versions),
            finish=finish,
            choices=self.recorder.read(slot.index, len(slot.context) - 1) if self.recorder is not None else None,
        )
        self.done.append((request.id, completion))
        self.clock += 1
        slot.request, slot.freed_at = None, self.clock
        self.free.append(slot)


def load_model(folder: str) -> nn.Module:
    """Any causal LM in a Hugging Face folder, ours included."""
    from posttrain.model.checkpoint import load_any

    return load_any(folder, torch.float32)


def _read(pipe: Connection, inbox: SimpleQueue[tuple[Any, ...]]) -> None:
    """Empties the pipe at all times: an owner that writes while this process writes would wait forever."""
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        inbox.put(("close",))


def main(
    pipe: Connection,
    folder: str,
    num_slots: int,
    max_context: int,
    threads: int,
    draft_steps: int = 0,
    record_choices: bool = False,
) -> None:
    """Serve requests from ``pipe`` until it closes. A closed pipe means that the owner is gone, however it went."""
    torch.set_num_threads(threads)
    model = load_model(folder)
    try:
        scheduler = Scheduler(model, num_slots, max_context, draft_steps, record_choices)
    except ValueError as error:
        pipe.send(("refused", str(error)))
        return
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
                pipe.send(("done", scheduler.done, scheduler.counts))
                scheduler.done = []
    except (ConnectionError, KeyboardInterrupt):
        return
