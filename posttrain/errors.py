"""Two kinds of error: an episode that fails is data and names its culprit; anything else ends the run with a cure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from posttrain.types import Culprit


class UserError(Exception):
    """A mistake of the person at the keyboard: shown as one message without a traceback, exit status 2."""


class ConfigError(UserError):
    """Names the file, the key and the cure."""


class DiskFull(UserError):
    """Names what was being written; what is there is whole."""


class RankError(Exception):
    """A process of a trainer that has several died, failed or did not answer within its bound."""


class TeacherError(Exception):
    """A teacher's server died too often, refused or did not answer within its bound."""


class ToolError(Exception):
    """A tool failed the way tools fail: its text goes to the model."""


class EpisodeError(Exception):
    """Infrastructure failed under an episode. ``culprit`` says which boundary."""

    culprit: Culprit = Culprit.WORLD


class EngineError(EpisodeError):
    """The engine died, refused or did not answer within its bound."""

    culprit = Culprit.ENGINE


class SandboxError(EpisodeError):
    """The sandbox cannot be had or is dead. Never text for the model."""

    culprit = Culprit.SANDBOX


class WorldError(EpisodeError):
    """A world's own code raised."""

    culprit = Culprit.WORLD


class RewardError(EpisodeError):
    """A grader or a reward raised."""

    culprit = Culprit.REWARD


_BOUNDARY: dict[Culprit, type[EpisodeError]] = {
    Culprit.ENGINE: EngineError,
    Culprit.SANDBOX: SandboxError,
    Culprit.WORLD: WorldError,
    Culprit.REWARD: RewardError,
}


@contextmanager
def boundary(culprit: Culprit) -> Iterator[None]:
    """Attribute whatever escapes the block to ``culprit``, keeping ToolError and EpisodeError as they are."""
    try:
        yield
    except (EpisodeError, ToolError, UserError):
        raise
    except Exception as error:
        raise _BOUNDARY[culprit](f"{type(error).__name__}: {error}") from error


def in_order(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The errors in a group of groups, in the order in which they came."""
    return [e for x in group.exceptions for e in (in_order(x) if isinstance(x, BaseExceptionGroup) else [x])]
