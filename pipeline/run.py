"""One fragment, from encoded images to a committed object. READ THIS FIRST.

The way of one image: `load` fetches its bytes, `segment` decodes, cuts, packs, predicts, stitches
and measures it, `store` commits its fragment. Each line of `segment` is one file of this package.
Where the model is a classifier `classify` stands in its place (pipeline/classify.py): a class per
picture, no mask.
Here one process runs the legs (`run_here`, some threads, a fragment each); on a cluster each worker
does, beside GPUs with the first leg further away (pipeline/cluster.py). An image ends in one place:
a `MeasuredMask` (or `ClassifiedImage`) or a `RejectedImage`, rows of the object that commits its
fragment.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, cast

from pipeline import formats
from pipeline.batch import pack
from pipeline.careful import segment_carefully
from pipeline.classify import classify
from pipeline.clock import Clock
from pipeline.errors import Reason, RunStuck
from pipeline.fetching import believed
from pipeline.large import LargeMask
from pipeline.line import Line
from pipeline.measure import MaskSink, MeasuredMask, RejectedImage, Result, SlotMask, measure
from pipeline.packing import object_of
from pipeline.pictures import decoded
from pipeline.records import EncodedImage, PlannedImage, Receipt, Task, Verdict
from pipeline.tile import Picture, Rows, Strip, TileAnswer, cut, stitch

if TYPE_CHECKING:
    from pipeline.infer import Segmenter

WATCH_S = 5.0  # how often the watchdog looks


def load(images: Sequence[PlannedImage], line: Line) -> Iterator[EncodedImage]:
    """Fetch encoded bytes: the leg that waits for the network. One answer per image, in order.

    Raises:
        StorageError: the source is not what it was: down, gone, closed to us.
    """
    yield from believed(line.source, _answers(images, line))


def _answers(images: Sequence[PlannedImage], line: Line) -> Iterator[EncodedImage]:
    hopeless = {image.image_id: image for image in images if image.problem}
    wanted = [image for image in images if not image.problem]
    fetched = iter(_fetched(wanted, line))
    for image in images:
        if image.image_id in hopeless:
            reason, _, detail = (image.problem or "").partition(": ")
            yield EncodedImage(image, None, Verdict("plan", cast("Reason", reason), detail))
        else:
            yield next(fetched)
    next(fetched, None)  # lets what was read close in order: a child that reads tables is kept


def _fetched(images: Sequence[PlannedImage], line: Line) -> Iterator[EncodedImage]:
    threads, limit = line.config.compute.fetch_threads, line.config.decode.max_bytes
    for name, group in groupby(images, key=lambda image: image.format):
        yield from formats.load(name, line.config.format).fetch(
            line.source, list(group), threads, limit
        )


def segment(
    encoded: Iterable[EncodedImage],
    line: Line,
    segmenter: "Segmenter",
    clock: Clock,
    slots: int | None = None,
) -> Iterator[MeasuredMask | RejectedImage]:
    """Encoded images to masks: the leg that wants a GPU and the cores beside it.

    Args:
        encoded: images of one fragment, in plan order.
        line: the run's line.
        segmenter: the model.
        clock: books the seconds.
        slots: what is left of the fragment's slots; all of them by default.
    """
    layout, ontology = line.ledger.layout, line.ledger.classes

    def sink_for(picture: Picture) -> MaskSink:
        if not picture.large:
            return SlotMask(layout)
        store = line.ledger.store
        return LargeMask(store, picture, ontology, layout.dtype, layout.fill, layout.confidence)

    aside: list[RejectedImage] = []
    left = layout.slots if slots is None else slots
    threads = line.decoders(segmenter.device.type)
    pictures = decoded(encoded, line, aside, left, clock, threads)
    predict = partial(segmenter.predict, saw=clock.saw)
    strips = masked(pictures, line, predict, segmenter.finish, clock)
    yield from clock.over("measure", measure(strips, sink_for))
    yield from aside


def masked(
    pictures: Iterable[Picture],
    line: Line,
    predict: Callable[..., Iterator[TileAnswer]],
    finish: Callable[..., Rows],
    clock: Clock,
) -> Iterator[Strip]:
    """Pictures to finished rows of their masks; scoring.py compares these instead of keeping them.

    Args:
        pictures: of one fragment.
        line: the run's line.
        predict: see `Segmenter.predict`.
        finish: see `Segmenter.finish`.
        clock: books the seconds.
    """
    confidence, window = line.ledger.layout.confidence, line.config.batch.window_mb * 1024**2
    tiles = cut(clock.over("decode", pictures), line.grid)
    if line.mixer is not None:
        answers = line.mixer.answers(tiles, partial(predict, confidence=confidence))
    else:
        batches = pack(tiles, line.ledger.budget, window, line.grid.align)
        answers = predict(batches, confidence)
    finish = partial(finish, confidence=confidence)
    yield from stitch(clock.over("predict", answers), line.grid, finish)


def answer(
    encoded: Iterable[EncodedImage],
    line: Line,
    segmenter: "Segmenter",
    clock: Clock,
    slots: int | None = None,
) -> Iterator[Result]:
    """`segment`, or `classify` where the run's model is a classifier."""
    if line.ledger.layout.has_masks:
        return segment(encoded, line, segmenter, clock, slots)
    return classify(encoded, line, segmenter, clock)


def attempt(
    task: Task, encoded: Iterable[EncodedImage], line: Line, segmenter: "Segmenter", clock: Clock
) -> Iterator[Result]:
    """`answer`; where an earlier attempt did not end, image by image in a child process."""
    if line.ledger.begin_attempt(task.fragment) == 0:
        return answer(encoded, line, segmenter, clock)
    return clock.over("careful", segment_carefully(encoded, line, line.ledger.layout.slots))


def store(task: Task, object_bytes: bytes, line: Line) -> bool:
    """Commit a fragment; False if another attempt was first (its object is the truth)."""
    return line.ledger.commit(task.fragment, object_bytes)


class Turn:
    """Lets so many fragments into the segment leg at a time; none any more after ``stop``.

    There are more fragments in flight than turns, so that the next one's bytes are there when a
    turn ends, and an object is stored while the next fragment is segmented.
    """

    def __init__(self, workers: int, stopped: Callable[[], bool]) -> None:
        self._free = threading.BoundedSemaphore(workers)
        self._stopped, self._closed = stopped, False

    def __enter__(self) -> bool:
        self._free.acquire()
        return not (self._closed or self._stopped())

    def __exit__(self, *_: object) -> None:
        self._free.release()

    def close(self) -> None:
        """Whoever waits is let in to learn that there is nothing to do any more."""
        self._closed = True


def in_flight(workers: int) -> int:
    """Fragments at a time, where so many are segmented at a time."""
    return workers + workers // 2 + 1


def run_fragment(
    task: Task,
    line: Line,
    segmenter: "Segmenter",
    clock: Clock,
    turn: Turn,
    encoded: Iterable[EncodedImage] | None = None,
) -> Receipt | None:
    """All three legs in this thread; None if there is nothing to do (any more).

    Args:
        task: the fragment.
        line: the run's line.
        segmenter: the model.
        clock: books the seconds.
        turn: when it may be segmented.
        encoded: its images, where somebody has fetched them.
    """
    if line.ledger.is_committed(task.fragment):
        return None
    if encoded is None:
        encoded = list(clock.over("load", load(line.images(task), line)))
    with turn as still_wanted:
        if not still_wanted:
            return None
        results = attempt(task, encoded, line, segmenter, clock)
        data, receipt = object_of(task, results, line, clock)
        segmenter.between_fragments()
    with clock.during("store"):
        mine = store(task, data, line)
    return replace(receipt, **clock.said(), adopted=not mine)


def run_here(
    tasks: Iterable[Task], line: Line, segmenter: "Segmenter", workers: int, stop: threading.Event
) -> Iterator[Receipt]:
    """Every fragment in this process, ``workers`` segmented at a time; after ``stop`` only those.

    Raises:
        RunStuck: if no leg of any fragment hands anything on for ``compute.no_progress_s``.
    """
    todo = iter(tasks)
    turn, most = Turn(workers, stop.is_set), in_flight(workers)
    flying: dict[Future[Receipt | None], Clock] = {}
    pool = ThreadPoolExecutor(most, thread_name_prefix="fragment")
    try:
        while True:
            while len(flying) < most and not stop.is_set() and (task := next(todo, None)):
                clock = Clock()
                flying[pool.submit(run_fragment, task, line, segmenter, clock, turn)] = clock
            if not flying:
                return
            landed, _ = wait(flying, timeout=WATCH_S, return_when=FIRST_COMPLETED)
            for future in landed:
                del flying[future]
                if (receipt := future.result()) is not None:
                    yield receipt
            _watch(flying.values(), line.config.compute.no_progress_s)
    finally:
        turn.close()
        pool.shutdown(wait=not _stuck(flying.values(), line.config.compute.no_progress_s))


def _stuck(clocks: Iterable[Clock], most_s: float) -> bool:
    beats = [clock.beat for clock in clocks]
    return bool(beats) and time.monotonic() - max(beats) > most_s


def _watch(clocks: Iterable[Clock], most_s: float) -> None:
    if _stuck(clocks, most_s):
        raise RunStuck(
            f"nothing has moved for {most_s:g} s (compute.no_progress_s); run the same command "
            "again: each image of the fragments in flight then gets a process and a time limit"
        )
