"""Where a padded picture ends, told to the layers that would look across its edge.

Shapes: B batch, C channels, H W any grid, sizes_B2 valid height and width on that grid.
"""

import torch
from torch import Tensor


def inside(sizes_B2: Tensor, height: int, width: int) -> Tensor:
    """inside_BHW, True where an item has content."""
    rows_H = torch.arange(height, device=sizes_B2.device)
    columns_W = torch.arange(width, device=sizes_B2.device)
    rows_BH1 = (rows_H < sizes_B2[:, :1]).unsqueeze(2)
    columns_B1W = (columns_W < sizes_B2[:, 1:]).unsqueeze(1)
    return rows_BH1 & columns_B1W


def cleared(x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
    """The same, with zeros outside of each item: what the layer would see around it alone.

    Not a product: the padding may hold NaN, and NaN times zero is NaN.
    """
    if sizes_B2 is None:
        return x_BCHW
    outside_B1HW = ~inside(sizes_B2, *x_BCHW.shape[-2:]).unsqueeze(1)
    return x_BCHW.masked_fill(outside_B1HW, 0.0)
