"""The nouns of the system. Standard library only, so that an author of a world never imports torch.

Tokens in, tokens out: what the model sampled is what is trained on; nothing here is ever re-tokenised. Every
per-token tuple of one object has the same length, checked once, in ``Segment`` and ``Sample``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


class StopReason(StrEnum):
    """Why an episode ended. Only what the agent itself caused can carry a reward."""

    SCORED = "scored"
    """The agent finished and the grader spoke."""
    AGENT_TIMEOUT = "agent_timeout"
    """Wall-clock or turn limit used up by the agent."""
    LOOP = "loop"
    """The agent repeated the same call until the limit."""
    CONTEXT_OVERFLOW = "context_overflow"
    """No room left for another answer."""
    REFUSED = "refused"
    """The provider of the model refused to answer."""
    NO_MODEL_CALL = "no_model_call"
    """The episode ended before the model was asked."""
    INFRASTRUCTURE = "infrastructure"
    """Sandbox or world broke: never text for the model, never a reward."""
    MODEL_API = "model_api"
    """The engine failed."""
    VERIFIER_ERROR = "verifier_error"
    """The reward raised."""


class Culprit(StrEnum):
    """The boundary at which an episode failed."""

    ENGINE = "engine"
    SANDBOX = "sandbox"
    WORLD = "world"
    REWARD = "reward"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    name: str
    """Name of the tool, as the model wrote it."""
    arguments: Mapping[str, Any]
    """Argument values, typed by the tool's schema where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    name: str
    """What the model calls."""
    description: str
    """One line for the system message."""
    parameters: Mapping[str, Literal["string", "integer", "number", "boolean", "json"]]
    """Argument name to type; all are required."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: Role
    """Who speaks."""
    content: str
    """Visible text; for role ``tool`` the observation."""
    thinking: str = ""
    """Reasoning text of an assistant message, without its tags."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of an assistant message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_turns: int = 8
    """Model calls an episode."""
    max_tokens: int = 64
    """Tokens sampled a turn."""
    timeout_s: float = 60.0
    """Seconds of the whole conversation, without those that the engine takes, which has a bound of its own
    (``engine.timeout_s``); as many for the session to begin, and for the grader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    id: str
    """Unique within its world and split, stable under the seed."""
    domain: str
    """Group of worlds that one expert owns: agent, reasoning, interaction."""
    world: str
    """The world that opens this task."""
    prompt: tuple[Message, ...]
    """What the model sees first."""
    thinking: bool = True
    """Whether the assistant turn opens with a think block."""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """Files put into the sandbox before the first turn."""
    limits: Limits = Limits()
    """Bounds on the episode."""
    difficulty: float = 0.0
    """The generator's own measure, for example the number of hops."""
    rollouts: int | None = None
    """Of a group that works on it; None: as many as the stage makes of every group."""
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Private to the world and its grader (JSON values): never shown to the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    temperature: float = 1.0
    """0 means greedy. Training samples at 1, so that the recorded log-probs are the policy's own."""
    max_tokens: int = 64
    """Bound on the sampled tokens."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the completion (and are part of it)."""
    seed: int = 0
    """Seeds this request alone: its random numbers do not depend on who shares its batch."""
    version: int | None = None
    """The resident version that samples all of it; None: the newest, and after a swap the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a model chose at every position of a context from 0 on, so that another forward can choose the same.

    Little-endian, in C order: position, then what the shape says."""

    slots: bytes
    """Mixture-of-experts slots, uint16."""
    slot_shape: tuple[int, int]
    """Of one position: layers, slots a token."""
    columns: bytes = b""
    """Attended columns, int32, -1 for none; empty if the model does not choose them."""
    column_shape: tuple[int, int, int] = (0, 0, 0)
    """Of one position: layers, indexers a layer, columns a token."""

    def __post_init__(self) -> None:
        columns = self.positions * math.prod(self.column_shape)
        if len(self.slots) != 2 * self.positions * math.prod(self.slot_shape) or len(self.columns) != 4 * columns:
            raise ValueError(
                f"{len(self.slots)} bytes of slots {self.slot_shape} and {len(self.columns)} bytes of columns "
                f"{self.column_shape} are not of the same positions"
            )

    @property
    def positions(self) -> int:
        """Positions that have a record."""
        return len(self.slots) // (2 * math.prod(self.slot_shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    ids: tuple[int, ...]
    """Sampled token ids."""
    logprobs: tuple[float, ...]
    """Log-probability of each sampled token under the distribution it was drawn from."""
    versions: tuple[int, ...]
    """Policy version that sampled each token."""
    finish: Literal["stop", "length"]
    """Stop token seen, or bound reached."""
    choices: Choices | None = None
    """Of the whole context but the last sampled token, which the model has not read; if the engine records them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The tokens that one message added to the context."""

    ids: tuple[int, ...]
    """Token ids, in order."""
    sampled: tuple[bool, ...]
    """True where the policy sampled the token: only these are trained."""
    logprobs: tuple[float, ...]
    """Behaviour log-probs; 0 where not sampled."""
    versions: tuple[int, ...]
    """Policy version of each token; -1 where not sampled."""
    choices: Choices | None = None
    """Of the branch so far, up to this segment's last token but one."""

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.sampled), len(self.logprobs), len(self.versions)}
        if len(lengths) != 1:
            raise ValueError(f"a segment's per-token tuples differ in length: {sorted(lengths)}")

    @classmethod
    def given(cls, ids: Sequence[int]) -> Segment:
        """Tokens the model was given."""
        n = len(ids)
        return cls(ids=tuple(ids), sampled=(False,) * n, logprobs=(0.0,) * n, versions=(-1,) * n)

    @classmethod
    def from_completion(cls, completion: Completion) -> Segment:
        """Tokens the model sampled."""
        return cls(
            ids=completion.ids,
            sampled=(True,) * len(completion.ids),
            logprobs=completion.logprobs,
            versions=completion.versions,
            choices=completion.choices,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    value: float
    """In 0..1 for the outcome; shaped parts may lower it."""
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    """Named parts, for reading; ``value`` is what is trained on."""
    outcome: float = 0.0
    """Solved or not, in 0..1: what evaluation counts."""
    valid: bool = True
    """False: the grader could not judge; the rollout is masked, never counted as 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    culprit: Culprit
    """The boundary that failed."""
    message: str
    """What it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    id: str
    """Unique in the run: ``<group>/<index>``, with ``.<attempt>`` after a retry."""
    group: str
    """All rollouts of one prompt share it."""
    task: Task
    """What was asked, as the world has it."""
    branches: tuple[tuple[Segment, ...], ...]
    """Each branch is one token sequence; rewriting history opens another."""
    messages: tuple[Message, ...]
    """The conversation as read back, for rewards and people."""
    stop: StopReason
    """How it ended."""
    score: Score | None = None
    """None unless the agent itself caused the end."""
    error: Failure | None = None
    """Who failed, when something outside the agent did."""
    parse_errors: tuple[str, ...] = ()
    """Names of the errors made by malformed tool calls, one an assistant turn at most."""
    tool_errors: int = 0
    """Calls that a tool answered with an error."""
    noise: int = 0
    """Level of the noise on what the user said and tools answered; 0 for none."""
    sandbox: str = ""
    """How the code it ran was isolated, in the sandbox's own words; empty if none ran."""
    wall_s: float = 0.0
    """Seconds from the first request to the score."""

    @property
    def valid(self) -> bool:
        """True if the rollout may be trained on and counted."""
        return self.score is not None and self.score.valid

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that touched any sampled token; -1 if none was sampled."""
        versions = [v for branch in self.branches for s in branch for v in s.versions if v >= 0]
        return min(versions, default=-1)

    @property
    def sampled_tokens(self) -> int:
        """Tokens the policy sampled, over all branches."""
        return sum(sum(s.sampled) for branch in self.branches for s in branch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What a teacher thinks of some tokens at every position that is judged: which they are hangs on the tokens before
    it and not on the one that was sampled.

    Little-endian, in C order: a row a position."""

    ids: bytes
    """Token ids, int32, no two alike in a row but for -1, which fills it up."""
    logprobs: bytes
    """Of these tokens, float32; of no meaning beside a -1."""
    width: int
    """Of a row."""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.logprobs) or len(self.ids) % (4 * self.width):
            raise ValueError(
                f"{len(self.ids)} bytes of ids and {len(self.logprobs)} of log-probs are not rows of {self.width}"
            )

    @property
    def rows(self) -> int:
        """Positions that are judged."""
        return len(self.ids) // (4 * self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    logprobs: tuple[float, ...]
    """Teacher's log-prob of every token given the ones before it; 0 where the mask is off."""
    teacher: str
    """Fingerprint of the teacher's weights."""
    support: Support | None = None
    """Of every masked position but the sequence's first; if the teacher was asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One branch made trainable. All tuples have the length of ``ids``; entry 0 is never trained."""

    rollout: str
    """Id of the rollout it came from."""
    domain: str
    """Domain, for metrics and shares."""
    ids: tuple[int, ...]
    """The whole context, token by token."""
    sampled: tuple[bool, ...]
    """Trained positions."""
    logprobs: tuple[float, ...]
    """Behaviour log-probs."""
    advantages: tuple[float, ...]
    """Reward-based advantage of each token; all 0 when a teacher gives the signal."""
    teacher_logprobs: tuple[float, ...] | None = None
    """Kept raw: the reverse-KL advantage is recomputed under the live student."""
    teacher_support: Support | None = None
    """The same of other tokens, at every trained position; if the objective uses them."""
    oldest_version: int = 0
    """For staleness."""
    versions: tuple[int, ...] | None = None
    """Policy version of each token, -1 where not sampled; None: all that is sampled is of ``oldest_version``."""
    choices: Choices | None = None
    """From position 0 on; the last positions have none."""

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.sampled), len(self.logprobs), len(self.advantages)}
        if self.teacher_logprobs is not None:
            lengths.add(len(self.teacher_logprobs))
        if self.versions is not None:
            lengths.add(len(self.versions))
        if len(lengths) != 1:
            raise ValueError(f"a sample's per-token tuples differ in length: {sorted(lengths)}")
        if self.teacher_support is not None and self.teacher_support.rows != sum(self.sampled[1:]):
            raise ValueError(
                f"a support of {self.teacher_support.rows} rows for {sum(self.sampled[1:])} trained tokens"
            )
        if self.choices is not None and self.choices.positions > len(self.ids):
            raise ValueError(f"choices of {self.choices.positions} positions for {len(self.ids)} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    version: int
    """Optimizer steps taken since the start of the stage; 0 is the starting policy."""
    where: str
    """Folder in Hugging Face format, or the name of a shared-memory block prefixed with ``shm:``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    exit_code: int
    """0 on success; 124 when the call's time ran out."""
    stdout: str
    """Captured output, capped."""
    stderr: str
    """Captured error output, capped."""
    truncated: bool = False
    """Whether output was cut at the cap."""
    timed_out: bool = False
    """Whether the call's time ran out."""
