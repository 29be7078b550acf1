"""Masks (or classes) and rejections of a fragment into the one object that commits it."""

import uuid
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

from pipeline.clock import Clock, peak_memory_mb
from pipeline.fragment import assemble
from pipeline.line import Line
from pipeline.measure import (
    ClassifiedImage,
    RejectedImage,
    Result,
    classified_row,
    image_row,
    images_table,
    prediction_row,
    predictions_table,
    rejected_row,
    stats_table,
)
from pipeline.records import Receipt, Task


def object_of(
    task: Task, results: Iterable[Result], line: Line, clock: Clock
) -> tuple[bytes, Receipt]:
    """The fragment's one object, and what is in it."""
    ordered = sorted(results, key=lambda result: result.plan.image_id)
    with clock.during("pack"):
        data, receipt = _packed(task, ordered, line)
    return data, replace(receipt, **clock.said(), peak_mb=peak_memory_mb())


def _packed(task: Task, ordered: list[Result], line: Line) -> tuple[bytes, Receipt]:
    layout, version = line.ledger.layout, line.ledger.model_version
    ids = [entry["id"] for entry in line.ledger.classes]
    rows, masks, frames, slots, certainty, predictions = [], [], [], [], [], []
    offset = pixels = 0
    first = ordered[0].plan.image_id if ordered else 0
    for result in ordered:
        if isinstance(result, RejectedImage):
            rows.append(rejected_row(result, version))
            continue
        pixels += result.height * result.width
        if isinstance(result, ClassifiedImage):
            rows.append(classified_row(result, version))
            predictions.append(prediction_row(result, line.ledger.classes))
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
        masks.append(result)
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
    third = None if layout.has_masks else predictions_table(predictions)
    first_two = images_table(rows), stats_table(masks, ids)
    data = assemble(about, *first_two, frames, slots, layout.index_entries, third)
    bytes_in = sum(row["input_bytes"] or 0 for row in rows)
    return data, Receipt(
        task.fragment, about["n_done"], about["n_rejected"], pixels, bytes_in, len(data)
    )
