"""From stored pixels to the numbers a model reads: clipped, gray where it wants gray, normalised.

On a CPU tile by tile, straight into the batch. To a GPU a batch goes as it is stored, in a quarter
of the bytes and in one copy, and is normalised there. Around a tile lies 0, the mean.

Shapes: B batch, H W padded pixels, C channels, X width times channels.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from models.parts import kernels
from models.parts.bundle import InputInfo
from models.parts.padding import cleared
from pipeline.records import Array
from pipeline.tile import Tile

_AS_TENSOR = {"uint8": torch.uint8, "uint16": torch.int32, "float32": torch.float32}
"""What a GPU is sent; torch knows few operations for uint16."""

WIDTHS = 32  # of pictures whose factors are kept: 24 KB each at 1000 pixels, 480 at 20,000


def factors(about: InputInfo, kind: np.dtype) -> tuple[Array, Array]:
    """scale_C and shift_C, float32: stored values times the one, plus the other, are normalised."""
    lo, hi = _range(about, kind) or (0, np.iinfo(np.uint8 if kind.kind == "f" else kind).max)
    std_C = np.asarray(about.std)
    scale_C = 1 / ((hi - lo) * std_C)
    shift_C = -(lo / (hi - lo) + np.asarray(about.mean)) / std_C
    return scale_C.astype(np.float32), shift_C.astype(np.float32)


def _range(about: InputInfo, kind: np.dtype) -> tuple[float, float] | None:
    return about.range if kind == np.uint16 else None  # 8 bits are 0 to 255


def admitted(values_HWC: Array, about: InputInfo) -> Array:
    """Values within the model's range, of one channel where it reads one."""
    own = _range(about, values_HWC.dtype)
    if own is not None:
        values_HWC = np.clip(values_HWC.astype(np.float32), *own)
    if about.channels == 1 and values_HWC.shape[2] == 3:
        values_HWC = _luma(values_HWC)
    return values_HWC


def _luma(values_HWC: Array) -> Array:
    """ITU-R 601-2 luma, as Pillow converts RGB to L."""
    return (values_HWC @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None]


def on_host(
    tiles: Sequence[Tile], about: InputInfo, number: torch.dtype, height: int, width: int
) -> torch.Tensor:
    """x_BCHW of a batch on the CPU."""
    x_BHWC = torch.empty((len(tiles), height, width, about.channels), dtype=number)
    x_BHX = x_BHWC.flatten(2)
    for i, tile in enumerate(tiles):
        scale_X, shift_X = _factors_of_rows(about, tile.values_HWC.dtype, tile.width)
        values_HWC = admitted(tile.values_HWC, about)
        if _compiled(values_HWC, about, number):
            x_HX = x_BHX.numpy()[i]  # torch takes ten times as long to name a part
            inside_HX = x_HX[: tile.height, : len(scale_X)]
            kernels.feed(values_HWC.reshape(tile.height, -1), scale_X, shift_X, inside_HX)
        else:
            x_HX = x_BHX[i]
            inside_HX = x_HX[: tile.height, : len(scale_X)]
            floats_HWC = torch.from_numpy(values_HWC.astype(np.float32))
            floats_HX = floats_HWC.expand(-1, -1, about.channels).flatten(1)
            scale, shift = torch.from_numpy(scale_X), torch.from_numpy(shift_X)
            inside_HX.copy_(torch.addcmul(shift, floats_HX, scale))
        x_HX[: tile.height, len(scale_X) :] = 0
        x_HX[tile.height :] = 0
    return x_BHWC.permute(0, 3, 1, 2)


@lru_cache(maxsize=WIDTHS)
def _factors_of_rows(about: InputInfo, kind: np.dtype, width: int) -> tuple[Array, Array]:
    """scale_X and shift_X: by rows of all channels, for three values would be a short loop."""
    scale_C, shift_C = factors(about, kind)
    return np.tile(scale_C, width), np.tile(shift_C, width)


def _compiled(values_HWC: Array, about: InputInfo, number: torch.dtype) -> bool:
    """Whether C can do it: 8 bits to float32, as many channels as the model reads."""
    return (
        kernels.LIBRARY is not None
        and values_HWC.dtype == np.uint8
        and values_HWC.shape[2] == about.channels
        and number == torch.float32
    )


def staged(
    tiles: Sequence[Tile], about: InputInfo, height: int, width: int, *, pinned: bool
) -> torch.Tensor:
    """stored_BHWC of tiles of one kind, to be copied to a GPU; around each lies anything."""
    first = admitted(tiles[0].values_HWC, about)
    stored_BHWC = torch.empty(
        (len(tiles), height, width, first.shape[2]),
        dtype=_AS_TENSOR[first.dtype.name],
        pin_memory=pinned,
    )
    if first.dtype.kind == "f":
        stored_BHWC.zero_()  # anything may be no number
    for i, tile in enumerate(tiles):
        values_HWC = first if i == 0 else admitted(tile.values_HWC, about)
        stored_BHWC[i, : tile.height, : tile.width].numpy()[...] = values_HWC
    return stored_BHWC


def normalised(
    stored_BHWC: torch.Tensor,
    scale_C: torch.Tensor,
    shift_C: torch.Tensor,
    sizes_B2: torch.Tensor | None,
    number: torch.dtype,
) -> torch.Tensor:
    """x_BCHW of a staged batch, where it is; `sizes_B2` if not every tile fills the shape."""
    x_BHWC = torch.addcmul(shift_C, stored_BHWC.to(torch.float32), scale_C).to(number)
    return cleared(x_BHWC.permute(0, 3, 1, 2), sizes_B2)
