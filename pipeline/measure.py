"""A mask's strips into compressed frames and the numbers that go with them.

A mask that fits its fragment's slots is compressed here; a larger one goes region by region to an
array of its own (pipeline/large.py). Both end as a `MeasuredMask`, rows of the two tables. Where a
classifier runs a picture ends as a `ClassifiedImage` (pipeline/classify.py), a row of two others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.fragment import CLASS_STATS, DETAIL, IMAGES, PREDICTIONS, slots_of
from pipeline.layout import Layout
from pipeline.records import Array, PlannedImage, Verdict
from pipeline.tile import Picture, Rows, Strip


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredMask:
    """All that is left of a picture: what the tables say, and frames if it lies in slots."""

    plan: PlannedImage
    height: int
    width: int
    input_bytes: int
    sha256: str
    counts_K: Array
    confidences_K: Array
    seam_score: float | None
    frames: tuple[bytes, ...] = ()
    confidence_frames: tuple[bytes, ...] = ()
    path: str | None = None
    """Where a large image's array lies in the run; None for one in slots."""


@dataclass(frozen=True, slots=True, eq=False)
class ClassifiedImage:
    """All that is left of a picture that a classifier has seen."""

    plan: PlannedImage
    height: int
    width: int
    """Of the upright picture, whatever the model read of it."""
    input_bytes: int
    sha256: str
    probabilities_K: Array
    """float32, in the order of the ontology; they sum to 1."""


@dataclass(frozen=True, slots=True, eq=False)
class RejectedImage:
    """An image that has a reason instead of an answer."""

    plan: PlannedImage
    verdict: Verdict
    input_bytes: int | None = None
    sha256: str | None = None


Result = MeasuredMask | ClassifiedImage | RejectedImage
"""Where every planned image ends."""


class MaskSink(Protocol):
    """Takes the rows of one mask from top to bottom."""

    def add(self, rows: Rows) -> None:
        """The next rows."""
        ...

    def close(self, picture: Picture, seam_score: float | None) -> MeasuredMask:
        """The mask is whole."""
        ...


@dataclass(slots=True)
class SlotMask:
    """A mask that lies in slots of its fragment."""

    layout: Layout
    parts: list[Rows] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        """See `MaskSink.add`."""
        self.parts.append(rows)

    def close(self, picture: Picture, seam_score: float | None) -> MeasuredMask:
        """See `MaskSink.close`."""
        labels = _joined([part.labels_HW for part in self.parts])
        certainty: tuple[bytes, ...] = ()
        if self.layout.confidence:
            sure = [part.confidence_HW for part in self.parts if part.confidence_HW is not None]
            values = _joined(sure).astype(labels.dtype)
            certainty = tuple(slots_of(values, self.layout.slot, self.layout.fill))
        counts, sums = summed(self.parts)
        frames = tuple(slots_of(labels, self.layout.slot, self.layout.fill))
        return measured(
            picture, counts, sums, seam_score, frames=frames, confidence_frames=certainty
        )


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def summed(parts: list[Rows]) -> tuple[Array, Array]:
    """Counts and confidences of several stretches of rows."""
    if len(parts) == 1:
        return parts[0].counts_K, parts[0].confidences_K
    counts, sums = [p.counts_K for p in parts], [p.confidences_K for p in parts]
    return np.sum(counts, axis=0), np.sum(sums, axis=0)


def measured(
    picture: Picture,
    counts_K: Array,
    confidences_K: Array,
    seam_score: float | None,
    **place: Any,  # noqa: ANN401 - fields of MeasuredMask
) -> MeasuredMask:
    """The record of a finished picture; ``place`` is its frames or its path."""
    pixels = picture.pixels
    about = (picture.plan, pixels.height, pixels.width, picture.input_bytes, picture.sha256)
    return MeasuredMask(*about, counts_K, confidences_K, seam_score, **place)


def measure(
    strips: Iterable[Strip], sink_for: Callable[[Picture], MaskSink]
) -> Iterator[MeasuredMask | RejectedImage]:
    """Masks, each as soon as its last strip is there."""
    sinks: dict[int, MaskSink] = {}
    failed: set[int] = set()
    for strip in strips:
        image_id = strip.picture.plan.image_id
        if image_id in failed:
            continue
        if strip.rows is None:
            failed.add(image_id)
            sinks.pop(image_id, None)
            verdict = Verdict("predict", "too_large", strip.failure or "")
            yield RejectedImage(
                strip.picture.plan, verdict, strip.picture.input_bytes, strip.picture.sha256
            )
            continue
        if image_id not in sinks:
            sinks[image_id] = sink_for(strip.picture)
        sinks[image_id].add(strip.rows)
        if strip.last:
            yield sinks.pop(image_id).close(strip.picture, strip.seam_score)


# ----------------------------------------------------------------------------------------- tables


def image_row(mask: MeasuredMask, model_version: str, place: dict[str, Any]) -> dict[str, Any]:
    """The images row of a mask; ``place`` says where it lies."""
    data = int(mask.counts_K.sum())
    return _row(
        mask.plan,
        model_version,
        status="done",
        height=mask.height,
        width=mask.width,
        input_bytes=mask.input_bytes,
        sha256=mask.sha256,
        nodata_pixels=mask.height * mask.width - data,
        seam_score=mask.seam_score,
        mean_confidence=float(mask.confidences_K.sum() / data) if data else None,
        **place,
    )


def classified_row(image: ClassifiedImage, model_version: str) -> dict[str, Any]:
    """The images row of a picture that has a class; it lies in no array."""
    return _row(
        image.plan,
        model_version,
        status="done",
        height=image.height,
        width=image.width,
        input_bytes=image.input_bytes,
        sha256=image.sha256,
        mean_confidence=float(image.probabilities_K.max()),
    )


def prediction_row(image: ClassifiedImage, classes: list[dict[str, Any]]) -> dict[str, Any]:
    """The predictions row of a picture: the first of the most probable classes."""
    first = int(image.probabilities_K.argmax())
    return {
        "image_id": image.plan.image_id,
        "label": classes[first]["id"],
        "name": classes[first]["name"],
        "confidence": float(image.probabilities_K[first]),
        "probabilities": image.probabilities_K.tolist(),
    }


def rejected_row(image: RejectedImage, model_version: str) -> dict[str, Any]:
    """The images row of an image without an answer."""
    verdict = image.verdict
    return _row(
        image.plan,
        model_version,
        status="rejected",
        station=verdict.station,
        reason=verdict.reason,
        detail=verdict.detail,
        input_bytes=image.input_bytes,
        sha256=image.sha256,
    )


def _row(plan: PlannedImage, model_version: str, **values: Any) -> dict[str, Any]:  # noqa: ANN401 - cells
    empty = dict.fromkeys((*IMAGES.names, DETAIL.name))
    named = {
        "image_id": plan.image_id,
        "key": plan.key,
        "uri": plan.uri,
        "etag": plan.etag,
        "fragment": plan.fragment,
        "model_version": model_version,
    }
    return {**empty, **named, **values}


def images_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as the images table of a fragment's header."""
    return pa.Table.from_pylist(rows, IMAGES.append(DETAIL))


def stats_table(masks: Sequence[MeasuredMask], class_ids: list[int]) -> pa.Table:
    """The class_stats of masks: classes that occur in each, fractions of its data pixels."""
    if not masks:
        return CLASS_STATS.empty_table()
    image_N = np.array([mask.plan.image_id for mask in masks], np.int64)
    counts_NK = np.stack([mask.counts_K for mask in masks])
    sums_NK = np.stack([mask.confidences_K for mask in masks])
    n, k = np.nonzero(counts_NK)
    counts, data = counts_NK[n, k], counts_NK.sum(1)[n]
    columns = [image_N[n], np.array(class_ids)[k], counts, counts / data, sums_NK[n, k] / counts]
    return pa.table(
        [
            pa.array(column).cast(kind)
            for column, kind in zip(columns, CLASS_STATS.types, strict=True)
        ],
        CLASS_STATS,
    )


def predictions_table(rows: list[dict[str, Any]]) -> pa.Table:
    """The third table of a classifier's fragment."""
    return pa.Table.from_pylist(rows, PREDICTIONS)
