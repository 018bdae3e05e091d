"""Who may know whom: ``posttrain`` <- {``rewards``, ``envs``} <- ``experts`` <- ``fusion``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "posttrain": set[str](),
    "rewards": {"posttrain"},
    "envs": {"posttrain"},
    "experts": {"posttrain", "rewards", "envs"},
    "fusion": {"posttrain", "rewards", "envs", "experts"},
}
FRONT_DOOR = Path("posttrain/cli.py")


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every absolute import, in function bodies too, and of ``import_module("literal")``."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module
            case ast.Call(
                func=ast.Attribute(attr="import_module" | "__import__") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module


def violations(path: Path, source: str) -> list[str]:
    """Imports in the file ``path`` (relative to the root) of one of our packages that its own may not know."""
    own = path.parts[0]
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[own] - {own}
    return [
        f"{path}:{line} imports {name}"
        for line, name in imported(source)
        if name.split(".")[0] in forbidden and path != FRONT_DOOR
    ]


def sources() -> list[Path]:
    return [p.relative_to(ROOT) for package in MAY_IMPORT for p in sorted((ROOT / package).rglob("*.py"))]


def test_nobody_imports_upwards() -> None:
    assert Path("posttrain/types.py") in sources()
    assert [v for path in sources() for v in violations(path, (ROOT / path).read_text())] == []


@pytest.mark.parametrize(
    ("path", "source", "bad"),
    [
        ("posttrain/loop.py", "import envs.sandbox", True),
        ("posttrain/loop.py", "def f():\n    from experts import x", True),
        ("posttrain/loop.py", "import importlib\nimportlib.import_module('fusion.mopd')", True),
        ("posttrain/cli.py", "def run():\n    from fusion import mopd", False),
        ("rewards/a.py", "from envs import x", True),
        ("envs/a.py", "import rewards", True),
        (
            "envs/a.py",
            "from posttrain.types import Task\nfrom envs import b\nfrom . import c\nimport envsx",
            False,
        ),
        ("experts/a.py", "import rewards.b, envs.c", False),
        ("experts/a.py", "import os, fusion", True),
        ("fusion/a.py", "import experts, rewards, envs, posttrain", False),
    ],
)
def test_the_check_itself(path: str, source: str, bad: bool) -> None:
    assert bool(violations(Path(path), source)) is bad


def test_the_nouns_need_the_standard_library_only() -> None:
    names = {name.split(".")[0] for _, name in imported((ROOT / "posttrain/types.py").read_text())}
    assert names <= sys.stdlib_module_names


@pytest.mark.parametrize("module", ["types", "protocols", "errors", "config", "run", "journal", "metrics"])
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import posttrain.{module}, sys; print({{'torch', 'transformers', 'trl'}} & set(sys.modules) or 'light')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout == "light\n"
