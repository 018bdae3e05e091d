"""The devices of a simulation: which requests they run, how fast, and how versions share them.

All requests of a device are sampled at the same speed, which falls as they grow in number. So a device has a clock of
its own that counts the tokens each of its requests got, and a request ends when that clock has gone on by its work.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from posttrain.scheduler import partition
from posttrain.simulate_settings import EngineLoad

_LEAST = 1e-5
"""Tokens that count as none, against rounding."""


class Request:
    """A rollout, one of whose turns at a time is sampled."""

    __slots__ = (
        "cache", "context", "device", "first", "fresh", "group", "last", "latencies", "live", "tokens", "turn",
        "version", "work",
    )  # fmt: skip

    def __init__(
        self, group: Any, version: int, tokens: list[float], latencies: list[float], prompt_tokens: float
    ) -> None:
        self.group, self.version, self.tokens, self.latencies = group, version, tokens, latencies
        self.turn = 0
        self.context = 0.0
        """Tokens before this turn that a cache held."""
        self.fresh = prompt_tokens
        """Prompt tokens that no cache has held yet."""
        self.cache = -1
        """Version whose cache there is."""
        self.work = 0.0
        """What is left of a turn that was moved, in sampled tokens."""
        self.device: Device | None = None
        self.first = self.last = -1
        """Oldest and newest version of its tokens."""
        self.live = True


class Device:
    """One engine."""

    __slots__ = ("clock", "due", "heap", "pool", "since")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.clock, self.since, self.due = 0.0, 0.0, math.inf
        self.heap: list[tuple[float, int, Request]] = []
        """What runs, by the clock at which it ends."""


class Pool:
    """Devices that serve the same, and the requests that wait for them. Device order is by load, then by arrival."""

    __slots__ = ("by_load", "limit", "queue", "version")

    def __init__(self, version: int, limit: int, capacity: int) -> None:
        self.version, self.limit = version, limit
        self.queue: deque[Request] = deque()
        self.by_load: list[dict[Device, None]] = [{} for _ in range(capacity + 1)]

    def free(self) -> Device | None:
        """The least loaded device that takes another request."""
        for load in range(self.limit):
            if self.by_load[load]:
                return next(iter(self.by_load[load]))
        return None

    def __len__(self) -> int:
        return sum(map(len, self.by_load))


class Fleet:
    """All devices. ``wake(time, device)`` asks that ``fire`` be called at that time."""

    def __init__(self, config: EngineLoad, *, pinned: bool, wake: Callable[[float, Device], None]) -> None:
        self.config, self.pinned, self.wake = config, pinned, wake
        self.apart = pinned and config.resident == "one"
        """Whether every version has devices of its own."""
        self.recompute = not pinned and config.on_swap == "recompute"
        loads, speeds = zip(*config.speed, strict=True)
        self._speed = [0.0, *np.interp(range(1, config.capacity + 1), loads, speeds).tolist()]
        self.version = 0
        pool = Pool(0, config.capacity, config.capacity)
        self.pools = {0: pool}
        self.devices = [Device(pool) for _ in range(config.count)]
        pool.by_load[0] = dict.fromkeys(self.devices)
        self._order = itertools.count()
        self.asked = self.answered = self.withdrawn = 0
        """Turns that came in, were sampled, and were given up."""
        self.busy = self.area = self.recomputed = 0.0
        """Device seconds with a request, request seconds, tokens whose cache was made anew."""
        self.moved = 0
        """Requests that another device went on with."""

    # One request

    def ask(self, now: float, request: Request) -> None:
        """A turn is to be sampled: on the least loaded device, or when one is free."""
        self.asked += 1
        pool = self.pools[request.version if self.apart else 0]
        device = None if pool.queue else pool.free()
        if device is None:
            pool.queue.append(request)
        else:
            self._advance(device, now)
            self._put(device, request)
            self._reload(device, len(device.heap) - 1)
            self._plan(device, now)

    def fire(self, now: float, device: Device) -> list[Request]:
        """The requests whose turn is sampled by now; those that wait take their places."""
        device.due = math.inf
        self._advance(device, now)
        heap, before, until = device.heap, len(device.heap), device.clock + _LEAST
        ended: list[Request] = []
        while heap and heap[0][0] <= until:
            request = heapq.heappop(heap)[2]
            self._end(request)
            ended.append(request)
        self.answered += len(ended)
        if ended:
            self._refill(device)
            self._reload(device, before)
        self._plan(device, now)
        return ended

    def withdraw(self, now: float, request: Request) -> None:
        """Its rollout is given up."""
        request.live = False
        device = request.device
        if device is not None:
            self._advance(device, now)
            before = len(device.heap)
            device.heap = [entry for entry in device.heap if entry[2] is not request]
            heapq.heapify(device.heap)
            self.withdrawn += 1
            self._refill(device)
            self._reload(device, before)
            self._plan(device, now)
        else:
            for pool in self.pools.values():
                if request in pool.queue:
                    pool.queue.remove(request)
                    self.withdrawn += 1

    def _put(self, device: Device, request: Request) -> None:
        version = self._served(device, request)
        if request.work == 0.0:
            prompt = request.fresh
            if self.recompute and request.cache not in (-1, version):
                prompt += request.context
                self.recomputed += request.context
            request.work = request.tokens[request.turn] + prompt / self.config.prefill
        if request.first < 0:
            request.first = version
        request.device, request.cache = device, version
        heapq.heappush(device.heap, (device.clock + request.work, next(self._order), request))

    def _end(self, request: Request) -> None:
        assert request.device is not None
        request.last = self._served(request.device, request)
        request.context += request.fresh + request.tokens[request.turn]
        request.device, request.fresh, request.work = None, 0.0, 0.0

    def _served(self, device: Device, request: Request) -> int:
        """Version that samples the request's next token."""
        if self.apart:
            return device.pool.version
        return request.version if self.pinned else self.version

    # One device

    def _advance(self, device: Device, now: float) -> None:
        passed, device.since = now - device.since, now
        if load := len(device.heap):
            device.clock += self._speed[load] * passed
            self.busy += passed
            self.area += load * passed
        else:
            device.clock = 0.0

    def _reload(self, device: Device, before: int) -> None:
        """Its load is no longer ``before``."""
        if before != len(device.heap):
            del device.pool.by_load[before][device]
            device.pool.by_load[len(device.heap)][device] = None

    def _refill(self, device: Device) -> None:
        queue = device.pool.queue
        while queue and len(device.heap) < device.pool.limit:
            self._put(device, queue.popleft())

    def _plan(self, device: Device, now: float) -> None:
        if device.heap:
            left = device.heap[0][0] - device.clock
            at = now + left / self._speed[len(device.heap)] if left > 0.0 else now
            # An earlier call is left as it is: it finds nothing and plans again.
            if at < device.due:
                device.due = at
                self.wake(at, device)

    # All devices

    def swap(self, now: float, version: int) -> None:
        """``version`` is the newest."""
        self.version = version
        if self.apart:
            for pool in self.pools.values():
                pool.limit = self.config.capacity_old or self.config.capacity
            self.pools[version] = Pool(version, self.config.capacity, self.config.capacity)
        elif self.recompute:
            for device in self.devices:
                self._recompute(device, now)

    def _recompute(self, device: Device, now: float) -> None:
        self._advance(device, now)
        entries = list[tuple[float, int, Request]]()
        for end, order, request in device.heap:
            sampled = max(0.0, request.tokens[request.turn] - (end - device.clock))
            held = request.context + request.fresh + sampled
            self.recomputed += held
            request.cache = self.version
            entries.append((end + held / self.config.prefill, order, request))
        device.heap = entries
        heapq.heapify(device.heap)

    def lacks(self, version: int) -> bool:
        """Whether requests of ``version`` wait and no device serves it."""
        return self.apart and bool(self.pools[version].queue) and not len(self.pools[version])

    def repartition(self, now: float, requests: Mapping[int, int]) -> None:
        """Share the devices out by the rollouts of every version. Caches move with the requests, for nothing."""
        wanted = partition(len(self.devices), requests)
        if not self.apart or not wanted:
            return
        spare: list[Device] = []
        for version, pool in list(self.pools.items()):
            spare += self._release(pool, now, len(pool) - wanted.get(version, 0))
            if version != self.version and not requests.get(version):
                del self.pools[version]
        for version, count in sorted(wanted.items(), reverse=True):
            pool = self.pools[version]
            for _ in range(count - len(pool)):
                device = spare.pop()
                device.pool = pool
                pool.by_load[0][device] = None
        for pool in self.pools.values():
            while pool.queue and (device := pool.free()) is not None:
                before = len(device.heap)
                self._advance(device, now)
                self._put(device, pool.queue.popleft())
                self._reload(device, before)
                self._plan(device, now)

    def _release(self, pool: Pool, now: float, count: int) -> list[Device]:
        """``count`` devices of the pool, the idlest first; what they ran waits first in the queue."""
        idlest = itertools.chain.from_iterable(list(devices) for devices in pool.by_load)
        found = list(itertools.islice(idlest, max(0, count)))
        moved: list[Request] = []
        for device in found:
            self._advance(device, now)
            del pool.by_load[len(device.heap)][device]
            for end, _, request in sorted(device.heap):
                request.work, request.device = max(_LEAST, end - device.clock), None
                moved.append(request)
            device.heap, device.clock, device.due = [], 0.0, math.inf
        self.moved += len(moved)
        pool.queue.extendleft(reversed(moved))
        return found

    def reset(self, now: float) -> None:
        """Measure from now on."""
        self.settle(now)
        self.busy = self.area = self.recomputed = 0.0
        self.moved = 0

    def settle(self, now: float) -> None:
        """Count everything up to now."""
        for device in self.devices:
            self._advance(device, now)

    def under_way(self) -> Iterable[Request]:
        """Turns that run or wait."""
        yield from (entry[2] for device in self.devices for entry in device.heap)
        yield from (request for pool in self.pools.values() for request in pool.queue)
