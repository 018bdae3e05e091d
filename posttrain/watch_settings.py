"""What is watched while a stage trains, and what is done about it; ``posttrain.watch`` does it. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field, field_validator, model_validator

from posttrain.config import Config
from posttrain.types import StopReason

METRICS = frozenset([
    # what the rollouts came to
    "reward", "outcome", "rollouts", "invalid", "silent_groups", "sampled_tokens", "truncated", "repetition",
    "parse_errors", "parse_failures", "tool_errors",
    # what the objective saw
    "entropy", "kl_behaviour", "kl_reference", "kl_teacher", "gap_abs", "ess_tokens", "ess_sequences", "token_masked",
    "sequence_masked", "importance_capped", "gated", "advantage_clipped", "aux_loss",
    # the step
    "tokens", "grad_norm", "lr", "roll_backs",
    # asynchrony
    "staleness_mean", "staleness_max", "staleness_short", "staleness_long", "stale", "evicted", "dropped_invalid",
    "filtered", "retries",
])  # fmt: skip
"""Names without a slash that a stage may log."""
_FAMILIES: Mapping[str, frozenset[str]] = {
    "stop": frozenset(StopReason),
    "noise": frozenset(("level", "clean", "noisy")),
    "time": frozenset(("wait_s", "step_s", "publish_s")),
}
"""Names with a slash whose second part is known beforehand. Parts of the reward, worlds, bounds of an objective and the
like are known when they are logged."""


def _known(metric: str) -> str:
    family, slash, member = metric.partition("/")
    if not slash and metric not in METRICS:
        raise ValueError(f"there is no metric `{metric}`; {nearest(metric, METRICS)}")
    if slash and family in _FAMILIES and member not in _FAMILIES[family]:
        near = nearest(metric, {f"{family}/{m}" for m in _FAMILIES[family]})
        raise ValueError(f"there is no metric `{metric}`; {near}")
    return metric


def nearest(given: str, known: frozenset[str] | set[str]) -> str:
    """What to choose instead, to go on a sentence."""
    close = difflib.get_close_matches(given, sorted(known), n=1)
    return f"the nearest is `{close[0]}`" if close else f"choose one of: {', '.join(sorted(known))}"


Factor = Annotated[float, Field(gt=1)]


class Rule(Config):
    """A bound on one metric, and what is done when it does not hold. One of the four bounds is set.

    The factors mean something for metrics that are positive: they are held against the mean of earlier positive values
    at which the rule held, once there are five.
    """

    metric: Annotated[str, AfterValidator(_known)]
    """Its name in ``metrics.jsonl``."""
    above: float | None = None
    """Violated by values above."""
    below: float | None = None
    """Violated by values below."""
    rises_by: Factor | None = None
    """Violated by values above this many times the mean."""
    falls_by: Factor | None = None
    """Violated by values below the mean divided by this."""
    of: Literal["average", "start"] = "average"
    """Which mean: the moving average, which a slow change takes with it, or that of the first five values."""
    over: Annotated[int, Field(gt=0)] = 1
    """Steps in a row that violate the rule before anything is done."""
    after: Annotated[int, Field(ge=0)] = 0
    """The version from which on the rule is held to."""
    do: Literal["warn", "pause", "roll_back"] = "warn"
    """warn: say so. pause: write a checkpoint and end with exit status 3. roll_back: go on from the last checkpoint at
    which every rule held, with other groups and a smaller rate."""

    @model_validator(mode="after")
    def _one_bound(self) -> Rule:
        given = [b for b in _BOUNDS if getattr(self, b) is not None]
        if len(given) != 1:
            raise ValueError(f"a rule has one of {', '.join(_BOUNDS)}; this one has {' and '.join(given) or 'none'}")
        if self.of == "start" and given[0] in ("above", "below"):
            raise ValueError(f"of: start is for rises_by and falls_by; with `{given[0]}` leave it out")
        return self


_BOUNDS = ("above", "below", "rises_by", "falls_by")

RULES: Mapping[str, Rule] = {
    # Gradient norm and effective sample size are what foretells a collapse (VCPO, arXiv 2602.17616).
    "gradient": Rule(metric="grad_norm", rises_by=10.0),
    # A fifth: four tokens of five say nothing, and what is learned is the noise of the rest.
    "ess": Rule(metric="ess_tokens", below=0.2, over=3, do="pause"),
    # A policy that has stopped to try things does not find better ones.
    "entropy": Rule(metric="entropy", falls_by=10.0, of="start", over=3),
    # A tenth of a nat a token is a hundred times what small steps at a small staleness make.
    "kl": Rule(metric="kl_behaviour", above=0.1, over=3),
    # Engine and trainer that differ this much on a token do not run the same model.
    "gap": Rule(metric="gap_abs", above=0.5, over=3),
    # Half of the data thrown away: a bound that does not fit, or an engine that does not.
    "gated": Rule(metric="gated", above=0.5, over=3),
    "masked": Rule(metric="token_masked", above=0.5, over=3),
    # A collapse, or a world that broke. A noisy reward would roll back good runs: no default does more than warn of it.
    "reward": Rule(metric="reward", falls_by=2.0, over=5),
    # Long answers are trained late when short ones are not: the tail grows. Of the start it would be the climb to the
    # bound that raises the alarm; the moving average goes along with that, whatever ``max_staleness`` is.
    "staleness": Rule(metric="staleness_long", rises_by=4.0, over=5),
    # The usual ways to reward's blind side: say ever more, say it again, or say nothing that can be read.
    "length": Rule(metric="sampled_tokens", rises_by=4.0, of="start", over=5),
    "truncated": Rule(metric="truncated", above=0.5, over=5, after=10),
    "repetition": Rule(metric="repetition", above=0.5, over=5, after=10),
    "parsing": Rule(metric="parse_failures", above=0.5, over=5, after=10),
}
"""Held to unless the config says otherwise."""


class WatchConfig(Config):
    """Rules, and how a stage is rolled back."""

    rules: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Rule | None] = Field(
        default_factory=lambda: dict[str, Rule | None](RULES)
    )
    """Name to rule. What is written here goes over the rules that there are (``posttrain.watch_settings.RULES``), key
    by key; null drops one."""
    memory: Annotated[int, Field(ge=5)] = 20
    """Values that a moving average remembers."""
    lr_scale: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor on the learning rate at every roll back."""
    max_roll_backs: Annotated[int, Field(ge=0)] = 2
    """Of one stage; a rule that asks for another one ends the run."""

    @field_validator("rules", mode="before")
    @classmethod
    def _over_the_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        named = cast(Mapping[str, Any], given)
        return {**RULES, **{name: _over(RULES.get(name), rule) for name, rule in named.items()}}


def _over(default: Rule | None, given: Any) -> Any:
    """``given`` with what it leaves open taken from ``default``; a new bound replaces the old one."""
    if default is None or not isinstance(given, Mapping):
        return given
    changes = cast(Mapping[str, Any], given)
    kept = default.model_dump()
    if any(changes.get(b) is not None for b in _BOUNDS):
        kept = {k: v for k, v in kept.items() if k not in _BOUNDS and k != "of"}
    return {**kept, **changes}


__all__ = ["METRICS", "RULES", "Rule", "WatchConfig", "nearest"]
