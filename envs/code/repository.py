"""A small repository with one broken function: how it is drawn, its files, and the tests that tell whether it works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from envs.code.pipelines import VISIBLE, Op, apply, differ, draw, source, spell
from envs.words import CITIES, THINGS

BUGS = ("swaps", "forgets", "turns", "no_return")
"""One operation is another one; one is missing; two are in the wrong order; the result is not returned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One test."""

    module: str
    """Without its suffix."""
    function: str
    text: str
    """Argument."""
    want: str
    """Result."""
    passed: bool
    """Whether the broken repository passes it: pass-to-pass, else fail-to-pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """Functions as they should be, and the one that is not."""

    functions: Mapping[str, Sequence[Op]]
    """In the order of definition: each calls only those before it."""
    homes: Mapping[str, str]
    """Function to its module."""
    broken: str
    """The function with the bug."""
    wrong: Sequence[Op]
    """Its operations as the files have them."""
    returns: bool
    """Whether it returns its result."""
    hidden: Sequence[str]
    """Inputs that only the grader knows."""

    @property
    def spec(self) -> str:
        """What the broken function should do, in words."""
        return spell(self.functions[self.broken])

    def data(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Repository:
        """Undo ``data``."""
        functions = {name: [(op, n) for op, n in ops] for name, ops in data["functions"].items()}
        return cls(
            functions=functions,
            homes=data["homes"],
            broken=data["broken"],
            wrong=[(op, n) for op, n in data["wrong"]],
            returns=data["returns"],
            hidden=data["hidden"],
        )

    def files(self) -> dict[str, str]:
        """Path to text, broken."""
        return {f"{module}.py": self._module(module) for module in dict.fromkeys(self.homes.values())}

    def _module(self, module: str) -> str:
        own = [name for name, home in self.homes.items() if home == module]
        called = {op for name in own for op, _ in self.functions[name] if op in self.homes}
        imports = [f"from {self.homes[f]} import {f}" for f in self.functions if f in called and f not in own]
        bodies = [
            source(name, self.wrong, self.returns) if name == self.broken else source(name, self.functions[name])
            for name in own
        ]
        return "\n\n\n".join(["\n".join(imports)] * bool(imports) + bodies) + "\n"

    def examples(self) -> list[Case]:
        """The tests that the model may see: of the broken function, on ``VISIBLE``."""
        return self._cases([self.broken], VISIBLE)

    def tests(self) -> list[Case]:
        """All tests: of every function, on visible and hidden inputs."""
        return self._cases(list(self.functions), [*VISIBLE, *self.hidden])

    def _cases(self, names: Sequence[str], inputs: Sequence[str]) -> list[Case]:
        seen = {**self.functions, self.broken: self.wrong}
        without = set() if self.returns else self._callers()
        cases: list[Case] = []
        for name in names:
            for text in inputs:
                want = apply(self.functions[name], text, self.functions)
                passed = name not in without and apply(seen[name], text, seen) == want
                case = Case(module=self.homes[name], function=name, text=text, want=want, passed=passed)
                cases.append(case)
        return cases

    def _callers(self) -> set[str]:
        """The broken function and all that call it, however indirectly."""
        found = {self.broken}
        for name, ops in self.functions.items():
            if any(op in found for op, _ in ops):
                found.add(name)
        return found


def draw_repository(
    rng: Random, *, modules: int, functions: int, max_ops: int, calls: float, hidden: int
) -> Repository | None:
    """A random one; None if the draw has operations that do nothing, or a bug that does not show."""
    names = rng.sample(THINGS, modules * functions)
    places = rng.sample(CITIES, modules)
    homes = {name: places[i // functions] for i, name in enumerate(names)}
    made: dict[str, Sequence[Op]] = {}
    for name in names:
        ops = [draw(rng) for _ in range(rng.randint(1, max_ops))]
        if made and rng.random() < calls:
            ops[rng.randrange(len(ops))] = (rng.choice(list(made)), 0)
        if not all(differ(ops[:i] + ops[i + 1 :], ops, made) for i in range(len(ops))):
            return None
        made[name] = ops
    broken = rng.choice(names)
    bug = break_ops(made[broken], rng.choice(BUGS), made, rng)
    if bug is None:
        return None
    # Hidden inputs hang on what is asked alone: the same request has the same tests under every seed.
    own = Random(f"code/{broken}/{spell(made[broken])}")
    inputs = ["".join(own.choices("abcdeXYZ", k=own.randint(4, 9))) for _ in range(hidden)]
    return Repository(functions=made, homes=homes, broken=broken, wrong=bug[0], returns=bug[1], hidden=inputs)


def break_ops(
    ops: Sequence[Op], kind: str, functions: Mapping[str, Sequence[Op]], rng: Random
) -> tuple[list[Op], bool] | None:
    """The operations with a bug of this kind that shows in the examples, and whether the result is returned; None if
    none was found."""
    ops = list(ops)
    for _ in range(20):
        at = rng.randrange(len(ops))
        match kind:
            case "swaps":
                wrong = [*ops[:at], draw(rng), *ops[at + 1 :]]
            case "forgets":
                wrong = [*ops[:at], *ops[at + 1 :]]
            case "turns":
                wrong = [*ops[:at], *reversed(ops[at : at + 2]), *ops[at + 2 :]]
            case _:
                return ops, False
        if wrong and differ(wrong, ops, functions):
            return wrong, True
    return None
