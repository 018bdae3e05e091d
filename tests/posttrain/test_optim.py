"""AdamW and Muon: what goes where, what a step is, and that schedulers, checkpoints and trainers take both."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from experts.config import ColdStartConfig
from posttrain.config import dump, load
from posttrain.errors import ConfigError
from posttrain.model import Longcat2ForCausalLM
from posttrain.optim import MuonAdamW, make_optimizer
from posttrain.settings import AdamWConfig, MuonConfig, OptimizerSettings, TrainerConfig
from tests.model.longcat2_tiny import tiny, tokens
from tests.posttrain.small import copies, differing, make_trainer, sample

MUON = OptimizerSettings(lr=1e-2, weight_decay=0.1, optimizer=MuonConfig())
ADAMW = OptimizerSettings(lr=1e-2, weight_decay=0.1)
BOTH = pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])


def small(**changes: Any) -> Longcat2ForCausalLM:
    return tiny(num_layers=1, oe_split_num=1, n_routed_experts=2, **changes).train()


def backward(model: Longcat2ForCausalLM, seed: int = 0) -> Tensor:
    ids = tokens(4, 12, seed)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def learn(model: Longcat2ForCausalLM, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def muon_names(model: Longcat2ForCausalLM, config: OptimizerSettings) -> set[str]:
    names = {p: n for n, p in model.named_parameters()}
    groups = make_optimizer(model.named_parameters(), config).param_groups
    return {names[p] for g in groups if "stacked" in g for p in g["params"]}


# What goes where


def test_muon_has_the_hidden_matrices() -> None:
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    assert muon_names(small(), MUON) == {
        *(f"model.oe_embed_proj{t}.weight" for t in range(3)),
        *(f"model.layers.0.self_attn.{i}.{n}.weight" for i in range(2) for n in attention),
        *(f"model.layers.0.mlps.{i}.{n}_proj.weight" for i in range(2) for n in ("gate", "up", "down")),
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }


def test_adamw_has_the_rest_and_decays_matrices_only() -> None:
    model = small()
    names = {p: n for n, p in model.named_parameters()}
    groups = [g for g in make_optimizer(model.named_parameters(), MUON).param_groups if "stacked" not in g]
    by_decay = {g["weight_decay"]: {names[p] for p in g["params"]} for g in groups}
    assert by_decay == {
        0.1: {
            "model.embed_tokens.weight",
            *(f"model.oe_embed_tokens{t}.weight" for t in range(3)),
            "model.layers.0.mlp.router.classifier.weight",
            "lm_head.weight",
        },
        0.0: {n for n, p in model.named_parameters() if p.ndim == 1},
    }


@pytest.mark.parametrize(
    ("name", "shape", "muons"),
    [
        ("transformer.wte.weight", (9, 4), False),
        ("transformer.wpe.weight", (9, 4), False),
        ("model.layers.1.mlp.gate.weight", (9, 4), False),
        ("model.layers.1.mlp.gate_proj.weight", (9, 4), True),
        ("conv.weight", (2, 3, 4, 4), False),
        ("scale", (), False),
    ],
)
def test_names_of_other_families(name: str, shape: tuple[int, ...], muons: bool) -> None:
    (group,) = make_optimizer([(name, nn.Parameter(torch.ones(shape)))], MUON).param_groups
    assert ("stacked" in group) is muons


def test_exclude_is_a_choice() -> None:
    model = small()
    without = OptimizerSettings(optimizer=MuonConfig(exclude=(r"^(?!.*kv_b_proj)",)))
    assert muon_names(model, without) == {f"model.layers.0.self_attn.{i}.kv_b_proj.weight" for i in range(2)}


@BOTH
def test_what_is_frozen_is_in_no_group(config: OptimizerSettings) -> None:
    model = small()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    held = [p for g in make_optimizer(model.named_parameters(), config).param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for n, p in model.named_parameters() if "experts" not in n}
    assert len(held) == len({id(p) for p in held})


def test_rates_and_their_scales() -> None:
    model = small()
    scales = {"oe_embed_tokens": 5.0, r"tokens0": 2.0, "o_proj": 0.5}
    config = OptimizerSettings(lr=0.01, lr_scales=scales, optimizer=MuonConfig(matrix_lr=0.02))
    optimizer = make_optimizer(model.named_parameters(), config)
    rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    found = {n: rates[p] for n, p in model.named_parameters()}
    assert found["model.embed_tokens.weight"] == found["model.norm.weight"] == 0.01
    assert found["model.oe_embed_tokens0.weight"] == 0.01 * 10
    assert found["model.oe_embed_tokens1.weight"] == 0.01 * 5
    assert found["model.layers.0.mlp.experts.down_proj"] == 0.02
    assert found["model.layers.0.self_attn.1.o_proj.weight"] == 0.01


# What a step is


def orthogonal(m_RC: Tensor) -> Tensor:
    """Newton-Schulz, 5 iterations of x <- 3.4445 x + (-4.775 g + 2.0315 g g) x with g = x x^T
    (kellerjordan.github.io/posts/muon), rounded to bfloat16 where torch rounds: once a line."""
    x = (m_RC.T if m_RC.shape[0] > m_RC.shape[1] else m_RC).bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        inner = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, inner, x, beta=3.4445)
    return (x.T if m_RC.shape[0] > m_RC.shape[1] else x).float()


def by_hand(weight_RC: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Muon with Nesterov momentum 0.95 (an average, as torch keeps it) and the scale of Moonlight."""
    momentum_RC = torch.zeros_like(weight_RC)
    for gradient_RC in gradients:
        momentum_RC = momentum_RC.lerp(gradient_RC, 0.05)  # 0.95 m + 0.05 g
        update_RC = orthogonal(gradient_RC.lerp(momentum_RC, 0.95))
        weight_RC = weight_RC * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(weight_RC.shape)) * update_RC
    return weight_RC


def parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The matrices of one parameter, by hand."""
    if name == "experts.gate_up_proj":
        half = tensor.shape[1] // 2
        gates = {f"gate{n}": tensor[n, :half] for n in range(len(tensor))}
        return gates | {f"up{n}": tensor[n, half:] for n in range(len(tensor))}
    if name == "experts.down_proj":
        return {f"down{n}": tensor[n] for n in range(len(tensor))}
    return {name: tensor}


@pytest.mark.parametrize(
    ("name", "shape"),
    [("o_proj.weight", (6, 10)), ("experts.gate_up_proj", (3, 10, 8)), ("experts.down_proj", (3, 8, 5))],
)
def test_muon_by_hand(name: str, shape: tuple[int, ...]) -> None:
    """Three steps. Every gate, up and down matrix of a bank is one of its own."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    gradients = [torch.randn(shape) for _ in range(3)]
    expected = {
        part: by_hand(start, [parts(name, g)[part] for g in gradients], 1e-2, 0.1)
        for part, start in parts(name, weight.detach().clone()).items()
    }
    optimizer = make_optimizer([(name, weight)], MUON)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    for part, found in parts(name, weight.detach()).items():
        assert torch.allclose(found, expected[part], rtol=0, atol=1e-6), part


def test_a_step_of_muon_is_as_large_as_one_of_adamw() -> None:
    """Root mean square 0.2 of the rate, up to what the iteration leaves of the singular values (0.7 to 1.2)."""
    torch.manual_seed(0)
    for shape in ((64, 64), (4, 32, 96), (256, 16)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape)
        make_optimizer([("w", weight)], OptimizerSettings(lr=1.0, optimizer=MuonConfig())).step()
        assert 0.13 < weight.detach().square().mean().sqrt().item() < 0.25


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs_bit_for_bit(decay: float) -> None:
    """Decay is for matrices."""
    ours, plain = small(), small()
    matrices = {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": decay}
    others = {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    config = OptimizerSettings(lr=0.01, weight_decay=decay)
    learn(ours, make_optimizer(ours.named_parameters(), config), range(4))
    learn(plain, torch.optim.AdamW([matrices, others], lr=0.01, betas=(0.9, 0.95), fused=True), range(4))
    assert differing(copies(ours), copies(plain)) == set()


def test_scaled_rates_are_the_cold_starts_bit_for_bit() -> None:
    """As the cold start of ``configs/tiny`` grouped its parameters by itself."""
    ours, plain = small(), small()
    tables = [p for n, p in plain.named_parameters() if "oe_embed_tokens" in n]
    others = [p for n, p in plain.named_parameters() if "oe_embed_tokens" not in n]
    groups = [{"params": others, "lr": 0.003}, {"params": tables, "lr": 0.003 * 5.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    config = ColdStartConfig(lr=0.003, lr_scales={"oe_embed_tokens": 5.0})
    mine = make_optimizer(ours.named_parameters(), config)
    assert [(len(g["params"]), g["lr"]) for g in mine.param_groups] == [(len(g["params"]), g["lr"]) for g in groups]
    learn(ours, mine, range(4))
    learn(plain, optimizer, range(4))
    assert differing(copies(ours), copies(plain)) == set()


def test_adamws_part_beside_muon_is_torchs_bit_for_bit() -> None:
    torch.manual_seed(0)
    table, norm, matrix = torch.randn(9, 4), torch.randn(4), nn.Parameter(torch.randn(4, 4))
    ours, plain = ([nn.Parameter(t.clone()) for t in (table, norm)] for _ in range(2))
    named = zip(("embed_tokens.weight", "q.weight", "norm.weight"), (ours[0], matrix, ours[1]), strict=True)
    groups = [{"params": plain[:1], "weight_decay": 0.1}, {"params": plain[1:], "weight_decay": 0.0}]
    optimizers = [make_optimizer(named, MUON), torch.optim.AdamW(groups, 1e-2, (0.9, 0.95), fused=True)]
    for _ in range(4):
        for mine, theirs in zip(ours, plain, strict=True):
            mine.grad = torch.randn(mine.shape)
            theirs.grad = mine.grad.clone()
        matrix.grad = torch.randn(4, 4)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))


@BOTH
def test_without_a_gradient_nothing_moves(config: OptimizerSettings) -> None:
    """Neither by momentum nor by decay, and no state is made."""
    model = small()
    optimizer = make_optimizer(model.named_parameters(), config)
    backward(model)
    still = {"model.layers.0.mlp.experts.down_proj", "model.embed_tokens.weight", "model.norm.weight"}
    for name, parameter in model.named_parameters():
        if name in still:
            parameter.grad = None
    before = copies(model)
    optimizer.step()
    assert differing(before, copies(model)) == {n for n, _ in model.named_parameters()} - still
    assert all(p not in optimizer.state for n, p in model.named_parameters() if n in still)
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())
    after = copies(model)
    optimizer.step()
    assert differing(after, copies(model)) == set()


def test_the_closure_sees_gradients_and_its_loss_comes_back() -> None:
    model = small()
    before = copies(model)
    assert make_optimizer(model.named_parameters(), MUON).step(lambda: float(backward(model))) > 3.0
    assert differing(before, copies(model)) == {n for n, _ in model.named_parameters()}


# Schedulers, checkpoints, trainers


def test_a_schedule_scales_both_parts() -> None:
    model = small()
    config = OptimizerSettings(lr=0.01, optimizer=MuonConfig(matrix_lr=0.04))
    optimizer = make_optimizer(model.named_parameters(), config)
    schedule = LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    learn(model, optimizer, range(1))
    schedule.step()
    assert {g["lr"] for g in optimizer.param_groups} == {0.0}
    assert {g["initial_lr"] for g in optimizer.param_groups} == {0.01, 0.04}
    before = copies(model)
    learn(model, optimizer, range(1))
    assert differing(before, copies(model)) == set()


@BOTH
def test_a_resumed_run_goes_on_bit_for_bit(config: OptimizerSettings, tmp_path: Path) -> None:
    """By a file, read as transformers' Trainer reads it."""
    whole = small()
    optimizer = make_optimizer(whole.named_parameters(), config)
    learn(whole, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = small()
    second.load_state_dict(whole.state_dict())
    resumed = make_optimizer(second.named_parameters(), config)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    learn(whole, optimizer, range(3, 6))
    learn(second, resumed, range(3, 6))
    assert differing(copies(whole), copies(second)) == set()


def test_accelerate_prepares_it() -> None:
    plain, prepared = small(), small()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(prepared, make_optimizer(prepared.named_parameters(), MUON))
    learn(model, optimizer, range(3))
    learn(plain, make_optimizer(plain.named_parameters(), MUON), range(3))
    assert differing(copies(plain), copies(prepared)) == set()


@BOTH
def test_transformers_trainer_resumes_bit_for_bit(config: OptimizerSettings, tmp_path: Path) -> None:
    """Its cosine schedule, its clipping and its checkpoint in the middle, as in the cold start."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, warmup_steps=1, lr_scheduler_type="cosine", save_steps=2, use_cpu=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=1.0, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 10)]

    def train(model: Longcat2ForCausalLM, checkpoint: Path | None) -> dict[str, Tensor]:
        optimizer = make_optimizer(model.named_parameters(), config)
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))  # pyright: ignore[reportArgumentType]
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        assert {g["lr"] for g in optimizer.param_groups} == {0.0}
        return copies(model)

    whole, middle = train(small(), None), tmp_path / "checkpoint-2"
    # Read here: the trainer itself knows nothing of the bank's names on disk.
    half = Longcat2ForCausalLM.from_pretrained(middle)
    assert "model.layers.0.mlp.experts.down_proj" in differing(whole, copies(half))
    assert differing(whole, train(half, middle)) == set()


def test_the_trainer_steps_resumes_and_freezes_with_it() -> None:
    samples = [sample(f"g/{i}", 6 + i, (-1.0) ** i, seed=i) for i in range(5)]
    options: dict[str, Any] = {"optimizer": MuonConfig(), "weight_decay": 0.01, "freeze": ["embed_tokens"]}
    whole = make_trainer(tiny(), **options)
    assert isinstance(whole.optimizer.optimizer, MuonAdamW)  # pyright: ignore[reportAttributeAccessIssue]
    before = copies(whole.base)
    whole.step(samples, 5)
    assert not any(re.search("embed_tokens", n) for n in differing(before, copies(whole.base)))
    assert "model.layers.0.mlp.experts.gate_up_proj" in differing(before, copies(whole.base))
    second = make_trainer(tiny(seed=5), **options)
    second.restore(deepcopy(whole.state()))
    assert whole.step(samples, 5) == second.step(samples, 5)
    assert differing(copies(whole.base), copies(second.base)) == set()


@pytest.mark.parametrize("seed", range(2))
def test_muon_learns_as_fast_as_adamw(seed: int) -> None:
    """Sequences by heart, at one rate for both."""
    losses = {}
    for config in (OptimizerSettings(lr=1e-2), OptimizerSettings(lr=1e-2, optimizer=MuonConfig())):
        torch.manual_seed(seed)
        model = Longcat2ForCausalLM(small().config).train()
        optimizer = make_optimizer(model.named_parameters(), config)
        for _ in range(14):
            learn(model, optimizer, range(seed, seed + 1))
        losses[config.optimizer.type] = float(backward(model, seed))
    assert losses["muon"] <= losses["adamw"] < 0.4


# What a config may say


def read(text: str, tmp_path: Path, kind: type[OptimizerSettings] = TrainerConfig) -> OptimizerSettings:
    (tmp_path / "c.yaml").write_text(text)
    return load(kind, tmp_path / "c.yaml")


def test_both_configs_read_and_write_it(tmp_path: Path) -> None:
    text = "lr: 0.5\nbetas: [0.8, 0.9]\noptimizer: {type: muon, matrix_lr: 0.1, exclude: [head]}\n"
    for kind in (TrainerConfig, ColdStartConfig):
        config = read(text, tmp_path, kind)
        assert (config.lr, config.betas) == (0.5, (0.8, 0.9))
        assert config.optimizer == MuonConfig(matrix_lr=0.1, exclude=("head",))
        assert read(dump(config), tmp_path, kind) == config
    assert TrainerConfig().optimizer == ColdStartConfig().optimizer == AdamWConfig()
    assert (TrainerConfig().lr, ColdStartConfig().lr) == (1e-3, 3e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {type: sgd}", "unknown type 'sgd' for `optimizer`. Valid types: adamw, muon"),
        ("optimizer: {momentum: 0.9}", "`optimizer` needs the key `type`, one of: adamw, muon"),
        ("optimizer: {type: adamw, momentum: 0.9}", "unknown key `optimizer.momentum`"),
        ("optimizer: {type: muon, momentum: 1.0}", "`optimizer.momentum`"),
        ("optimizer: {type: muon, matrix_lr: 0}", "`optimizer.matrix_lr`"),
        ("lora: {rank: 4}\noptimizer: {type: muon}", "muon is for whole matrices; with lora use type: adamw"),
        (
            "optimizer: {type: muon}\nparallel: {type: fsdp, processes: 2}",
            "muon is for whole matrices, and parallel.type fsdp has them in parts; use type: adamw, or",
        ),
    ],
)
def test_mistakes_are_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        read(text, tmp_path)
