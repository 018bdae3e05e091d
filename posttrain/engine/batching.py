"""Continuous batching: many requests, and one forward a token for all of them that the same version of the model
samples (or a few tokens, with drafts: see ``speculative``).

A request gets a slot of the cache and keeps it until it ends. A slot that is free still holds what it computed, so the
next turn of a conversation continues where its last one stopped (same weights only), and rollouts of one prompt share
one prefill. New weights are taken between two tokens; running requests that are not pinned go on under them, with the
cache that they have or with one that is computed anew, and every token is stamped with the version that sampled it.

Shapes: B rows in a forward, N tokens drawn from one, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from posttrain.engine import compiled
from posttrain.engine.cache import SlotCache
from posttrain.engine.recorder import Recorder
from posttrain.engine.resident import Resident
from posttrain.engine.sampling import draw
from posttrain.engine.slots import Request, Slot, chunks, lay_out
from posttrain.engine.speculative import DraftCounts, Drafter
from posttrain.types import Completion


class Scheduler:
    """Continuous batching over a ``SlotCache``. Deterministic: the same calls give the same tokens."""

    def __init__(
        self,
        model: Any,
        num_slots: int,
        max_context: int,
        draft_steps: int = 0,
        record_choices: bool = False,
        on_swap: Literal["keep", "recompute"] = "keep",
        compiling: bool = False,
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
        self.resident, self.max_context, self.on_swap = Resident(model, compiling), max_context, on_swap
        self.cache = SlotCache(num_slots, max_context)
        self.drafter = Drafter(model.config, self.cache, draft_steps) if draft_steps else None
        self.recorder = Recorder(model.config, self.cache) if record_choices else None
        self.slots = [Slot(index=i) for i in range(num_slots)]
        self.free = list(self.slots)
        self.pending: deque[Request] = deque()
        self.clock = 0
        self.done: list[tuple[int, Completion]] = []
        self.failed: list[tuple[int, str]] = []

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile, if the engine does, what later forwards need: of rows next to each other, and of others."""
        if self.resident.compiling:
            for slots in (self.slots[:5], self.slots[1:4]):
                for tokens in (2, 1):  # the first makes the cache, and is not compiled
                    starts = [self.max_context - tokens] * len(slots)
                    self._forward(self.model, slots, [[0] * tokens] * len(slots), starts)

    @property
    def busy(self) -> bool:
        """Whether a call of ``step`` would do something."""
        return bool(self.pending) or len(self.free) < len(self.slots)

    @property
    def counts(self) -> DraftCounts:
        """What came of drafts so far."""
        return self.drafter.counts if self.drafter is not None else DraftCounts()

    @property
    def model(self) -> Any:
        """The newest version."""
        return self.resident[self.resident.newest]

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue them. Those that are pinned to a version that is not resident land in ``failed``."""
        for request in requests:
            version = request.sampling.version
            if version is None or version in self.resident:
                self.pending.append(request)
            else:
                self.failed.append((request.id, f"version {version} is not resident in the engine: {self.resident}"))

    def set_version(self, version: int, keep: Collection[int] = ()) -> Any:
        """Make ``version`` the newest, see ``Engine.load``. Returns its model, into which the caller reads the weights
        before the next step. What other weights computed is not continued by new requests, and requests pinned to a
        version that is dropped land in ``failed``."""
        before = set(self.resident)
        model = self.resident.replace(version, keep)
        dropped = {v for v in before if v not in self.resident or v == version}
        for slot in self.slots:
            pinned = slot.request is not None and slot.request.sampling.version is not None
            if slot.version in dropped or (slot.request is not None and not pinned):
                slot.version = -1
            if slot.request is None and slot.version < 0:
                # Who takes which row must not depend on earlier weights: a resumed run has not seen them.
                slot.freed_at = 0
        self._fail(dropped)
        return model

    def _fail(self, dropped: Collection[int]) -> None:
        """End whatever is pinned to a version that was dropped, in a slot or in the queue."""
        for slot in self.slots:
            if slot.request is not None and slot.request.sampling.version in dropped:
                self._refuse(slot.request)
                slot.request, slot.freed_at = None, 0
                self.free.append(slot)
        for request in self.pending:
            if request.sampling.version in dropped:
                self._refuse(request)
        self.pending = deque(r for r in self.pending if r.sampling.version not in dropped)

    def forget(self, request_id: int) -> None:
        """End that request, if it has not ended: nobody waits for it."""
        self.pending = deque(r for r in self.pending if r.id != request_id)
        for slot in self.slots:
            if slot.request is not None and slot.request.id == request_id:
                self._release(slot)

    def _refuse(self, request: Request) -> None:
        version = request.sampling.version
        self.failed.append((request.id, f"version {version} was dropped before its request ended: {self.resident}"))

    @torch.inference_mode()
    def step(self) -> None:
        """Admit what fits, then one forward for everything that runs on the same version. Finished requests land in
        ``done``."""
        if self.on_swap == "recompute":
            self._recompute([s for s in self.slots if s.request is not None and s.version < 0])
        self._admit()
        running: dict[int, list[Slot]] = {}
        for slot in self.slots:
            if slot.request is not None:
                running.setdefault(self._serving(slot.request), []).append(slot)
        for version in sorted(running):
            self._decode(self.resident[version], running[version], alone=len(running) == 1)

    def _serving(self, request: Request) -> int:
        pinned = request.sampling.version
        return self.resident.newest if pinned is None else pinned

    def _recompute(self, slots: Sequence[Slot]) -> None:
        """Compute anew, under the newest weights, what older ones computed. All but the token sampled last, which the
        next forward reads."""
        for slot in slots:
            slot.states, slot.version = slot.states[:0], self.resident.newest
        for chunk in chunks([(s, len(s.context) - 1) for s in slots]):
            self._read_columns(chunk, [0] * len(chunk), [len(s.context) - 1 for s in chunk])

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
        leaders: dict[tuple[int, tuple[int, ...]], Slot] = {}
        followers: list[tuple[Slot, Slot]] = []
        work: dict[int, list[tuple[Slot, int]]] = {}
        for slot, known in batch:
            same = slot.version, tuple(slot.context)
            if known == 0 and same in leaders:
                followers.append((slot, leaders[same]))
                continue
            if known == 0:
                leaders[same] = slot
            work.setdefault(slot.version, []).append((slot, known))
        for version in sorted(work):
            self._prefill(work[version], followers)

    def _choose(self, request: Request) -> tuple[Slot, int]:
        """The free slot that already holds the longest beginning of the request, else the one freed longest ago."""
        best, known, version = None, 0, self._serving(request)
        for slot in self.free:
            n = len(slot.context) - 1
            fits = slot.version == version and known < n < len(request.ids)
            if fits and tuple(slot.context[:n]) == request.ids[:n]:
                best, known = slot, n
        slot = best or min(self.free, key=lambda s: (s.freed_at, s.index))
        self.free.remove(slot)
        return slot, known

    def _start(self, slot: Slot, request: Request, known: int) -> None:
        if not known:
            slot.states = slot.states[:0]
        slot.context, slot.request, slot.version = list(request.ids), request, self._serving(request)
        slot.logprobs, slot.versions = [], []
        room = min(request.sampling.max_tokens, self.max_context - len(request.ids))
        slot.uniforms = np.random.Generator(np.random.PCG64(request.sampling.seed)).random(room)

    def _prefill(self, work: Sequence[tuple[Slot, int]], followers: Sequence[tuple[Slot, Slot]]) -> None:
        by_leader: dict[int, list[Slot]] = {}
        for follower, leader in followers:
            by_leader.setdefault(leader.index, []).append(follower)
        known = {slot.index: known for slot, known in work}
        for chunk in chunks([(slot, len(slot.context) - n) for slot, n in work]):
            slots, rows = list(chunk), list(range(len(chunk)))
            logits_BV = self._read_columns(chunk, [known[s.index] for s in chunk], [len(s.context) for s in chunk])
            for row, leader in enumerate(chunk):
                copies = by_leader.get(leader.index, [])
                if copies:
                    self._share(leader, copies)
                    slots += copies
                    rows += [row] * len(copies)
            self._sample(slots, [[]] * len(slots), logits_BV[rows])

    def _read_columns(self, slots: Sequence[Slot], known: Sequence[int], ends: Sequence[int]) -> Tensor:
        """Logits ``[B, V]`` after the columns before ``ends`` of contexts whose first columns are ``known``, by the one
        version that the slots have in common."""
        model = self.resident[slots[0].version]
        tokens = [s.context[k:e] for s, k, e in zip(slots, known, ends, strict=True)]
        out = self._forward(model, slots, tokens, known)
        every_B, last_B = torch.arange(len(slots)), torch.tensor([len(t) - 1 for t in tokens])
        if self.drafter is not None:
            states = [out.last_hidden_state[row, : len(t)] for row, t in enumerate(tokens)]
            self.drafter.prefill(model, slots, states, ends)
        return out.logits[every_B, last_B].float()

    def _share(self, leader: Slot, copies: Sequence[Slot]) -> None:
        """Give ``copies`` what was computed for the same context."""
        targets = torch.tensor([s.index for s in copies])
        self.cache.copy_row(leader.index, targets, len(leader.context))
        if self.recorder is not None:
            self.recorder.copy_row(leader.index, targets, len(leader.context))
        for slot in copies:
            slot.states = leader.states

    def _decode(self, model: Any, running: Sequence[Slot], alone: bool) -> None:
        """One round for the slots that ``model`` serves; ``alone``: no other version serves any."""
        count = running[-1].index + 1
        # Rows 0..count-1 as they lie; idle ones among them compute into the trash column and are ignored.
        slots = self.slots[:count] if alone and count <= 2 * len(running) else running
        drafts = self.drafter.propose(model, slots) if self.drafter is not None else [[]] * len(slots)
        tokens = [[s.context[-1], *d] if s.request is not None else [] for s, d in zip(slots, drafts, strict=True)]
        out = self._forward(model, slots, tokens, [len(s.context) - 1 for s in slots])
        rows = [row for row, slot in enumerate(slots) if slot.request is not None]
        drafts = [drafts[row] for row in rows]
        if out.logits.shape[1] == 1:
            logits_NV = out.logits[:, 0] if len(rows) == len(slots) else out.logits[rows, 0]
        else:
            places = [(row, place) for row, draft in zip(rows, drafts, strict=True) for place in range(len(draft) + 1)]
            logits_NV = out.logits[[row for row, _ in places], [place for _, place in places]]
        sampled = self._sample(running, drafts, logits_NV.float())
        if self.drafter is not None:
            for slot, row, draft, taken in zip(running, rows, drafts, sampled, strict=True):
                self.drafter.judged(slot, draft, out.last_hidden_state[row], taken)

    def _forward(
        self, model: Any, slots: Sequence[Slot], tokens: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> Any:
        """The model's output for ``tokens`` at the columns from ``starts`` on; a slot without tokens is idle."""
        rows = lay_out(self.cache, slots, tokens, starts)
        one_token = rows.ids_BT.shape[1] == 1
        with compiled.only_if(one_token and len(slots) > 1) if self.resident.compiling else nullcontext():
            out = model(
                input_ids=rows.ids_BT,
                attention_mask=rows.mask_B1TS,
                position_ids=rows.positions_BT,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1 if one_token else 0,
                **({"output_choices": True} if self.recorder is not None else {}),
            )
        if self.recorder is not None:
            self.recorder.write(out)
        return out

    def _sample(self, slots: Sequence[Slot], drafts: Sequence[Sequence[int]], logits_NV: Tensor) -> list[list[int]]:
        """Extend each slot by the policy's own tokens, from the logits after its context and after each of its drafts:
        as long as they are the drafts, and one more. Returns them."""
        if not any(drafts):
            token_N, logprob_N = draw(logits_NV, slots, [0] * len(slots))
            drawn = zip(slots, token_N.tolist(), logprob_N.tolist(), strict=True)
            return [self._extend(slot, ((token, logprob),)) for slot, token, logprob in drawn]
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
            slot.versions.append(self._serving(request))
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
        self._release(slot)

    def _release(self, slot: Slot) -> None:
        self.clock += 1
        slot.request, slot.freed_at = None, self.clock
        self.free.append(slot)
