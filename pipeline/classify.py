"""One class for a whole picture: the short way of an image, where the model is a classifier.

A picture is scaled to what the model reads in one pass, in the threads that decode it, and goes
into a batch as one tile; its softmax is its answer. There is no mask, nothing is cut or stitched.

The scale is a rule of the picture's size alone: to the bundle's `input.resize` where there is one,
whatever the picture's shape; else a picture whose longer side exceeds the tile size is scaled down
to it, its shape kept, and a smaller one is read as it is. The filter is a triangle as wide as a
step of the new grid (Pillow's BILINEAR, which does not alias), its answers rounded to whole values.
Transparent pixels are read in the colour they are stored with.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipeline.batch import pack
from pipeline.clock import Clock
from pipeline.line import Line
from pipeline.measure import ClassifiedImage, RejectedImage
from pipeline.pictures import ahead
from pipeline.records import Array, EncodedImage, Pixels, Verdict
from pipeline.tile import Picture, Tile, TileAnswer

if TYPE_CHECKING:
    from pipeline.infer import Segmenter

Size = tuple[int, int]
"""Height and width in pixels."""


def classify(
    encoded: Iterable[EncodedImage], line: Line, segmenter: "Segmenter", clock: Clock
) -> Iterator[ClassifiedImage | RejectedImage]:
    """Encoded images to classes: the segment leg of a classifying run.

    Args:
        encoded: images of one fragment, in plan order.
        line: the run's line.
        segmenter: the model.
        clock: books the seconds.
    """
    aside: list[RejectedImage] = []
    tiles = clock.over(
        "decode", _scaled(encoded, line, aside, segmenter.bundle.input.resize, clock)
    )
    window = line.config.batch.window_mb * 1024**2
    batches = pack(tiles, line.ledger.budget, window, line.grid.align)
    answers = segmenter.predict(batches, confidence=False, saw=clock.saw)
    for answer in clock.over("predict", answers):
        yield _result(answer)
    yield from aside


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


def _scaled(
    encoded: Iterable[EncodedImage],
    line: Line,
    aside: list[RejectedImage],
    resize: Size | None,
    clock: Clock,
) -> Iterator[Tile]:
    """Pictures as the model reads them, each one tile; what is none goes aside."""
    change = partial(_read, resize=resize, longest=line.grid.size)
    for one in ahead(encoded, line, aside, change, clock):
        pixels, upright = one.pixels
        picture = Picture(
            one.plan, pixels, one.input_bytes, one.sha256,
            large=False, rows=(0,), columns=(0,), upright=upright,
        )  # fmt: skip
        yield Tile(picture, 0, 0, pixels.height, pixels.width)


def _read(pixels: Pixels, resize: Size | None, longest: int) -> tuple[Pixels, Size]:
    upright = pixels.height, pixels.width
    return Pixels(scaled(pixels.values_HWC, size_read(upright, resize, longest)), None), upright


def _result(answer: TileAnswer) -> ClassifiedImage | RejectedImage:
    picture = answer.tile.picture
    about = picture.input_bytes, picture.sha256
    if answer.probabilities_K is None:
        verdict = Verdict("predict", "too_large", answer.failure or "")
        return RejectedImage(picture.plan, verdict, *about)
    upright = picture.upright or (picture.pixels.height, picture.pixels.width)
    return ClassifiedImage(picture.plan, *upright, *about, answer.probabilities_K)
