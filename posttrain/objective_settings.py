"""What an objective can be told; ``posttrain.objective`` has the formulas. Imports no torch.

pi: the policy being trained. prox: the same policy at the start of the step. mu: the engine that sampled. A: advantage.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from posttrain.config import Config

Reduction = Literal["constant", "token", "response"]


def _around_one(band: tuple[float, float]) -> tuple[float, float]:
    low, high = band
    if not 0 <= low < 1 < high:
        raise ValueError(f"a band of ratios is [low, high] with 0 <= low < 1 < high, not [{low:g}, {high:g}]")
    return band


Band = Annotated[tuple[float, float], AfterValidator(_around_one)]
Cap = Annotated[float, Field(gt=0)]
Coefficient = Annotated[float, Field(ge=0)]


class PolicyLoss(Config):
    """What the objectives that learn from advantages share.

    The four corrections speak of prox/mu, which is what engine and staleness changed before the step, and go together
    as one likes. HisPO (arXiv 2603.21065, Eq. 9) is ``token_band`` and ``sequence_band`` at once.
    """

    reduction: Reduction = "constant"
    """What the sum over trained tokens is divided by. constant: rollouts x ``constant_length`` (Dr. GRPO, arXiv
    2503.20783); token: trained tokens of the optimizer step (DAPO, arXiv 2503.14476); response: each response by its
    own length, then by rollouts (GRPO, arXiv 2402.03300)."""
    constant_length: Annotated[int, Field(gt=0)] = 64
    """T_max of the constant reduction, whatever the lengths are."""
    importance_cap: Cap | None = None
    """TIS, decoupled PPO (arXiv 2110.00641): the objective sees pi/prox and is weighted by min(prox/mu, cap). null: it
    sees pi/mu whole."""
    token_band: Band | None = None
    """IcePop (arXiv 2510.18855): a token with prox/mu outside carries no signal."""
    sequence_band: Band | None = None
    """A response whose geometric mean of prox/mu is outside carries no signal; [0.99, 1.01] is advised for large
    models."""
    sequence_cap: Cap | None = None
    """MIS (arXiv 2512.23075): a response whose product of prox/mu is above carries no signal."""
    pull: Coefficient = 0.0
    """Weight of (log pi/mu)^2, which holds the policy near the sampler (Kimi K2.5, arXiv 2602.02276)."""
    kl: Coefficient = 0.0
    """Weight of 1/2 (log pi/ref)^2, whose gradient, on the policy's own samples, is that of KL(pi || ref); ref is where
    the stage starts. 0: off, and no ref is kept."""
    entropy: Coefficient = 0.0
    """Weight of the entropy, which is maximised."""

    @property
    def uses_prox(self) -> bool:
        """Whether anything is told of prox."""
        return any(
            bound is not None for bound in (self.importance_cap, self.token_band, self.sequence_band, self.sequence_cap)
        )


class DppoLoss(PolicyLoss):
    """Divergence PPO (arXiv 2602.04879): a trust region of probabilities, where clips bound their ratio."""

    type: Literal["dppo"] = "dppo"
    delta: Annotated[float, Field(gt=0, le=1)] = 0.2
    """A token whose probability has moved by more than this from mu's, the way A says, is masked."""
    ratio_cap: Cap = 2.0
    """The ratio is a weight (stop-gradient), cut here."""
    token_band: Band | None = (0.5, 5.0)
    """The engine-gap guard: as in every objective, but on."""
    pull: Coefficient = 1e-3
    """As in every objective, but on."""


class ClippedLoss(PolicyLoss):
    """Token-level GRPO with triplet clipping (LongCat-Flash-Thinking, arXiv 2509.18883, Eq. 4)."""

    type: Literal["clipped"] = "clipped"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """eps_neg_low: with A < 0 the ratio is trusted down to 1 - clip_low."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """eps_pos_high: with A > 0 the ratio is trusted up to 1 + clip_high."""
    clip_negative: Annotated[float, Field(gt=1)] = 3.0
    """eps_neg_high: an absolute bound on the ratio where A < 0."""
    importance_cap: Cap | None = 2.0
    """C: as in every objective, but on."""


class GrpoLoss(PolicyLoss):
    """PPO's clip without a critic (arXiv 2402.03300, Eq. 3), on pi/mu: one ratio for everything that moved."""

    type: Literal["grpo"] = "grpo"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio is trusted down to 1 - clip_low."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """The ratio is trusted up to 1 + clip_high; DAPO (arXiv 2503.14476) takes 0.28."""


class GspoLoss(PolicyLoss):
    """Group sequence policy optimisation (arXiv 2507.18071, Eq. 13-14; LongCat-Flash-Thinking-2601, arXiv 2601.16725,
    Eq. 1): the ratio is the geometric mean over the response."""

    type: Literal["gspo"] = "gspo"
    reduction: Reduction = "response"
    """As in every objective; the paper's is response."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    """The mean ratio is trusted down to 1 - clip_low. The paper's values are for large models: a mean over few tokens
    strays further."""
    clip_high: Annotated[float, Field(gt=0)] = 4e-4
    """And up to 1 + clip_high."""


class CispoLoss(PolicyLoss):
    """Clipped importance weights (MiniMax-M1, arXiv 2506.13585, Eq. 4-5): every token keeps its gradient."""

    type: Literal["cispo"] = "cispo"
    ratio_cap: Cap = 5.0
    """The ratio is a weight (stop-gradient), cut here."""


class SampledEstimator(Config):
    """The divergence is judged by the token that was sampled: one number a token from the teacher."""

    type: Literal["sampled"] = "sampled"


class TopkEstimator(Config):
    """It is summed over what the teacher finds most likely, and judged by the sampled token where that is another: the
    same in the mean, with less noise."""

    type: Literal["topk"]
    support: Annotated[int, Field(gt=0)] = 32
    """The teacher's most likely tokens at a position. They take ``8 * support`` bytes a trained token."""
    decision_tokens: bool = True
    """Sum over the tokens with which the chat's markup ends a turn, a thought, or opens a call too, however unlikely
    they are to the teacher (arXiv 2607.07050)."""


class DistillLoss(Config):
    """Multi-teacher on-policy distillation (MiMo-V2-Flash, arXiv 2601.02780, Eq. 5-9)."""

    type: Literal["mopd"] = "mopd"
    estimator: Annotated[SampledEstimator | TopkEstimator, Field(discriminator="type")] = SampledEstimator()
    """Of the reverse KL to the teacher."""
    advantage_clip: Annotated[float, Field(gt=0)] = 5.0
    """The log-ratio to the teacher is cut to +- this."""
    gate_low: Annotated[float, Field(gt=0)] = 0.5
    """IcePop gate: a token with pi/mu below it carries no signal."""
    gate_high: Annotated[float, Field(gt=0)] = 2.0
    """IcePop gate: a token with pi/mu above it carries no signal."""


PolicyLossConfig = Annotated[DppoLoss | ClippedLoss | GrpoLoss | GspoLoss | CispoLoss, Field(discriminator="type")]
LossConfig = Annotated[PolicyLossConfig | DistillLoss, Field(discriminator="type")]
