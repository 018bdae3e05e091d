"""The distillation objective, worked out by hand. One response, unless rows are given."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.objective import Stats, Tokens, distill_terms
from posttrain.objective_settings import DistillLoss
from tests.posttrain.objectives import learn, logs, numbers, tokens

MOPD = DistillLoss()


def distilled(pi: Tensor, mu: Tensor, teacher: Tensor) -> tuple[float, list[float], Stats]:
    return learn(MOPD, tokens(pi, mu, torch.zeros_like(pi), teacher_N=teacher))


def test_four_tokens_by_hand() -> None:
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
    loss, gradient, stats = distilled(pi, mu, teacher)
    assert gradient == pytest.approx([0.173287, -0.138629, 0.0, -1.25], abs=1e-6)
    assert gradient[2] == 0
    assert loss == pytest.approx(-0.120113 + 0.127025 + 16.25, abs=1e-6)
    assert (stats["gated"], stats["advantage_clipped"]) == (1, 1)
    assert stats["kl_teacher"] == pytest.approx(math.log(2) - math.log(2) - math.log(9 / 8) - 12)
    assert stats["loss/response"] == loss


def test_gates_outside_and_leaves_the_others_alone() -> None:
    """Ratios 0.49 and 2.01 are out; 0.51 and 1.99 weigh what they are, they are not cut to the band."""
    mu = numbers(*[-3.0] * 5)
    pi = mu + numbers(0.49, 0.51, 1.0, 1.99, 2.01).log()
    _, gradient, stats = distilled(pi, mu, pi + 1.0)
    assert [-g for g in gradient] == pytest.approx([0, 0.2 * 0.51, 0.2, 0.2 * 1.99, 0])
    assert stats["gated"] == 2


def test_the_share_does_not_shrink_when_others_are_gated() -> None:
    mu, teacher = numbers(-2, -2), numbers(-1, -1)
    _, open_, _ = distilled(numbers(-2, -2), mu, teacher)
    _, gated, _ = distilled(numbers(-2, 0), mu, teacher)
    assert open_[0] == gated[0] == pytest.approx(-0.5)
    assert gated[1] == 0


@pytest.mark.parametrize("gap", [-20.0, -5.0, -1.5, 1.5, 5.0, 20.0])
def test_the_advantage_is_cut_at_five(gap: float) -> None:
    pi = numbers(-25.0)
    _, (gradient,), _ = distilled(pi, pi, pi + gap)
    assert -gradient == pytest.approx(max(-5.0, min(5.0, gap)))


def test_the_gradient_is_that_of_the_reverse_kl_and_the_direct_one_forgets_the_teacher() -> None:
    """Exact expectations over a vocabulary of five: every token once, weighted by its probability.

    The advantage with stop-gradient gives the gradient of KL(pi || teacher); differentiating log pi - log teacher
    itself gives sum_v pi_v grad log pi_v = 0, whoever the teacher is."""
    logits = numbers(0.3, -1.0, 0.8, 0.1, -0.4).requires_grad_()
    pi = torch.log_softmax(logits, 0)
    mu = pi.detach()
    for teacher in (logs(0.1, 0.2, 0.3, 0.15, 0.25), logs(0.4, 0.3, 0.1, 0.1, 0.1)):
        (exact,) = torch.autograd.grad((pi.exp() * (pi - teacher)).sum(), logits, retain_graph=True)
        given = Tokens(
            pi_N=pi, prox_N=mu, mu_N=mu, advantage_N=torch.zeros(5), row_N=torch.zeros(5, dtype=torch.long),
            entropy_N=torch.zeros(5), teacher_N=teacher,
        )  # fmt: skip
        terms_N, _, _ = distill_terms(given, MOPD)
        (ours,) = torch.autograd.grad((mu.exp() * terms_N).sum(), logits, retain_graph=True)
        (direct,) = torch.autograd.grad((mu.exp() * (pi - teacher)).sum(), logits, retain_graph=True)
        assert torch.allclose(ours, exact, atol=1e-12)
        assert exact.abs().max() > 0.01
        assert direct.abs().max() < 1e-12


def test_a_student_equal_to_its_teacher_learns_nothing() -> None:
    pi = logs(0.2, 0.5, 0.9)
    loss, gradient, stats = distilled(pi, pi - 0.1, pi)
    assert (loss, gradient, stats["kl_teacher"]) == (0, [0, 0, 0], 0)


def test_without_a_teacher_it_is_refused() -> None:
    with pytest.raises(ValueError, match="needs teacher log-probs"):
        learn(MOPD, tokens(logs(0.5), logs(0.5), numbers(0)))
