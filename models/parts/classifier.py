"""Models that score a whole picture: one class for each.

A subclass writes `scores`. As with `Segmenter`, items pass one by one on the CPU and together
elsewhere and in training.

Shapes: B batch, C input channels, K classes, H W padded input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.parts.network import Network


class Classifier(Network):
    """A model that maps pictures to class scores."""

    task = "classify"
    receptive_field = None

    def scores(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BK.

        Args:
            x_BCHW: pictures at their padded size; zero outside of each.
            sizes_B2: padded height and width of each, on the device of the pictures; None: all H W.
        """
        raise NotImplementedError

    def forward(self, x_BCHW: Tensor, sizes_B2: Tensor | None = None) -> Tensor:
        """Score every class for every picture.

        Args:
            x_BCHW: normalised pictures, padded at the bottom and on the right where sizes differ.
            sizes_B2: valid height and width of each (int64, best kept on the CPU); None: all valid.

        Returns:
            logits_BK.
        """
        sizes = self.checked(x_BCHW, sizes_B2)
        if x_BCHW.device.type == "cpu" and not self.training:
            return torch.cat([self.scores(x_1CHW, None) for x_1CHW in self.alone(x_BCHW, sizes)])
        return self.scores(*self.together(x_BCHW, sizes))
