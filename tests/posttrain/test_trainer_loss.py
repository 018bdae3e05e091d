"""What a step hands to the optimizer: denominators, whatever the packing, and the terms beside the advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.model import Longcat2ForCausalLM
from posttrain.objective_settings import (
    CispoLoss,
    ClippedLoss,
    DistillLoss,
    DppoLoss,
    GrpoLoss,
    GspoLoss,
    LossConfig,
    Reduction,
    TopkEstimator,
)
from posttrain.settings import LoraConfig
from posttrain.types import Sample, Support
from tests.model.longcat2_tiny import tiny
from tests.posttrain.small import make_trainer, plain_logprobs, sample

LORA = LoraConfig(rank=4, alpha=8.0)
SAMPLES = [sample(f"g/{i}", 6 + i, (-1.0) ** i, seed=i) for i in range(5)]


@pytest.fixture(autouse=True)
def _same_adapters() -> None:
    torch.manual_seed(0)


pytestmark = pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step",  # where a test looks at gradients instead of stepping
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft's call
)


def gradients(samples: Sequence[Sample], rollouts: int, **options: Any) -> dict[str, Tensor]:
    """What one step would hand to the optimizer."""
    trainer = make_trainer(max_grad_norm=1e9, **options)
    found: dict[str, Tensor] = {}
    # After clipping, before the step.
    trainer.optimizer.step = lambda: found.update(  # pyright: ignore[reportAttributeAccessIssue]
        {n: p.grad.clone() for n, p in trainer.base.named_parameters() if p.grad is not None}
    )
    trainer.step(samples, rollouts)
    return found


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert any(bool(g.any()) for g in a.values()), "nothing is compared"
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6), name


# Denominators


@pytest.mark.parametrize("reduction", ["constant", "token", "response"])
@pytest.mark.parametrize("kind", [DppoLoss, ClippedLoss, GrpoLoss, GspoLoss, CispoLoss])
def test_neither_micro_batches_nor_padding_nor_silent_samples_change_the_gradient(
    kind: type[DppoLoss] | type[ClippedLoss] | type[GrpoLoss] | type[GspoLoss] | type[CispoLoss], reduction: Reduction
) -> None:
    """With every term on, and bands within which only a part of tokens and responses falls."""
    _unchanged_by_packing(
        kind(
            reduction=reduction, constant_length=8, token_band=(0.05, 20.0), sequence_band=(0.1, 2.0), pull=0.01,
            kl=0.05, entropy=0.01,
        )
    )  # fmt: skip


TOPK = DistillLoss(estimator=TopkEstimator(type="topk"), gate_low=1e-6, gate_high=1e6)


@pytest.mark.parametrize("loss", [DistillLoss(gate_low=1e-6, gate_high=1e6), TOPK], ids=["sampled", "topk"])
def test_nor_that_of_the_distillation(loss: DistillLoss) -> None:
    _unchanged_by_packing(loss)


def support(rows: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> Support:
    ids, values = np.array(rows, "<i4"), np.array(logprobs, "<f4")
    return Support(ids=ids.tobytes(), logprobs=values.tobytes(), width=ids.shape[1])


def named(s: Sample, width: int) -> Support:
    """Every trained token's own id, every other time, and those after it; the last row is not full."""
    rows = [[(i + t % 2 + k) % 61 for k in range(width)] for t, i in enumerate(s.ids) if t >= 3]
    rows[-1][-1] = -1
    return support(rows, [[-1.0 - 0.3 * k for k in range(width)] for _ in rows])


def _unchanged_by_packing(loss: LossConfig) -> None:
    judged = [replace(s, teacher_logprobs=tuple(-1.0 - 0.1 * t for t in range(len(s.ids)))) for s in SAMPLES]
    judged = [replace(s, teacher_support=named(s, 3 + i % 2)) for i, s in enumerate(judged)] if loss is TOPK else judged
    together = gradients(judged, 5, loss=loss, tokens_per_micro_batch=10_000)
    assert max(g.abs().max() for g in together.values()) > 1e-3
    close(together, gradients(judged, 5, loss=loss, tokens_per_micro_batch=1))
    close(together, gradients(judged[::-1], 5, loss=loss, tokens_per_micro_batch=20))
    # A long sample without a trained token pads nothing away and is not part of the mean.
    nothing = Support(ids=b"", logprobs=b"", width=3)
    silent = sample("g/9", 40, sampled=(False,) * 40, teacher_logprobs=(0.0,) * 40, teacher_support=nothing)
    close(together, gradients([*judged, silent], 5, loss=loss, tokens_per_micro_batch=10_000))


def test_nor_the_metrics() -> None:
    loss = GspoLoss(token_band=(0.05, 20.0), sequence_band=(0.1, 2.0))
    whole = make_trainer(loss=loss, tokens_per_micro_batch=10_000).step(SAMPLES, 5)
    split = make_trainer(loss=loss, tokens_per_micro_batch=1).step(SAMPLES, 5)
    assert split == pytest.approx(whole, rel=1e-4)
    assert 0 < whole["ess_sequences"] < 1 and 0 < whole["ess_tokens"] < 1
    assert 0 < whole["token_masked"] < 1 and 0 < whole["sequence_masked"] < 1
    assert "loss/response" in whole and "gspo/clipped" in whole


def test_the_clipped_denominator_is_rollouts_times_the_constant_length() -> None:
    """Twice the rollouts or twice T_max: half of the gradient. The lengths themselves do not matter."""
    whole = gradients(SAMPLES, 5, loss=ClippedLoss(constant_length=8))
    half = {k: g / 2 for k, g in whole.items()}
    close(half, gradients(SAMPLES, 10, loss=ClippedLoss(constant_length=8)))
    close(half, gradients(SAMPLES, 5, loss=ClippedLoss(constant_length=16)))
    split = [gradients([s], 5, loss=ClippedLoss(constant_length=8)) for s in SAMPLES]
    close(whole, {k: sum((g[k] for g in split), torch.zeros(())) for k in whole})


def test_the_token_denominator_is_the_number_of_trained_tokens_of_the_step() -> None:
    """Rollouts do not matter; the sum of both alone, each times its share of the 3 + 6 tokens, is the whole."""
    loss = GrpoLoss(reduction="token")
    both = gradients([SAMPLES[0], SAMPLES[3]], 2, loss=loss)
    close(both, gradients([SAMPLES[0], SAMPLES[3]], 7, loss=loss))
    three, six = (gradients([s], 1, loss=loss) for s in (SAMPLES[0], SAMPLES[3]))
    close(both, {k: three[k] * 3 / 9 + six[k] * 6 / 9 for k in both})


def test_the_response_denominator_is_its_own_length_then_rollouts() -> None:
    constant, response = GrpoLoss(constant_length=1), GrpoLoss(reduction="response")
    both = gradients([SAMPLES[0], SAMPLES[3]], 4, loss=response)
    three, six = (gradients([s], 1, loss=constant) for s in (SAMPLES[0], SAMPLES[3]))
    close(both, {k: (three[k] / 3 + six[k] / 6) / 4 for k in both})


def test_the_distillation_denominator_is_each_response_s_own_length_then_rollouts() -> None:
    loss = DistillLoss(gate_low=1e-9, gate_high=1e9)
    both = [replace(s, teacher_logprobs=(-1.0,) * len(s.ids)) for s in (SAMPLES[0], SAMPLES[3])]
    together = gradients(both, 2, loss=loss)
    one, other = (gradients([s], 1, loss=loss) for s in both)
    close(together, {k: (one[k] + other[k]) / 2 for k in together})


@pytest.mark.parametrize("way", ["in chunks", "from logits"])
def test_topk_over_the_whole_vocabulary_is_the_reverse_kl(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient of the mean over responses of the mean of KL(pi || teacher) over the tokens of each."""
    if way == "from logits":
        monkeypatch.setattr("posttrain.trainer.plain_head", lambda model: None)
    teacher = tiny(seed=7)
    judged: list[Sample] = []
    for s in SILENT:
        rows = [p.tolist() for p in torch.log_softmax(_logits(teacher, s), -1)[2:-1].detach()]
        whole = support([range(len(rows[0]))] * len(rows), rows)
        given = (0.0,) * 3 + tuple(row[i] for row, i in zip(rows, s.ids[3:], strict=True))
        judged.append(replace(s, teacher_logprobs=given, teacher_support=whole))
    exact = TOPK.model_copy(update={"advantage_clip": 100.0})
    ours = gradients(judged, 2, loss=exact)
    model = tiny()
    model.train()
    model.freeze_idle()
    for s in SILENT:
        logp_TV, teacher_TV = (torch.log_softmax(_logits(m, s), -1)[2:-1] for m in (model, teacher))
        ((logp_TV.exp() * (logp_TV - teacher_TV.detach())).sum(-1).mean() / 2).backward()
    close(ours, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert max(g.abs().max() for g in ours.values()) > 1e-2


def _logits(model: Longcat2ForCausalLM, s: Sample) -> Tensor:
    return model(input_ids=torch.tensor([s.ids]), use_cache=False).logits[0].float()


def test_topk_says_how_much_of_both_policies_it_sums_over() -> None:
    """Over 30 of 61 tokens, once with every sampled token in it and once with none."""
    model = tiny()
    logp_TV = torch.log_softmax(_logits(model, SAMPLES[0]), -1)[2:-1].detach()
    for there in (True, False):
        rows = [[(i + 2 * k + (not there)) % 61 for k in range(30)] for i in SAMPLES[0].ids[3:]]
        mass = float(torch.gather(logp_TV, 1, torch.tensor(rows)).exp().sum(1).mean())
        said = replace(
            SAMPLES[0], teacher_logprobs=(-1.0,) * 6, teacher_support=support(rows, [[math.log(0.02)] * 30] * 3)
        )
        stats = make_trainer(loss=TOPK).step([said], 1)
        assert stats["student_mass"] == pytest.approx(mass, rel=1e-4)
        assert stats["teacher_mass"] == pytest.approx(0.6, rel=1e-4)
        assert stats["tail"] == (not there)


def test_distillation_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="needs teacher log-probs"):
        make_trainer(loss=DistillLoss()).step(SAMPLES, 5)


# Terms beside the advantages


def quiet(*, kl: float = 0.0, entropy: float = 0.0) -> GrpoLoss:
    """Without advantages (see SILENT) only these terms are left."""
    return GrpoLoss(constant_length=1, kl=kl, entropy=entropy)


SILENT = [replace(s, advantages=(0.0,) * len(s.ids)) for s in SAMPLES[:2]]


def by_hand(model: Longcat2ForCausalLM, term: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradient of the sum of ``term(log-probs of the whole vocabulary, of the token)`` over SILENT's 3 + 4 tokens."""
    model.train()
    model.freeze_idle()
    total = torch.zeros(())
    for s in SILENT:
        logp_TV = torch.log_softmax(model(input_ids=torch.tensor([s.ids]), use_cache=False).logits[0].float(), -1)
        for t in range(3, len(s.ids)):
            total = total + term(logp_TV[t - 1], logp_TV[t - 1, s.ids[t]])
    total.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_the_entropy_term_raises_the_entropy_as_the_formula_says() -> None:
    """Loss -0.3 * sum of entropies over 2 rollouts."""
    ours = gradients(SILENT, 2, loss=quiet(entropy=0.3))
    close(ours, by_hand(tiny(), lambda logp_V, _: 0.3 / 2 * (logp_V.exp() * logp_V).sum()))
    assert max(g.abs().max() for g in ours.values()) > 1e-2
    trainer = make_trainer(loss=quiet(entropy=0.3))
    first, second = (trainer.step(SILENT, 2)["entropy"] for _ in range(2))
    assert second > first


def test_without_an_entropy_term_nothing_has_a_gradient() -> None:
    assert all(not g.any() for g in gradients(SILENT, 2, loss=quiet()).values())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_kl_term_starts_at_nothing_and_pulls_back_to_the_start(lora: LoraConfig | None) -> None:
    """After a step by advantages, the silent loss 0.4 * 1/2 (log pi/ref)^2 goes down towards the stage's start."""
    trainer = make_trainer(loss=GrpoLoss(constant_length=1, kl=0.4), lora=lora, lr=3e-3)
    assert trainer.step(SILENT, 2)["grad_norm"] == pytest.approx(0, abs=1e-5), "pi is ref"
    trainer.step(SAMPLES[:2], 2)
    trainer.step(SAMPLES[:2], 2)
    found = [trainer.step(SILENT, 2)["kl_reference"] for _ in range(8)]
    assert found[0] > 1e-4
    assert found[-1] < 0.7 * found[0]


def test_the_kl_term_is_the_formula_against_a_frozen_start() -> None:
    """A restored trainer is given the stage's start and the moved weights: gradient of 0.4 / 2 * 1/2 (log pi/ref)^2."""
    start, moved = tiny(), tiny(seed=5)
    ids = [s.ids for s in SILENT]
    reference = torch.cat([torch.tensor(plain_logprobs(start, i)[3:]) for i in ids])
    trainer = make_trainer(start, loss=quiet(kl=0.4), max_grad_norm=1e9)
    trainer.base.load_state_dict(moved.state_dict())
    found: dict[str, Tensor] = {}
    trainer.optimizer.step = lambda: found.update(  # pyright: ignore[reportAttributeAccessIssue]
        {n: p.grad.clone() for n, p in trainer.base.named_parameters() if p.grad is not None}
    )
    trainer.step(SILENT, 2)
    place = iter(reference)
    close(found, by_hand(moved, lambda _, logp: 0.4 / 2 * (logp - next(place)) ** 2 / 2))
    assert max(g.abs().max() for g in found.values()) > 1e-2
