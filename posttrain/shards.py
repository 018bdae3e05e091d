"""Tensors of which every rank has a part, and tensors that all ranks have alike.

What gathers or spreads is for all ranks at once, in the same order.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.optim import Optimizer


def outline(model: nn.Module) -> bytes:
    """The model without the values of its parameters, pickled, for ``from_outline``."""
    shapes = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return pickle.dumps(copy.deepcopy(model, {**shapes}))


def from_outline(pickled: bytes) -> Any:
    """The model again, its parameters not yet filled."""
    model = pickle.loads(pickled)
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one is one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="cpu")
                made.setdefault(parameter, nn.Parameter(empty, parameter.requires_grad))
                module._parameters[name] = made[parameter]
    return model


@torch.no_grad()
def make_alike(model: nn.Module) -> None:
    """Give every rank the parameters and buffers that rank 0 has."""
    for tensor in model.state_dict().values():
        host = tensor.cpu()
        distributed.broadcast(host, 0)
        tensor.copy_(host)


def without_values(tree: Any) -> Any:
    """The same tree of dicts, lists and tuples, its tensors without memory: what a follower needs to know of it."""
    return _mapped(tree, lambda tensor: tensor.to("meta"))


def gathered(tree: Any) -> Any:
    """The same tree with whole tensors, on the CPU, for those in parts."""
    return _mapped(tree, lambda t: t.full_tensor().cpu() if isinstance(t, DTensor) else t)


@torch.no_grad()
def take(source: Tensor, like: Tensor) -> Tensor:
    """What rank 0 has in ``source``, on the device of ``like``, in parts where that is. Other ranks need the shape."""
    device = like.device if source.shape == like.shape else torch.device("cpu")
    whole = torch.empty_like(source, device=device) if source.is_meta else source.to(device)
    if isinstance(like, DTensor) and source.shape == like.shape:
        return distribute_tensor(whole, like.device_mesh, like.placements)  # from rank 0
    distributed.broadcast(whole, 0)
    return whole


@torch.no_grad()
def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """What ``load_state_dict`` does, on all ranks, with the values that rank 0 has."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(take(state[name], tensor))


def optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` can be given on this rank, with the values that rank 0 has in ``state``."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    taken = {
        i: {key: take(value, parameters[i]) if isinstance(value, Tensor) else value for key, value in own.items()}
        for i, own in state["state"].items()
    }
    return {**state, "state": taken}


def whole_weight(weight: Tensor) -> Tensor:
    """``weight`` for a product outside of the module that has it. As everywhere under FSDP, its gradient is the mean of
    the ranks'."""
    if not isinstance(weight, DTensor):
        return weight
    whole = weight.full_tensor(grad_placements=[Partial() for _ in weight.placements])
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / weight.device_mesh.size())
    return whole


def _mapped(tree: Any, change: Any) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree
