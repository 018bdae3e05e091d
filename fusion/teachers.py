"""Teachers that live in the training process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posttrain.model.checkpoint import load_any
from posttrain.types import Support, TeacherScores
from posttrain.weights import fingerprint


class ModelTeacher:
    """A whole model of its own. Implements ``protocols.Teacher``.

    Log-probs are taken at temperature 1 from byte-identical token ids. ``top_k``: so many of its most likely tokens,
    and the token ids ``always``, are the support of its scores; 0: they have none. Not thread-safe."""

    def __init__(
        self, folder: Path, tokens_per_forward: int = 8192, top_k: int = 0, always: Sequence[int] = ()
    ) -> None:
        self.model = load_any(folder, torch.float32)
        self.name = fingerprint(self.model)
        self._budget, self._top_k, self._always = tokens_per_forward, top_k, torch.tensor(always, dtype=torch.long)

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
            logp_BTV = torch.log_softmax(logits_BTV, -1)
            logp_BT = logp_BTV.gather(2, ids_BT[:, 1:, None])[..., 0]
            for row, i in enumerate(chunk):
                given = [0.0, *logp_BT[row, : len(ids[i]) - 1].tolist()]
                masked = tuple(p if m else 0.0 for p, m in zip(given, mask[i], strict=True))
                support = self._support(logp_BTV[row], mask[i]) if self._top_k else None
                out[i] = TeacherScores(logprobs=masked, teacher=self.name, support=support)
        return [out[i] for i in range(len(ids))]

    def _support(self, logp_TV: Tensor, mask: Sequence[bool]) -> Support:
        # Of all tokens, those that are not judged too: their log-probs are many more than what is found in them.
        top_TK, ids_TK = logp_TV[: len(mask) - 1].topk(self._top_k)
        places = torch.tensor(mask[1:], dtype=torch.bool)
        forced_TF = logp_TV[: len(mask) - 1, self._always]
        always_TF = self._always.expand_as(forced_TF)
        always_TF = torch.where((always_TF[..., None] == ids_TK[:, None]).any(-1), -1, always_TF)
        found_NK = torch.cat([ids_TK, always_TF], 1)[places], torch.cat([top_TK, forced_TF], 1)[places]
        return pack_support(found_NK[0].numpy(), found_NK[1].numpy())


def pack_support(ids_NK: np.ndarray, logprobs_NK: np.ndarray) -> Support:
    """A row a judged position; -1 is no id."""
    ids, logprobs = ids_NK.astype("<i4").tobytes(), logprobs_NK.astype("<f4").tobytes()
    return Support(ids=ids, logprobs=logprobs, width=ids_NK.shape[1])
