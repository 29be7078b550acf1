"""How often each class occurs in the labels, and the weights that make up for it.

Shapes: K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class ClassCounts:
    """Pixels of each class, counted picture by picture."""

    classes: int
    ignore_id: int = 255
    """Pixels with this label are not counted."""
    pixels_K: NDArray[np.int64] = field(init=False)
    """Of this class."""
    around_K: NDArray[np.int64] = field(init=False)
    """All of the pictures that show this class, ignored ones too (as SegNet counts them)."""

    def __post_init__(self) -> None:
        self.pixels_K = np.zeros(self.classes, dtype=np.int64)
        self.around_K = np.zeros(self.classes, dtype=np.int64)

    def add(self, labels: NDArray[np.integer]) -> None:
        """Count one picture."""
        counted = labels[labels != self.ignore_id]
        if counted.size and not 0 <= counted.min() <= counted.max() < self.classes:
            raise ValueError(
                f"labels run from {counted.min()} to {counted.max()}; {self.classes} classes "
                f"are 0 to {self.classes - 1}, and {self.ignore_id} is ignored"
            )
        here_K = np.bincount(counted, minlength=self.classes)
        self.pixels_K += here_K
        self.around_K += np.where(here_K > 0, labels.size, 0)

    def merge(self, other: ClassCounts) -> None:
        """Take over what another counted."""
        self.pixels_K += other.pixels_K
        self.around_K += other.around_K

    def median_frequency(self, heaviest: float = np.inf) -> tuple[float, ...]:
        """A weight for each class: the median frequency over its own (Eigen and Fergus 2015).

        A class is as frequent as in the pictures that show it. One that never occurs weighs 1.

        Args:
            heaviest: no weight is larger; a class of a few pixels would rule every step.
        """
        found = self.pixels_K > 0
        if not found.any():
            raise ValueError("no pixel has a class: there is nothing to balance; look at the masks")
        often_K = self.pixels_K / np.maximum(self.around_K, 1)
        median = np.median(often_K[found])
        weights_K = np.divide(median, often_K, out=np.ones(self.classes), where=found)
        return tuple(np.minimum(weights_K, heaviest).tolist())
