"""Log-probs of given tokens without the logits of all of them: the head is applied to a few rows at a time, forwards
and again backwards, and what a chunk needs is forgotten with it.

Memory beyond the gradients is that of one chunk of logits instead of several copies of ``[N, V]``; on a CPU a chunk
stays in the cache, which pays for computing it twice.

Shapes: N tokens, D hidden, V vocabulary, C rows of a chunk, M ids a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Logits of a chunk: 1 MiB in float32 stays in a core's cache, 256 MiB keeps a GPU busy."""
_OF_HEAD = 8
"""A chunk has at least an eighth as many logits as the head has weights: every chunk reads all of these."""
_BARE, _users = Lock(), dict[nn.Module, int]()
"""Threads that have a head bare."""
_SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")
"""Fields of configs whose models do more to hidden states than to multiply them by the head."""


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The head of a causal LM whose logits are ``hidden @ weight.T`` and no more, else None."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    config = getattr(model, "config", None)
    # By what it does, since FSDP makes a class of its own of every class.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or head.bias is not None:
        return None
    if type(head.weight.data) not in (Tensor, DTensor):
        return None
    return None if any(getattr(config, field, None) not in (None, 1, 1.0) for field in _SCALED) else head


@contextmanager
def bare(head: nn.Linear) -> Iterator[None]:
    """The model's logits are the hidden states that ``head`` would be given; where several threads are in here, until
    the last of them leaves."""
    with _BARE:
        head.forward, _users[head] = lambda input: input, _users.get(head, 0) + 1
    try:
        yield
    finally:
        with _BARE:
            _users[head] -= 1
            if not _users[head]:
                del head.forward, _users[head]


def rows_of_chunk(device: str, vocabulary: int, hidden: int) -> int:
    """Tokens whose logits are there at once; ``device``: its type."""
    return max(1, hidden // _OF_HEAD, _CHUNK.get(device, _CHUNK["cuda"]) // vocabulary)


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, ids: Tensor, dtype: torch.dtype | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """``log_softmax(hidden @ weight.T)[n, ids[n]]``, in the shape of ``ids``, and the entropy of every row, ``[N]``, in
    float32.

    ``ids``: one a row, ``[N]``, or several, ``[N, M]``: no two of them alike, but any may equal the row's first. The
    product is in ``dtype`` (None: that of the hidden states), all that follows in float32. Both are differentiable:
    with z the logits, p their softmax and H the entropy, d logp / dz = onehot - p and dH / dz = -p (log p + H).
    ``chunk``: logits held at once, by default those of ``rows_of_chunk``."""
    rows = max(1, chunk // len(weight_VD)) if chunk else rows_of_chunk(hidden_ND.device.type, *weight_VD.shape)
    ids_NM = ids if ids.dim() == 2 else ids[:, None]
    found: Any = _TokenLogprobs.apply(hidden_ND, weight_VD, ids_NM, dtype or hidden_ND.dtype, rows)
    logp_NM, entropy_N = found
    return logp_NM.view_as(ids), entropy_N


def _read(logits_CV: Tensor, ids_CM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs ``[C, M]``, log of the sum of exponentials and entropies ``[C]`` of a chunk."""
    z_CV = logits_CV.float()
    # One exponential for both: H = log sum exp z - sum p z.
    z_CV = z_CV - z_CV.amax(-1, keepdim=True)
    weight_CV = z_CV.exp()
    sum_C = weight_CV.sum(-1)
    log_C = sum_C.log()
    logp_CM = z_CV.gather(1, ids_CM) - log_C[:, None]
    total_C = logits_CV.gather(1, ids_CM[:, :1])[:, 0].float() - logp_CM[:, 0]
    return logp_CM, total_C, log_C - (weight_CV * z_CV).sum(-1) / sum_C


def _grad(logits_CV: Tensor, total_C: Tensor, entropy_C: Tensor, by_logp_C: Tensor, by_entropy_C: Tensor) -> Tensor:
    """Of a chunk's logits, but for the onehot, in the type of the logits."""
    logp_CV = logits_CV.float() - total_C[:, None]
    at_CV = by_logp_C[:, None] + by_entropy_C[:, None] * (logp_CV + entropy_C[:, None])
    return (-logp_CV.exp() * at_CV).to(logits_CV.dtype)


def _grad_of_logp(logits_CV: Tensor, total_C: Tensor, by_logp_C: Tensor) -> Tensor:
    """The same where nothing hangs on the entropies."""
    return (-(logits_CV.float() - total_C[:, None]).exp() * by_logp_C[:, None]).to(logits_CV.dtype)


@cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel for all of it: on a GPU every pass over a chunk costs more than the arithmetic."""
    return torch.compile(function, dynamic=True)


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    return _fused(function) if device.type == "cuda" and find_spec("triton") is not None else function


def _own(ids_NM: Tensor, logp_NM: Tensor, entropy_N: Tensor, by_logp_NM: Tensor, by_entropy_N: Tensor | None) -> Tensor:
    """Gradient of the tokens' own logits, in float32: 1 - p is nothing in fewer bits where p is nearly 1."""
    at_NM = by_logp_NM.sum(1, keepdim=True)
    if by_entropy_N is not None:
        at_NM = at_NM + by_entropy_N[:, None] * (logp_NM + entropy_N[:, None])
    if ids_NM.shape[1] > 1:  # what equals the first is the same logit, which is written once
        first_NM = ids_NM == ids_NM[:, :1]
        by_logp_NM = torch.where(first_NM, (by_logp_NM * first_NM).sum(1, keepdim=True), by_logp_NM)
    return by_logp_NM - logp_NM.exp() * at_NM


class _TokenLogprobs(torch.autograd.Function):
    """See ``token_logprobs``."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_NM: Tensor, dtype: torch.dtype, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Both results; kept for the way back are the inputs, the results and a number a row."""
        weight, read = weight_VD.to(dtype), _on(hidden_ND.device, _read)
        logp_NM = hidden_ND.new_empty(ids_NM.shape, dtype=torch.float32)
        total_N, entropy_N = logp_NM.new_empty(len(ids_NM)), logp_NM.new_empty(len(ids_NM))
        for a in range(0, len(ids_NM), rows):
            part = slice(a, a + rows)
            logits_CV = hidden_ND[part].to(dtype) @ weight.T
            logp_NM[part], total_N[part], entropy_N[part] = read(logits_CV, ids_NM[part])
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NM, total_N, logp_NM, entropy_N)
        ctx.dtype, ctx.rows = dtype, rows
        ctx.set_materialize_grads(False)
        return logp_NM, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of hidden states and weight."""
        hidden_ND, weight_VD, ids_NM, total_N, logp_NM, entropy_N = ctx.saved_tensors
        by_logp_NM, by_entropy_N = grads
        if by_logp_NM is None:
            by_logp_NM = torch.zeros_like(logp_NM)
        own_NM = _own(ids_NM, logp_NM, entropy_N, by_logp_NM, by_entropy_N).to(ctx.dtype)
        by_logp_N = by_logp_NM.sum(1)
        weight, wanted = weight_VD.to(ctx.dtype), ctx.needs_input_grad
        grad_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
        for a in range(0, len(ids_NM), ctx.rows):
            part = slice(a, a + ctx.rows)
            hidden_CD, by_logp_C = hidden_ND[part].to(ctx.dtype), by_logp_N[part]
            logits_CV = hidden_CD @ weight.T
            if by_entropy_N is None:
                grad_CV = _on(hidden_ND.device, _grad_of_logp)(logits_CV, total_N[part], by_logp_C)
            else:
                grad = _on(hidden_ND.device, _grad)
                grad_CV = grad(logits_CV, total_N[part], entropy_N[part], by_logp_C, by_entropy_N[part])
            grad_CV.scatter_(1, ids_NM[part], own_NM[part])
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = grad_CV @ weight
            if grad_weight_VD is not None and ctx.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
            elif grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_CD
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None
