"""Pictures as they lie in memory, made into what a model reads.

Shapes: B batch, C channels, H W picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from models.training.recipes import Recipe

Batch = tuple[Tensor, Tensor]
"""x_BCHW normalised, and integer class indexes: labels_BHW, or labels_B for a classifier."""


def batch_of(pixels_BHWC: NDArray[np.uint8], labels: NDArray[np.integer], recipe: Recipe) -> Batch:
    """8-bit pictures as a model reads them, channels last in memory."""
    _, _, width, channels = pixels_BHWC.shape
    mean_C, std_C = (torch.tensor(part).expand(channels) for part in (recipe.mean, recipe.std))
    x_BHWC = torch.from_numpy(np.require(pixels_BHWC, requirements=("C", "W"))).float()
    # Whole rows at once: three numbers at a time would leave most of a vector unit idle.
    rows = x_BHWC.view(-1, width * channels)
    rows.mul_((1 / (255 * std_C)).repeat(width)).sub_((mean_C / std_C).repeat(width))
    return x_BHWC.permute(0, 3, 1, 2), torch.from_numpy(np.require(labels, requirements="W"))
