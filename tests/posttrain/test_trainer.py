"""Steps of a tiny longcat2 model: what moves, what does not, and that it repeats bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor
from transformers import AutoModelForCausalLM

from posttrain import trainer as trainer_module
from posttrain.errors import UserError
from posttrain.files import save_state
from posttrain.objective import Loss, Tokens, loss
from posttrain.objective_settings import ClippedLoss
from posttrain.settings import LoraConfig, TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Sample
from posttrain.weights import read_into, state_of
from tests.model.longcat2_tiny import tiny, tokens
from tests.posttrain.small import copies, differing, make_trainer, plain_logprobs, sample
from tests.posttrain.tiny import VOCAB, make_model

LORA = LoraConfig(rank=4, alpha=8.0)
SAMPLES = [sample(f"g/{i}", 6 + i, (-1.0) ** i, seed=i) for i in range(5)]


@pytest.fixture(autouse=True)
def _same_adapters() -> None:
    torch.manual_seed(0)


pytestmark = pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step",  # where a test looks at gradients instead of stepping
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft's call
)


# What a step does


def test_a_step_changes_weights_and_lowers_the_loss() -> None:
    trainer = make_trainer()
    before, ids = copies(trainer.base), SAMPLES[0].ids
    start = sum(plain_logprobs(trainer.base, ids)[3:])
    stats = trainer.step([SAMPLES[0]], 1)
    assert "lm_head.weight" in differing(before, copies(trainer.base))
    assert sum(plain_logprobs(trainer.base, ids)[3:]) > start, "advantage +1 makes its tokens likelier"
    assert stats["tokens"] == 3 and stats["grad_norm"] > 0


@pytest.mark.parametrize("samples", [[], [replace(SAMPLES[0], sampled=(False,) * 6)]], ids=["none", "untrained"])
def test_without_trained_tokens_nothing_moves(samples: list[Sample]) -> None:
    """Momentum from the step before and weight decay must not move the weights either."""
    trainer = make_trainer(weight_decay=0.1)
    trainer.step(SAMPLES, 5)
    before, schedule = copies(trainer.base), trainer.schedule.state_dict()
    stats = trainer.step(samples, 3)
    assert differing(before, copies(trainer.base)) == set()
    assert trainer.schedule.state_dict()["last_epoch"] == schedule["last_epoch"]
    assert (stats["tokens"], stats["grad_norm"]) == (0, 0)


def test_a_token_at_position_0_alone_is_no_trained_token() -> None:
    trainer = make_trainer()
    before = copies(trainer.base)
    trainer.step([replace(SAMPLES[0], sampled=(True, *(False,) * 5))], 1)
    assert differing(before, copies(trainer.base)) == set()


def test_logprobs_equal_a_plain_forward_of_each_sequence() -> None:
    """``gap_abs`` is the mean |trainer - behaviour|: behaviour log-probs from unpadded single forwards make it 0."""
    model = tiny()
    exact = [replace(s, logprobs=tuple(plain_logprobs(model, s.ids))) for s in SAMPLES]
    assert make_trainer(model).step(exact, 5)["gap_abs"] < 1e-5
    shifted = [replace(s, logprobs=tuple(p - 0.25 for p in s.logprobs)) for s in exact]
    stats = make_trainer().step(shifted, 5)
    assert stats["gap_abs"] == pytest.approx(0.25, abs=1e-5)
    assert stats["tokens"] == sum(len(s.ids) - 3 for s in SAMPLES)


def test_entropy_is_that_of_the_whole_distribution() -> None:
    model, one = tiny(), SAMPLES[0]
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([one.ids])).logits[0, 2:-1]
    expected = torch.distributions.Categorical(logits=logits_TV).entropy().mean().item()
    assert make_trainer(model).step([one], 1)["entropy"] == pytest.approx(expected, rel=1e-5)


def test_masked_tokens_get_exactly_no_gradient() -> None:
    """The logits at t speak of token t + 1; only where that one is trained may they have a gradient."""
    trainer = make_trainer(tokens_per_micro_batch=10_000)
    seen: list[Tensor] = []

    def keep(_module: object, _args: object, output: Any) -> None:
        output.logits.retain_grad()
        seen.append(output.logits)

    trainer.base.register_forward_hook(keep)
    trained = (False, False, True, True, False, False, True, False, True, False)
    gap = replace(SAMPLES[4], sampled=trained, advantages=(1.0,) * 10)
    trainer.step([gap, SAMPLES[0]], 2)
    (logits_BTV,) = seen
    assert logits_BTV.grad is not None
    touched_BT = logits_BTV.grad.abs().sum(-1) != 0
    assert touched_BT[0].tolist() == [*gap.sampled[1:], False]
    assert touched_BT[1].tolist() == [False, False, True, True, True, False, False, False, False, False]


# The optimizer


def test_two_updates_a_batch_use_the_log_probs_from_before_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio of the second update is to the policy that the step started with."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(tokens: Tokens, *rest: Any) -> Loss:
        seen.append((tokens.pi_N.detach().clone(), tokens.prox_N.clone()))
        return loss(tokens, *rest)

    monkeypatch.setattr(trainer_module.objective, "loss", spy)
    trainer = make_trainer(updates_per_batch=2)
    # Samples are dealt out in the order of their rollouts: 0, 2, 4 first, then 1, 3; longest first in a micro-batch.
    known = [torch.tensor(plain_logprobs(trainer.base, s.ids)[3:]) for s in SAMPLES]
    start = [torch.cat([known[i] for i in part]) for part in ((4, 2, 0), (3, 1))]
    trainer.step(SAMPLES, 5)
    (pi_1, prox_1), (pi_2, prox_2) = seen
    assert torch.allclose(prox_1, start[0], atol=1e-5) and torch.allclose(pi_1, prox_1, atol=1e-6)
    assert torch.allclose(prox_2, start[1], atol=1e-5)
    assert (pi_2 - prox_2).abs().max() > 1e-3
    assert trainer.schedule.state_dict()["last_epoch"] == 2


def test_a_gradient_that_is_not_finite_raises_before_the_step() -> None:
    trainer = make_trainer()
    trainer.version = 7
    before = copies(trainer.base)
    with pytest.raises(FloatingPointError, match="nan at version 7"):
        trainer.step([replace(SAMPLES[0], advantages=(float("nan"),) * 6)], 1)
    assert differing(before, copies(trainer.base)) == set()
    assert trainer.optimizer.state_dict()["state"] == {}


def test_frozen_patterns_stay_and_the_rest_moves() -> None:
    trainer = make_trainer(freeze=["embed", r"layers\.0\."], weight_decay=0.1)
    before = copies(trainer.base)
    trainer.step(SAMPLES, 5)
    moved = differing(before, copies(trainer.base))
    assert not any("embed" in n or "layers.0." in n for n in moved)
    assert {"lm_head.weight", "model.norm.weight"} <= moved and any("layers.1." in n for n in moved)


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    """lr 1, warmup 1, 4 steps: (1/2, 1, 1, ...) times (1, .775, .55, .325, .1)."""
    trainer = make_trainer(lr=1.0, warmup_steps=1, steps=4)
    rates = [trainer.schedule.get_last_lr()[0]]
    for _ in range(4):
        rates.append(trainer.step(SAMPLES[:1], 1)["lr"])
    assert rates == pytest.approx([0.5, 0.775, 0.55, 0.325, 0.1])


@pytest.mark.parametrize("kind", ["longcat2", "llama"])
def test_what_is_computed_again_gives_the_same_step_and_is_not_kept(kind: str) -> None:
    def stepped(how: Any) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
        config = TrainerConfig(lr=1e-3, warmup_steps=0, decay=False, activations=how)
        trainer = Trainer(make_model(kind), config, ClippedLoss(), 1)
        own = {p.untyped_storage().data_ptr() for p in trainer.base.parameters()}
        kept: dict[int, Tensor] = {}  # and with it its address, which nothing else gets meanwhile

        def pack(tensor: Tensor) -> Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in own:
                kept[place] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stats = trainer.step(SAMPLES, 5)
        state = {k: v.clone() for k, v in trainer.weights().items()}
        trainer.close()
        return stats, state, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    (want, whole, most), (got, again, few) = stepped("keep"), stepped("recompute")
    assert got == pytest.approx(want, rel=1e-6)
    assert all(torch.allclose(again[name], tensor, atol=1e-7) for name, tensor in whole.items())
    assert 0 < few < most / 4
    stats, offloaded, fewest = stepped("offload")
    assert stats == pytest.approx(got, rel=1e-6)
    assert all(torch.allclose(offloaded[name], tensor, atol=1e-7) for name, tensor in again.items())
    # On a CPU what enters the layers is in the host's memory as it is.
    assert fewest < few if torch.cuda.is_available() else fewest == few


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"share_prompts": True}, {"packed": True}, {"activations": "recompute"}, {"mixed_precision": "bf16"}],
)
def test_side_by_side_a_step_is_the_same_bit_for_bit(kind: str, changes: dict[str, Any]) -> None:
    def steps(at_once: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        given: Any = {"lr": 1e-3, "warmup_steps": 0, "tokens_per_micro_batch": 16, **changes}
        torch.manual_seed(0)
        trainer = Trainer(make_model(kind), TrainerConfig(**given, micro_batches_at_once=at_once), ClippedLoss(), 3)
        stats = [trainer.step(SAMPLES, 5) for _ in range(3)]
        state = {k: v.clone() for k, v in trainer.weights().items()}
        trainer.close()
        return stats, state

    (want, alone), (got, beside) = steps(1), steps(3)
    assert got == want
    assert all(torch.equal(beside[name], tensor) for name, tensor in alone.items())


def test_what_is_wrong_side_by_side_is_raised() -> None:
    trainer = Trainer(make_model("llama"), TrainerConfig(micro_batches_at_once=2), ClippedLoss(), 1)
    broken = [replace(s, ids=(VOCAB, *s.ids[1:])) for s in SAMPLES]
    with pytest.raises(IndexError):
        trainer.step(broken, 5)
    trainer.close()


def test_what_cannot_be_side_by_side_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.micro_batches_at_once: models of type longcat2 count"):
        make_trainer(micro_batches_at_once=2)
    with pytest.raises(ValueError, match=r"micro_batches_at_once: adapters change a layer while it runs"):
        TrainerConfig(micro_batches_at_once=2, lora=LoraConfig(rank=2))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"share_prompts": True}, {"share_prompts": True, "micro_batches_at_once": 2}])
def test_a_compiled_trainer_steps_as_a_plain_one(changes: dict[str, Any]) -> None:
    """Two steps of other shapes, so that the second is not what was compiled first."""

    def steps(compiled: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        given: Any = {"lr": 1e-3, "warmup_steps": 0, "decay": False, "tokens_per_micro_batch": 16, **changes}
        trainer = Trainer(make_model("llama"), TrainerConfig(**given, compile=compiled), ClippedLoss(), 2)
        stats = [trainer.step([s for s in SAMPLES if len(s.ids) < most], 5) for most in (1000, 8)]
        state = {k: v.clone() for k, v in trainer.weights().items()}
        trainer.close()
        return stats, state

    (plain, want), (compiled, got) = steps(False), steps(True)
    for a, b in zip(plain, compiled, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    assert all(torch.allclose(got[name], tensor, atol=1e-5) for name, tensor in want.items())
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_and_in_bf16_micro_batches_side_by_side_do_not_wait_for_each_other() -> None:
    """Casts that torch remembers wait for Python under a lock, for which whoever compiles waited: it hung."""

    def steps(at_once: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        given: Any = {"lr": 1e-3, "warmup_steps": 0, "tokens_per_micro_batch": 16}
        config = TrainerConfig(**given, compile=True, mixed_precision="bf16", micro_batches_at_once=at_once)
        trainer = Trainer(make_model("llama", num_hidden_layers=1), config, ClippedLoss(), 2)
        stats = [trainer.step(SAMPLES, 5) for _ in range(2)]
        state = {k: v.clone() for k, v in trainer.weights().items()}
        trainer.close()
        return stats, state

    (beside, got), (want, alone) = steps(3), steps(1)
    torch.compiler.reset()
    assert beside == want
    assert all(torch.equal(got[name], tensor) for name, tensor in alone.items())


def test_a_model_that_chooses_as_it_goes_is_not_compiled() -> None:
    with pytest.raises(UserError, match=r"trainer.compile: models of type longcat2"):
        make_trainer(compile=True)


def test_without_a_compiler_nothing_is_compiled() -> None:
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(
            UserError, match=r"^trainer\.compile: torch finds no C\+\+ compiler to do it with: install g\+\+"
        ),
    ):
        Trainer(make_model("llama"), TrainerConfig(compile=True), ClippedLoss(), 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compile": True}, r"compile: is for one process; set it to false, or parallel\.type to none"),
        ({"share_prompts": True}, r"share_prompts: is for one process; set it to false"),
        ({"micro_batches_at_once": 2}, r"micro_batches_at_once: is for one process; set it to 1"),
        ({"parallel": {"type": "ddp", "processes": 2, "devices": [3, 3]}}, r"\[3, 3\] for 2 processes; give each one"),
        ({"parallel": {"type": "ddp", "processes": 2, "devices": [3]}}, r"\[3\] for 2 processes; give each one"),
        ({"parallel": {"type": "fsdp", "processes": 1}}, "greater than or equal to 2"),
    ],
)
def test_what_several_processes_do_not_have_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainerConfig(**{"parallel": {"type": "fsdp", "processes": 2}, **options})


# Weights out


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_published_weights_arrive_byte_for_byte(lora: LoraConfig | None) -> None:
    trainer, other = make_trainer(lora=lora), tiny(seed=1)
    try:
        for version in (0, 1, 2):
            weights = trainer.publish()
            assert weights.version == version and weights.where.startswith("shm:")
            read_into(other, weights.where)
            assert differing({k: v.clone() for k, v in trainer.weights().items()}, state_of(other)) == set()
            trainer.step(SAMPLES, 5)
            trainer.version += 1
        assert differing({k: v.clone() for k, v in trainer.weights().items()}, state_of(other)) != set()
    finally:
        trainer.close()
    trainer.close()


def test_lora_publishes_what_merging_gives_and_leaves_the_base_alone() -> None:
    start = copies(tiny())
    trainer = make_trainer(lora=LORA)
    for _ in range(2):
        trainer.step(SAMPLES, 5)
    published = {k: v.clone() for k, v in trainer.weights().items()}
    inside = {k.replace(".base_layer.", "."): v for k, v in trainer.base.state_dict().items() if ".lora_" not in k}
    assert differing(start, inside) == set(), "training and publishing only touch the adapters"
    merged = copies(trainer.base_model())
    changed = differing(start, merged)
    assert any("q_a_proj" in n for n in changed) and "model.embed_tokens.weight" not in changed
    assert published.keys() == state_of(tiny()).keys()
    for name, tensor in published.items():
        assert torch.allclose(tensor, merged[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_saved_and_loaded_gives_the_same_logits(lora: LoraConfig | None, tmp_path: Path) -> None:
    trainer, ids = make_trainer(lora=lora), tokens(2, 9, low=3)
    trainer.step(SAMPLES, 5)
    with torch.no_grad():
        trained = trainer.model(input_ids=ids).logits
        start = tiny()(input_ids=ids).logits
        trainer.save(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=ids).logits
    assert torch.allclose(trained, loaded, atol=0 if lora is None else 1e-5)
    assert not torch.allclose(start, loaded, atol=1e-3)


# Again


def train(trainer: Trainer, steps: Sequence[int]) -> list[dict[str, float]]:
    out: list[dict[str, float]] = []
    for step in steps:
        out.append(trainer.step([sample(f"g/{i}", 6 + i, (-1.0) ** i, seed=10 * step + i) for i in range(4)], 4))
        trainer.version += 1
    return out


@pytest.mark.parametrize("options", [{}, {"lora": LORA}, {"updates_per_batch": 2}], ids=["full", "lora", "two updates"])
def test_three_and_three_steps_are_six(options: dict[str, Any], tmp_path: Path) -> None:
    whole = make_trainer(weight_decay=0.01, **options)
    stats = train(whole, range(6))
    torch.manual_seed(0)  # adapters start at random
    first = make_trainer(weight_decay=0.01, **options)
    train(first, range(3))
    save_state({"trainer": first.state(), "finished": [1, 2]}, tmp_path / "deep" / "state.pt")
    torch.manual_seed(99)
    second = make_trainer(tiny(seed=5), weight_decay=0.01, **options)
    second.restore(torch.load(tmp_path / "deep" / "state.pt", weights_only=True)["trainer"])
    assert second.version == 3
    assert train(second, range(3, 6)) == stats[3:]
    assert differing(copies(whole.base), copies(second.base)) == set()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["state.pt"]


def test_a_resumed_trainer_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    """Dropout of an adapter and the like: numbers that are drawn after the checkpoint go on where they were."""
    torch.manual_seed(1)
    trainer = make_trainer()
    train(trainer, range(1))
    torch.rand(3)
    save_state(trainer.state(), tmp_path / "state.pt")
    drawn = torch.rand(5)
    torch.manual_seed(2)
    again = make_trainer()
    again.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.rand(5), drawn)


def test_two_identical_runs_are_bitwise_equal() -> None:
    one, two = make_trainer(), make_trainer()
    assert train(one, range(3)) == train(two, range(3))
    assert differing(copies(one.base), copies(two.base)) == set()
