"""The indexer's loss: it learns to put its softmax where the attention it serves puts its weights.

Legend: B batch, T current tokens, t a chunk of them, S cached columns, s columns in sight, K chosen columns, h heads,
E latent and rotary width, I index heads, D = index_head_dim.
Source: LongCat Sparse Attention, arXiv 2608.01662: ``L_I = mean_t KL(p_t || softmax(I_t))`` with p_t the mean over
heads of the attention weights, over everything in sight (warm-up) or over the chosen set (sparse stage).
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from posttrain.model.indexer import IndexQueries
from posttrain.model.sparse import support_probs
from posttrain.model.visibility import Visibility

_CHUNK = 1 << 22
"""Values of the largest tensor of a chunk, whatever the context's length."""


def index_loss(
    queries: IndexQueries,
    q_BThE: Tensor,
    kv_BSE: Tensor,
    columns_BTK: Tensor | None,
    visibility: Visibility,
    live_BT: Tensor | None,
) -> Tensor:
    """Mean over live tokens of the KL, a float32 scalar. Only the indexer gets a gradient.

    Args:
        q_BThE: scaled queries of the attention that is imitated, no gradient.
        kv_BSE: its ``[latent | rotated key]`` rows, no gradient.
        columns_BTK: the support, -1 for none; None: everything in sight.
    """
    batch, tokens = q_BThE.shape[:2]
    weight_BT = torch.ones(batch, tokens, device=q_BThE.device)
    if live_BT is not None:
        weight_BT = weight_BT * live_BT
    weight_BT = weight_BT / weight_BT.sum().clamp(min=1)
    if columns_BTK is not None:
        columns_BTK = columns_BTK.detach()
    return _IndexKL.apply(*queries, q_BThE.detach(), kv_BSE.detach(), columns_BTK, visibility, weight_BT)


class _IndexKL(torch.autograd.Function):
    """Loss and gradient in one forward pass over chunks of tokens: nothing of T x S is kept, and the backward pass only
    scales what is there. With pi = softmax(I): dL/dI = pi - p, then through ``I = sum_j w_j relu(q_j . k)``."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q_BTID: Tensor,
        w_BTI: Tensor,
        k_BSD: Tensor,
        q_BThE: Tensor,
        kv_BSE: Tensor,
        columns_BTK: Tensor | None,
        visibility: Visibility,
        weight_BT: Tensor,
    ) -> Tensor:
        loss = weight_BT.new_zeros(())
        dq, dw, dk = (torch.zeros_like(x, dtype=torch.float32) for x in (q_BTID, w_BTI, k_BSD))
        batch, tokens, heads, _ = q_BThE.shape
        width = kv_BSE.shape[1] if columns_BTK is None else columns_BTK.shape[-1] * q_BTID.shape[-1]
        step = max(1, _CHUNK // (batch * max(heads, q_BTID.shape[2]) * width))
        for start in range(0, tokens, step):
            part = slice(start, min(start + step, tokens))
            q, w = q_BTID[:, part].float(), w_BTI[:, part]
            end = visibility.end(part.start, part.stop)
            if columns_BTK is None:
                seen_BtK = visibility.rows(part.start, part.stop).expand(batch, -1, -1)
                p_BtK = _dense_probs(q_BThE[:, part], kv_BSE[:, :end], seen_BtK)
                k = k_BSD[:, :end].float()
            else:
                columns_BtK = columns_BTK[:, part].long()
                seen_BtK = columns_BtK >= 0
                p_BtK = support_probs(q_BThE[:, part], kv_BSE, columns_BtK)
                rows = torch.arange(batch, device=q.device)[:, None, None]
                k = k_BSD[rows, columns_BtK.clamp(min=0)].float()  # [B, t, K, D]
            hit_BtIK = _each(q, k.mT).relu_()
            scores_BtK = torch.matmul(w.unsqueeze(2), hit_BtIK).squeeze(2).masked_fill(~seen_BtK, -torch.inf)
            log_pi = scores_BtK.log_softmax(dim=-1).masked_fill(~seen_BtK, 0.0)
            loss += (weight_BT[:, part, None] * (torch.xlogy(p_BtK, p_BtK) - p_BtK * log_pi)).sum()
            g_BtK = (log_pi.exp().masked_fill(~seen_BtK, 0.0) - p_BtK) * weight_BT[:, part, None]
            dw[:, part] = torch.matmul(hit_BtIK, g_BtK.unsqueeze(-1)).squeeze(-1)
            d_hit = (g_BtK.unsqueeze(2) * w.unsqueeze(-1)).mul_(hit_BtIK > 0)
            dq[:, part] = _each(d_hit, k)
            if columns_BTK is None:
                dk[:, :end] += torch.matmul(d_hit.flatten(1, 2).mT, q.flatten(1, 2))
            else:
                _add_rows(dk, columns_BTK[:, part], torch.matmul(d_hit.mT, q))
        ctx.save_for_backward(dq.to(q_BTID.dtype), dw, dk.to(k_BSD.dtype))
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dw, dk = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        return grad * dq, grad * dw, grad * dk, None, None, None, None, None


def _dense_probs(q_BthE: Tensor, kv_BsE: Tensor, seen_Bts: Tensor) -> Tensor:
    """Mean over heads of the attention weights, float32 [B, t, s]; a token that sees nothing gets zeros."""
    logits_Bths = _each(q_BthE.float(), kv_BsE.float().mT)
    logits_Bths.masked_fill_(~seen_Bts.unsqueeze(2), -torch.inf)
    return logits_Bths.softmax(dim=-1).mean(dim=2).masked_fill(~seen_Bts, 0.0)


def _each(a_BtIX: Tensor, b: Tensor) -> Tensor:
    """Matrix products; ``b`` [B, X, Y] is one for all tokens of a row, [B, t, X, Y] one for each. Left to broadcasting,
    matmul would copy the former for every token."""
    if b.ndim == 4:
        return torch.matmul(a_BtIX, b)
    return torch.bmm(a_BtIX.flatten(1, 2), b).unflatten(1, a_BtIX.shape[1:3])


def _add_rows(out_BSD: Tensor, columns_BtK: Tensor, rows_BtKD: Tensor) -> None:
    """Adds each row to its column; rows of no column are zero already."""
    for out, columns, rows in zip(out_BSD, columns_BtK, rows_BtKD, strict=True):
        out.index_add_(0, columns.clamp(min=0).flatten().long(), rows.flatten(0, 1))
