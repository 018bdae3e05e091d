"""The one way to an optimizer: AdamW, or Muon for the hidden matrices and AdamW for the rest.

What Muon takes for a matrix: a 2-D parameter, and in a bank [N, R, C] of experts each of the N; where gate and up rows
lie in one tensor, each half. What is not hidden (embeddings, heads, routers) is named in ``MuonConfig.exclude``.
torch iterates in bfloat16; on a CPU that has none, Muon made the tiny cold start 1.7 times as long.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from posttrain.settings import MuonConfig, OptimizerSettings


def make_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerSettings) -> Optimizer:
    """An optimizer of those that require a gradient: a group for each set of equal settings, in order of appearance."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            settings = _settings(name, parameter, config)
            group = groups.setdefault(tuple(settings.items()), {"params": [], **settings})
            group["params"].append(parameter)
    if isinstance(config.optimizer, MuonConfig):
        return MuonAdamW(groups.values())
    return AdamW(groups.values(), fused=True)


def _settings(name: str, parameter: Tensor, config: OptimizerSettings) -> dict[str, Any]:
    scale = math.prod(factor for pattern, factor in config.lr_scales.items() if re.search(pattern, name))
    decay = config.weight_decay if parameter.ndim > 1 else 0.0
    muon = config.optimizer
    if isinstance(muon, MuonConfig) and hidden_matrices(name, parameter, muon):
        return {
            "lr": (muon.matrix_lr or config.lr) * scale,
            "weight_decay": decay,
            "momentum": muon.momentum,
            "ns_steps": muon.ns_steps,
            "adjust_lr_fn": "match_rms_adamw",
            "stacked": 2 if parameter.ndim == 3 and name.endswith("gate_up_proj") else 1,
        }
    return {"lr": config.lr * scale, "weight_decay": decay, "betas": config.betas, "fused": True}


def rate_of(warmup_steps: int, decay: bool, total: int) -> Callable[[int], float]:
    """Factor on the peak rate at an optimizer step of ``total``: a rise from 0, then a fall to a tenth."""

    def rate(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        return rise * (1 - 0.9 * min(1.0, step / total)) if decay else rise

    return rate


def hidden_matrices(name: str, parameter: Tensor, muon: MuonConfig) -> bool:
    """Whether the parameter of this name is Muon's."""
    return parameter.ndim in (2, 3) and not any(re.search(pattern, name) for pattern in muon.exclude)


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` on the groups that say how many matrices are ``stacked`` in one, AdamW on the others.

    To schedulers, checkpoints and Accelerate it is one optimizer over the model's own parameters; the state of Muon is
    one ``momentum_buffer`` of the parameter's shape. The two optimizers that do the work live for the length of a step
    and own nothing, so whatever replaces groups, state or storage between steps (``load_state_dict`` does) is seen.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; parameters without a gradient stay as they are. Returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "stacked" in group:
                self._muon(group)
            else:
                adamw = AdamW([{**group}])
                adamw.state = self.state
                adamw.step()
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        views: list[Tensor] = []
        state: dict[Tensor, Any] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            own = self.state[parameter]
            if not own:
                own["momentum_buffer"] = torch.zeros_like(parameter)
            whole = (parameter.detach(), parameter.grad, own["momentum_buffer"])
            for view, gradient, momentum in zip(*(_matrices(t, group["stacked"]) for t in whole), strict=True):
                view.grad = gradient
                views.append(view)
                state[view] = {"momentum_buffer": momentum}
        muon = Muon([{**group, "params": views}])
        muon.state.update(state)
        muon.step()


def _matrices(tensor: Tensor, stacked: int) -> list[Tensor]:
    """Views of ``[R, C]`` or ``[N, R, C]`` as matrices ``[R / stacked, C]``."""
    bank = tensor.unbind() if tensor.ndim == 3 else (tensor,)
    return [matrix for rows in bank for matrix in rows.chunk(stacked)]
