"""What ``engine.compile`` buys: ``python benchmarks/compiled_engine.py [--slots 192] [--rounds 12]``.

The small random Qwen3 of ``small_model.py``, one thread, groups of 8 requests of 16 tokens, each answered by 48, so
many that hardly a slot is ever free. The scheduler of the local engine as it is and compiled take turns at 48 steps.
Printed: sampled tokens a second of CPU time, medians, and the median of the ratios of two turns; exit status 1 if
compiling does not pay."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from random import Random

import torch
from small_model import make_model

from posttrain.engine.batching import Scheduler
from posttrain.engine.slots import Request
from posttrain.engine.worker import load_model
from posttrain.types import Sampling

PROMPT, TOKENS, SIZE = 16, 48, 8


class Sampler:
    """A scheduler that always has something to do."""

    def __init__(self, folder: Path, slots: int, compiling: bool) -> None:
        self.scheduler = Scheduler(load_model(str(folder)), slots, PROMPT + TOKENS, compiling=compiling)
        self.scheduler.warm_up()
        self._rng, self._numbers = Random(0), count()

    def turn(self, most: int, steps: int = TOKENS) -> float:
        """Tokens a second of CPU time; ``most``: requests that may start in one step, so that not all are as far."""
        started, tokens = time.process_time(), 0
        for _ in range(steps):
            for _ in range(min(len(self.scheduler.free), most) // SIZE):
                ids = tuple(self._rng.randrange(3, 500) for _ in range(PROMPT))
                made = [(n, Sampling(max_tokens=TOKENS, seed=n)) for _ in range(SIZE) for n in [next(self._numbers)]]
                self.scheduler.submit([Request(id=n, ids=ids, sampling=s) for n, s in made])
            self.scheduler.step()
            tokens += sum(slot.request is not None for slot in self.scheduler.slots)
            self.scheduler.done = []
        return tokens / (time.process_time() - started)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--slots", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        plain, compiled = (Sampler(Path(folder), options.slots, compiling) for compiling in (False, True))
    for sampler in (plain, compiled):
        sampler.turn(4 * SIZE, 2 * TOKENS)
    turns = [(plain.turn(options.slots), compiled.turn(options.slots)) for _ in range(options.rounds)]
    medians = [statistics.median(speeds) for speeds in zip(*turns, strict=True)]
    ratio = statistics.median(b / a for a, b in turns)
    print(f"sampled tokens a CPU second: {medians[0]:.0f}, compiled {medians[1]:.0f}; ratio {ratio:.2f}")
    sys.exit(ratio <= 1)


if __name__ == "__main__":
    main()
