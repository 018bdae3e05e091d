"""Settings of all tests."""

import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Machines are shared, and a slow example is no bug.
settings.register_profile("posttrain", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("posttrain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests first: of several workers none shall be left alone with one at the end."""
    slow = {_module(item) for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: _module(item) not in slow)


def _module(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its precision in the process: what one test sets up must not reach the next."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
