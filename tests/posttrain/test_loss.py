"""The objectives, worked out by hand.

Numbers of the clipped loss are those of arXiv 2509.18883 Eq. 4 with clip_low 0.2, clip_high 0.28, clip_negative 3, C 2.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from posttrain.loss import clipped_loss, distill_loss
from posttrain.settings import ClippedLoss, DistillLoss

CLIPPED, MOPD = ClippedLoss(), DistillLoss()


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Clipped


def clipped(ratios: Tensor, weights: Tensor, advantages: Tensor) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient in log pi, stats at given pi/prox and prox/mu."""
    mu = numbers(*[-2.0] * len(ratios))
    prox = mu + weights.log()
    pi = (prox + ratios.log()).requires_grad_()
    loss, stats = clipped_loss(pi, prox, mu, advantages, CLIPPED)
    loss.backward()
    assert pi.grad is not None
    return loss.item(), pi.grad, stats


def test_clipped_six_tokens_by_hand() -> None:
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
    loss, gradient, stats = clipped(
        numbers(1.1, 1.5, 0.5, 2.0, 5.0, 0.5), numbers(1, 1, 1, 4, 1, 0.5), numbers(1, 1, -2, -1, -1, 1)
    )
    assert loss == pytest.approx(5.97)
    assert gradient.tolist() == pytest.approx([-1.1, 0.0, 0.0, 4.0, 0.0, -0.25])
    assert (stats["clipped"], stats["importance_capped"]) == (3, 1)
    # k3 of token 0 is 1.1 - 1 - ln 1.1; of token 3, whose pi/mu is 8, it is 8 - 1 - ln 8; and so on.
    assert stats["kl_behaviour"] == pytest.approx(sum(r - 1 - math.log(r) for r in (1.1, 1.5, 0.5, 8.0, 5.0, 0.25)))


def plain(pi: Tensor, prox: Tensor, mu: Tensor, advantages: Tensor) -> Tensor:
    """Eq. 4 token by token, written with ifs."""
    total = torch.zeros((), dtype=torch.float64)
    for p, x, m, a in zip(pi, prox, mu, advantages, strict=True):
        r, weight = torch.exp(p - x), min(math.exp(x - m), 2.0)
        if a > 0:
            term = r * a if r < 1.28 else 1.28 * a
        elif r < 0.8:
            term = 0.8 * a
        else:
            term = r * a if r < 3 else 3.0 * a
        total = total - weight * term
    return total


def test_clipped_equals_the_plain_formula_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(400, dtype=torch.float64, generator=generator) for _ in range(4)]
    mu, prox, advantages = -2 + draw[0], -2 + draw[0] + 0.7 * draw[1], draw[2]
    ours = (prox + draw[3]).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss, _ = clipped_loss(ours, prox, mu, advantages, CLIPPED)
    expected = plain(theirs, prox, mu, advantages)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item())
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)
    assert 50 < (ours.grad == 0).sum() < 350, "both sides of the clips must have been tried"


@pytest.mark.parametrize(
    ("advantage", "low", "high"),
    [(1.0, 0.0, 1.28), (-1.0, 0.8, 3.0)],
    ids=["A=+1: slope up to 1.28, then flat", "A=-1: flat below 0.8, slope to 3, flat above"],
)
def test_where_the_objective_slopes(advantage: float, low: float, high: float) -> None:
    """The outer max as printed would make A = +1 the constant 3."""
    ratios = numbers(*[0.01 * k + 0.005 for k in range(500)])
    ones = torch.ones_like(ratios)
    _, gradient, _ = clipped(ratios, ones, advantage * ones)
    slope = -gradient / ratios
    inside = (ratios > low) & (ratios < high)
    assert slope[inside].tolist() == pytest.approx([advantage] * int(inside.sum()))
    assert slope[~inside].abs().max() == 0
    values = [-clipped(r[None], ones[:1], advantage * ones[:1])[0] for r in ratios[::25]]
    assert all(a >= b - 1e-12 if advantage < 0 else a <= b + 1e-12 for a, b in pairwise(values))
    assert values[-1] == pytest.approx(advantage * high)


def test_importance_weight_is_cut_above_only_and_carries_no_gradient() -> None:
    mu = numbers(-2, -2, -2)
    prox = (mu + numbers(0.1, 1.9, 50).log()).requires_grad_()
    pi = prox.detach().clone().requires_grad_()
    loss, stats = clipped_loss(pi, prox.detach(), mu, numbers(1, 1, 1), CLIPPED)
    loss.backward()
    assert pi.grad is not None
    assert (-pi.grad).tolist() == pytest.approx([0.1, 1.9, 2.0])
    assert stats["importance_capped"] == 1
    # The weight itself: with pi held still, moving prox moves only the ratio's part, -w * A * (-r) = w at r = 1.
    attached, _ = clipped_loss(pi.detach(), prox, mu, numbers(1, 1, 1), CLIPPED)
    attached.backward()
    assert prox.grad is not None
    assert prox.grad.tolist() == pytest.approx([0.1, 1.9, 2.0])


def test_clipped_no_advantage_no_gradient_and_nothing_counted() -> None:
    loss, gradient, stats = clipped(numbers(0.2, 1.0, 7.0), numbers(1, 1, 1), numbers(0, 0, 0))
    assert loss == 0
    assert gradient.tolist() == [0, 0, 0]
    assert stats["clipped"] == 0


# Distillation


def distilled(
    pi: Tensor, mu: Tensor, teacher: Tensor, share: Tensor, config: DistillLoss = MOPD
) -> tuple[float, Tensor, dict[str, float]]:
    pi = pi.detach().clone().requires_grad_()
    loss, stats = distill_loss(pi, mu, teacher, share, config)
    loss.backward()
    assert pi.grad is not None
    return loss.item(), pi.grad, stats


def test_mopd_four_tokens_by_hand() -> None:
    """One response of four tokens, so the share is 1/4 for each, gated or not.

    token  pi    mu    pi/mu  teacher  A = ln T/pi       -share w A = gradient  loss = gradient * log pi
    0      .5    .5    1      .25      ln .5 = -0.6931   +0.173287              0.173287 * ln .5 = -0.120113
    1      .4    .5    0.8    .8       ln 2  =  0.6931   -0.138629             -0.138629 * ln .4 =  0.127025
    2      .8    .2    4      .9       gated              0                     0
    3      e-13  e-13  1      e-1      12, cut to 5      -1.25                 -1.25 * -13       = 16.25
    """
    pi = torch.cat([logs(0.5, 0.4, 0.8), numbers(-13)])
    mu = torch.cat([logs(0.5, 0.5, 0.2), numbers(-13)])
    teacher = torch.cat([logs(0.25, 0.8, 0.9), numbers(-1)])
    loss, gradient, stats = distilled(pi, mu, teacher, numbers(0.25, 0.25, 0.25, 0.25))
    assert gradient.tolist() == pytest.approx([0.173287, -0.138629, 0.0, -1.25], abs=1e-6)
    assert loss == pytest.approx(-0.120113 + 0.127025 + 16.25, abs=1e-6)
    assert (stats["gated"], stats["advantage_clipped"]) == (1, 1)
    assert stats["kl_teacher"] == pytest.approx(math.log(2) - math.log(2) - math.log(9 / 8) - 12)


def test_mopd_gates_outside_and_leaves_the_others_alone() -> None:
    """Ratios 0.49 and 2.01 are out; 0.51 and 1.99 weigh what they are, they are not cut to the band."""
    ratios = numbers(0.49, 0.51, 1.0, 1.99, 2.01)
    mu = numbers(*[-3.0] * 5)
    pi = mu + ratios.log()
    _, gradient, stats = distilled(pi, mu, pi + 1.0, numbers(*[0.2] * 5))
    assert (-gradient).tolist() == pytest.approx([0, 0.2 * 0.51, 0.2, 0.2 * 1.99, 0])
    assert stats["gated"] == 2


def test_mopd_share_does_not_shrink_when_others_are_gated() -> None:
    mu, teacher, share = numbers(-2, -2), numbers(-1, -1), numbers(0.5, 0.5)
    _, open_, _ = distilled(numbers(-2, -2), mu, teacher, share)
    _, gated, _ = distilled(numbers(-2, 0), mu, teacher, share)
    assert open_[0] == gated[0] == pytest.approx(-0.5)
    assert gated[1] == 0


@pytest.mark.parametrize("gap", [-20.0, -5.0, -1.5, 1.5, 5.0, 20.0])
def test_mopd_advantage_is_cut_at_five(gap: float) -> None:
    pi = numbers(-25.0)
    _, gradient, _ = distilled(pi, pi, pi + gap, numbers(1))
    assert (-gradient).item() == pytest.approx(max(-5.0, min(5.0, gap)))


def test_mopd_gradient_is_that_of_the_reverse_kl_and_the_direct_one_forgets_the_teacher() -> None:
    """Exact expectations over a vocabulary of five: every token once, weighted by its probability.

    The advantage with stop-gradient gives the gradient of KL(pi || teacher); differentiating log pi - log teacher
    itself gives sum_v pi_v grad log pi_v = 0, whoever the teacher is (mopd.md 1.1, trap a)."""
    logits = numbers(0.3, -1.0, 0.8, 0.1, -0.4).requires_grad_()
    pi = torch.log_softmax(logits, 0)
    mu = pi.detach()
    for teacher in (logs(0.1, 0.2, 0.3, 0.15, 0.25), logs(0.4, 0.3, 0.1, 0.1, 0.1)):
        (exact,) = torch.autograd.grad((pi.exp() * (pi - teacher)).sum(), logits, retain_graph=True)
        loss, _ = distill_loss(pi, mu, teacher, mu.exp(), MOPD)
        (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (direct,) = torch.autograd.grad((mu.exp() * (pi - teacher)).sum(), logits, retain_graph=True)
        assert torch.allclose(ours, exact, atol=1e-12)
        assert exact.abs().max() > 0.01
        assert direct.abs().max() < 1e-12


def test_mopd_student_equal_to_its_teacher_learns_nothing() -> None:
    pi = logs(0.2, 0.5, 0.9)
    loss, gradient, stats = distilled(pi, pi - 0.1, pi, numbers(1 / 3, 1 / 3, 1 / 3))
    assert (loss, gradient.tolist(), stats["kl_teacher"]) == (0, [0, 0, 0], 0)


# Both


def test_a_sum_over_parts_is_the_sum_over_the_whole() -> None:
    """Nothing in the losses is normalised by what happens to share a micro-batch."""
    generator = torch.Generator().manual_seed(1)
    pi, prox, mu, other = (torch.randn(12, dtype=torch.float64, generator=generator) * 0.3 - 2 for _ in range(4))
    share = torch.full((12,), 0.25, dtype=torch.float64)
    for cut in (1, 5, 11):
        parts = [slice(0, cut), slice(cut, 12)]
        whole = clipped_loss(pi, prox, mu, other + 2, CLIPPED)[0]
        assert sum(clipped_loss(pi[s], prox[s], mu[s], other[s] + 2, CLIPPED)[0] for s in parts) == pytest.approx(whole)
        whole = distill_loss(pi, mu, other, share, MOPD)[0]
        assert sum(distill_loss(pi[s], mu[s], other[s], share[s], MOPD)[0] for s in parts) == pytest.approx(whole)
