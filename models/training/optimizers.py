"""The optimizer of a recipe, and what it remembers by the names of the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from models.training.recipes import Recipe


def optimizer_of(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer, its parameters in groups of one decay and one factor each."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    heads = set(recipe.heads)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            decay = recipe.weight_decay if _decays(name, parameter) else 0.0
            factor = recipe.head_factor if heads & set(name.split(".")) else 1.0
            groups.setdefault((decay, factor), []).append(parameter)
    if recipe.head_factor != 1 and not any(factor != 1 for _, factor in groups):
        parts = ", ".join(name for name, _ in net.named_children())
        raise ValueError(
            f"head_factor {recipe.head_factor}: the model has none of the heads "
            f"{', '.join(recipe.heads)}; its parts are {parts}"
        )
    listed = [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (decay, factor), parameters in groups.items()
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            listed, lr=recipe.rate.peak, momentum=recipe.momentum, nesterov=recipe.nesterov
        )
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(listed, lr=recipe.rate.peak)


def _decays(name: str, parameter: Tensor) -> bool:
    """Matrices and windows of layers; not norms, biases, latents, position tables."""
    return parameter.ndim > 1 and name.endswith("weight")


def memory_of(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """What the optimizer remembers, as PARAMETER/WHAT; the tensors themselves."""
    return {
        f"{name}/{what}": value
        for name, parameter in net.named_parameters()
        for what, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)  # SGD without momentum remembers None
    }


def remind(optimizer: torch.optim.Optimizer, net: nn.Module, memory: Mapping[str, Tensor]) -> None:
    """Let the optimizer remember this, by value, and nothing else."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    remembered: dict[int, dict[str, Tensor]] = {}
    for key, value in memory.items():
        name, _, what = key.rpartition("/")
        remembered.setdefault(order.index(name), {})[what] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": remembered})
