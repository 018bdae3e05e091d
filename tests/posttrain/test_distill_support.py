"""The estimator topk: what it adds up to by hand, and against the reverse KL over a small vocabulary, where every token
that might have been sampled is tried, weighted by its probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.objective import OnSupport, loss
from posttrain.objective_settings import DistillLoss, TopkEstimator
from tests.posttrain.objectives import ONE, logs, numbers, tokens

TOPK = DistillLoss(estimator=TopkEstimator(type="topk"))
OPEN: dict[str, Any] = {"advantage_clip": 100.0, "gate_low": 1e-9, "gate_high": 1e9}
EXACT = TOPK.model_copy(update=OPEN)
V = 6
LOGITS = numbers(0.3, -1.0, 0.8, 0.1, -0.4, -3.0)
TEACHER = logs(0.1, 0.2, 0.25, 0.15, 0.05, 0.25)
MU = torch.log_softmax(LOGITS + numbers(0.3, -0.2, 0.0, 0.1, -0.4, 0.5), 0)
SUPPORTS = [(2, 5), (0,), (1, 3, 4), tuple(range(V))]


def on(support: Sequence[int], logp_V: Tensor, teacher_V: Tensor, sampled: Tensor) -> OnSupport:
    """The same support for every sampled token, which is filled up by one place."""
    places = torch.tensor([*support, 0])
    there = torch.arange(len(places)) < len(support)
    n = len(sampled)
    return OnSupport(
        logp_V[places].expand(n, -1),
        teacher_V[places].expand(n, -1),
        there.expand(n, -1),
        (sampled[:, None] == torch.tensor(support)).any(1),
    )


def each(config: DistillLoss, support: Sequence[int], mu_V: Tensor = MU, teacher_V: Tensor = TEACHER) -> Tensor:
    """Gradient in the logits, [V, V], for each token that might have been sampled."""
    logits = LOGITS.clone().requires_grad_()
    logp_V = torch.log_softmax(logits, 0)
    found = []
    for y in range(V):
        held = on(support, logp_V, teacher_V, torch.tensor([y]))
        given = tokens(logp_V[[y]], mu_V[[y]], numbers(0), teacher_N=teacher_V[[y]], support=held)
        total, _, _ = loss(replace(given, pi_N=logp_V[[y]]), config, ONE)
        found.append(torch.autograd.grad(total, logits, retain_graph=True)[0])
    return torch.stack(found)


def exact(logits_V: Tensor = LOGITS, teacher_V: Tensor = TEACHER) -> Tensor:
    """Gradient of KL(pi || teacher), by autograd of the formula."""
    logits = logits_V.clone().requires_grad_()
    logp_V = torch.log_softmax(logits, 0)
    return torch.autograd.grad((logp_V.exp() * (logp_V - teacher_V)).sum(), logits)[0]


def test_three_tokens_by_hand() -> None:
    """One response of three tokens: a third each. The support has two tokens, the second row only one.

    token  pi   mu   w     teacher  in S  S: pi, teacher        -sum pi ln(teacher/pi) per ln pi
    0      .5   .5   1     .25      yes   .5, .25  .2, .4       .5 ln 2 = .346574   -.2 ln 2 = -.138629
    1      .1   .08  1.25  .2       no    .5, .5   (filled up)  0                   0;  its own -1.25 ln 2 = -.866434
    2      .4   .1   4     .5       no    .3, .3   .2, .1       gated
    """
    held = OnSupport(
        logs(0.5, 0.2, 0.5, 0.1, 0.3, 0.2).view(3, 2).requires_grad_(),
        logs(0.25, 0.4, 0.5, 0.9, 0.3, 0.1).view(3, 2),
        torch.tensor([[True, True], [True, False], [True, True]]),
        torch.tensor([True, False, False]),
    )
    given = tokens(
        logs(0.5, 0.1, 0.4), logs(0.5, 0.08, 0.1), torch.zeros(3), teacher_N=logs(0.25, 0.2, 0.5), support=held
    )
    total, stats, gated_N = loss(given, TOPK, ONE)
    by_pi, by_support = torch.autograd.grad(total, [given.pi_N, held.pi_NK])
    assert (3 * by_pi).tolist() == pytest.approx([0, -0.866434, 0], abs=1e-6)
    assert (3 * by_support).flatten().tolist() == pytest.approx([0.346574, -0.138629, 0, 0, 0, 0], abs=1e-6)
    assert by_pi[0] == by_pi[2] == 0 and not by_support[1:].any(), "exactly"
    value = 0.346574 * math.log(0.5) - 0.138629 * math.log(0.2) - 0.866434 * math.log(0.1)
    assert total.item() == pytest.approx(value / 3, abs=1e-6)
    assert gated_N.tolist() == [False, False, True]
    assert (stats["gated"], stats["tail"]) == (1, 2)
    assert stats["teacher_mass"] == pytest.approx(0.65 + 0.5 + 0.4)
    assert stats["student_mass"] == pytest.approx(0.7 + 0.5 + 0.5)


def test_over_the_whole_vocabulary_it_is_the_reverse_kl_whatever_was_sampled() -> None:
    for gradient in each(EXACT, range(V)):
        assert torch.allclose(gradient, exact(), atol=1e-12)
    assert exact().abs().max() > 0.1


@pytest.mark.parametrize("support", SUPPORTS)
def test_in_the_mean_over_what_the_engine_samples_it_is_the_reverse_kl(support: tuple[int, ...]) -> None:
    """Off policy too: the engine's distribution is another than the student's."""
    mean = (MU.exp()[:, None] * each(EXACT, support)).sum(0)
    assert torch.allclose(mean, exact(), atol=1e-12)


@pytest.mark.parametrize("support", SUPPORTS)
def test_clipped_the_mean_is_that_of_the_sampled_token(support: tuple[int, ...]) -> None:
    config = {**OPEN, "advantage_clip": 0.5}
    of_topk = (MU.exp()[:, None] * each(TOPK.model_copy(update=config), support)).sum(0)
    of_sampled = (MU.exp()[:, None] * each(DistillLoss(**config), support)).sum(0)
    assert torch.allclose(of_topk, of_sampled, atol=1e-12)
    assert (of_topk - exact()).abs().max() > 0.01, "something was clipped"


def test_it_has_less_noise_than_the_sampled_token() -> None:
    """Variance over what the student samples, summed over the logits."""

    def noise(config: DistillLoss, support: tuple[int, ...]) -> float:
        p_V = torch.softmax(LOGITS, 0)
        found = each(config, support, mu_V=p_V.log())
        return float((p_V[:, None] * (found - exact()).square()).sum())

    sampled = noise(DistillLoss(**OPEN), (0,))
    found = [noise(EXACT, support) for support in ((5,), (5, 2), (5, 2, 1), (5, 2, 1, 3), tuple(range(V)))]
    assert found == sorted(found, reverse=True) and found[0] < sampled
    assert found[3] < sampled / 2 and found[-1] < 1e-24


def test_a_gated_token_has_no_gradient_at_all() -> None:
    """w is 4 or 1/4 for every token: the sum over the support is as little trusted as the token."""
    logits = LOGITS.clone().requires_grad_()
    logp_V = torch.log_softmax(logits, 0)
    for shift in (math.log(4), -math.log(4)):
        held = on((2, 5), logp_V, TEACHER, torch.arange(V))
        given = tokens(logp_V, logp_V.detach() - shift, torch.zeros(V), teacher_N=TEACHER, support=held)
        total, stats, gated_N = loss(given, TOPK, ONE)
        (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
        assert not gradient.any() and gated_N.all() and stats["gated"] == V


def test_it_comes_to_rest_at_the_teacher_where_the_truncated_sum_does_not() -> None:
    """Descent on the exact mean: the truncated sum leaves the student 1/e of the teacher's mass on the support."""
    support = torch.tensor([2, 5])

    def truncated(logp_V: Tensor, teacher_V: Tensor) -> Tensor:
        return (logp_V.exp() * (logp_V - teacher_V))[support].sum()

    def ours(logp_V: Tensor, teacher_V: Tensor) -> Tensor:
        p_V, total = logp_V.detach().exp(), torch.zeros((), dtype=torch.float64)
        held = on(support.tolist(), logp_V, teacher_V, torch.arange(V))
        for y in range(V):
            one = OnSupport(*(t[[y]] for t in held))
            given = tokens(logp_V[[y]], logp_V[[y]].detach(), numbers(0), teacher_N=teacher_V[[y]], support=one)
            total = total + p_V[y] * loss(replace(given, pi_N=logp_V[[y]]), EXACT, ONE).total
        return total

    ends: list[Tensor] = []
    for term, steps, rate in ((truncated, 3000, 2.0), (ours, 200, 2.0)):
        logits = LOGITS.clone().requires_grad_()
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(term(torch.log_softmax(logits, 0), TEACHER), logits)
            logits = (logits - rate * gradient).detach().requires_grad_()
        ends.append(torch.log_softmax(logits.detach(), 0))
    drained, rested = ends
    assert float(drained[support].exp().sum()) == pytest.approx(0.5 / math.e, abs=1e-3)
    assert float((rested.exp() * (rested - TEACHER)).sum()) < 1e-6


def test_without_a_support_it_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the support of a teacher in every sample"):
        loss(tokens(logs(0.5), logs(0.5), numbers(0), teacher_N=logs(0.5)), TOPK, ONE)


def test_the_sampled_estimator_passes_over_a_support() -> None:
    given = tokens(logs(0.5), logs(0.5), numbers(0), teacher_N=logs(0.25))
    held = on((2, 5), LOGITS.log_softmax(0), TEACHER, torch.tensor([2]))
    assert loss(replace(given, support=held), DistillLoss(), ONE) == loss(given, DistillLoss(), ONE)
