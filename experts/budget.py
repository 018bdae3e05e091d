"""How many rollouts each group gets out of a common budget.

A group teaches if it has a right rollout and a wrong one. With pass rate p that happens to n rollouts with probability
``V(n) = 1 - p^n - (1-p)^n``, which is what a group is worth here. LongCat-Flash-Thinking-2601 (arXiv 2601.16725) gives
out rollouts one by one, to the task that gains most, from a heap, and does not print its V; this one is the chance of a
gradient that is not zero, which Knapsack-RL (arXiv 2509.25849) sets out to raise. V is concave in n, so greedy is
optimal.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def value(rollouts: int, rate: float) -> float:
    """Probability that ``rollouts`` >= 1 of pass rate ``rate`` are neither all right nor all wrong."""
    return 1.0 - rate**rollouts - (1.0 - rate) ** rollouts


def gain(rollouts: int, rate: float) -> float:
    """``value(rollouts + 1) - value(rollouts)``, without their cancellation."""
    return rate**rollouts * (1.0 - rate) + (1.0 - rate) ** rollouts * rate


def allocate(rates: Sequence[float], total: int, lowest: int, highest: int) -> list[int]:
    """Rollouts of groups of these pass rates: ``total`` in all, each in ``lowest..highest``, of the largest summed
    value. Of equal gains the group with fewer rollouts goes first, then the earlier one. Raises ValueError if the
    bounds do not allow ``total``."""
    if not 1 <= lowest <= highest or not lowest * len(rates) <= total <= highest * len(rates):
        raise ValueError(f"{total} rollouts do not go into {len(rates)} groups of {lowest} to {highest}")
    sizes = [lowest] * len(rates)
    heap = [(-gain(lowest, rate), lowest, i) for i, rate in enumerate(rates)] if lowest < highest else []
    heapq.heapify(heap)
    for _ in range(total - lowest * len(rates)):
        _, size, i = heapq.heappop(heap)
        sizes[i] = size + 1
        if size + 1 < highest:
            heapq.heappush(heap, (-gain(size + 1, rates[i]), size + 1, i))
    return sizes
