"""Holds the numbers of every step against rules. A function of those numbers alone: no clock, no chance.

What a rule remembers (how long it has been violated, the mean that a factor is held against) goes into checkpoints, so
that a resumed run sees what an undisturbed one would have.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from posttrain.errors import UserError
from posttrain.watch_settings import RULES, Rule, WatchConfig, nearest

_SETTLED = 5
"""Values that make a mean."""
_COUNTS = ("stop/", "staleness/")
"""Counts that are logged where they are not 0."""


class Paused(UserError):
    """A rule asked for a person. The checkpoint is written; exit status 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A rule has been violated for as many steps as it bears."""

    rule: str
    """Name of the rule."""
    do: Literal["warn", "pause", "roll_back"]
    version: int
    value: float
    bound: float
    """What ``value`` is on the wrong side of."""
    steps: int
    """For how many it has been violated."""
    new: bool
    """Whether it begins here."""
    text: str
    """All of it, for people."""


@dataclass(slots=True)
class _Track:
    """What a rule remembers."""

    violated: int = 0
    """Steps in a row, up to now."""
    count: int = 0
    average: float = 0.0
    start: float = 0.0

    def mean(self, rule: Rule) -> float | None:
        """What a factor of the rule is held against; None while there is too little."""
        if self.count < _SETTLED:
            return None
        return self.start if rule.of == "start" else self.average

    def add(self, value: float, memory: int) -> None:
        """Take in a value at which the rule held."""
        if not (math.isfinite(value) and value > 0):  # 0 is what a step without trained tokens has
            return
        self.count += 1
        self.average += (value - self.average) / min(self.count, memory)
        if self.count <= _SETTLED:
            self.start = self.average


class Watch:
    """The rules of one stage. ``key`` is where they stand in the config, ``sometimes`` names metrics that a step may do
    without."""

    def __init__(self, config: WatchConfig, key: str = "watch", sometimes: Collection[str] = ()) -> None:
        self.rules = {name: rule for name, rule in config.rules.items() if rule is not None}
        self._key, self._sometimes, self._memory = key, sometimes, config.memory
        self._tracks = {name: _Track() for name in self.rules}
        self._checked = False

    def see(self, version: int, stats: Mapping[str, float]) -> list[Alarm]:
        """Alarms of the step that made ``version``, in the order of the rules. A metric that the step has no value of
        changes nothing.

        Raises UserError at the first step that trained something, for a rule on a metric that it does not have."""
        if not self._checked and stats.get("tokens", 1.0):
            self._check(stats)
        judged = (self._judge(name, rule, version, stats) for name, rule in self.rules.items())
        return [alarm for alarm in judged if alarm is not None]

    @property
    def well(self) -> bool:
        """Whether no rule was violated at the last step. A warning that was given before and still stands is passed
        over: it would keep every later checkpoint from being a good one."""
        return not any(t.violated and not self._stands(name, t) for name, t in self._tracks.items())

    def _stands(self, name: str, track: _Track) -> bool:
        rule = self.rules[name]
        return rule.do == "warn" and track.violated > rule.over

    def start_over(self, rule: str) -> None:
        """Forget what the rule remembers: what follows is its new measure."""
        self._tracks[rule] = _Track()

    def state(self) -> dict[str, Any]:
        """For ``restore``."""
        return {n: {"metric": self.rules[n].metric, "track": asdict(t)} for n, t in self._tracks.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``. A rule that is new, or is about another metric than it was, starts over."""
        for name, rule in self.rules.items():
            if name in state and state[name]["metric"] == rule.metric:
                self._tracks[name] = _Track(**state[name]["track"])

    def _check(self, stats: Mapping[str, float]) -> None:
        self._checked = True
        for name, rule in self.rules.items():
            metric = rule.metric
            there = metric in stats or metric in self._sometimes or metric.startswith((*_COUNTS, "noise/"))
            if not there and rule != RULES.get(name):  # the defaults are for every objective
                raise UserError(
                    f"{self._key}.rules.{name}.metric: this stage logs no `{metric}`; {nearest(metric, set(stats))}"
                )

    def _judge(self, name: str, rule: Rule, version: int, stats: Mapping[str, float]) -> Alarm | None:
        value = stats.get(rule.metric, 0.0 if rule.metric.startswith(_COUNTS) else None)
        if value is None:
            return None
        track = self._tracks[name]
        bound, words = _bound(rule, track.mean(rule))
        upper = rule.above is not None or rule.rises_by is not None
        # Written so that a value that is no number violates both kinds.
        if bound is None or version < rule.after or (value <= bound if upper else value >= bound):
            track.violated = 0
            track.add(value, self._memory)
            return None
        track.violated += 1
        if track.violated < rule.over:
            return None
        side = "above" if upper else "below"
        steps = f", for {track.violated} steps" if track.violated > 1 else ""
        return Alarm(
            rule=name,
            do=rule.do,
            version=version,
            value=value,
            bound=bound,
            steps=track.violated,
            new=track.violated == rule.over,
            text=f"{rule.metric} is {value:.4g}, {side} {words}{steps}",
        )


def _bound(rule: Rule, mean: float | None) -> tuple[float | None, str]:
    """What a value must not pass, if that is known yet, and in words."""
    kind = "the mean of its first values" if rule.of == "start" else "its moving average"
    match rule:
        case Rule(above=float(bound)) | Rule(below=float(bound)):
            return bound, f"{bound:g}"
        case Rule(rises_by=float(factor)) if mean is not None:
            return mean * factor, f"{factor:g} times {kind}, {mean:.4g}"
        case Rule(falls_by=float(factor)) if mean is not None:
            return mean / factor, f"{kind}, {mean:.4g}, divided by {factor:g}"
        case _:
            return None, ""


__all__ = ["Alarm", "Paused", "Watch"]
