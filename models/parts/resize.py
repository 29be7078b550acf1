"""Coarse maps stretched to finer grids, item by item as if each were alone.

Shapes: B batch, C channels, h w coarse grid, H W fine grid, sizes_B2 valid height and width on the
coarse grid.
"""

import torch
from torch import Tensor, nn


def upsampled(x_BChw: Tensor, factor: int, sizes_B2: Tensor | None = None) -> Tensor:
    """x_BCHW, `factor` times as high and wide (bilinear, half-pixel centres).

    At its border an item sees its own last row again, not its neighbour on the canvas, nor zeros.
    """
    x_BChw = x_BChw if sizes_B2 is None else edges_repeated(x_BChw, sizes_B2)
    return nn.functional.interpolate(
        x_BChw, scale_factor=factor, mode="bilinear", align_corners=False
    )


def edges_repeated(x_BChw: Tensor, sizes_B2: Tensor) -> Tensor:
    """The same, with every item's last row and column repeated up to the canvas."""
    for axis in (0, 1):
        length = x_BChw.shape[2 + axis]
        place_L = torch.arange(length, device=x_BChw.device)
        source_BL = torch.minimum(place_L, sizes_B2[:, axis, None] - 1)
        shape = (-1, 1, length, 1) if axis == 0 else (-1, 1, 1, length)
        x_BChw = x_BChw.gather(2 + axis, source_BL.view(shape).expand_as(x_BChw))
    return x_BChw


def upsampled_rows(x_BChw: Tensor, factor: int, rows: range) -> Tensor:
    """Some rows of `upsampled`, from the coarse rows around them alone."""
    first = max(rows.start // factor - 1, 0)
    last = min((rows.stop - 1) // factor + 1, x_BChw.shape[2] - 1)
    part_BChW = upsampled(x_BChw[:, :, first : last + 1], factor)
    start = rows.start - first * factor
    return part_BChW[:, :, start : start + len(rows)]
