"""Liger's kernels in the real trainer: the same steps, with less kept for the gradient. By triton's interpreter.

This file is the program too that the interpreter runs, and what its ranks begin with: two gaps of the interpreter are
closed on import. It passes on a float as it is, for which kernels ask its type, and CUDA's rsqrt it does not know."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.activations import kept_per_token
from posttrain.errors import UserError
from posttrain.objective_settings import ClippedLoss, DppoLoss
from posttrain.prepare import use_liger
from posttrain.settings import FsdpConfig, LoraConfig, TrainerConfig
from tests.posttrain.test_memory import kept
from tests.posttrain.test_ranks import ODD, close, copied, taken, trainer_of
from tests.posttrain.tiny import make_model

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KL = DppoLoss(constant_length=8, kl=0.1, entropy=0.01)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a reference, which is a copy": ("qwen3", {"updates_per_batch": 2}),
    "packed and recomputed": ("llama", {"packed": True, "activations": "recompute"}),
    "adapters": ("qwen3", {"lora": LoraConfig(rank=4, alpha=8.0)}),
}
TOGETHER = "two ranks"
KEPT = [("qwen3", False), ("qwen3", True), ("llama", False)]

if INTERPRETED:
    import liger_kernel.ops.rms_norm as norms  # pyright: ignore[reportMissingTypeStubs]
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    converted: Any = interpreter._implicit_cvt

    def with_floats(arg: Any) -> Any:
        if not isinstance(arg, float):
            return converted(arg)
        return tl.tensor(interpreter.TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)

    setattr(interpreter, "_implicit_cvt", with_floats)  # noqa: B010
    setattr(norms, "rsqrt", lambda x: tl.rsqrt(x))  # noqa: B010  # looked up when it is interpreted


def compare(kind: str, **options: Any) -> None:
    """Metrics, gaps, moments and weights of three steps, of which one is of one sample."""
    with trainer_of(kind, KL, **options) as plain:
        wanted = taken(plain, ODD)
        state = copied(plain.state())
    with trainer_of(kind, KL, liger=True, **options) as fused:
        names = {type(m).__name__: m._get_name() for m in fused.base.modules()}
        assert {v for k, v in names.items() if k.endswith("RMSNorm")} == {"LigerRMSNorm"}
        assert {v for k, v in names.items() if k.endswith("MLP")} == {"LigerSwiGLUMLP"}
        close(taken(fused, ODD), wanted)
        close(copied(fused.state())["model"], state["model"])
        close(copied(fused.state())["optimizer"], state["optimizer"])
    others = {m._get_name() for m in make_model(kind).modules()}
    assert not any("Liger" in name for name in others), "a model that is made later"


def compare_ranks() -> None:
    """Several processes: one step of two in parts is that of one without."""
    with trainer_of("llama", ClippedLoss()) as plain:
        wanted, weights = taken(plain, ODD[:1]), copied(plain.weights())
    parts = FsdpConfig(type="fsdp", processes=2, timeout_s=240)
    with trainer_of("llama", ClippedLoss(), liger=True, parallel=parts) as fused:
        close(taken(fused, ODD[:1]), wanted)
        close(fused.weights(), weights)


def compare_kept(kind: str, half: bool) -> None:
    """Against the formula, and against what transformers' own layers keep."""
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 16}
    plain, fused = (make_model(kind, **shape).train() for _ in range(2))
    use_liger(fused, "cpu")
    ids = torch.randint(3, 60, (2, 24))
    bytes_of = [kept(model, ids, half) for model in (plain, fused)]
    width = 2 if half else 4
    formulas = [ids.numel() * kept_per_token(plain.config, width, 24, width, liger) for liger in (False, True)]
    assert all(0.8 < formula / real < 1.2 for formula, real in zip(formulas, bytes_of, strict=True))
    assert bytes_of[1] / bytes_of[0] == pytest.approx(formulas[1] / formulas[0], rel=0.08) and bytes_of[1] < bytes_of[0]


def interpreted(*case: str) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *case], env=environment, cwd=root, timeout=400, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "same"


needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")


@needs_liger
@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, TOGETHER])
def test_the_same_steps(case: str) -> None:
    interpreted(case)


@needs_liger
def test_what_is_kept() -> None:
    interpreted("kept")


def test_where_it_cannot_run() -> None:
    off = "set trainer.liger to false"
    with pytest.raises(UserError, match=f"its kernels are for GPUs, and this trains on the CPU: {off}"):
        use_liger(make_model("llama"), "cpu")
    with pytest.raises(ValueError, match="liger: compile fuses the same operations; set one of the two to false"):
        TrainerConfig(liger=True, compile=True)


@needs_liger
@pytest.mark.parametrize("kind", ["longcat2", "gpt2"])
def test_a_model_that_it_does_not_know_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"it has no kernels for models of type {kind}: set trainer.liger to false"):
        use_liger(make_model(kind), "cuda")


@needs_liger
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES)
def test_the_same_steps_on_a_gpu(case: str) -> None:
    kind, options = CASES[case]
    compare(kind, **({**options, "packed": False}))  # its kernel there wants half precision


if __name__ == "__main__":
    asked = sys.argv[1]
    if asked in CASES:
        compare(CASES[asked][0], **CASES[asked][1])
    elif asked == TOGETHER:
        compare_ranks()
    else:
        for kind, half in KEPT:
            compare_kept(kind, half)
    print("same")
