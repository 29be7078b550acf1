"""One picture seen many ways: another size, place, orientation, brightness.

Shapes: C channels, H W picture, h w window before it is resized, S side of the crop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True, slots=True)
class Augment:
    """How far a picture may stray; all draws come from the generator handed in."""

    crop: int = 256
    """Side of what comes out, in pixels."""
    zoom: tuple[float, float] = (0.6, 1.6)
    """Smallest and largest magnification."""
    gain: tuple[float, float] = (0.6, 1.6)
    """Smallest and largest contrast."""
    gamma: tuple[float, float] = (0.7, 1.4)
    """Smallest and largest bend of the brightness curve."""
    shift: float = 0.08
    """Largest change of each channel, white being 1."""
    ignore_id: int = 255
    """The label of what lies outside of the picture."""

    def __call__(
        self, x_CHW: Tensor, labels_HW: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """A crop of the picture (values 0 to 1) and of its labels, both S x S."""
        x_ChW, labels_hW = self._window(x_CHW, labels_HW, generator)
        x_CSS, labels_SS = self._resized(x_ChW, labels_hW)
        turns = int(torch.randint(4, (), generator=generator))
        x_CSS, labels_SS = x_CSS.rot90(turns, (-2, -1)), labels_SS.rot90(turns, (-2, -1))
        if torch.rand((), generator=generator) < 0.5:
            x_CSS, labels_SS = x_CSS.flip(-1), labels_SS.flip(-1)
        return self._recoloured(x_CSS, generator), labels_SS

    def _window(
        self, x_CHW: Tensor, labels_HW: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        side = round(self.crop / _between(self.zoom, generator))
        height, width = labels_HW.shape
        top = int(torch.randint(max(height - side, 0) + 1, (), generator=generator))
        left = int(torch.randint(max(width - side, 0) + 1, (), generator=generator))
        x_Chw = x_CHW[:, top : top + side, left : left + side]
        labels_hw = labels_HW[top : top + side, left : left + side]
        missing = (0, side - x_Chw.shape[2], 0, side - x_Chw.shape[1])
        mean_C11 = x_Chw.mean((1, 2), keepdim=True)
        padded_Chw = nn.functional.pad(x_Chw - mean_C11, missing) + mean_C11
        return padded_Chw, nn.functional.pad(labels_hw, missing, value=self.ignore_id)

    def _resized(self, x_Chw: Tensor, labels_hw: Tensor) -> tuple[Tensor, Tensor]:
        size = (self.crop, self.crop)
        x_1CSS = nn.functional.interpolate(
            x_Chw[None], size, mode="bilinear", align_corners=False, antialias=True
        )
        labels_11SS = nn.functional.interpolate(
            labels_hw[None, None].float(), size, mode="nearest-exact"
        )
        return x_1CSS[0], labels_11SS[0, 0].long()

    def _recoloured(self, x_CSS: Tensor, generator: Generator) -> Tensor:
        gain, gamma = _between(self.gain, generator), _between(self.gamma, generator)
        shift_C11 = (torch.rand((len(x_CSS), 1, 1), generator=generator) * 2 - 1) * self.shift
        middle_C11 = x_CSS.mean((1, 2), keepdim=True)
        bent_CSS = x_CSS.clamp(0, 1) ** gamma
        return (middle_C11 + (bent_CSS - middle_C11) * gain + shift_C11).clamp(0, 1)


def _between(limits: tuple[float, float], generator: Generator) -> float:
    """A factor between the two, as often below 1 as its inverse is above."""
    low, high = (math.log(limit) for limit in limits)
    return math.exp(low + (high - low) * float(torch.rand((), generator=generator)))
