"""The versions of a policy that an engine can sample from at the same time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import deepcopy
from typing import Any

from posttrain.engine import compiled


class Resident:
    """A model each, in the order in which they were loaded. It holds no more models than versions."""

    def __init__(self, model: Any, compiling: bool = False) -> None:
        self._models: dict[int, Any] = {0: model.eval()}
        self.newest, self.compiling = 0, compiling
        if compiling:
            compiled.enable(model)

    def __contains__(self, version: int) -> bool:
        return version in self._models

    def __iter__(self) -> Iterator[int]:
        return iter(self._models)

    def __getitem__(self, version: int) -> Any:
        return self._models[version]

    def __str__(self) -> str:
        return f"resident are {', '.join(map(str, self))} (newest: {self.newest})"

    def replace(self, version: int, keep: Collection[int]) -> Any:
        """Makes ``version`` the newest, and drops every other one that is not in ``keep``, an earlier one of the same
        number too. Returns its model, which still has some dropped version's weights, or a copy of the last one's."""
        kept = {v: m for v, m in self._models.items() if v in keep and v != version}
        dropped = [m for v, m in self._models.items() if v not in kept]
        model = dropped[-1] if dropped else deepcopy(self._models[self.newest])
        if self.compiling and not dropped:  # a copy is as it was before
            compiled.enable(model)
        self._models, self.newest = {**kept, version: model}, version
        return model
