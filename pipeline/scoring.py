"""Labelled pictures through the same legs as any run (run.py), and a comparison at the end.

What is measured is what runs: the same decoding, tiles, batches and stitching. A picture's mask is
compared with its labels and forgotten; what is left of it is a row of counts. A whole picture that
has a class counts as one pixel of it.

Shapes: H, W of the upright picture; K classes in the ontology's order.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from models.training.scores import Boundary, Calibration, Confusion
from pipeline.batch import Batch
from pipeline.classify import classified
from pipeline.clock import Clock
from pipeline.config import SegmentConfig
from pipeline.infer import Segmenter
from pipeline.labels import LabelledItem, Loader
from pipeline.layout import N_SLOTS, Layout
from pipeline.line import Line
from pipeline.measure import RejectedImage
from pipeline.pictures import decoded
from pipeline.records import Array, EncodedImage, Receipt, Verdict
from pipeline.rejections import REJECTED
from pipeline.run import load, masked
from pipeline.scoretable import BOUNDARY, EVALUATION
from pipeline.tile import Picture, Rows, Strip, TileAnswer
from pipeline.unwritten import unwritten

SLOT = 2**22  # nothing is stored; pictures only must not count as too large for their fragment

ROWS = pa.schema([*EVALUATION, *BOUNDARY, pa.field("miou", pa.float64())])
"""What the gate reads, borders, and the mean IoU of the classes that are labelled in the image."""


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """A picture, what it is and what the model says."""

    item: LabelledItem
    picture: Picture
    labels_HW: Array
    """Class indexes; the ontology's `ignored` where nothing is to be found. 1 x 1: the class of the
    whole picture."""
    answers_HW: Array
    """Of the same kind."""
    sure_HW: Array
    """Confidence, uint8."""
    seconds: float
    """Of the model: of one core, or of the GPU."""

    @property
    def pixels(self) -> int:
        """Of the upright picture."""
        upright = self.picture.upright or (self.picture.pixels.height, self.picture.pixels.width)
        return upright[0] * upright[1]


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What is left of some pictures."""

    rows: pa.Table
    rejected: pa.Table
    confusion_KK: Array
    receipt: Receipt


class Scorer:
    """Compares what a model says with what is true; used by several threads."""

    def __init__(self, line: Line, loader: Loader, segmenter: Segmenter, border: float) -> None:
        """Made where the pictures are answered.

        Args:
            line: how pictures are decoded, cut and packed.
            loader: reads the masks.
            segmenter: the model; its classes have the names of the ontology's.
            border: how far a border may be off (`scores.Boundary.width`).
        """
        self._line, self._loader, self._segmenter = line, loader, segmenter
        self._border = border
        self.device = segmenter.device.type
        self._names = loader.ontology.names
        self._place = np.full(int(np.iinfo(segmenter.dtype).max) + 1, loader.ontology.ignored)
        for entry in segmenter.bundle.classes:
            self._place[entry.id] = self._names.index(entry.name)
        self._place = self._place.astype(loader.ontology.dtype)
        # On a GPU a thread would count the time it waits for the others.
        self._turn = nullcontext() if self.device == "cpu" else threading.Lock()

    def __call__(self, items: Sequence[LabelledItem]) -> Scored:
        """Answer and compare these pictures."""
        clock, aside, rows = Clock(), list[RejectedImage](), list[dict[str, object]]()
        together, pixels = self._confusion(), 0
        for answered in self.answers(items, aside, clock):
            own = self._confusion()
            own.add(answered.labels_HW, answered.answers_HW)
            together.counts_KK += own.counts_KK
            pixels += answered.pixels
            rows.append(self._row(answered, own))
        self._segmenter.between_fragments()
        keys = {item.image.image_id: item.key for item in items}
        rejected = [
            {
                "key": keys[one.plan.image_id],
                "station": one.verdict.station,
                "reason": one.verdict.reason,
                "detail": one.verdict.detail,
            }
            for one in aside
        ]
        receipt = Receipt(0, len(rows), len(aside), pixels, 0, 0, clock.seconds)
        return Scored(
            pa.Table.from_pylist(rows, ROWS),
            pa.Table.from_pylist(rejected, REJECTED),
            together.counts_KK,
            receipt,
        )

    def _confusion(self) -> Confusion:
        return Confusion(len(self._names), self._loader.ontology.ignored)

    # ---------------------------------------------------------------------------------- answering

    def answers(
        self, items: Sequence[LabelledItem], aside: list[RejectedImage], clock: Clock
    ) -> Iterator[Answered]:
        """Pictures with labels and answers, each as soon as it is whole.

        Args:
            items: a fragment.
            aside: takes the pictures that cannot be answered.
            clock: books the seconds.
        """
        line = self._line
        threads = line.config.compute.fetch_threads
        encoded = list(clock.over("load", load([item.image for item in items], line)))
        masks = list(clock.over("load", self._loader.encoded_masks(items, threads)))
        known = {one[0].image.image_id: one for one in zip(items, masks, strict=True)}
        timed = _Timed(self._segmenter, self._turn)
        if self._segmenter.bundle.task == "classify":
            yield from self._classes(encoded, known, timed, aside, clock)
            return
        left, threads = line.ledger.layout.slots, line.decoders(self._segmenter.device.type)
        pictures = decoded(encoded, line, aside, left, clock, threads)
        strips = masked(pictures, line, timed.predict, timed.finish, clock)
        for picture, rows in _whole(strips, aside):
            seconds = timed.seconds.pop(picture.plan.image_id)
            yield self._answered(*known[picture.plan.image_id], picture, rows, seconds)

    def _classes(
        self,
        encoded: list[EncodedImage],
        known: dict[int, tuple[LabelledItem, EncodedImage]],
        timed: "_Timed",
        aside: list[RejectedImage],
        clock: Clock,
    ) -> Iterator[Answered]:
        """The same, of a classifier."""
        ids = [entry.id for entry in self._segmenter.bundle.classes]
        predict = partial(timed.predict, confidence=False)
        for answer in classified(encoded, self._line, self._segmenter, predict, aside, clock):
            picture = answer.tile.picture
            if answer.probabilities_K is None:
                aside.append(_too_large(picture, answer.failure))
                continue
            item, mask = known[picture.plan.image_id]
            best = int(answer.probabilities_K.argmax())
            yield Answered(
                item,
                picture,
                self._loader.labels(item, mask, (1, 1)),
                self._place[[[ids[best]]]],
                np.rint(255 * answer.probabilities_K[best]).astype(np.uint8).reshape(1, 1),
                timed.seconds.pop(picture.plan.image_id),
            )

    def _answered(
        self,
        item: LabelledItem,
        mask: EncodedImage,
        picture: Picture,
        rows: list[Rows],
        seconds: float,
    ) -> Answered:
        pixels = picture.pixels
        labels_HW = self._loader.labels(item, mask, (pixels.height, pixels.width))
        if pixels.nodata_HW is not None:
            labels_HW[pixels.nodata_HW] = self._loader.ontology.ignored
        answers_HW = self._place[np.concatenate([part.labels_HW for part in rows])]
        sure = [part.confidence_HW for part in rows if part.confidence_HW is not None]
        return Answered(item, picture, labels_HW, answers_HW, np.concatenate(sure), seconds)

    # ----------------------------------------------------------------------------------- comparing

    def _row(self, answered: Answered, confusion: Confusion) -> dict[str, object]:
        labels_HW, answers_HW = answered.labels_HW, answered.answers_HW
        counted_HW = labels_HW != self._loader.ontology.ignored
        calibration = Calibration()
        calibration.add(answered.sure_HW[counted_HW], (labels_HW == answers_HW)[counted_HW])
        count_L, sure_L, right_L = calibration.bins()
        border = Boundary(len(self._names), self._border, self._loader.ontology.ignored)
        border.add(labels_HW, answers_HW)
        miou = confusion.mean_found(confusion.iou_K())
        return {
            "key": answered.item.key,
            "stratum": answered.item.stratum,
            "intersection": np.diag(confusion.counts_KK),
            "labelled": confusion.labelled_K(),
            "answered": confusion.answered_K(),
            "bin_count": count_L,
            "bin_confidence": sure_L,
            "bin_correct": right_L,
            "seconds": answered.seconds,
            "pixels": answered.pixels,
            "boundary_labelled": border.labelled_K,
            "boundary_found": border.found_K,
            "boundary_answered": border.answered_K,
            "boundary_right": border.right_K,
            "miou": None if np.isnan(miou) else miou,
        }


def scorer_of(
    asked: SegmentConfig, bundle: tuple[bytes, bytes], loader: Loader, border: float
) -> Scorer:
    """A scorer with a model of its own, on this machine's device.

    Args:
        asked: what a run over the pictures would be asked for.
        bundle: model.json and weights.safetensors.
        loader: reads the masks.
        border: see `Scorer`.
    """
    segmenter = Segmenter.of(bundle, asked)
    found = segmenter.found(asked.batch.pixels)
    wide = segmenter.dtype != np.uint8
    dtype, fill = ("uint16", 65535) if wide else ("uint8", 255)
    layout = Layout("flat", dtype, fill, N_SLOTS, SLOT, confidence=True)
    line = unwritten(asked, segmenter.bundle, found, layout)
    return Scorer(line, replace(loader, limits=line.limits), segmenter, border)


def _whole(
    strips: Iterable[Strip], aside: list[RejectedImage]
) -> Iterator[tuple[Picture, list[Rows]]]:
    """Pictures with all their rows; what has none goes aside."""
    parts: dict[int, list[Rows]] = defaultdict(list)
    failed: set[int] = set()
    for strip in strips:
        picture, image_id = strip.picture, strip.picture.plan.image_id
        if image_id in failed:
            continue
        if strip.rows is None:
            failed.add(image_id)
            parts.pop(image_id, None)
            aside.append(_too_large(picture, strip.failure))
            continue
        parts[image_id].append(strip.rows)
        if strip.last:
            yield picture, parts.pop(image_id)


def _too_large(picture: Picture, failure: str | None) -> RejectedImage:
    verdict = Verdict("predict", "too_large", failure or "")
    return RejectedImage(picture.plan, verdict, picture.input_bytes, picture.sha256)


class _Timed:
    """A segmenter with a stopwatch: the seconds that each picture takes.

    On a CPU the model has one thread, whose own time does not depend on what else the machine does.
    """

    def __init__(self, segmenter: Segmenter, turn: AbstractContextManager[object]) -> None:
        self._segmenter, self._turn = segmenter, turn
        self._now = time.thread_time if segmenter.device.type == "cpu" else time.perf_counter
        self.seconds: dict[int, float] = defaultdict(float)

    def predict(self, batches: Iterable[Batch], confidence: bool) -> Iterator[TileAnswer]:
        """See `Segmenter.predict`; a batch's time is shared by pixels."""
        for batch in batches:
            with self._turn:
                start = self._now()
                answers = list(self._segmenter.predict([batch], confidence))
                spent = self._now() - start
            pixels = sum(tile.height * tile.width for tile in batch.tiles)
            for tile in batch.tiles:
                share = tile.height * tile.width / pixels
                self.seconds[tile.picture.plan.image_id] += share * spent
            yield from answers

    def finish(
        self,
        picture: Picture,
        scores_KGg: Array,
        g0: int,
        cells: tuple[int, int],
        y0: int,
        y1: int,
        confidence: bool,
    ) -> Rows:
        """See `Segmenter.finish`."""
        start = self._now()
        rows = self._segmenter.finish(picture, scores_KGg, g0, cells, y0, y1, confidence)
        self.seconds[picture.plan.image_id] += self._now() - start
        return rows
