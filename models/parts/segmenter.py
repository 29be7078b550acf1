"""What every model of the zoo promises, and how it keeps items apart.

A subclass writes `grid`: pixels in, logits on its native grid out. Here it becomes `forward`.

On the CPU items pass one by one, each at its own valid size: an answer then cannot depend on batch
mates, bit for bit, because oneDNN and MKL choose kernels by batch size (torch 2.13 takes another
convolution for one small picture than for two). It costs nothing: eight 256 px pictures in one
batch took twice as long as one by one (137 against 63 ms, one thread, 2026-11-20).
Elsewhere items pass together, and `grid` masks what lies outside of each.

Shapes: B batch, C input channels, K classes, H W padded input, h w native grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from models.parts.configs import ModelConfig

Size = tuple[int, int]
"""Height and width."""


class Segmenter(nn.Module):
    """A model that maps pictures to class scores for every pixel."""

    config: ModelConfig
    classes: int
    channels: int
    stride: int
    """Input pixels per cell of the native grid."""
    min_side: int
    """The shortest side it accepts."""
    receptive_field: int | None
    """Pixels one answer depends on; None: all of them."""

    def native_size(self, height: int, width: int) -> Size:
        """The size of the native grid for a picture of this size."""
        return height // self.stride, width // self.stride

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw on the native grid; outside of each item's valid size they mean nothing."""
        raise NotImplementedError

    def forward(
        self, x_BCHW: Tensor, sizes_B2: Tensor | None = None, *, native: bool = False
    ) -> Tensor:
        """Score every class at every pixel.

        Args:
            x_BCHW: normalised pictures, padded at the bottom and on the right where sizes differ.
            sizes_B2: valid height and width of each (int64, best kept on the CPU); None: all valid.
            native: leave the scores on the native grid instead of stretching them to H x W.

        Returns:
            logits_BKHW, or logits_BKhw if native; zero outside of the valid size.
        """
        sizes = self._checked(x_BCHW, sizes_B2)
        if x_BCHW.device.type == "cpu":
            answers = self._one_by_one(x_BCHW, sizes)
        elif sizes_B2 is None:
            logits_BKhw = self.grid(x_BCHW, None)
            return logits_BKhw if native else stretched(logits_BKhw, x_BCHW.shape[-2:])
        else:
            answers = self._together(x_BCHW, sizes_B2, sizes)
        if native:
            return on_canvas(answers, self.native_size(*x_BCHW.shape[-2:]))
        stretches = (stretched(a_1Khw, size) for a_1Khw, size in zip(answers, sizes, strict=True))
        return on_canvas(stretches, x_BCHW.shape[-2:])

    def _one_by_one(self, x_BCHW: Tensor, sizes: list[Size]) -> list[Tensor]:
        # clone, not contiguous: a single-channel picture counts as contiguous in either format, and
        # the strides it happens to have would choose the kernel.
        return [
            self.grid(x_BCHW[i : i + 1, :, :h, :w].clone(memory_format=torch.channels_last), None)
            for i, (h, w) in enumerate(sizes)
        ]

    def _together(self, x_BCHW: Tensor, sizes_B2: Tensor, sizes: list[Size]) -> list[Tensor]:
        logits_BKhw = self.grid(x_BCHW, sizes_B2.to(x_BCHW.device))
        cells = [self.native_size(*size) for size in sizes]
        return [logits_BKhw[i : i + 1, :, :h, :w] for i, (h, w) in enumerate(cells)]

    def _checked(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> list[Size]:
        batch, channels, height, width = x_BCHW.shape
        if channels != self.channels:
            raise ValueError(
                f"the model reads {self.channels} channels, the batch has {channels} "
                f"(shape {tuple(x_BCHW.shape)}); convert the pictures"
            )
        if sizes_B2 is None:
            sizes = [(height, width)] * batch
        elif sizes_B2.shape != (batch, 2):
            raise ValueError(f"sizes must be ({batch}, 2), they are {tuple(sizes_B2.shape)}")
        else:
            sizes = [(h, w) for h, w in sizes_B2.tolist()]
        for h, w in set(sizes):
            if not (self.min_side <= h <= height and self.min_side <= w <= width):
                raise ValueError(
                    f"a picture of {h} x {w} in a batch of {height} x {width}: sides must be at "
                    f"least {self.min_side} and fit into the batch; pad the picture or leave it out"
                )
        return sizes


def stretched(logits_BKhw: Tensor, size: Iterable[int]) -> Tensor:
    """The logits at the size of the picture."""
    return nn.functional.interpolate(
        logits_BKhw, size=tuple(size), mode="bilinear", align_corners=False
    )


def on_canvas(answers: Iterable[Tensor], size: Iterable[int]) -> Tensor:
    """Answers of different sizes as one batch, zeros below and to the right."""
    height, width = size
    return torch.cat(
        [nn.functional.pad(a, (0, width - a.shape[-1], 0, height - a.shape[-2])) for a in answers]
    )
