"""Pictures as rows of patches, and where in the picture each of them lies.

The vector of a patch is channel-major: all pixels of channel 0 row by row, then those of channel 1.
Patches follow each other row by row.

Shapes: B batch, C channels, H W pixels, P side of a patch, h w grid of patches, T = h w tokens,
V = C P P values of a patch, D width, N rows of a table (extra tokens, then T);
cells_B2 height and width of each item on the grid of patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from models.parts.padding import inside

if TYPE_CHECKING:
    from models.parts.folding import Affine
    from models.parts.network import Size

Interpolation = Literal["bilinear", "bicubic"]


def cut(x_BCHW: Tensor, patch: int) -> Tensor:
    """tokens_BTV: the picture in patches; its sides are multiples of theirs."""
    return pixel_unshuffle(x_BCHW, patch).flatten(2).mT


def pasted(tokens_BTV: Tensor, cells: Size, patch: int) -> Tensor:
    """x_BCHW: the picture that `cut` cut, on this grid."""
    return pixel_shuffle(tokens_BTV.mT.unflatten(2, cells), patch)


def as_convolution(affine: Affine, channels: int, patch: int) -> nn.Conv2d:
    """The convolution that cuts patches and puts them through this linear layer, in one."""
    weight_DV, bias_D = affine
    conv = nn.Conv2d(channels, len(weight_DV), patch, stride=patch, device="meta")
    weight_DCPP = weight_DV.detach().unflatten(1, (channels, patch, patch))
    conv.weight = nn.Parameter(weight_DCPP.clone(memory_format=torch.channels_last))
    conv.bias = nn.Parameter(bias_D.detach().clone())
    return conv


def grid_of(x_BCHW: Tensor, sizes_B2: Tensor | None, patch: int) -> tuple[Size, Tensor | None]:
    """The grid of patches of the canvas and cells_B2 of its items; None: all fill it."""
    height, width = x_BCHW.shape[-2:]
    cells_B2 = None if sizes_B2 is None else sizes_B2 // patch
    return (height // patch, width // patch), cells_B2


def readable(
    cells: Size, cells_B2: Tensor | None, *, before: int = 0, after: int = 0
) -> Tensor | None:
    """mask_B11N for attention: True for the patches of an item and for tokens that are no patches.

    None where every token may be read.

    Args:
        cells: the grid of patches.
        cells_B2: what of it belongs to each item.
        before: tokens in front of the patches.
        after: tokens behind them.
    """
    if cells_B2 is None:
        return None
    mask_BN = nn.functional.pad(inside(cells_B2, *cells).flatten(1), (before, after), value=True)
    return mask_BN[:, None, None]


class PositionTable(nn.Module):
    """A learned vector for each place of a grid, stretched to whatever grid a picture has.

    Grids are compared, not token counts: 4 x 16 patches are not 8 x 8. On the grid it was made for,
    the table is passed on as it is. Rows of extra tokens have no place and are never stretched.
    Drawn from N(0, 1); draw again for another start.
    """

    def __init__(
        self, cells: Size, width: int, *, extra: int = 0, interpolation: Interpolation = "bilinear"
    ) -> None:
        super().__init__()
        self.cells, self.extra = cells, extra
        self.interpolation: Interpolation = interpolation
        self.table = nn.Parameter(torch.randn(extra + cells[0] * cells[1], width))

    def forward(self, cells: Size, cells_B2: Tensor | None = None) -> Tensor:
        """positions_BND, B being 1 if all items fill the grid; outside of an item any number."""
        if cells_B2 is None:
            if cells == self.cells:
                return self.table.unsqueeze(0)
            cells_B2 = torch.stack(
                [torch.full((1,), n, device=self.table.device) for n in cells], 1
            )
        places_BTD = self.stretched(cells, cells_B2).flatten(1, 2)
        extra_BND = self.table[: self.extra].expand(len(places_BTD), -1, -1)
        return torch.cat([extra_BND, places_BTD], dim=1)

    def stretched(self, cells: Size, cells_B2: Tensor) -> Tensor:
        """places_BhwD, from shares of old rows and columns that differ from item to item."""
        old_HWD = self.table[self.extra :].unflatten(0, self.cells)
        rows_BhH, columns_BwW = (
            shares(cells_B2[:, axis], cells[axis], self.cells[axis], self.interpolation, old_HWD)
            for axis in (0, 1)
        )
        tall_BhWD = torch.einsum("bhr,rcd->bhcd", rows_BhH, old_HWD)
        return torch.einsum("bwc,bhcd->bhwd", columns_BwW, tall_BhWD)


def shares(
    lengths_B: Tensor, longest: int, old: int, interpolation: Interpolation, like: Tensor
) -> Tensor:
    """shares_BLO: how much each new place takes of each old one when `old` become `length` places.

    As `torch.nn.functional.interpolate` has it, with half-pixel centres and the border repeated;
    but every item may have its own length, and none has to leave the device.
    """
    kind = torch.promote_types(like.dtype, torch.float32)
    place_L = torch.arange(longest, dtype=kind, device=like.device)
    source_BL = (place_L + 0.5) * (old / lengths_B.to(kind)[:, None]) - 0.5
    reach, kernel = KERNELS[interpolation]
    step_X = torch.arange(1 - reach, 1 + reach, device=like.device)
    tap_BLX = source_BL.floor()[:, :, None] + step_X
    weight_BLX = kernel((source_BL[:, :, None] - tap_BLX).abs())
    old_O = torch.arange(old, device=like.device)
    taken_BLXO = tap_BLX.clamp(0, old - 1)[..., None] == old_O
    return (weight_BLX[..., None] * taken_BLXO).sum(2).to(like.dtype)


def linear_kernel(distance: Tensor) -> Tensor:
    """The nearer of two neighbours counts for more."""
    return 1 - distance


def cubic_kernel(distance: Tensor) -> Tensor:
    """Keys' kernel over four neighbours, with torch's slope of -0.75."""
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance <= 1, near, far)


KERNELS = {"bilinear": (1, linear_kernel), "bicubic": (2, cubic_kernel)}
"""How many neighbours to each side count, and how much by their distance."""
