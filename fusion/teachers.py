"""Teachers that live in the training process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from posttrain.model.checkpoint import load_any
from posttrain.types import TeacherScores
from posttrain.weights import fingerprint


class ModelTeacher:
    """A whole model of its own. Implements ``protocols.Teacher``.

    Log-probs are taken at temperature 1 from byte-identical token ids. Not thread-safe."""

    def __init__(self, folder: Path, tokens_per_forward: int = 8192) -> None:
        self.model = load_any(folder, torch.float32)
        self.name = fingerprint(self.model)
        self._budget = tokens_per_forward

    @torch.inference_mode()
    def score(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[bool]]) -> list[TeacherScores]:
        """See the protocol. Sequences are right-padded together, longest first, within the token budget."""
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        out: dict[int, TeacherScores] = {}
        while order:
            width = len(ids[order[0]])
            count = max(1, self._budget // width)
            chunk, order = order[:count], order[count:]
            ids_BT = torch.zeros(len(chunk), width, dtype=torch.long)
            for row, i in enumerate(chunk):
                ids_BT[row, : len(ids[i])] = torch.tensor(ids[i])
            logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
            logp_BT = torch.log_softmax(logits_BTV, -1).gather(2, ids_BT[:, 1:, None])[..., 0]
            for row, i in enumerate(chunk):
                given = [0.0, *logp_BT[row, : len(ids[i]) - 1].tolist()]
                masked = tuple(p if m else 0.0 for p, m in zip(given, mask[i], strict=True))
                out[i] = TeacherScores(logprobs=masked, teacher=self.name)
        return [out[i] for i in range(len(ids))]
