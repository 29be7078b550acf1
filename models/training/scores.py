"""How good masks are: a confusion matrix that grows picture by picture, and what follows from it.

Shapes: H W picture, K classes, N pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
