"""Two processes, the same seed, everything switched on: the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import hashlib, json, sys, torch
from posttrain.objective_settings import ClippedLoss
from posttrain.settings import TrainerConfig
from posttrain.trainer import Trainer
from posttrain.types import Sample
from tests.model.longcat2_tiny import LSA, MTP, tiny, tokens

signals = dict(moe_target_topk=3, router_bias_update_rate=0.01, router_aux_loss_coef=0.01, z_loss_coef=1e-4)
model = tiny(seed=1, **LSA, **MTP, mtp_loss_coef=0.1, indexer_loss_coef=1.0, **signals)
deterministic = sys.argv[1] == "yes"
trainer = Trainer(model, TrainerConfig(threads=2, deterministic=deterministic), ClippedLoss(), 4)
losses = []
for step in range(4):
    samples = []
    for i in range(6):
        ids = tuple(tokens(1, 20 + 3 * i, seed=10 * step + i)[0].tolist())
        n = len(ids)
        samples.append(Sample(
            rollout=f"{step}/{i}", domain="d", ids=ids, sampled=(False,) * 5 + (True,) * (n - 5),
            logprobs=(-4.0,) * n, advantages=((-1.0) ** i,) * n,
        ))
    losses.append(trainer.step(samples, 6))
digest = hashlib.sha256()
for name, tensor in sorted(model.state_dict().items()):
    digest.update(name.encode() + tensor.numpy().tobytes())
asked = torch.are_deterministic_algorithms_enabled()
print(json.dumps({"losses": losses, "weights": digest.hexdigest(), "asked": asked}))
"""


def _run(deterministic: str) -> dict:
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, deterministic],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
def test_two_runs_give_the_same_losses_and_weights_bit_for_bit() -> None:
    first, second = _run("yes"), _run("yes")
    assert first["asked"] and first == second
    assert all(step["tokens"] > 0 and step["aux_loss"] > 0 and step["grad_norm"] > 0 for step in first["losses"])
    assert not _run("no")["asked"]
