"""Functions on strings, as lists of operations: what they mean, how they are spelled, and how they look in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

Op = tuple[str, int]
"""Name and number; 0 for an operation without one. A name that is not in ``OPS`` calls another function."""

OPS: Mapping[str, tuple[str, Callable[[str, int], str]]] = {
    "reverse": ("s=s[::-1]", lambda s, n: s[::-1]),
    "double": ("s=s+s", lambda s, n: s + s),
    "upper": ("s=s.upper()", lambda s, n: s.upper()),
    "lower": ("s=s.lower()", lambda s, n: s.lower()),
    "add": ("s=s+'{n}'", lambda s, n: f"{s}{n}"),
    "put": ("s='{n}'+s", lambda s, n: f"{n}{s}"),
    "drop": ("s=s[{n}:]", lambda s, n: s[n:]),
    "chop": ("s=s[:-{n}]", lambda s, n: s[:-n]),
    "head": ("s=s[:{n}]", lambda s, n: s[:n]),
    "tail": ("s=s[-{n}:]", lambda s, n: s[-n:]),
}
"""Name to its line of Python and its meaning here; those with ``{n}`` take a number."""

VISIBLE = ("Abcde", "xYz")
"""Inputs of the examples that a model may see."""

Functions = Mapping[str, Sequence[Op]]
"""Name of a function to its operations."""


def apply(ops: Sequence[Op], text: str, functions: Functions) -> str:
    """What the operations make of ``text``."""
    for name, n in ops:
        text = OPS[name][1](text, n) if name in OPS else apply(functions[name], text, functions)
    return text


def line(op: Op) -> str:
    """The operation as a line of a function's body."""
    name, n = op
    return " " + (OPS[name][0].format(n=n) if name in OPS else f"s={name}(s)")


def source(name: str, ops: Sequence[Op], returns: bool = True) -> str:
    """A whole function, one line an operation."""
    return "\n".join([f"def {name}(s):", *map(line, ops), *([" return s"] if returns or not ops else [])])


def spell(ops: Sequence[Op]) -> str:
    """The operations in words: ``drop2 reverse``."""
    return " ".join(f"{name}{n or ''}" for name, n in ops)


def draw(rng: Random) -> Op:
    """One operation."""
    name = rng.choice(tuple(OPS))
    if "{n}" not in OPS[name][0]:
        return name, 0
    return name, rng.randint(1, 9 if name in ("add", "put") else 4)


def differ(one: Sequence[Op], other: Sequence[Op], functions: Functions, inputs: Sequence[str] = VISIBLE) -> bool:
    """Whether the two differ on any of ``inputs``."""
    return any(apply(one, text, functions) != apply(other, text, functions) for text in inputs)
