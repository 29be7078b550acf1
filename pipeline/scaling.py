"""At which size a classifier reads a picture, in a run and in training.

The scale is a rule of the picture's size alone: to the bundle's `input.resize` where there is one,
whatever the picture's shape; else a picture whose longer side exceeds the tile size is scaled down
to it, its shape kept, and a smaller one is read as it is. The filter is a triangle as wide as a
step of the new grid (Pillow's BILINEAR, which does not alias), its answers rounded to whole values.
Transparent pixels are read in the colour they are stored with.
"""

import numpy as np
from PIL import Image

from pipeline.records import Array

Size = tuple[int, int]
"""Height and width in pixels."""


def size_read(upright: Size, resize: Size | None, longest: int) -> Size:
    """The size at which a picture is read.

    Args:
        upright: the picture's own.
        resize: the bundle's, if it has one.
        longest: the tile size.
    """
    if resize is not None:
        return resize
    share = min(1.0, longest / max(upright))
    return max(1, round(upright[0] * share)), max(1, round(upright[1] * share))


def scaled(values_HWC: Array, size: Size) -> Array:
    """The same picture at another size, of the same type."""
    if values_HWC.shape[:2] == size:
        return values_HWC
    values = values_HWC[..., 0] if values_HWC.shape[2] == 1 else values_HWC
    deep = values.dtype == np.uint16  # Pillow filters them as floats
    image = Image.fromarray(values.astype(np.float32) if deep else values)
    made = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    made = np.rint(made).astype(np.uint16) if deep else made
    return made.reshape(*size, values_HWC.shape[2])
