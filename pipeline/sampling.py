"""A few pictures through the legs of any run, to see what one costs; nothing is kept."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.clock import Clock
from pipeline.config import SegmentConfig
from pipeline.infer import Segmenter
from pipeline.layout import Layout
from pipeline.measure import MeasuredMask, RejectedImage
from pipeline.records import PlannedImage
from pipeline.run import answer, load
from pipeline.unwritten import unwritten


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one picture has cost."""

    image_id: int
    seconds: float
    """Of a worker, while the others work as well: at work, or on a GPU from end to end."""
    pixels: int
    stored: int
    """Bytes of its mask, compressed."""
    rejected: bool


def sampler_of(
    bundle: tuple[bytes, bytes], layout: Layout, asked: SegmentConfig
) -> Callable[[PlannedImage], Sampled]:
    """What measures a picture, with a model of its own, on this machine's device.

    Args:
        bundle: model.json and weights.safetensors.
        layout: where answers would lie.
        asked: what a run would be asked for.
    """
    segmenter = Segmenter.of(bundle, asked)
    found = segmenter.found(asked.batch.pixels)
    line = unwritten(asked, segmenter.bundle, found, layout)

    def sampled(image: PlannedImage) -> Sampled:
        clock, start = Clock(), time.perf_counter()
        loaded = clock.over("load", load([image], line))
        (result,) = answer(loaded, line, segmenter, clock)
        # A run of many keeps its cores at work while it waits, as one picture alone cannot.
        worked, passed = sum(clock.busy.values()), time.perf_counter() - start
        seconds = worked if segmenter.device.type == "cpu" else passed
        if isinstance(result, RejectedImage):
            return Sampled(image.image_id, seconds, 0, 0, rejected=True)
        pixels, stored = result.height * result.width, 0
        if isinstance(result, MeasuredMask):
            stored = sum(map(len, result.frames + result.confidence_frames))
        return Sampled(image.image_id, seconds, pixels, stored, rejected=False)

    return sampled
