"""Each of the five package names resolves into this repository: PyPI has an unrelated ``envs``, among others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["posttrain", "rewards", "envs", "experts", "fusion"]


@pytest.mark.parametrize("name", PACKAGES)
def test_the_name_is_ours_as_installed(name: str, tmp_path: Path) -> None:
    """From another folder and without PYTHONPATH, as the console script sees it."""
    code = f"import {name}; print({name}.__file__)"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stderr}\nIs the repository installed? pip install -c constraints.txt -e ."
    assert Path(run.stdout.strip()).resolve() == (ROOT / name / "__init__.py").resolve()
