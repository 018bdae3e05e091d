"""The objectives, worked out by hand and against their formulas written token by token.

Where nothing else is said the reduction is a plain sum (constant, one rollout, T_max = 1), in double precision.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.objective import Extent, Stats, Tokens, loss, policy_terms
from posttrain.objective_settings import CispoLoss, ClippedLoss, DppoLoss, GrpoLoss, GspoLoss, PolicyLossConfig
from tests.posttrain.objectives import BARE, KINDS, ONE, learn, logs, numbers, tokens


def at_ratios(ratios: Tensor, advantages: Tensor, weights: Tensor | None = None) -> Tokens:
    """Tokens with these pi/prox and prox/mu."""
    mu = torch.full_like(ratios, -2.0)
    prox = mu if weights is None else mu + weights.log()
    return tokens(prox + ratios.log(), mu, advantages, prox=prox)


# Every objective by hand


def test_dppo_six_tokens() -> None:
    """
    token  A   pi    mu    pi/mu       pi - mu  masked          d loss / d log pi = -min(pi/mu, 2) A
    0     +1   .5    .4    1.25        +.1      no              -1.25
    1     +1   .7    .4    1.75        +.3      A > 0 and up     0
    2     -1   .1    .4    .25         -.3      A < 0 and down   0
    3     -1   .7    .4    1.75        +.3      no: other way   +1.75
    4     +2   .006  .001  6, cut to 2 +.005    no              -4
    5     +1   .1    .4    .25         -.3      no: other way   -0.25
    """
    pi, mu = logs(0.5, 0.7, 0.1, 0.7, 0.006, 0.1), logs(0.4, 0.4, 0.4, 0.4, 0.001, 0.4)
    total, gradient, stats = learn(DppoLoss(**BARE), tokens(pi, mu, numbers(1, 1, -1, -1, 2, 1)))
    assert gradient == pytest.approx([-1.25, 0, 0, 1.75, -4, -0.25])
    assert gradient[1] == gradient[2] == 0, "exactly"
    assert total == pytest.approx(sum(g * p for g, p in zip(gradient, pi.tolist(), strict=True)))
    assert (stats["dppo/masked"], stats["dppo/capped"]) == (2, 1)


def test_dppo_by_default_is_guarded_and_pulled() -> None:
    """
    token  A   pi   mu   what holds                            d loss / d log pi
    0     +1   .5   .4   nothing                               -1.25 + 0.002 ln 1.25
    1     +1   .7   .4   its own mask: the pull is left         0.002 ln 1.75
    2     +1   .06  .01  pi/mu = 6 is above 5: nothing is left  0
    3     +1   .3   .7   pi/mu = 3/7 is below 0.5: the same     0
    """
    given = tokens(logs(0.5, 0.7, 0.06, 0.3), logs(0.4, 0.4, 0.01, 0.7), numbers(1, 1, 1, 1))
    _, gradient, stats = learn(DppoLoss(constant_length=1), given)
    assert gradient == pytest.approx([-1.25 + 0.002 * math.log(1.25), 0.002 * math.log(1.75), 0, 0])
    assert gradient[2:] == [0, 0]
    assert (stats["token_masked"], stats["dppo/masked"], stats["gated"]) == (2, 1, 3)


def test_clipped_six_tokens() -> None:
    """
    token  A   r    prox/mu  weight  surrogate                            weight * surrogate  d loss / d log pi
    0     +1   1.1  1        1       min(1.1, 1.1)           =  1.1        1.1                -1.1
    1     +1   1.5  1        1       min(1.5, 1.28)          =  1.28       1.28                0 (flat)
    2     -2   0.5  1        1       min(-1, -1.6)           = -1.6       -1.6                 0 (flat)
    3     -1   2.0  4        2 (C)   max(min(-2, -1.28), -3) = -2         -4                  +2 * 2 = 4
    4     -1   5.0  1        1       max(min(-5, -1.28), -3) = -3         -3                   0 (flat)
    5     +1   0.5  0.5      0.5     min(0.5, 0.8)           =  0.5        0.25               -0.25
    The sum is -5.97, the loss 5.97.
    """
    ratios, weights = numbers(1.1, 1.5, 0.5, 2.0, 5.0, 0.5), numbers(1, 1, 1, 4, 1, 0.5)
    given = at_ratios(ratios, numbers(1, 1, -2, -1, -1, 1), weights)
    total, gradient, stats = learn(ClippedLoss(constant_length=1), given)
    assert total == pytest.approx(5.97)
    assert gradient == pytest.approx([-1.1, 0.0, 0.0, 4.0, 0.0, -0.25])
    assert [gradient[i] for i in (1, 2, 4)] == [0, 0, 0]
    assert (stats["clipped/clipped"], stats["importance_capped"]) == (3, 1)
    # k3 of token 0 is 1.1 - 1 - ln 1.1; of token 3, whose pi/mu is 8, it is 8 - 1 - ln 8; and so on.
    assert stats["kl_behaviour"] == pytest.approx(sum(r - 1 - math.log(r) for r in (1.1, 1.5, 0.5, 8.0, 5.0, 0.25)))


@pytest.mark.parametrize(
    ("advantage", "low", "high"),
    [(1.0, 0.0, 1.28), (-1.0, 0.8, 3.0)],
    ids=["A=+1: slope up to 1.28, then flat", "A=-1: flat below 0.8, slope to 3, flat above"],
)
def test_where_eq_4_slopes(advantage: float, low: float, high: float) -> None:
    """The outer max as printed would make A = +1 the constant 3."""
    ratios = numbers(*[0.01 * k + 0.005 for k in range(500)])
    config = ClippedLoss(constant_length=1)
    _, gradient, _ = learn(config, at_ratios(ratios, advantage * torch.ones_like(ratios)))
    slope = -numbers(*gradient) / ratios
    inside = (ratios > low) & (ratios < high)
    assert slope[inside].tolist() == pytest.approx([advantage] * int(inside.sum()))
    assert slope[~inside].abs().max() == 0
    values = [-learn(config, at_ratios(r[None], numbers(advantage)))[0] for r in ratios[::25]]
    assert all(a >= b - 1e-12 if advantage < 0 else a <= b + 1e-12 for a, b in pairwise(values))
    assert values[-1] == pytest.approx(advantage * high)


def test_grpo_four_tokens() -> None:
    """``min(r A, clip(r, 0.8, 1.2) A)``: flat above 1.2 with A > 0 and below 0.8 with A < 0, unbounded elsewhere."""
    ratios, advantages = numbers(1.5, 0.5, 0.5, 5.0), numbers(2, 2, -1, -1)
    total, gradient, stats = learn(GrpoLoss(**BARE), at_ratios(ratios, advantages))
    assert total == pytest.approx(-(1.2 * 2 + 0.5 * 2 - 0.8 - 5.0))
    assert gradient == pytest.approx([0, -1.0, 0, 5.0])
    assert gradient[0] == gradient[2] == 0
    assert stats["grpo/clipped"] == stats["gated"] == 2


GSPO = GspoLoss(clip_low=0.2, clip_high=0.3, reduction="response")


def test_gspo_two_responses() -> None:
    """
    response  A    pi/mu of its tokens  s                 min(s A, clip(s) A)     gradient of each token
    0        +1    2, 1/2 * 1.21        sqrt(1.21) = 1.1  1.1 (1.3 is the bound)  -1.1 / 2 tokens / 2 rollouts
    1        -2    1/8, 1, 1            1/2               -1.6 (flat)              0
    """
    ratios = numbers(2, 0.605, 1 / 8, 1, 1)
    mu = torch.full_like(ratios, -2.0)
    given = tokens(mu + ratios.log(), mu, numbers(1, 1, -2, -2, -2), rows=[0, 0, 1, 1, 1])
    total, gradient, stats = learn(GSPO, given, Extent(rollouts=2, tokens=5))
    assert total == pytest.approx(-(1.1 - 1.6) / 2)
    assert gradient == pytest.approx([-1.1 / 4, -1.1 / 4, 0, 0, 0])
    assert gradient[2:] == [0, 0, 0]
    assert stats["gspo/clipped"] == 3


def test_gspo_is_the_gradient_of_the_response_s_own_ratio_whatever_its_length() -> None:
    """(1/G) sum_i min(s_i A_i, clip(s_i) A_i) with s_i = exp(mean of log pi/mu), differentiated as it stands."""
    generator = torch.Generator().manual_seed(3)
    lengths, advantages = (1, 2, 7, 30), (1.0, -0.5, 0.7, -1.0)
    rows = [i for i, n in enumerate(lengths) for _ in range(n)]
    log_ratio = 0.3 * torch.randn(len(rows), dtype=torch.float64, generator=generator)
    mu = torch.full_like(log_ratio, -1.5)
    given = tokens(mu + log_ratio, mu, numbers(*[advantages[i] for i in rows]), rows=rows)
    _, gradient, _ = learn(GSPO, given, Extent(rollouts=4, tokens=len(rows)))
    pi = (mu + log_ratio).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i, a in enumerate(advantages):
        s = torch.exp(torch.stack([(pi - mu)[t] for t, row in enumerate(rows) if row == i]).sum() / lengths[i])
        total = total - torch.minimum(s * a, s.clamp(0.8, 1.3) * a) / 4
    total.backward()
    assert pi.grad is not None and gradient == pytest.approx(pi.grad.tolist())
    # Every token of a response twice: the ratio is the same, so is each response's share of the gradient.
    twice = tokens(mu.repeat(2) + log_ratio.repeat(2), mu.repeat(2), given.advantage_N.repeat(2), rows=rows * 2)
    _, doubled, _ = learn(GSPO, twice, Extent(rollouts=4, tokens=2 * len(rows)))
    assert [2 * g for g in doubled[: len(rows)]] == pytest.approx(gradient)


def test_cispo_keeps_the_gradient_of_every_token() -> None:
    """-min(r, 5) A, however far the token has moved."""
    ratios, advantages = numbers(0.1, 1.0, 4.0, 50.0), numbers(1, -1, -2, 1)
    _, gradient, stats = learn(CispoLoss(**BARE), at_ratios(ratios, advantages))
    assert gradient == pytest.approx([-0.1, 1.0, 8.0, -5.0])
    assert (stats["cispo/capped"], stats["gated"]) == (1, 0)


# Corrections: all of them with pi = prox, so that only prox/mu is away from 1

GAPS = numbers(0.25, 1.0, 3.0, 1.01, 1.02, 0.99)
"""prox/mu of two responses of three tokens: means .75^(1/3) = .909 and 1.0198^(1/3) = 1.0066; products .75, 1.0198."""


@pytest.mark.parametrize(
    ("correction", "weights", "counted"),
    [
        ({}, [0.25, 1.0, 3.0, 1.01, 1.02, 0.99], {}),
        ({"importance_cap": 2.0}, [0.25, 1.0, 2.0, 1.01, 1.02, 0.99], {"importance_capped": 1}),
        ({"token_band": (0.5, 2.0)}, [0, 1.0, 0, 1.01, 1.02, 0.99], {"token_masked": 2}),
        ({"sequence_band": (0.98, 1.02)}, [0, 0, 0, 1.01, 1.02, 0.99], {"sequence_masked": 3}),
        ({"sequence_band": (0.9, 1.002)}, [0.25, 1.0, 3.0, 0, 0, 0], {"sequence_masked": 3}),
        ({"sequence_cap": 1.0}, [0.25, 1.0, 3.0, 0, 0, 0], {"sequence_masked": 3}),
        ({"sequence_cap": 0.7}, [0, 0, 0, 0, 0, 0], {"sequence_masked": 6}),
        # HisPO with delta_seq 0.1 and delta_tok 0.5.
        (
            {"token_band": (0.5, 1.5), "sequence_band": (0.9, 1.1)},
            [0, 1.0, 0, 1.01, 1.02, 0.99],
            {"token_masked": 2, "sequence_masked": 0},
        ),
        # delta_seq 0.05: the whole first response falls, also its token of ratio 1.
        (
            {"token_band": (0.5, 1.5), "sequence_band": (0.95, 1.05)},
            [0, 0, 0, 1.01, 1.02, 0.99],
            {"token_masked": 2, "sequence_masked": 3},
        ),
    ],
    ids=["off", "TIS", "IcePop", "geometric low", "geometric high", "MIS", "MIS all", "HisPO token", "HisPO both"],
)
def test_what_a_correction_leaves(correction: dict[str, Any], weights: list[float], counted: Stats) -> None:
    """Gradient -A weight with A = 2; masked tokens exactly 0, the pull too."""
    mu = torch.full_like(GAPS, -2.0)
    config = CispoLoss(**{**BARE, **correction, "pull": 0.1})
    given = tokens(mu + GAPS.log(), mu, 2 * torch.ones_like(mu), rows=[0, 0, 0, 1, 1, 1])
    _, gradient, stats = learn(config, given)
    pull = [0.2 * math.log(g) if w else 0.0 for g, w in zip(GAPS.tolist(), weights, strict=True)]
    assert gradient == pytest.approx([p - 2 * w for p, w in zip(pull, weights, strict=True)])
    assert [g == 0 for g in gradient] == [w == 0 for w in weights]
    assert {k: stats[k] for k in stats if k.endswith("masked") or k.startswith("importance")} == counted


def test_the_importance_weight_is_cut_above_only_and_carries_no_gradient() -> None:
    mu = numbers(-2, -2, -2)
    prox = (mu + numbers(0.1, 1.9, 50).log()).requires_grad_()
    given = tokens(prox, mu, numbers(1, 1, 1), prox=prox)
    total, stats, _ = loss(given, ClippedLoss(constant_length=1), ONE)
    total.backward()
    assert given.pi_N.grad is not None and prox.grad is None
    assert (-given.pi_N.grad).tolist() == pytest.approx([0.1, 1.9, 2.0])
    assert stats["importance_capped"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_token_has_no_gradient_even_where_its_ratio_overflows(kind: type[GrpoLoss]) -> None:
    """pi/mu = e^900 is infinite; infinity times 0 would be no number."""
    config = kind(**{**BARE, "token_band": (0.5, 2.0), "pull": 0.1, "importance_cap": None})
    _, gradient, stats = learn(config, tokens(numbers(-0.1, -0.1), numbers(-900, -0.1), numbers(-1, -1), [0, 1]))
    assert gradient == pytest.approx([0, 1]) and gradient[0] == 0
    assert all(math.isfinite(v) for v in stats.values())


# Against the formulas, token by token


def plain(config: PolicyLossConfig, t: Tokens) -> Tensor:
    """Sum of the terms, with ifs."""
    rows, total = t.row_N.tolist(), torch.zeros((), dtype=torch.float64)
    gap = (t.prox_N - t.mu_N).tolist()
    whole = [p - m for p, m in zip(t.pi_N.tolist(), t.mu_N.tolist(), strict=True)]
    moved = [p - x for p, x in zip(t.pi_N.tolist(), t.prox_N.tolist(), strict=True)]
    for n, (pi, mu, a) in enumerate(zip(t.pi_N, t.mu_N.tolist(), t.advantage_N.tolist(), strict=True)):
        own = [m for m, row in enumerate(rows) if row == rows[n]]
        product = math.exp(sum(gap[m] for m in own))
        kept = config.token_band is None or config.token_band[0] <= math.exp(gap[n]) <= config.token_band[1]
        if config.sequence_band is not None:
            kept &= config.sequence_band[0] <= product ** (1 / len(own)) <= config.sequence_band[1]
        kept &= config.sequence_cap is None or product <= config.sequence_cap
        if kept:
            split = config.importance_cap
            weight = 1.0 if split is None else min(math.exp(gap[n]), split)
            logs_of = whole if split is None else moved
            if isinstance(config, GspoLoss):
                mean = sum(logs_of[m] for m in own) / len(own)
                r = math.exp(mean) * torch.exp(pi - pi.item())
            else:
                r = torch.exp(pi - (pi.item() - logs_of[n]))
            total = total - weight * _plain_surrogate(config, r, pi, mu, a) + config.pull * (pi - mu) ** 2
        if t.reference_N is not None:
            total = total + config.kl * (pi - t.reference_N[n]) ** 2 / 2
        total = total - config.entropy * t.entropy_N[n]
    return total


def _plain_surrogate(config: PolicyLossConfig, r: Tensor, pi: Tensor, mu: float, a: float) -> Tensor:
    if isinstance(config, DppoLoss | CispoLoss):
        up = math.exp(pi.item()) - math.exp(mu)
        if isinstance(config, DppoLoss) and (up > config.delta if a > 0 else -up > config.delta):
            return 0 * pi
        return min(r.item(), config.ratio_cap) * a * pi
    if a > 0:
        return r * a if r < 1 + config.clip_high else numbers(1 + config.clip_high)[0] * a
    if r < 1 - config.clip_low:
        return numbers(1 - config.clip_low)[0] * a
    dual = isinstance(config, ClippedLoss) and r > config.clip_negative
    return numbers(config.clip_negative)[0] * a if isinstance(config, ClippedLoss) and dual else r * a


CORRECTIONS: dict[str, dict[str, Any]] = {
    "off": {"importance_cap": None},
    "TIS": {"importance_cap": 1.5},
    "IcePop": {"importance_cap": None, "token_band": (0.6, 1.6)},
    "sequence": {"sequence_band": (0.8, 1.25), "sequence_cap": 2.0},
    "HisPO": {"importance_cap": None, "token_band": (0.5, 1.5), "sequence_band": (0.9, 1.1)},
}


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_plain_formula(kind: type[GrpoLoss], correction: str) -> None:
    """120 tokens in 30 responses, every term on."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(120, dtype=torch.float64, generator=generator) for _ in range(5)]
    mu = -1 - draw[0].abs()
    prox = mu + 0.4 * draw[1]
    given = tokens(
        (prox + 0.9 * draw[3]).clamp_max(-0.01), mu, draw[2], [n // 4 for n in range(120)],
        prox=prox, reference_N=mu + draw[4], entropy=draw[4].abs(),
    )  # fmt: skip
    config = kind(**{**BARE, "pull": 0.02, "kl": 0.03, "entropy": 0.04, **CORRECTIONS[correction]})
    total, gradient, stats = learn(config, given)
    expected = plain(config, given)
    (theirs,) = torch.autograd.grad(expected, given.pi_N)
    assert total == pytest.approx(expected.item())
    assert gradient == pytest.approx(theirs.tolist(), abs=1e-12)
    bounds = [v for k, v in stats.items() if k.endswith(("masked", "clipped", "capped"))]
    assert bounds and all(0 < v < 120 for v in bounds), "both sides of every bound must have been tried"


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_all_are_reinforce(kind: type[GrpoLoss], correction: str) -> None:
    """pi = prox = mu: the gradient in log pi is -A, whatever else is on but kl and entropy."""
    pi, advantages = logs(0.1, 0.5, 0.9, 0.01), numbers(1, -2, 0.5, 0)
    config = kind(**{**BARE, **CORRECTIONS[correction], "pull": 0.5})
    _, gradient, stats = learn(config, tokens(pi, pi, advantages, [0, 0, 1, 1]))
    assert gradient == pytest.approx([-1, 2, -0.5, 0])
    assert not any(v for k, v in stats.items() if k.endswith(("masked", "clipped", "capped")))


@pytest.mark.parametrize("kind", KINDS)
def test_no_advantage_no_gradient_and_nothing_clipped(kind: type[GrpoLoss]) -> None:
    _, gradient, stats = learn(kind(**BARE), at_ratios(numbers(0.2, 1.0, 7.0), numbers(0, 0, 0)))
    assert gradient == [0, 0, 0]
    assert not any(v for k, v in stats.items() if k.endswith(("/masked", "/clipped")))


def test_kl_and_entropy_of_one_token_by_hand() -> None:
    """pi .5, ref .25: 0.1 * (ln 2)^2 / 2, gradient 0.1 ln 2; minus 0.2 * an entropy of 3. k3: 1/2 - 1 + ln 2."""
    given = tokens(logs(0.5), logs(0.5), numbers(0), reference_N=logs(0.25), entropy=numbers(3))
    total, gradient, stats = learn(GrpoLoss(**BARE, kl=0.1, entropy=0.2), given)
    assert total == pytest.approx(0.1 * math.log(2) ** 2 / 2 - 0.6)
    assert gradient == pytest.approx([0.1 * math.log(2)])
    assert stats["kl_reference"] == pytest.approx(0.5 - 1 + math.log(2))
    with pytest.raises(ValueError, match="reference"):
        learn(GrpoLoss(kl=0.1), tokens(logs(0.5), logs(0.5), numbers(0)))


def test_the_kl_term_is_the_gradient_of_the_kl() -> None:
    """Exact expectation over a vocabulary of five: every token once, weighted by its probability."""
    logits = numbers(0.3, -1.0, 0.8, 0.1, -0.4).requires_grad_()
    reference = logs(0.1, 0.2, 0.3, 0.15, 0.25)
    pi = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((pi.exp() * (pi - reference)).sum(), logits, retain_graph=True)
    given = Tokens(
        pi_N=pi, prox_N=pi.detach(), mu_N=pi.detach(), advantage_N=torch.zeros(5), row_N=torch.arange(5),
        entropy_N=torch.zeros(5), reference_N=reference,
    )  # fmt: skip
    terms, _, _ = policy_terms(given, GrpoLoss(kl=1.0))
    (ours,) = torch.autograd.grad((pi.exp().detach() * terms).sum(), logits)
    assert torch.allclose(ours, exact, atol=1e-12) and exact.abs().max() > 0.01
