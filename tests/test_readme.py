"""What the README shows is true: its example is a world, its commands exist, and it is short."""

from __future__ import annotations

import asyncio
import re
import sys
import types
from pathlib import Path

from posttrain.cli import app

README = Path(__file__).parent.parent / "README.md"


def test_the_example_is_a_world_that_checks() -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    module = types.ModuleType("readme_echo")
    sys.modules["readme_echo"] = module
    exec(compile(code, "README.md", "exec"), module.__dict__)
    world = module.Echo(module.EchoConfig(), "echo")
    assert asyncio.run(world.check()) == {"reference": 1.0, "empty": 0.0}
    assert {t.domain for t in world.tasks("train", 20, 0)} == {"manners"}


def test_the_commands_are_there() -> None:
    shown = set(re.findall(r"^    posttrain (\w+)", README.read_text(), flags=re.MULTILINE))
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    assert shown == commands | {group.name for group in app.registered_groups}


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120
