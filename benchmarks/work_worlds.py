"""What generated work environments are and cost: ``python benchmarks/work_worlds.py [--seeds 100] [--mistakes 10]``.

For every domain: its tools and the dependencies between them, the time to generate an environment on one core, the
length of its chain and the number of its tools, how many of the operations that change something are somebody's goal,
and how many single mistakes of each kind were tried in ``--mistakes`` environments, with the share that changed what is
left. Those that did not (a look-up of another row with the same value, a superfluous step that the chain makes anyway)
are no mistakes.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from rich.console import Console
from rich.progress import track
from rich.table import Table

from envs.work.corruptions import corruptions
from envs.work.database import Database
from envs.work.domain import DOMAINS, load_domain
from envs.work.generate import Size, environment, final_state
from envs.work.graph import edges

SIZE = Size()
KINDS = ("dropped", "value", "tool", "extra")


@dataclass
class Line:
    """What was counted in one domain."""

    seconds: float = 0.0
    steps: Counter[int] = field(default_factory=Counter[int])
    tools: Counter[int] = field(default_factory=Counter[int])
    goals: set[str] = field(default_factory=set[str])
    tried: Counter[str] = field(default_factory=Counter[str])
    real: Counter[str] = field(default_factory=Counter[str])


def mean(counts: Counter[int]) -> float:
    return sum(n * c for n, c in counts.items()) / counts.total()


def measure(name: str, seeds: int, mistakes: int) -> Line:
    """Everything about one domain."""
    line = Line()
    load_domain(name)
    for seed in range(seeds):
        started = time.process_time()
        made = environment(name, seed, SIZE)
        line.seconds += time.process_time() - started
        line.steps[len(made.steps)] += 1
        line.tools[len(made.tools)] += 1
        line.goals |= {made.steps[g.step].tool for g in made.goals}
        if seed >= mistakes:
            continue
        database = Database(name, made.rows, made.spare)
        wanted = final_state(database, made.steps)
        for wrong in corruptions(database, made.steps, made.tools, SIZE.rows, Random(seed)):
            line.tried[wrong.kind] += 1
            line.real[wrong.kind] += final_state(database, wrong.steps) != wanted
        database.close()
    return line


def shares(line: Line) -> list[str]:
    """Real ones of those tried, a kind a column."""
    return [f"{line.real[k]}/{line.tried[k]}" for k in KINDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, help="environments a domain")
    parser.add_argument("--mistakes", type=int, default=10, help="environments a domain in which mistakes are tried")
    asked = parser.parse_args()
    heads = ("domain", "tools", "edges", "ms", "calls", "offered", "goals", *KINDS)
    table = Table(*heads, title=f"{asked.seeds} environments a domain, {SIZE}")
    whole = Line()
    for name in track(DOMAINS, "domains"):
        line = measure(name, asked.seeds, asked.mistakes)
        operations = load_domain(name).operations
        writes = sum(bool(o.does) for o in operations.values())
        table.add_row(
            name,
            str(len(operations)),
            str(len(edges(name))),
            f"{1000 * line.seconds / asked.seeds:.1f}",
            f"{mean(line.steps):.1f}",
            f"{min(line.tools)}-{max(line.tools)}",
            f"{len(line.goals)}/{writes}",
            *shares(line),
        )
        whole.seconds += line.seconds
        whole.tried += line.tried
        whole.real += line.real
    console = Console(width=120)
    console.print(table)
    console.print(f"{asked.seeds * len(DOMAINS)} environments in {whole.seconds:.1f} s of one core")
    if whole.tried:
        told = f"{whole.real.total()} of {whole.tried.total()}"
        console.print(f"{told} single mistakes are real ({whole.real.total() / whole.tried.total():.1%})")


if __name__ == "__main__":
    main()
