"""A mask too large for slots: its own pyramid, committed region by region while it is made.

A region of level 0 is one create-only object that carries its counts; whoever comes second adopts
the first one's, so the statistics always belong to the pixels that are there. Levels 1 to 3 are
made from the committed pixels and may be written any number of times.
"""

import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.fragment import (
    CLASS_STATS,
    EMPTY,
    IMAGES,
    FragmentDamaged,
    assemble,
    check_data,
    compress,
    decompress,
    read_header,
    read_index,
)
from pipeline.layout import INNER, LEVELS, REGION, large_array_json, large_group_json, large_path
from pipeline.measure import MeasuredMask, measured
from pipeline.records import Array
from pipeline.storage import Store
from pipeline.tile import Picture, Rows


@dataclass(slots=True)
class LargeMask:
    """Takes rows from top to bottom and writes whole bands of regions."""

    store: Store
    picture: Picture
    classes: list[dict[str, Any]]
    dtype: str
    fill: int
    confidence: bool
    kept: list[Rows] = field(default_factory=list)
    band: int = 0
    counts_K: Array = field(init=False)
    confidences_K: Array = field(init=False)

    def __post_init__(self) -> None:
        self.counts_K = np.zeros(len(self.classes), np.int64)
        self.confidences_K = np.zeros(len(self.classes))
        path, pixels = large_path(self.picture.plan.image_id), self.picture.pixels
        self.store.replace(
            f"{path}/zarr.json", large_group_json(self.classes, self.fill, self.picture.plan.uri)
        )
        for level in range(LEVELS):
            about = large_array_json(pixels.height, pixels.width, level, self.dtype, self.fill)
            self.store.replace(f"{path}/{level}/zarr.json", about)
        if self.confidence:
            about = large_array_json(pixels.height, pixels.width, 0, "uint8", 0)
            self.store.replace(f"{path}/confidence/zarr.json", about)

    def add(self, rows: Rows) -> None:
        """See `pipeline.measure.MaskSink`."""
        self.kept.append(rows)
        while sum(len(part.labels_HW) for part in self.kept) >= REGION:
            self._write_band(REGION)

    def close(self, picture: Picture, seam_score: float | None) -> MeasuredMask:
        """See `pipeline.measure.MaskSink`."""
        left = sum(len(part.labels_HW) for part in self.kept)
        if left:
            self._write_band(left)
        path = large_path(picture.plan.image_id)
        return measured(picture, self.counts_K, self.confidences_K, seam_score, path=path)

    def _write_band(self, height: int) -> None:
        labels = np.concatenate([part.labels_HW for part in self.kept])
        # A large picture is always asked for its confidences: its statistics come from them.
        certainties = (part.confidence_HW for part in self.kept)
        sure = np.concatenate([part for part in certainties if part is not None])
        self.kept = (
            [Rows(labels[height:], sure[height:], *_nothing)] if len(labels) > height else []
        )
        for column in range(-(-labels.shape[1] // REGION)):
            across = slice(column * REGION, (column + 1) * REGION)
            self._write_region(column, labels[:height, across], sure[:height, across])
        self.band += 1

    def _write_region(self, column: int, labels: Array, sure: Array) -> None:
        path = large_path(self.picture.plan.image_id)
        ids = [entry["id"] for entry in self.classes]
        counts = [int((labels == k).sum()) for k in ids]
        # Confidence is summed from its stored form (1/255 steps), region by region.
        sums = [float(sure[labels == k].sum(dtype=np.int64) / 255) for k in ids]
        about = {"image_id": self.picture.plan.image_id, "region": [self.band, column]}
        about |= {"counts": counts, "confidences": sums, "token": uuid.uuid4().hex}
        key = f"c/{self.band}/{column}"
        mine = self.store.create(f"{path}/0/{key}", region_bytes(labels, REGION, self.fill, about))
        if not mine:
            labels, about = committed_region(
                self.store, f"{path}/0/{key}", labels.shape, self.dtype, self.fill
            )
        for level in range(1, LEVELS):
            step = 2**level
            part = region_bytes(labels[::step, ::step], REGION // step, self.fill, {})
            self.store.replace(f"{path}/{level}/{key}", part)
        if self.confidence and (mine or self.store.stat(f"{path}/confidence/{key}") is None):
            self.store.replace(f"{path}/confidence/{key}", region_bytes(sure, REGION, 0, {}))
        self.counts_K += np.array(about["counts"])
        self.confidences_K += np.array(about["confidences"])


_nothing = (np.zeros(0), np.zeros(0))  # counts of kept rows are taken when their region is written


def region_bytes(labels: Array, side: int, fill: int, about: dict[str, Any]) -> bytes:
    """A square shard of inner chunks; positions outside of the labels hold the fill value."""
    inner = min(INNER, side)
    across = side // inner
    frames, slots = [], []
    for y in range(0, labels.shape[0], inner):
        for x in range(0, labels.shape[1], inner):
            part = labels[y : y + inner, x : x + inner]
            chunk = np.full((inner, inner), fill, labels.dtype)
            chunk[: part.shape[0], : part.shape[1]] = part
            frames.append(compress(chunk))
            slots.append(y // inner * across + x // inner)
    tables = IMAGES.empty_table(), CLASS_STATS.empty_table()
    return assemble(about, *tables, frames, slots, across * across)


def committed_region(
    store: Store, path: str, shape: tuple[int, ...], dtype: str, fill: int, level: int = 0
) -> tuple[Array, dict[str, Any]]:
    """Pixels and header facts of a region, checked.

    Args:
        store: the run folder.
        path: the region's object.
        shape: its height and width, in pixels of its level.
        dtype: of its pixels.
        fill: where there are none.
        level: 0 is a commit, the others are made from it.

    Raises:
        FragmentDamaged: naming the object.
    """
    data = store.read(path)
    try:
        header = read_header(data)
        check_data(data, header)
        side = REGION // 2**level
        inner = min(INNER, side)
        across = side // inner
        pixels = np.full((side, side), fill, dtype)
        for slot, (offset, nbytes) in enumerate(read_index(data, across * across).tolist()):
            if nbytes != EMPTY:
                y, x = slot // across * inner, slot % across * inner
                block = decompress(memoryview(data)[offset : offset + nbytes], dtype)
                pixels[y : y + inner, x : x + inner] = block.reshape(inner, inner)
    except FragmentDamaged as error:
        raise FragmentDamaged(f"{path}: {error}") from error
    return pixels[: shape[0], : shape[1]], header.about
