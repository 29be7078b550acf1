"""From scores on the native grid to labels: up-sampling, argmax, confidence, counts, by rows.

On a CPU one pass in C does it all (models/parts/kernels/finish.h). What follows is for GPUs, and
for CPUs where nothing was compiled. Whatever passes over the scores at full size a core does eight
or sixteen values at a time: the greatest, what is missing to it, the rank of what misses nothing,
and two to the power of what is missing. torch's own `max` with places goes value by value (2.13:
1.7 to 5 ns a value, against 0.6 for these; 2026-11-29), its comparisons make booleans value by
value, and exp2 is half of exp.
Scores are never kept at full size: a strip of rows is up-sampled (bilinear, half-pixel centres),
reduced to labels, and forgotten.

Shapes: B pictures, K classes; h, w native grid; H, W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate

from models.parts import kernels
from pipeline.records import Array

OCTAVE = 1 / math.log(2)
"""What logits are multiplied by so that 2^x is what e^x was."""
FAR = 1e30  # times what is missing: far below every rank, where anything is missing at all
STRIP = 4_000_000  # score values up-sampled at once, at most: 16 MB of float32
GPU_STRIP = 32_000_000  # fewer and larger steps: 128 MB, and three times that while it works
# Of a strip a CPU's cache keeps so many from pass to pass; fewer rows cost more than that saves.
CACHED, ROWS = 350_000, 16


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """Pixel rows of some pictures, on the device they were made on."""

    labels_BHW: torch.Tensor
    """uint8, or int32 where ids are larger; the fill value where there is no data."""
    certainty_BHW: torch.Tensor | None
    """uint8, 255 = certain, 0 where there is no data."""
    counts_BK: torch.Tensor
    """Data pixels per class, int64."""
    sums_BK: torch.Tensor
    """Sum of the winning class's softmax per class, float64."""


class Finisher:
    """Finishes scores for the classes of one model."""

    def __init__(self, ids: list[int], device: torch.device) -> None:
        self.dtype = np.dtype(np.uint8 if max(ids) < 255 else np.uint16)
        self.fill = int(np.iinfo(self.dtype).max)
        self._kind = torch.uint8 if self.dtype == np.uint8 else torch.int32  # uint16 knows little
        self._ids_K = torch.tensor(ids, device=device).to(self._kind)
        self._identity = ids == list(range(len(ids)))
        self._compiled = device.type == "cpu" and kernels.LIBRARY is not None
        self._renaming_K = None if self._identity else torch.tensor(ids, dtype=torch.int32)

    def finished(
        self,
        scores_Khw: torch.Tensor,
        g0: int,
        cells: tuple[int, int],
        size: tuple[int, int],
        span: tuple[int, int],
        width: int,
        blank_1HW: torch.Tensor | None,
        confidence: bool,
    ) -> Finished:
        """Rows of pixels of one picture from the scores around them.

        Args:
            scores_Khw: float32 grid rows from g0 on.
            g0: the grid row of the first.
            cells: rows and columns of the whole grid.
            size: height and width over which they are stretched, in pixels.
            span: first pixel row, and the row after the last.
            width: of the picture; what is beyond is cut off.
            blank_1HW: True where those rows have no data.
            confidence: whether every pixel's is wanted.
        """
        if self._compiled:
            labels = self._renaming_K, self.fill, self._kind
            rest = g0, cells, size, span, width, blank_1HW, *labels
            done = kernels.finish(scores_Khw, *rest, confidence=confidence)
            if done is not None:
                return Finished(*done)
        row = len(scores_Khw) * size[1]

        def octaves(y0: int, y1: int) -> torch.Tensor:
            octaves_KHW = upsampled(scores_Khw, g0, cells, size, y0, y1, OCTAVE)
            return octaves_KHW[:, None, :, :width]

        step = min(max(1, STRIP // row), max(ROWS, CACHED // row))
        return self._by_strips(octaves, span, step, blank_1HW, confidence)

    def finished_together(
        self,
        scores_BKhw: torch.Tensor,
        cells_B2: torch.Tensor,
        sizes_B2: torch.Tensor,
        span: tuple[int, int],
        width: int,
        blank_BHW: torch.Tensor | None,
        confidence: bool,
        g0: int = 0,
    ) -> Finished:
        """The same for pictures of several sizes, on a GPU, which is asked for no value.

        Args:
            scores_BKhw: float32 grid rows from g0 on.
            cells_B2: rows and columns of each whole grid.
            sizes_B2: height and width over which they are stretched, in pixels.
            span: first pixel row, and the row after the last.
            width: that is wanted of every picture.
            blank_BHW: True where a picture has no data, or is none.
            confidence: whether every pixel's is wanted.
            g0: the grid row of the first.
        """
        wide_BKhW = widened_each(scores_BKhw * OCTAVE, cells_B2, sizes_B2, width)

        def octaves(y0: int, y1: int) -> torch.Tensor:
            return heightened_each(wide_BKhW, cells_B2, sizes_B2, (y0, y1), g0)

        step = max(1, GPU_STRIP // (scores_BKhw.shape[0] * scores_BKhw.shape[1] * width))
        return self._by_strips(octaves, span, step, blank_BHW, confidence)

    def _by_strips(
        self,
        octaves: Callable[[int, int], torch.Tensor],
        span: tuple[int, int],
        step: int,
        blank_BHW: torch.Tensor | None,
        confidence: bool,
    ) -> Finished:
        """So many rows at a time, of which ``octaves`` gives the scores at full size (KBHW)."""
        parts = []
        for y0 in range(*span, step):
            y1 = min(y0 + step, span[1])
            blank = None if blank_BHW is None else blank_BHW[:, y0 - span[0] : y1 - span[0]]
            parts.append(self._reduced(octaves(y0, y1), blank, confidence))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _reduced(
        self, octaves_KBHW: torch.Tensor, blank_BHW: torch.Tensor | None, confidence: bool
    ) -> Finished:
        """Labels, counts and confidences of some rows."""
        index_BHW, sure_BHW = decided(octaves_KBHW)
        index_BHW = index_BHW.to(self._kind)
        if blank_BHW is not None:
            index_BHW = index_BHW.masked_fill(blank_BHW, self.fill)
            sure_BHW = sure_BHW.masked_fill(blank_BHW, 0.0)
        counts_BK, sums_BK = counted(index_BHW, sure_BHW, len(octaves_KBHW))
        labels_BHW = index_BHW if self._identity else self._renamed(index_BHW, blank_BHW)
        certainty = (sure_BHW * 255).round_().to(torch.uint8) if confidence else None
        return Finished(labels_BHW, certainty, counts_BK, sums_BK)

    def _renamed(self, index_BHW: torch.Tensor, blank_BHW: torch.Tensor | None) -> torch.Tensor:
        known_BHW = index_BHW if blank_BHW is None else index_BHW.masked_fill(blank_BHW, 0)
        labels_BHW = self._ids_K[known_BHW.long()]
        return labels_BHW if blank_BHW is None else labels_BHW.masked_fill(blank_BHW, self.fill)


def _joined(parts: list[Finished]) -> Finished:
    sure = [p.certainty_BHW for p in parts if p.certainty_BHW is not None]  # all have it, or none
    return Finished(
        torch.cat([p.labels_BHW for p in parts], 1),
        torch.cat(sure, 1) if sure else None,
        torch.stack([p.counts_BK for p in parts]).sum(0),
        torch.stack([p.sums_BK for p in parts]).sum(0),
    )


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
    rows = torch.arange(y0, y1, dtype=torch.float64)
    at = ((rows + 0.5) * cells[0] / size[0] - 0.5).clamp_(min=0)
    upper = at.floor()
    lower = (upper + 1).clamp_(max=cells[0] - 1)
    first, last = int(upper[0]), int(lower[-1])
    # Rows are widened while they are few: torch does that value by value.
    near_Khw = scores_Khw[:, first - g0 : last - g0 + 1] * scale
    wide_KhW = interpolate(near_Khw, size=size[1], mode="linear", align_corners=False)
    top_KHW = wide_KhW.index_select(1, (upper - first).long())
    bottom_KHW = wide_KhW.index_select(1, (lower - first).long())
    share = (at - upper).to(scores_Khw.dtype)[None, :, None]
    return top_KHW.lerp_(bottom_KHW, share)


def widened_each(
    scores_BKhw: torch.Tensor, cells_B2: torch.Tensor, sizes_B2: torch.Tensor, width: int
) -> torch.Tensor:
    """Grids as wide as the pixels, every picture by its own measure: scores_BKhW.

    For this a GPU gets from torch's own (2.11) a thread for each column alone, whatever B, K and h
    are: of 16 pictures of 11 classes it took 5 of 8 ms (2026-11-29, H200).

    Args:
        scores_BKhw: grids.
        cells_B2: rows and columns that count; what lies beyond is not read.
        sizes_B2: pixels over which they are stretched.
        width: pixels that are wanted.
    """
    left_BW, right_BW, share_BW = _between(cells_B2[:, 1], sizes_B2[:, 1], (0, width))
    shape = *scores_BKhw.shape[:3], width
    left, right = (
        scores_BKhw.gather(3, place_BW[:, None, None].expand(shape))
        for place_BW in (left_BW, right_BW)
    )
    return left.lerp_(right, share_BW[:, None, None].to(left.dtype))


def heightened_each(
    scores_BKhW: torch.Tensor,
    cells_B2: torch.Tensor,
    sizes_B2: torch.Tensor,
    span: tuple[int, int],
    g0: int = 0,
) -> torch.Tensor:
    """Pixel rows of grids that are as wide as the pixels: scores_KBHW.

    Whole rows of all pictures are taken by their number, which is faster than value by value.

    Args:
        scores_BKhW: grid rows from g0 on.
        cells_B2: rows and columns of each whole grid.
        sizes_B2: pixels over which they are stretched.
        span: the first pixel row that is wanted, and the one after the last.
        g0: the grid row of the first.
    """
    batch, _, rows, _ = scores_BKhW.shape
    top_BH, bottom_BH, share_BH = _between(cells_B2[:, 0], sizes_B2[:, 0], span)
    scores_KxW = scores_BKhW.transpose(0, 1).flatten(1, 2)
    start_B1 = torch.arange(batch, device=scores_BKhW.device)[:, None] * rows - g0
    top, bottom = (
        scores_KxW.index_select(1, (place_BH + start_B1).flatten())
        for place_BH in (top_BH, bottom_BH)
    )
    top.lerp_(bottom, share_BH.flatten()[:, None].to(top.dtype))
    return top.unflatten(1, (batch, -1))


def _between(
    cells_B: torch.Tensor, length_B: torch.Tensor, span: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which two cells each pixel of a side lies between, and its share of the second: each BS."""
    pixel_S = torch.arange(*span, device=cells_B.device, dtype=torch.float64)
    last_B1 = cells_B[:, None] - 1.0
    at_BS = ((pixel_S + 0.5) * cells_B[:, None] / length_B[:, None] - 0.5).clamp_(min=0)
    before_BS = torch.minimum(at_BS.floor(), last_B1)
    after_BS = torch.minimum(before_BS + 1, last_B1)
    return before_BS.long(), after_BS.long(), at_BS - before_BS


def decided(octaves_KHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The winner of every pixel and its softmax: index_HW (float), sure_HW.

    Args:
        octaves_KHW: logits times `OCTAVE`, of one picture or several (KBHW); they are overwritten.

    Of classes that are level the first wins.
    """
    classes, rest = len(octaves_KHW), (1,) * (octaves_KHW.ndim - 1)
    missing_KHW = octaves_KHW.sub_(octaves_KHW.amax(0))
    rank_K = torch.arange(classes, 0, -1, device=missing_KHW.device, dtype=missing_KHW.dtype)
    ranked_KHW = torch.add(rank_K.view(-1, *rest), missing_KHW, alpha=FAR)
    index_HW = ranked_KHW.amax(0).nan_to_num_(classes).neg_().add_(classes)
    return index_HW, missing_KHW.exp2_().sum(0).reciprocal_()


def counted(
    index_BHW: torch.Tensor, sure_BHW: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of each class and the sum of their confidences; what is no class counts nowhere.

    Returns:
        counts_BK (int64) and sums_BK (float64).
    """
    if index_BHW.device.type != "cpu":
        return counted_on_gpu(index_BHW, sure_BHW, classes)
    counts_BK = np.empty((len(index_BHW), classes), np.int64)
    sums_BK = np.empty((len(index_BHW), classes), np.float64)
    for i, (index_HW, sure_HW) in enumerate(zip(index_BHW.numpy(), sure_BHW.numpy(), strict=True)):
        # Not torch's bincount, which would first copy the labels to int64.
        flat, sure = index_HW.reshape(-1), sure_HW.reshape(-1)
        counts_BK[i] = np.bincount(flat, minlength=classes)[:classes]
        sums_BK[i] = np.bincount(flat, weights=sure, minlength=classes)[:classes]
    return torch.from_numpy(counts_BK), torch.from_numpy(sums_BK)


def counted_on_gpu(
    index_BHW: torch.Tensor, sure_BHW: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where the pixels are not at hand: sums of a fixed order, which wait for nothing."""
    number_K = torch.arange(classes, device=index_BHW.device, dtype=index_BHW.dtype)
    is_BKHW = index_BHW[:, None] == number_K[:, None, None]
    sure_BKHW = torch.where(is_BKHW, sure_BHW[:, None], 0.0)
    return is_BKHW.sum((2, 3)), sure_BKHW.sum((2, 3), dtype=torch.float64)


def as_array(tensor: torch.Tensor, kind: np.dtype) -> Array:
    """A tensor of the host as an array of that type."""
    return tensor.numpy().astype(kind, copy=False)
