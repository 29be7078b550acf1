"""What can be said of a model without training or timing it: counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.parts.network import Network

SIDE = 512


@dataclass(frozen=True, slots=True)
class Facts:
    """One row of the table of models."""

    task: str
    parameters: int
    gflop: float
    """Of one picture of 512 x 512; a multiply and an add are two."""
    stride: int
    min_side: int
    multiple: int
    receptive_field: int | None


def counted(build: Callable[[], Network]) -> Facts:
    """The facts of the model that `build` makes; it takes no memory and no time."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad():
        model = build().eval().requires_grad_(requires_grad=False)
        with counter:
            model(torch.zeros(1, model.channels, SIDE, SIDE))
    return Facts(
        model.task,
        sum(value.numel() for value in model.parameters()),
        counter.get_total_flops() / 1e9,
        model.stride,
        model.min_side,
        model.multiple,
        model.receptive_field,
    )
