"""Models that score every pixel, and how they keep the items of a batch apart.

A subclass writes `grid`: pixels in, logits on its native grid out. Here it becomes `forward`.

On the CPU items pass one by one, each at its own padded size: an answer then cannot depend on batch
mates, bit for bit, because oneDNN and MKL choose kernels by batch size (torch 2.13 takes another
convolution for one small picture than for two). It costs nothing: eight 256 px pictures in one
batch took twice as long as one by one (137 against 63 ms, one thread, 2026-11-20).
Elsewhere, and in training, items pass together, and `grid` masks what lies outside of each.

Shapes: B batch, C input channels, K classes, H W padded input, h w native grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from models.parts.network import Network, fitted, on_canvas

if TYPE_CHECKING:
    from collections.abc import Iterable

    from models.parts.network import Size


class Segmenter(Network):
    """A model that maps pictures to class scores for every pixel."""

    task = "segment"
    partial_cells: bool = True
    """Whether a cell that the picture fills only in part counts, or is dropped (`floor`)."""

    def native_size(self, height: int, width: int) -> Size:
        """The size of the native grid for a picture of this size."""
        if self.partial_cells:
            return -(-height // self.stride), -(-width // self.stride)
        return height // self.stride, width // self.stride

    def span(self, height: int, width: int) -> Size:
        """The pixels over which the native grid is stretched; beyond the picture is cut off."""
        if self.partial_cells:
            h, w = self.native_size(height, width)
            return h * self.stride, w * self.stride
        return height, width

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw on the native grid of the padded sizes.

        Args:
            x_BCHW: pictures at their padded size; zero outside of each.
            sizes_B2: padded height and width of each, on the device of the pictures; None: all H W.
                What comes out beyond them means nothing.
        """
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
        sizes = self.checked(x_BCHW, sizes_B2)
        cells = [self.native_size(*size) for size in sizes]
        if x_BCHW.device.type == "cpu" and not self.training:
            scores = [self.grid(x_1CHW, None) for x_1CHW in self.alone(x_BCHW, sizes)]
        else:
            scores_BKhw = self.grid(*self.together(x_BCHW, sizes))
            if native:
                return fitted(scores_BKhw, cells, self.native_size(*x_BCHW.shape[-2:]))
            if len(set(sizes)) == 1:  # one stretch for all: the usual case
                scores, cells, sizes = [scores_BKhw], cells[:1], sizes[:1]
            else:
                scores = list(scores_BKhw.split(1))
        answers = [a[:, :, :h, :w] for a, (h, w) in zip(scores, cells, strict=True)]
        if native:
            return on_canvas(answers, self.native_size(*x_BCHW.shape[-2:]))
        stretches = (
            stretched(a, self.span(h, w))[:, :, :h, :w]
            for a, (h, w) in zip(answers, sizes, strict=True)
        )
        return on_canvas(stretches, x_BCHW.shape[-2:])


def stretched(logits_BKhw: Tensor, size: Iterable[int]) -> Tensor:
    """The logits at another size (bilinear, half-pixel centres)."""
    size = tuple(size)
    if logits_BKhw.shape[-2:] == size:
        return logits_BKhw
    return nn.functional.interpolate(logits_BKhw, size=size, mode="bilinear", align_corners=False)
