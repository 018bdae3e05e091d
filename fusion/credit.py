"""The student's credit: what the teacher of the domain thinks of the student's own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from experts.credit import samples_of
from posttrain.protocols import Teacher
from posttrain.types import Rollout, Sample


class TeacherCredit:
    """Strict routing: one teacher a domain, chosen by the task's label. Implements ``protocols.Credit``.

    Teacher log-probs are stored as they are; the advantage is taken under the live student in the loss."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = teachers

    def __call__(self, group: Sequence[Rollout]) -> list[Sample]:
        samples = [s for rollout in group for s in samples_of(rollout, 0.0)]
        if not samples:
            return []
        teacher = self.teachers[samples[0].domain]
        scores = teacher.score([s.ids for s in samples], [s.sampled for s in samples])
        return [
            replace(s, teacher_logprobs=t.logprobs, teacher_support=t.support)
            for s, t in zip(samples, scores, strict=True)
        ]
