"""One fragment, from encoded images to a committed object. READ THIS FIRST.

The way of one image: `load` fetches its bytes, `segment` decodes, cuts, packs, predicts, stitches
and measures it, `store` commits its fragment. Each line of `segment` is one file of this package.
Here one process runs the legs (`run_here`, some threads, a fragment each); a cluster runs the
same three legs, only further apart (pipeline/cluster.py). An image ends in one place: a
`MeasuredMask` or a `RejectedImage`, both rows of the object that commits its fragment.
"""

import hashlib
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar, cast

import pyarrow.parquet as pq

from pipeline import formats
from pipeline.batch import pack
from pipeline.careful import segment_carefully
from pipeline.config import Compute, SegmentConfig
from pipeline.decode import DecodeLimits, decode
from pipeline.errors import ImageRejected, Reason
from pipeline.fragment import assemble
from pipeline.infer import Segmenter
from pipeline.large import LargeMask
from pipeline.ledger import Ledger
from pipeline.measure import (
    MaskSink,
    MeasuredMask,
    RejectedImage,
    SlotMask,
    image_row,
    measure,
    rejected_row,
    stat_rows,
    tables,
)
from pipeline.plan import path_of_round, read_fragment
from pipeline.records import EncodedImage, Pixels, PlannedImage, Verdict
from pipeline.storage import Store, open_store
from pipeline.tile import Grid, Picture, cut, stitch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Task:
    """A fragment to be done: where its plan lies."""

    fragment: int
    round: int
    row_group: int
    images: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a fragment."""

    fragment: int
    done: int
    rejected: int
    pixels: int
    bytes_in: int
    bytes_out: int
    seconds: dict[str, float] = field(default_factory=dict)
    adopted: bool = False
    """Another writer's object was there first; the counts are ours, the truth is its header."""


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """All that the legs need; made from the run folder alone, on any machine."""

    ledger: Ledger
    source: Store
    config: SegmentConfig
    grid: Grid

    @classmethod
    def open(cls, run_uri: str, compute: Compute) -> "Line":
        """The line of an existing run."""
        ledger = Ledger.open(open_store(run_uri))
        config = ledger.config.model_copy(update={"compute": compute})
        return cls(ledger, open_store(config.source), config, ledger.grid)

    def segmenter(self) -> Segmenter:
        """The run's own copy of its model, on this machine's device."""
        return Segmenter(*self.ledger.bundle_files(), self.config.compute.device)

    def images(self, task: Task) -> list[PlannedImage]:
        """The planned images of a fragment."""
        with self.ledger.plan_file(path_of_round(task.round)) as file:
            return read_fragment(pq.ParquetFile(file), task.row_group)


# ------------------------------------------------------------------------------------------- legs


def load(images: Sequence[PlannedImage], line: Line) -> Iterator[EncodedImage]:
    """Fetch encoded bytes: the leg that waits for the network. One answer per image, in order."""
    hopeless = {image.image_id: image for image in images if image.problem}
    wanted = [image for image in images if not image.problem]
    fetched = iter(_fetched(wanted, line))
    for image in images:
        if image.image_id in hopeless:
            reason, _, detail = (image.problem or "").partition(": ")
            yield EncodedImage(image, None, Verdict("plan", cast("Reason", reason), detail))
        else:
            yield next(fetched)


def _fetched(images: Sequence[PlannedImage], line: Line) -> Iterator[EncodedImage]:
    threads, limit = line.config.compute.fetch_threads, line.config.decode.max_bytes
    start = 0
    while start < len(images):
        end = start + 1
        while end < len(images) and images[end].format == images[start].format:
            end += 1
        yield from formats.load(images[start].format).fetch(
            line.source, images[start:end], threads, limit
        )
        start = end


def segment(
    encoded: Iterable[EncodedImage],
    line: Line,
    segmenter: Segmenter,
    clock: "Clock",
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
    pictures = decoded(encoded, line, aside, layout.slots if slots is None else slots)
    tiles = cut(clock.over("decode", pictures), line.grid)
    batches = pack(
        tiles, line.ledger.budget, line.config.batch.window_mb * 1024**2, line.grid.stride
    )
    answers = segmenter.predict(batches, layout.confidence)
    finish = partial(segmenter.finish, confidence=layout.confidence)
    strips = stitch(clock.over("predict", answers), line.grid, finish)
    yield from clock.over("measure", measure(strips, sink_for))
    yield from aside


def attempt(
    task: Task, encoded: Iterable[EncodedImage], line: Line, segmenter: Segmenter, clock: "Clock"
) -> Iterator[MeasuredMask | RejectedImage]:
    """`segment`; where an earlier attempt did not end, image by image in a child process."""
    if line.ledger.begin_attempt(task.fragment) == 0:
        return segment(encoded, line, segmenter, clock)
    return segment_carefully(encoded, line, line.ledger.layout.slots)


def store(task: Task, object_bytes: bytes, line: Line) -> bool:
    """Commit a fragment; False if another attempt was first (its object is the truth)."""
    return line.ledger.commit(task.fragment, object_bytes)


# ----------------------------------------------------------------------------------- decode ahead


def decoded(
    encoded: Iterable[EncodedImage], line: Line, aside: list[RejectedImage], left: int
) -> Iterator[Picture]:
    """Pictures in plan order, decoded a little ahead in threads; the others go aside."""
    limits = DecodeLimits(
        max_bytes=line.config.decode.max_bytes, max_pixels=line.config.decode.max_pixels
    )
    layout = line.ledger.layout
    for item, digest, outcome in _ahead(encoded, limits, line.config.compute.decode_threads):
        size = None if item.data is None else len(item.data)
        if isinstance(outcome, Verdict):
            aside.append(RejectedImage(item.plan, outcome, size, digest))
            continue
        need = layout.slots_for(outcome.height, outcome.width)
        large = need is None or need > min(left, max(1, layout.slots // 4))
        left -= 0 if large or need is None else need
        rows, columns = line.grid.offsets(outcome.height), line.grid.offsets(outcome.width)
        yield Picture(item.plan, outcome, size or 0, digest or "", large, rows, columns)


Decoded = tuple[EncodedImage, str | None, Pixels | Verdict]


def _ahead(
    encoded: Iterable[EncodedImage], limits: DecodeLimits, threads: int
) -> Iterator[Decoded]:
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[Future[Decoded]] = deque()
        for item in encoded:
            waiting.append(pool.submit(_decoded, item, limits))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _decoded(item: EncodedImage, limits: DecodeLimits) -> Decoded:
    if item.data is None:
        return item, None, item.verdict or Verdict("fetch", "unreadable", "no bytes came")
    digest = hashlib.sha256(item.data).hexdigest()
    try:
        return item, digest, decode(item.data, limits)
    except ImageRejected as verdict:
        return item, digest, Verdict(verdict.station, verdict.reason, verdict.detail)


# --------------------------------------------------------------------------------- the fragment


def object_of(
    task: Task, results: Iterable[MeasuredMask | RejectedImage], line: Line
) -> tuple[bytes, Receipt]:
    """The fragment's one object, and what is in it."""
    layout, version = line.ledger.layout, line.ledger.model_version
    ids = [entry["id"] for entry in line.ledger.classes]
    ordered = sorted(results, key=lambda result: result.plan.image_id)
    rows, stats, frames, slots, certainty = [], [], [], [], []
    offset = pixels = 0
    first = ordered[0].plan.image_id if ordered else 0
    for result in ordered:
        if isinstance(result, RejectedImage):
            rows.append(rejected_row(result, version))
            continue
        place: dict[str, object] = {"path": result.path}
        if result.path is None:
            slot = result.plan.image_id - first if layout.kind == "stacked" else len(slots)
            sizes = [len(frame) for frame in result.frames]
            place = {"byte_offset": offset, "byte_nbytes": sizes}
            number = task.fragment * layout.slots + slot
            place |= (
                {"mask_index": number}
                if layout.kind == "stacked"
                else {"pixel_start": number * layout.slot}
            )
            slots += range(slot, slot + len(sizes))
            frames += result.frames
            certainty += result.confidence_frames
            offset += sum(sizes)
        rows.append(image_row(result, version, place))
        stats += stat_rows(result, ids)
        pixels += result.height * result.width
    about = {
        "fragment": task.fragment,
        "round": task.round,
        "token": uuid.uuid4().hex,
        "written": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "n_done": sum(row["status"] == "done" for row in rows),
        "n_rejected": sum(row["status"] == "rejected" for row in rows),
        "n_pixels": pixels,
        "model_version": version,
    }
    if layout.confidence:
        slots, frames = slots + [layout.slots + s for s in slots], frames + certainty
    data = assemble(about, *tables(rows, stats), frames, slots, layout.index_entries)
    bytes_in = sum(row["input_bytes"] or 0 for row in rows)
    return data, Receipt(
        task.fragment, about["n_done"], about["n_rejected"], pixels, bytes_in, len(data)
    )


class Clock:
    """Seconds per leg of one fragment, each without the legs that feed it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def over(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Items, with the time it takes to make them booked under a name."""
        source = iter(items)
        while True:
            self._inner.append(0.0)
            start = time.perf_counter()
            item = next(source, _END)
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent
            if item is _END:
                return
            yield cast("T", item)


_END = object()


def run_fragment(task: Task, line: Line, segmenter: Segmenter) -> Receipt | None:
    """All three legs in this thread; None if the fragment is committed already."""
    if line.ledger.is_committed(task.fragment):
        return None
    clock = Clock()
    encoded = list(clock.over("load", load(line.images(task), line)))
    data, receipt = object_of(task, attempt(task, encoded, line, segmenter, clock), line)
    start = time.perf_counter()
    mine = store(task, data, line)
    seconds = {**clock.seconds, "store": time.perf_counter() - start}
    return replace(receipt, seconds=seconds, adopted=not mine)


def run_here(
    tasks: Iterable[Task], line: Line, segmenter: Segmenter, workers: int, stop: threading.Event
) -> Iterator[Receipt]:
    """Every fragment in this process, ``workers`` at a time; after ``stop`` those in flight."""
    todo = iter(tasks)
    flying: set[Future[Receipt | None]] = set()
    with ThreadPoolExecutor(workers, thread_name_prefix="segment") as pool:
        while True:
            while (
                len(flying) < workers
                and not stop.is_set()
                and (task := next(todo, None)) is not None
            ):
                flying.add(pool.submit(run_fragment, task, line, segmenter))
            if not flying:
                return
            landed, flying = wait(flying, return_when=FIRST_COMPLETED)
            for future in landed:
                if (receipt := future.result()) is not None:
                    yield receipt


Runner = Callable[[Iterable[Task], threading.Event], Iterator[Receipt]]
"""Whatever turns tasks into receipts: this process, or a cluster."""
