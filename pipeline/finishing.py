"""From scores on the native grid to labels: up-sampling, argmax, confidence, counts, by rows.

Whatever passes over the scores at full size a core does eight or sixteen values at a time: the
greatest, what is missing to it, the rank of what misses nothing, and two to the power of what is
missing. torch's own `max` with places goes value by value (2.13: 1.7 to 5 ns a value, against 0.6
for these; 2026-11-29), its comparisons make booleans value by value, and exp2 is half of exp.

Shapes: K classes; h, w native grid; H, W pixels.
"""

import math

import numpy as np
import torch
from torch.nn.functional import interpolate

from pipeline.records import Array

OCTAVE = 1 / math.log(2)
"""What logits are multiplied by so that 2^x is what e^x was."""
FAR = 1e30  # times what is missing: far below every rank, where anything is missing at all
COUNT_BY_CLASS = 32  # up to so many classes one pass per class beats bincount's int64 copy


def upsampled(
    scores_Khw: torch.Tensor,
    g0: int,
    cells: tuple[int, int],
    size: tuple[int, int],
    y0: int,
    y1: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """Pixel rows y0 to y1 of the bilinear up-sampling of a whole grid, from the rows at hand.

    Args:
        scores_Khw: grid rows from g0 on.
        g0: the grid row of the first.
        cells: rows and columns of the whole grid.
        size: height and width over which they are stretched, in pixels.
        y0: first pixel row.
        y1: the row after the last.
        scale: what the scores are multiplied by on the way.

    Returns:
        logits_KHW with y1 - y0 rows, as `interpolate(align_corners=False)` of the whole would give.
    """
    rows = torch.arange(y0, y1, dtype=torch.float64)  # on the host: a GPU divides less exactly
    at = ((rows + 0.5) * cells[0] / size[0] - 0.5).clamp_(min=0)
    upper = at.floor()
    lower = (upper + 1).clamp_(max=cells[0] - 1)
    first, last = int(upper[0]), int(lower[-1])
    device = scores_Khw.device
    # Rows are widened while they are few: torch does that value by value.
    near_Khw = scores_Khw[:, first - g0 : last - g0 + 1] * scale
    wide_KhW = interpolate(near_Khw, size=size[1], mode="linear", align_corners=False)
    top_KHW = wide_KhW.index_select(1, (upper - first).long().to(device))
    bottom_KHW = wide_KhW.index_select(1, (lower - first).long().to(device))
    share = (at - upper).to(scores_Khw.dtype)[None, :, None].to(device)
    return top_KHW.lerp_(bottom_KHW, share)


def decided(octaves_KHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The winner of every pixel and its softmax: index_HW (float), sure_HW.

    Args:
        octaves_KHW: logits times `OCTAVE`; they are overwritten.

    Of classes that are level the first wins.
    """
    classes = len(octaves_KHW)
    missing_KHW = octaves_KHW.sub_(octaves_KHW.amax(0))
    rank_K = torch.arange(classes, 0, -1, device=missing_KHW.device, dtype=missing_KHW.dtype)
    ranked_KHW = torch.add(rank_K[:, None, None], missing_KHW, alpha=FAR)
    index_HW = ranked_KHW.amax(0).nan_to_num_(classes).neg_().add_(classes)
    return index_HW, missing_KHW.exp2_().sum(0).reciprocal_()


def counted(index_HW: torch.Tensor, sure_HW: torch.Tensor, classes: int) -> tuple[Array, Array]:
    """Pixels of each class and the sum of their confidences; what is no class counts nowhere."""
    if index_HW.device.type != "cpu":
        return counted_on_gpu(index_HW, sure_HW, classes)
    # Not torch's bincount, which would first copy the labels to int64.
    flat, sure = index_HW.numpy().reshape(-1), sure_HW.numpy().reshape(-1)
    counts = np.bincount(flat, minlength=classes)[:classes]
    return counts, np.bincount(flat, weights=sure, minlength=classes)[:classes]


def counted_on_gpu(
    index_HW: torch.Tensor, sure_HW: torch.Tensor, classes: int
) -> tuple[Array, Array]:
    """The same where the pixels are not at hand; class by class the sums do not depend on luck."""
    if classes <= COUNT_BY_CLASS:
        masks = [index_HW == k for k in range(classes)]
        counts = torch.stack([m.count_nonzero() for m in masks])
        sums = torch.stack([(sure_HW * m).sum(dtype=torch.float64) for m in masks])
    else:
        flat = index_HW.flatten().long()
        kept = flat < classes
        flat, sure = flat[kept], sure_HW.flatten()[kept]
        counts = torch.bincount(flat, minlength=classes)
        sums = torch.bincount(flat, weights=sure.double(), minlength=classes)
    return counts.cpu().numpy().astype(np.int64), sums.cpu().numpy().astype(np.float64)
