"""Encoded images to upright pictures, one by one or a little ahead of the model in threads."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from pipeline.clock import Clock
from pipeline.decode import DecodeLimits, Reads, decode
from pipeline.errors import ImageRejected
from pipeline.headers import probe
from pipeline.line import Line
from pipeline.measure import RejectedImage
from pipeline.records import EncodedImage, Pixels, PlannedImage, Verdict
from pipeline.tile import Picture

T = TypeVar("T")

RGB = 3  # bytes of a pixel; of a gray one 1 or 2. While it works a decoder may have 4 more


@dataclass(frozen=True, slots=True, eq=False)
class Decoded(Generic[T]):
    """A picture, its pixels as they are wanted."""

    plan: PlannedImage
    input_bytes: int
    sha256: str
    pixels: T


Outcome = Decoded[T] | RejectedImage
"""A picture, or why there is none."""


def decoded(
    encoded: Iterable[EncodedImage],
    line: Line,
    aside: list[RejectedImage],
    left: int,
    clock: Clock,
    threads: int,
) -> Iterator[Picture]:
    """Pictures in plan order; what is none goes aside.

    Args:
        encoded: images of one fragment, in plan order.
        line: the run's line.
        aside: takes the rejected ones.
        left: slots the fragment has left; a picture that needs more becomes large.
        clock: books what the threads work.
        threads: see `ahead`.
    """
    layout = line.ledger.layout
    for one in ahead(encoded, line, aside, lambda pixels: pixels, clock, threads):
        pixels = one.pixels
        need = layout.slots_for(pixels.height, pixels.width)
        large = need is None or need > min(left, max(1, layout.slots // 4))
        left -= 0 if large or need is None else need
        rows, columns = line.grid.offsets(pixels.height), line.grid.offsets(pixels.width)
        yield Picture(one.plan, pixels, one.input_bytes, one.sha256, large, rows, columns)


def ahead(
    encoded: Iterable[EncodedImage],
    line: Line,
    aside: list[RejectedImage],
    change: Callable[[Pixels], T],
    clock: Clock,
    threads: int,
    reads: Reads | None = None,
) -> Iterator[Decoded[T]]:
    """Decoded pictures in plan order, with what ``change`` makes of their pixels where they decode.

    Args:
        encoded: images of one fragment, in plan order.
        line: the run's line; its room bounds how far they run ahead.
        aside: takes what is no picture.
        change: of pixels what is wanted.
        clock: books what the threads work.
        threads: that run ahead by a picture each and one. 0: none is decoded before it is asked
            for, by who asks.
        reads: what is read of a picture, which need not be larger (`decode`).
    """
    make = partial(_decoded, limits=line.limits, change=change, reads=reads)
    about = encoded, line, make, clock
    made = _in_threads(*about, threads) if threads else _here(*about)
    with line.room.fragment(), closing(made):
        for outcome in made:
            if isinstance(outcome, RejectedImage):
                aside.append(outcome)
            else:
                yield outcome


def _here(
    encoded: Iterable[EncodedImage],
    line: Line,
    make: Callable[[EncodedImage], Outcome[T]],
    clock: Clock,
) -> Generator[Outcome[T]]:
    for item in encoded:
        need = _nbytes(item, line.limits)
        line.room.take(need, wait=True)
        try:
            outcome = make(item)
            clock.work("decode", 0.0)  # a sign that it is done; its time is booked by who asks
            yield outcome
        finally:
            line.room.give_back(need)  # the next is wanted: this one has been cut


def _in_threads(
    encoded: Iterable[EncodedImage],
    line: Line,
    make: Callable[[EncodedImage], Outcome[T]],
    clock: Clock,
    threads: int,
) -> Generator[Outcome[T]]:
    waiting: deque[tuple[Future[tuple[Outcome[T], float]], int]] = deque()

    def landed() -> Iterator[Outcome[T]]:
        outcome, worked = waiting[0][0].result()
        clock.work("decode", worked)
        yield outcome
        line.room.give_back(waiting.popleft()[1])  # the next is wanted: this one has been cut

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for item in encoded:
                need = _nbytes(item, line.limits)
                while len(waiting) > threads or not line.room.take(need, wait=not waiting):
                    yield from landed()
                waiting.append((pool.submit(_timed, make, item), need))
            while waiting:
                yield from landed()
        finally:
            line.room.give_back(sum(need for _, need in waiting))


def _nbytes(item: EncodedImage, limits: DecodeLimits) -> int:
    """What a picture will take decoded, by its header; 0 for what is not going to be."""
    height, width = probe(item.data or b"") or (0, 0)
    return RGB * height * width if height * width <= limits.max_pixels else 0


def _timed(
    make: Callable[[EncodedImage], Outcome[T]], item: EncodedImage
) -> tuple[Outcome[T], float]:
    start = time.thread_time()
    outcome = make(item)
    return outcome, time.thread_time() - start


def _decoded(
    item: EncodedImage, limits: DecodeLimits, change: Callable[[Pixels], T], reads: Reads | None
) -> Outcome[T]:
    if item.data is None:
        verdict = item.verdict or Verdict("fetch", "unreadable", "no bytes came")
        return RejectedImage(item.plan, verdict)
    size, digest = len(item.data), hashlib.sha256(item.data).hexdigest()
    try:
        return Decoded(item.plan, size, digest, change(decode(item.data, limits, reads)))
    except ImageRejected as error:
        verdict = Verdict(error.station, error.reason, error.detail)
        return RejectedImage(item.plan, verdict, size, digest)
