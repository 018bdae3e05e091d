"""Which held-out conversations are worth reading, and their text cut into turns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fusion.results import BASE, STUDENT

_TURN = re.compile(r"^\[(thinks|calls|system|user|assistant|tool)\] ?", re.MULTILINE)
"""How ``envs.episode.transcript`` begins a part. A model that writes such a line itself is taken at its word."""

_NEWLINE = re.compile(r"(?<!\\)((?:\\\\)*)\\n")
"""An escaped line break in the printed argument of a call: code is read in lines."""

Record = Mapping[str, Any]
Turn = tuple[str, str]
"""Who and what."""


def turns(text: str) -> list[Turn]:
    """A transcript, cut into its parts."""
    starts = list(_TURN.finditer(text))
    ends = [*(m.start() for m in starts), len(text)][1:]
    parts = [(m.group(1), text[m.end() : end].rstrip("\n")) for m, end in zip(starts, ends, strict=True)]
    return [(who, _NEWLINE.sub("\\1\n", what) if who == "calls" else what) for who, what in parts]


def tasks_to_read(
    evaluation: Mapping[str, Sequence[Record]], teachers: Mapping[str, str], count: int
) -> list[dict[str, Any]]:
    """``count`` tasks a world, side by side: what every policy was told, and what each went on to do.

    Half of them are tasks that base failed and the student solved, the rest failures of the student, those first that
    another policy solved. Policies are base, the domain's teacher and the student, as far as they were evaluated.
    """
    by_task = {p: {(r["world"], r["task"]): r for r in records} for p, records in evaluation.items()}
    anyone = next(iter(evaluation.values()), [])
    worlds = dict.fromkeys((r["domain"], r["world"]) for r in anyone)
    out: list[dict[str, Any]] = []
    for domain, world in worlds:
        shown = [p for p in (BASE, teachers.get(domain), STUDENT) if p in by_task]
        if not shown:
            continue
        tasks = [(world, r["task"]) for r in anyone if r["world"] == world]
        rows = [{p: by_task[p][t] for p in shown} for t in tasks if all(t in by_task[p] for p in shown)]
        out += [_side_by_side(row, kind) for kind, row in _choose(rows, count)]
    return out


def _choose(rows: Sequence[Mapping[str, Record]], count: int) -> list[tuple[str, Mapping[str, Record]]]:
    kinds: dict[str, list[Mapping[str, Record]]] = {"learned": [], "lost": [], "failed": [], "solved": []}
    for row in rows:
        solved = {p: (r["outcome"] or 0.0) >= 0.5 for p, r in row.items()}
        last = STUDENT if STUDENT in solved else next(reversed(solved))
        if solved[last]:
            kinds["solved" if solved.get(BASE, True) else "learned"].append(row)
        else:
            kinds["lost" if any(solved.values()) else "failed"].append(row)
    half = (count + 1) // 2
    ordered = [(kind, row) for kind in ("lost", "failed", "solved") for row in kinds[kind]]
    first = [("learned", row) for row in kinds["learned"]]
    chosen = first[:half] + ordered[: count - min(half, len(first))]
    return (chosen + first[half:])[:count]


def _side_by_side(row: Mapping[str, Record], kind: str) -> dict[str, Any]:
    conversations = {p: turns(r.get("text", "")) for p, r in row.items()}
    given = _common([list(takewhile(lambda t: t[0] in ("system", "user"), c)) for c in conversations.values()])
    task = next(iter(row.values()))
    return {
        "kind": kind,
        "task": task["task"],
        "domain": task["domain"],
        "world": task["world"],
        "difficulty": task["difficulty"],
        "given": conversations[next(iter(row))][:given],
        "sides": [
            {
                "policy": p,
                "outcome": r["outcome"],
                "tokens": r["tokens"],
                "stop": r["stop"],
                "turns": conversations[p][given:],
            }
            for p, r in row.items()
        ],
    }


def _common(prompts: Sequence[Sequence[Turn]]) -> int:
    """Turns that all begin with."""
    shortest = min(len(p) for p in prompts)
    return next((i for i in range(shortest) if len({p[i] for p in prompts}) > 1), shortest)


__all__ = ["Turn", "tasks_to_read", "turns"]
