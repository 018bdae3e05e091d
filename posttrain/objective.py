"""The objectives, as pure functions of per-token log-probs.

``terms`` gives what each trained token adds to the loss, ``reduce`` divides by what the caller fixes for the whole
optimizer step, so that neither padding nor the split into micro-batches changes the result. What speaks of a response
needs all of its tokens in one micro-batch.

Shapes: N trained tokens of one micro-batch, row by row; B rows, each the whole of one response (a rollout has one a
branch); K tokens of a support. pi, prox, mu: see ``posttrain.objective_settings``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.batch import Batch
from posttrain.objective_settings import (
    CispoLoss,
    ClippedLoss,
    DistillLoss,
    DppoLoss,
    GrpoLoss,
    GspoLoss,
    LossConfig,
    PolicyLossConfig,
    Reduction,
    TopkEstimator,
)

Stats = dict[str, float]
"""Sums over the trained tokens of a micro-batch; ``means`` makes metrics of their sums over the whole step."""

_MAX_LOG_RATIO = 20.0
"""A ratio beyond is cut, not infinite: infinity times the zero of a mask has no gradient."""
_MAX_LOG_PRODUCT = 50.0
"""The same for a product over a response: its square is still a number."""


class OnSupport(NamedTuple):
    """Two policies on the tokens that the teacher named, whichever was sampled."""

    pi_NK: Tensor
    """Log-probs that carry the gradient."""
    teacher_NK: Tensor
    """Log-probs of the teacher."""
    there_NK: Tensor
    """False where a row is filled up."""
    holds_N: Tensor
    """True where the sampled token is one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The trained tokens of a micro-batch."""

    pi_N: Tensor
    """Log-probs that carry the gradient."""
    prox_N: Tensor
    """Log-probs at the start of the step."""
    mu_N: Tensor
    """Log-probs of the engine that sampled."""
    advantage_N: Tensor
    """Reward-based advantages."""
    row_N: Tensor
    """Row of each token, int64."""
    entropy_N: Tensor
    """Of the whole distribution; carries a gradient if the objective uses it."""
    reference_N: Tensor | None = None
    """Log-probs of the policy that the stage began with, if the objective uses it."""
    teacher_N: Tensor | None = None
    """Log-probs of the teacher, if the objective uses one."""
    support: OnSupport | None = None
    """What else the teacher said, if the objective uses it."""

    @property
    def length_B(self) -> Tensor:
        """Trained tokens of every row."""
        return torch.bincount(self.row_N)

    def row_sum(self, values_N: Tensor) -> Tensor:
        """Sum of every row [B], in double precision, without gradient."""
        values_N = values_N.detach().double()
        return values_N.new_zeros(len(self.length_B)).index_add(0, self.row_N, values_N)


class Terms(NamedTuple):
    """What the tokens of a micro-batch add to a loss."""

    terms_N: Tensor
    """Minimised."""
    gated_N: Tensor
    """True where a mask, a clip or a correction takes the signal of the advantage, or the teacher, away."""
    stats: Stats


class Loss(NamedTuple):
    """What a micro-batch adds to the loss of its optimizer step."""

    total: Tensor
    stats: Stats
    gated_N: Tensor
    """As in ``Terms``."""


class Extent(NamedTuple):
    """What one optimizer step covers, over all of its micro-batches."""

    rollouts: float
    """Those without signal counted too."""
    tokens: int
    """Trained ones."""


def loss(tokens: Tokens, config: LossConfig, extent: Extent) -> Loss:
    """What a micro-batch adds to the loss of its optimizer step, with sums for ``means``."""
    distils = isinstance(config, DistillLoss)
    terms_N, gated_N, stats = distill_terms(tokens, config) if distils else policy_terms(tokens, config)
    reduction, length = ("response", 1) if distils else (config.reduction, config.constant_length)
    total = reduce(terms_N, tokens, reduction, length, extent)
    return Loss(total, {**stats, **_behaviour(tokens), f"loss/{reduction}": total.item()}, gated_N)


def reduce(terms_N: Tensor, tokens: Tokens, reduction: Reduction, constant_length: int, extent: Extent) -> Tensor:
    """The part of the reduced loss that these tokens make; parts of one step add up to the whole."""
    match reduction:
        case "constant":
            return terms_N.sum() / (extent.rollouts * constant_length)
        case "token":
            return terms_N.sum() / extent.tokens
        case "response":
            return (terms_N / tokens.length_B[tokens.row_N]).sum() / extent.rollouts


def policy_terms(tokens: Tokens, config: PolicyLossConfig) -> Terms:
    """Terms of an objective that learns from advantages.

    A correction that masks a token masks the pull as well, since both trust the recorded mu; the objective's own mask
    leaves the pull, which is what brings such a token back."""
    pi_N, mu_N = tokens.pi_N, tokens.mu_N
    keep_N, stats = _kept(tokens, config)
    if config.importance_cap is None:
        weight_N, log_ratio_N = torch.ones_like(mu_N), pi_N - mu_N
    else:
        prox_N = tokens.prox_N.detach()
        whole_N = _ratio(prox_N - mu_N)
        weight_N, log_ratio_N = whole_N.clamp_max(config.importance_cap), pi_N - prox_N
        stats["importance_capped"] = (whole_N > config.importance_cap).sum().item()
    surrogate_N, flat_N, own = _surrogate(tokens, log_ratio_N, config)
    terms_N = -weight_N * surrogate_N
    if config.pull:
        terms_N = terms_N + config.pull * (pi_N - mu_N).square()
    terms_N = torch.where(keep_N, terms_N, 0.0)
    if config.kl:
        if tokens.reference_N is None:
            raise ValueError("loss.kl needs the log-probs of a reference")
        terms_N = terms_N + config.kl * (pi_N - tokens.reference_N).square() / 2
        stats["kl_reference"] = _k3(tokens.reference_N, pi_N.detach()).sum().item()
    if config.entropy:
        terms_N = terms_N - config.entropy * tokens.entropy_N
    gated_N = flat_N | ~keep_N
    stats |= {"gated": gated_N.sum().item(), **{f"{config.type}/{k}": value for k, value in own.items()}}
    return Terms(terms_N, gated_N, stats)


def distill_terms(tokens: Tokens, config: DistillLoss) -> Terms:
    """``-w * A * log pi`` with ``A = sg[clip(log teacher - log pi, +-5)]`` and the gate ``w = sg[pi/mu]`` inside
    [low, high], else 0; with the estimator topk what ``_over_support`` says.

    The log-ratio is an advantage (stop-gradient): differentiated directly, the teacher would vanish from the gradient.
    A response's length does not shrink when tokens are gated."""
    if tokens.teacher_N is None:
        raise ValueError("the distillation loss needs teacher log-probs in every sample")
    pi_N = tokens.pi_N.detach()
    raw_N = tokens.teacher_N - pi_N
    advantage_N = raw_N.clamp(-config.advantage_clip, config.advantage_clip)
    ratio_N = _ratio(pi_N - tokens.mu_N)
    inside_N = (ratio_N >= config.gate_low) & (ratio_N <= config.gate_high)
    stats = {
        "gated": (~inside_N).sum().item(),
        "advantage_clipped": (raw_N.abs() > config.advantage_clip).sum().item(),
        "kl_teacher": (-raw_N).sum().item(),
    }
    sampled_N = -torch.where(inside_N, ratio_N, 0.0) * advantage_N * tokens.pi_N
    if not isinstance(config.estimator, TopkEstimator):
        return Terms(sampled_N, ~inside_N, stats)
    if tokens.support is None:
        raise ValueError("the estimator topk needs the support of a teacher in every sample")
    head_N, masses = _over_support(tokens.support, config.advantage_clip)
    terms_N = torch.where(inside_N, head_N, 0.0) + torch.where(tokens.support.holds_N, 0.0, sampled_N)
    return Terms(terms_N, ~inside_N, {**stats, **masses})


def _over_support(support: OnSupport, clip: float) -> tuple[Tensor, Stats]:
    """What the support S adds to the term of every token, [N]: ``-sum over v in S of sg[pi(v)] A(v) log pi(v)``; the
    sampled token y adds its own ``-w A(y) log pi(y)`` if S does not hold it.

    Unclipped, with r = log pi/teacher, the gradient is ``sum_S pi r grad log pi + [y not in S] w r(y) grad log pi(y)``:
    head and sampled tail, as in pull request 3608 of NVIDIA-NeMo/RL. Its mean over y from mu is the gradient of KL(pi
    || teacher) on the way taken, ``sum over all v of pi r grad log pi`` (DeepSeek-V4, arXiv 2606.19348, section 5.1.2),
    whatever S is, as long as S does not hang on y: the sum takes the place of its own estimate, and needs no weight
    since y has no part in it. Clipped, the mean is that of the estimator sampled.

    The head alone is the gradient of the generalised KL ``sum_S [pi r - pi + teacher]`` (MOPD, arXiv 2606.30406, Eq. 5)
    and leaves free how the mass beyond S is split; the truncated ``sum_S pi r`` is at rest where the student's mass on
    S is 1/e of the teacher's."""
    pi_NK = support.pi_NK.detach()
    p_NK = torch.where(support.there_NK, pi_NK.exp(), 0.0)
    advantage_NK = (support.teacher_NK - pi_NK).clamp(-clip, clip)
    teacher_NK = torch.where(support.there_NK, support.teacher_NK.exp(), 0.0)
    masses = {
        "teacher_mass": teacher_NK.sum().item(),
        "student_mass": p_NK.sum().item(),
        "tail": (~support.holds_N).sum().item(),
    }
    return -(p_NK * advantage_NK * support.pi_NK).sum(-1), masses


def means(sums: Stats, updates: int) -> Stats:
    """Metrics of a step whose micro-batches, of ``updates`` optimizer steps, came to ``sums``, ``tokens`` among them.

    Shares and means are over the trained tokens; ``ess_*`` is (sum w)^2 / (n sum w^2) of w = pi/mu, 1 when all weigh
    the same; ``loss/<reduction>`` is the mean over the optimizer steps."""
    rest = dict(sums)
    tokens = rest.pop("tokens", 0.0)
    if not tokens:
        return {}
    out: Stats = {}
    for unit, count in (("tokens", tokens), ("sequences", rest.pop("sequences"))):
        total, squares = rest.pop(f"weight_{unit}"), rest.pop(f"weight_squared_{unit}")
        out[f"ess_{unit}"] = total**2 / (count * squares)
    return out | {key: value / (updates if key.startswith("loss/") else tokens) for key, value in rest.items()}


def _surrogate(tokens: Tokens, log_ratio_N: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Tensor, Stats]:
    """What is maximised, [N], where a bound keeps it from learning, [N], and sums that bear the objective's name."""
    ratio_N, advantage_N = _ratio(log_ratio_N), tokens.advantage_N
    match config:
        case DppoLoss():
            moved_N = tokens.pi_N.detach().exp() - tokens.mu_N.exp()
            outside_N = (advantage_N.sign() * moved_N) > config.delta
            weighted_N, stats = _weighted(tokens, ratio_N, config.ratio_cap)
            return torch.where(outside_N, 0.0, weighted_N), outside_N, {**stats, "masked": outside_N.sum().item()}
        case CispoLoss():
            weighted_N, stats = _weighted(tokens, ratio_N, config.ratio_cap)
            return weighted_N, torch.zeros_like(ratio_N, dtype=torch.bool), stats
        case GspoLoss():
            mean_B = tokens.row_sum(log_ratio_N) / tokens.length_B
            # The value of the whole response's ratio, the gradient of the token's own.
            of_row_N = _ratio(mean_B)[tokens.row_N].to(log_ratio_N.dtype)
            ratio_N = of_row_N * (tokens.pi_N - tokens.pi_N.detach()).exp()
            return _clip(ratio_N, advantage_N, config)
        case GrpoLoss():
            return _clip(ratio_N, advantage_N, config)
        case ClippedLoss():
            surrogate_N, _, _ = _clip(ratio_N, advantage_N, config)
            # As printed, Eq. 4 takes the outer max for both signs and would flatten every positive token.
            bounded_N = torch.maximum(surrogate_N, config.clip_negative * advantage_N)
            surrogate_N = torch.where(advantage_N < 0, bounded_N, surrogate_N)
            return surrogate_N, *_flat(surrogate_N, ratio_N * advantage_N)


def _weighted(tokens: Tokens, ratio_N: Tensor, cap: float) -> tuple[Tensor, Stats]:
    """REINFORCE with the ratio as a weight, cut at ``cap``."""
    weight_N = ratio_N.detach().clamp_max(cap)
    capped = (ratio_N > cap).sum().item()
    return weight_N * tokens.advantage_N * tokens.pi_N, {"capped": capped}


def _clip(
    ratio_N: Tensor, advantage_N: Tensor, config: GrpoLoss | GspoLoss | ClippedLoss
) -> tuple[Tensor, Tensor, Stats]:
    """PPO's ``min(r A, clip(r, 1 - low, 1 + high) A)``, where it is flat, and sums."""
    inside_N = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate_N = torch.minimum(ratio_N * advantage_N, inside_N * advantage_N)
    return surrogate_N, *_flat(surrogate_N, ratio_N * advantage_N)


def _flat(surrogate_N: Tensor, free_N: Tensor) -> tuple[Tensor, Stats]:
    """Tokens that a bound keeps from learning."""
    flat_N = surrogate_N != free_N
    return flat_N, {"clipped": flat_N.sum().item()}


def _kept(tokens: Tokens, config: PolicyLossConfig) -> tuple[Tensor, Stats]:
    """Tokens that the corrections leave in, [N], and what they took out."""
    gap_N, stats = tokens.prox_N.detach() - tokens.mu_N, Stats()
    keep_N = torch.ones_like(gap_N, dtype=torch.bool)
    if config.token_band is not None:
        low, high = config.token_band
        ratio_N = _ratio(gap_N)
        keep_N = (ratio_N >= low) & (ratio_N <= high)
        stats["token_masked"] = (~keep_N).sum().item()
    if config.sequence_band is None and config.sequence_cap is None:
        return keep_N, stats
    sum_B = tokens.row_sum(gap_N)
    keep_B = torch.ones_like(sum_B, dtype=torch.bool)
    if config.sequence_band is not None:
        low, high = config.sequence_band
        mean_B = (sum_B / tokens.length_B).exp()
        keep_B = (mean_B >= low) & (mean_B <= high)
    if config.sequence_cap is not None:
        keep_B = keep_B & (sum_B.exp() <= config.sequence_cap)
    stats["sequence_masked"] = (~keep_B[tokens.row_N]).sum().item()
    return keep_N & keep_B[tokens.row_N], stats


@torch.no_grad()
def _behaviour(tokens: Tokens) -> Stats:
    """How far the policy is from the one that sampled."""
    gap_N = tokens.pi_N - tokens.mu_N
    weight_N = _ratio(gap_N).double()
    rows_B = tokens.row_sum(gap_N)[tokens.length_B > 0]
    weight_B = rows_B.clamp(-_MAX_LOG_PRODUCT, _MAX_LOG_PRODUCT).exp()
    return {
        "gap_abs": gap_N.abs().sum().item(),
        "kl_behaviour": _k3(tokens.pi_N, tokens.mu_N).sum().item(),
        "entropy": tokens.entropy_N.sum().item(),
        "tokens": float(len(gap_N)),
        "weight_tokens": weight_N.sum().item(),
        "weight_squared_tokens": weight_N.square().sum().item(),
        "sequences": float(len(weight_B)),
        "weight_sequences": weight_B.sum().item(),
        "weight_squared_sequences": weight_B.square().sum().item(),
    }


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _k3(p_N: Tensor, q_N: Tensor) -> Tensor:
    """Non-negative estimate of KL(q || p) from tokens drawn from q (Schulman's k3)."""
    log_ratio_N = p_N - q_N
    return _ratio(log_ratio_N) - 1 - log_ratio_N


def on_support(batch: Batch, logprobs: Tensor) -> tuple[Tensor, OnSupport | None]:
    """Log-probs of ``batch.judged_ids`` taken apart: of the trained tokens, ``[N]``, and of the support."""
    if batch.support_NK is None or batch.support_teacher_NK is None:
        return logprobs, None
    holds_N = (batch.support_NK == batch.judged_ids[:, :1]).any(1)
    return logprobs[:, 0], OnSupport(logprobs[:, 1:], batch.support_teacher_NK, batch.support_NK >= 0, holds_N)
