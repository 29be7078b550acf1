"""One class for a whole picture: the short way of an image, where the model is a classifier.

A picture is scaled to what the model reads in one pass, where it is decoded, and goes into a batch
as one tile; its softmax is its answer. There is no mask, nothing is cut or stitched.
How it is scaled: pipeline/scaling.py.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from pipeline.batch import Batch, pack
from pipeline.clock import Clock
from pipeline.decode import Reads
from pipeline.line import Line
from pipeline.measure import ClassifiedImage, RejectedImage
from pipeline.pictures import ahead
from pipeline.records import EncodedImage, Pixels, Verdict
from pipeline.scaling import Size, scaled, size_read
from pipeline.tile import Picture, Tile, TileAnswer

if TYPE_CHECKING:
    from pipeline.infer import Segmenter

Predict = Callable[[Iterable[Batch]], Iterator[TileAnswer]]
"""Answers to every tile of batches, in their order."""


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
    predict = partial(segmenter.predict, confidence=False, saw=clock.saw)
    for answer in classified(encoded, line, segmenter, predict, aside, clock):
        yield _result(answer)
    yield from aside


def classified(
    encoded: Iterable[EncodedImage],
    line: Line,
    segmenter: "Segmenter",
    predict: Predict,
    aside: list[RejectedImage],
    clock: Clock,
) -> Iterator[TileAnswer]:
    """Encoded images to the model's answers; what cannot be decoded goes aside.

    Args:
        encoded: images of one fragment, in plan order.
        line: the run's line.
        segmenter: the model; its bundle says what it reads.
        predict: its answers.
        aside: takes the images that are none.
        clock: books the seconds.
    """
    tiles = clock.over("decode", _scaled(encoded, line, segmenter, aside, clock))
    window = line.config.batch.window_mb * 1024**2
    batches = pack(tiles, line.ledger.budget, window, line.grid.align)
    return clock.over("predict", predict(batches))


def _scaled(
    encoded: Iterable[EncodedImage],
    line: Line,
    segmenter: "Segmenter",
    aside: list[RejectedImage],
    clock: Clock,
) -> Iterator[Tile]:
    """Pictures as the model reads them, each one tile; what is none goes aside."""
    reads = partial(size_read, resize=segmenter.bundle.input.resize, longest=line.grid.size)
    threads = line.decoders(segmenter.device.type)
    for one in ahead(encoded, line, aside, partial(_read, reads), clock, threads, reads):
        pixels, upright = one.pixels
        picture = Picture(
            one.plan, pixels, one.input_bytes, one.sha256,
            large=False, rows=(0,), columns=(0,), upright=upright,
        )  # fmt: skip
        yield Tile(picture, 0, 0, pixels.height, pixels.width)


def _read(reads: Reads, pixels: Pixels) -> tuple[Pixels, Size]:
    upright = pixels.whole or (pixels.height, pixels.width)
    return Pixels(scaled(pixels.values_HWC, reads(upright)), None), upright


def _result(answer: TileAnswer) -> ClassifiedImage | RejectedImage:
    picture = answer.tile.picture
    about = picture.input_bytes, picture.sha256
    if answer.probabilities_K is None:
        verdict = Verdict("predict", "too_large", answer.failure or "")
        return RejectedImage(picture.plan, verdict, *about)
    upright = picture.upright or (picture.pixels.height, picture.pixels.width)
    return ClassifiedImage(picture.plan, *upright, *about, answer.probabilities_K)
