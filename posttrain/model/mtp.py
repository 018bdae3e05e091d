"""Multi-token prediction: one dense block that drafts the tokens after the next, applied again and again.

Legend: B batch, T tokens, S columns, H hidden, V vocabulary, h heads, E = kv_lora_rank + qk_rope_head_dim,
K chosen columns, m rows of earlier steps.

Step k at base i reads the hidden state of step k - 1 (step 0: the model's, after its final norm) and token t_{i+k}, and
predicts t_{i+k+1}. It sees what a draft sees when it is sampled: the first step's keys up to i, then its own earlier
steps' keys, at positions i + 1, i + 2, ... Training does exactly that, so a draft is never asked for what it was not
trained on. With LSA the first step's index set serves all steps (arXiv 2608.01662: CLI over the draft steps).
Names follow the official checkpoints (``model.mtp.*``); the word embedding and the head are the model's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from posttrain.model.attention import AttentionPlan, IndexSet, LongcatMLA
from posttrain.model.config import Longcat2Config
from posttrain.model.index_loss import index_loss
from posttrain.model.moe import LongcatMLP
from posttrain.model.norm import LongcatRMSNorm
from posttrain.model.sparse import sparse_attend
from posttrain.model.visibility import Visibility


class _Named(nn.Module):
    """A norm under the checkpoint's name ``<...>.m.weight``."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.m = LongcatRMSNorm(hidden, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normed x."""
        return self.m(x)


class _Dense(nn.Module):
    """A SwiGLU under the checkpoint's name ``transformer_layer.mlp``."""

    def __init__(self, config: Longcat2Config) -> None:
        super().__init__()
        self.mlp = LongcatMLP(config.hidden_size, config.ffn_hidden_size)


class DraftBlock(nn.Module):
    """Joins token and hidden state, then one attention and one dense FFN."""

    def __init__(self, config: Longcat2Config) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = _Named(hidden, eps), _Named(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.input_layernorm = LongcatRMSNorm(hidden, eps)
        self.self_attn = LongcatMLA(config, config.num_attentions)
        self.post_attention_layernorm = LongcatRMSNorm(hidden, eps)
        self.transformer_layer = _Dense(config)

    def join(self, embedded_BTH: Tensor, hidden_BTH: Tensor) -> Tensor:
        """``W_eh [RMS_e(embedding); RMS_h(hidden)]``: the embedding's half comes first."""
        return self.eh_proj(torch.cat((self.enorm(embedded_BTH), self.hnorm(hidden_BTH)), dim=-1))

    def finish(self, z_BTH: Tensor) -> Tensor:
        """The FFN with its residual."""
        return z_BTH + self.transformer_layer.mlp(self.post_attention_layernorm(z_BTH))


class Drafted(NamedTuple):
    hidden_BTH: Tensor
    """After the block's own norm: for the head, and for the next step."""
    columns_BTK: Tensor | None
    """Columns that were attended to; None: all that are seen."""


class LongcatMTP(nn.Module):
    """The draft block and its norm."""

    def __init__(self, config: Longcat2Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([DraftBlock(config)])
        self.norm = LongcatRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_BTH: Tensor,
        embedded_BTH: Tensor,
        rotations_BTP: Tensor,
        plan: AttentionPlan,
        cache: Cache | None = None,
        columns_BTK: Tensor | None = None,
    ) -> Drafted:
        """One step. ``columns_BTK``: an earlier step's set and the columns drafted since, in place of a new one."""
        block: Any = self.layers[0]
        z = block.join(embedded_BTH, hidden_BTH)
        attended = block.self_attn(block.input_layernorm(z), rotations_BTP, plan, cache, None, columns_BTK)
        chosen = attended.chosen.columns_BTK if attended.chosen is not None else None
        return Drafted(self.norm(block.finish(z + attended.out_BTH)), chosen)

    def unroll(
        self, hidden_BTH: Tensor, embedded_BTH: Tensor, rotations_of: Callable[[int], Tensor], plan: AttentionPlan
    ) -> tuple[list[Tensor], Tensor | None]:
        """All steps at every base, without a cache.

        Args:
            embedded_BTH: word embeddings of the tokens themselves; step k reads them k places to the left.
            rotations_of: gives the rotations of positions moved by so many places.

        Returns:
            The steps' hidden states after the norm, [B, T, H] each; entries whose tokens lie beyond T mean nothing.
            The indexer's loss, summed over the steps, if the plan wants it.
        """
        block: Any = self.layers[0]
        attention: LongcatMLA = block.self_attn
        z = block.join(embedded_BTH.roll(-1, dims=1), hidden_BTH)
        normed = block.input_layernorm(z)
        first = attention(normed, rotations_of(0), plan, None)
        states, loss, index = [self.norm(block.finish(z + first.out_BTH))], first.index_loss, first.chosen
        kv_BSE = torch.cat(attention.keys(normed, rotations_of(0)), dim=-1)
        own: list[Tensor] = []
        for step in range(1, self.config.mtp_num_layers or 0):
            z = block.join(embedded_BTH.roll(-step - 1, dims=1), states[-1])
            normed, turned = block.input_layernorm(z), rotations_of(step)
            own.append(torch.cat(attention.keys(normed, turned), dim=-1))
            q_BThE = attention.latent_queries(*attention.queries(normed, turned)[1:])
            mixed_BThC = _attend(q_BThE, kv_BSE, torch.stack(own, dim=2), index, plan, attention.latent)
            states.append(self.norm(block.finish(z + attention.o_proj(attention.values(mixed_BThC)))))
            if index is not None and index.queries is not None:
                step_loss = index_loss(index.queries, q_BThE, kv_BSE, index.columns_BTK, plan.visibility, plan.live)
                loss = step_loss if loss is None else loss + step_loss
        return states, loss


def _attend(
    q_BThE: Tensor, kv_BSE: Tensor, own_BTmE: Tensor, index: IndexSet | None, plan: AttentionPlan, latent: int
) -> Tensor:
    """Attention over the first step's rows, as its base saw them, and the base's own later rows; [B, T, h, latent]."""
    batch, tokens, steps = own_BTmE.shape[:3]
    if index is not None and index.columns_BTK is not None:
        columns = index.columns_BTK
        rows = torch.arange(tokens * steps, device=columns.device, dtype=columns.dtype) + kv_BSE.shape[1]
        every_BTK = torch.cat((columns, rows.view(1, tokens, steps).expand(batch, -1, -1)), dim=-1)
        return sparse_attend(q_BThE, torch.cat((kv_BSE, own_BTmE.flatten(1, 2)), dim=1), every_BTK, latent)
    heads = q_BThE.shape[2]  # flattened by hand: matmul would copy the shared rows for every token
    logits_BThS = torch.bmm(q_BThE.flatten(1, 2), kv_BSE.mT).unflatten(1, (tokens, heads))
    seen_BTS = plan.visibility.rows(0, tokens)
    logits_BThS = logits_BThS.masked_fill(~seen_BTS.unsqueeze(2), torch.finfo(logits_BThS.dtype).min)
    logits_BThm = torch.matmul(q_BThE, own_BTmE.mT)
    weights = torch.cat((logits_BThS, logits_BThm), dim=-1).softmax(dim=-1, dtype=torch.float32).to(q_BThE.dtype)
    past, own = weights.split((kv_BSE.shape[1], steps), dim=-1)
    mixed_BThC = torch.bmm(past.flatten(1, 2), kv_BSE[..., :latent]).unflatten(1, (tokens, heads))
    return mixed_BThC + torch.matmul(own, own_BTmE[..., :latent])


def draft_loss(
    logits_of: Callable[[Tensor], Tensor],
    states: list[Tensor],
    labels_BT: Tensor,
    visibility: Visibility,
    items: Tensor | int | None,
) -> Tensor:
    """Mean over steps of the cross entropy of step k at base i against token i + k + 1, where that token has a label
    (-100: none) and belongs to the base's document. Divided by the number of such tokens, or by ``items``."""
    total = states[0].new_zeros(())
    for step, state_BTH in enumerate(states, start=1):
        shift = step + 1
        inside_BT = visibility.first_BT[:, shift:] <= visibility.last_BT[:, :-shift]  # one document holds both
        target_BT = labels_BT[:, shift:].masked_fill(~inside_BT, -100)
        kept = target_BT != -100
        loss = F.cross_entropy(logits_of(state_BTH[:, :-shift][kept]).float(), target_BT[kept], reduction="sum")
        total = total + loss / (kept.sum().clamp(min=1) if items is None else items)
    return total / len(states)
