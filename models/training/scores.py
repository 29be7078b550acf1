"""How good masks are: counts that grow picture by picture, and the figures that follow from them.

Counts of pictures add up, figures do not. Three kinds are counted: pixels by what they are and what
they were called (`Confusion`), pixels by how sure the answer was (`Calibration`), and pixels on the
borders between classes (`Boundary`). Where a class does not occur its figure is NaN; means are over
the classes that are there to be found (`mean_found`), so that a class that was only called by
mistake counts as a mistake on the others.

Shapes: H W picture, K classes, N pixels, P points on borders, L bins of confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 15
"""Of confidence, equally wide (Guo et al. 2017, section 2)."""
WIDTH = 0.0075
"""How far a border may be off, as a share of the picture's diagonal (Csurka et al. 2013)."""
LEVELS = 256
"""Of a stored confidence."""


@dataclass(slots=True)
class Confusion:
    """Pixels counted by what they are (rows) and what they were called (columns)."""

    classes: int
    ignore_id: int = 255
    """Pixels with this label are not counted."""
    counts_KK: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts_KK = np.zeros((self.classes, self.classes), dtype=np.int64)

    def add(self, labels: NDArray[np.integer], answers: NDArray[np.integer]) -> None:
        """Count one picture or a batch.

        Args:
            labels: class indexes of any shape, or ignore_id.
            answers: class indexes of the same shape.
        """
        if labels.shape != answers.shape:
            raise ValueError(f"labels are {labels.shape}, answers are {answers.shape}")
        counted = labels != self.ignore_id
        labels_N = labels[counted].astype(np.int64)
        answers_N = answers[counted].astype(np.int64)
        for name, found_N in (("labels", labels_N), ("answers", answers_N)):
            if found_N.size and not 0 <= found_N.min() <= found_N.max() < self.classes:
                raise ValueError(
                    f"{name} run from {found_N.min()} to {found_N.max()}; {self.classes} classes "
                    f"are 0 to {self.classes - 1}, and {self.ignore_id} is ignored"
                )
        pairs_N = labels_N * self.classes + answers_N
        counts = np.bincount(pairs_N, minlength=self.classes**2)
        self.counts_KK += counts.reshape(self.classes, self.classes)

    def iou_K(self) -> NDArray[np.float64]:  # noqa: N802  (a shape suffix)
        """Intersection over union of each class; NaN where a class was neither there nor called."""
        hits_K = np.diag(self.counts_KK).astype(float)
        union_K = self.counts_KK.sum(0) + self.counts_KK.sum(1) - hits_K
        return np.divide(hits_K, union_K, out=np.full(self.classes, np.nan), where=union_K > 0)

    def mean_iou(self) -> float:
        """The mean over the classes that occurred; NaN if nothing was counted."""
        iou_K = self.iou_K()
        return float(iou_K[~np.isnan(iou_K)].mean()) if self.counts_KK.any() else float("nan")

    def accuracy(self) -> float:
        """The share of pixels called what they are; NaN if nothing was counted."""
        total = self.counts_KK.sum()
        return float(np.trace(self.counts_KK) / total) if total else float("nan")

    def labelled_K(self) -> NDArray[np.int64]:  # noqa: N802  (as above)
        """Pixels that are of each class."""
        return self.counts_KK.sum(1)

    def answered_K(self) -> NDArray[np.int64]:  # noqa: N802
        """Pixels that were called each class."""
        return self.counts_KK.sum(0)

    def recall_K(self) -> NDArray[np.float64]:  # noqa: N802
        """The share of each class that was called so."""
        return _ratio(np.diag(self.counts_KK), self.labelled_K())

    def dice_K(self) -> NDArray[np.float64]:  # noqa: N802
        """Twice the intersection over the sum of both, of each class."""
        return _ratio(2 * np.diag(self.counts_KK), self.labelled_K() + self.answered_K())

    def mean_found(self, figure_K: NDArray[np.float64]) -> float:
        """The mean of a figure over the classes that are labelled; NaN if none is."""
        there_K = self.labelled_K() > 0
        return float(figure_K[there_K].mean()) if there_K.any() else float("nan")


@dataclass(slots=True)
class Calibration:
    """Whether answers are right as often as they are sure: pixels by bins of confidence.

    A bin is open below and closed above, as in Guo et al. 2017: (0, 1/15], (1/15, 2/15], ...
    """

    counts_2N: NDArray[np.int64] = field(init=False)
    """Pixels at each stored confidence: wrong ones, right ones."""

    def __post_init__(self) -> None:
        self.counts_2N = np.zeros((2, LEVELS), dtype=np.int64)

    def add(self, sure: NDArray[np.uint8], right: NDArray[np.bool_]) -> None:
        """Count pixels.

        Args:
            sure: confidence as it is stored with masks, 255 = certain.
            right: whether these pixels were called what they are.
        """
        codes_N = sure.ravel().astype(np.int64) + LEVELS * right.ravel()
        self.counts_2N += np.bincount(codes_N, minlength=2 * LEVELS).reshape(2, LEVELS)

    def bins(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Of each bin: pixels, sum of their confidences, how many are right."""
        level_N = np.arange(LEVELS)
        # 255 is 15 * 17: whole numbers decide, no rounding of k/15.
        place_N = np.maximum(level_N - 1, 0) // ((LEVELS - 1) // BINS)
        count_L = np.bincount(place_N, weights=self.counts_2N.sum(0), minlength=BINS)
        right_L = np.bincount(place_N, weights=self.counts_2N[1], minlength=BINS)
        sure_L = np.bincount(place_N, weights=self.counts_2N.sum(0) * level_N, minlength=BINS)
        return count_L.astype(np.int64), sure_L / (LEVELS - 1), right_L.astype(np.int64)

    def error(self) -> float:
        """Expected calibration error: the mean distance of confidence and accuracy over pixels."""
        count_L, sure_L, right_L = self.bins()
        total = count_L.sum()
        return float(np.abs(sure_L - right_L).sum() / total) if total else float("nan")


@dataclass(slots=True)
class Boundary:
    """Borders of classes: how many of their pixels lie near a border of the same class.

    A pixel is on the border of its class if one of its four neighbours is of another class; where a
    picture ends or a pixel is ignored there is no border. Near is within a disk. Precision is
    right / answered, recall found / labelled, and F their harmonic mean (Csurka et al. 2013, "What
    is a good evaluation measure for semantic segmentation?"; the width is read as by DAVIS, Perazzi
    et al. 2016).
    """

    classes: int
    width: float = WIDTH
    """Below 1: a share of the picture's diagonal; else pixels. Rounded up."""
    ignore_id: int = 255
    labelled_K: NDArray[np.int64] = field(init=False)
    """Border pixels of the labels,"""
    found_K: NDArray[np.int64] = field(init=False)
    """and how many of them lie near one of the answers."""
    answered_K: NDArray[np.int64] = field(init=False)
    """Border pixels of the answers,"""
    right_K: NDArray[np.int64] = field(init=False)
    """and how many of them lie near one of the labels."""

    def __post_init__(self) -> None:
        if not 0 < self.width < math.inf:
            raise ValueError(f"a border's width must be above 0, it is {self.width}; try {WIDTH}")
        for name in ("labelled_K", "found_K", "answered_K", "right_K"):
            setattr(self, name, np.zeros(self.classes, dtype=np.int64))

    def pixels(self, height: int, width: int) -> int:
        """How far a border may be off in a picture of this size."""
        share = self.width < 1
        return math.ceil(self.width * math.hypot(height, width) if share else self.width)

    def add(self, labels_HW: NDArray[np.integer], answers_HW: NDArray[np.integer]) -> None:
        """Count one picture; pixels ignored by either are ignored."""
        left_out_HW = (labels_HW == self.ignore_id) | (answers_HW == self.ignore_id)
        within = self.pixels(*labels_HW.shape)
        space = _Space(labels_HW.shape[0] + 2 * within, labels_HW.shape[1] + 2 * within)
        labels_P = space.borders(labels_HW, left_out_HW)
        answers_P = space.borders(answers_HW, left_out_HW)
        self.labelled_K += self._by_class(space, labels_P)
        self.answered_K += self._by_class(space, answers_P)
        self.found_K += self._by_class(space, labels_P[space.near(labels_P, answers_P, within)])
        self.right_K += self._by_class(space, answers_P[space.near(answers_P, labels_P, within)])

    def _by_class(self, space: _Space, points_P: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(points_P // space.size, minlength=self.classes)

    def f_K(self) -> NDArray[np.float64]:  # noqa: N802  (a shape suffix)
        """F of each class; NaN where it has no border, 0 where none of it is matched."""
        return _f(_ratio(self.right_K, self.answered_K), _ratio(self.found_K, self.labelled_K))

    def mean_f(self) -> float:
        """The mean over the classes that have labelled borders; NaN if none has."""
        there_K = self.labelled_K > 0
        return float(self.f_K()[there_K].mean()) if there_K.any() else float("nan")


@dataclass(frozen=True, slots=True)
class _Space:
    """Points of all classes as numbers: class, row and column, with room around each class's plane.

    The room is as wide as what counts as near, so a step sideways never ends in another row.
    """

    height: int
    width: int

    @property
    def size(self) -> int:
        """Numbers of one class."""
        return self.height * self.width

    def borders(
        self, values_HW: NDArray[np.integer], left_out_HW: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Border pixels of every class, in order."""
        border_HW = np.zeros(values_HW.shape, dtype=bool)
        kept_HW = ~left_out_HW
        down = (values_HW[1:] != values_HW[:-1]) & kept_HW[1:] & kept_HW[:-1]
        border_HW[1:] |= down
        border_HW[:-1] |= down
        across = (values_HW[:, 1:] != values_HW[:, :-1]) & kept_HW[:, 1:] & kept_HW[:, :-1]
        border_HW[:, 1:] |= across
        border_HW[:, :-1] |= across
        rows_P, columns_P = np.nonzero(border_HW)
        margin = (self.width - values_HW.shape[1]) // 2
        places_P = (rows_P + margin) * self.width + columns_P + margin
        return np.sort(values_HW[border_HW].astype(np.int64) * self.size + places_P)

    def near(
        self, points_P: NDArray[np.int64], others_P: NDArray[np.int64], within: int
    ) -> NDArray[np.bool_]:
        """Which points have another of their class within a disk; both are in order."""
        found_P = np.zeros(points_P.size, dtype=bool)
        open_P = np.arange(points_P.size)
        for step in sorted(range(-within, within + 1), key=abs):  # most are found at once
            reach = math.isqrt(within**2 - step**2)
            at_P = points_P[open_P] + step * self.width
            first_P = np.searchsorted(others_P, at_P - reach)
            hit_P = first_P < np.searchsorted(others_P, at_P + reach, side="right")
            found_P[open_P[hit_P]] = True
            open_P = open_P[~hit_P]
        return found_P


def _ratio(part_K: NDArray[np.integer], whole_K: NDArray[np.integer]) -> NDArray[np.float64]:
    """NaN where there is nothing to divide by."""
    nothing_K = np.full(part_K.shape, np.nan)
    return np.divide(part_K.astype(np.float64), whole_K, out=nothing_K, where=whole_K > 0)


def _f(precision_K: NDArray[np.float64], recall_K: NDArray[np.float64]) -> NDArray[np.float64]:
    either_K = ~(np.isnan(precision_K) & np.isnan(recall_K))
    precision_K, recall_K = np.nan_to_num(precision_K), np.nan_to_num(recall_K)
    both_K = precision_K + recall_K
    f_K = np.divide(2 * precision_K * recall_K, both_K, out=np.zeros_like(both_K), where=both_K > 0)
    return np.where(either_K, f_K, np.nan)
