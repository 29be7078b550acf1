"""A finished (or unfinished) run, read back: masks or classes by key, tables, a torch data set.

Nothing here is needed to read a run: zarr, xarray, DuckDB and polars do (README). It adds comfort
and speed: a mask is one range request and one decompression per slot.
"""

# pyarrow.compute makes its functions when it is imported; no type checker can see them.
# pyright: reportAttributeAccessIssue=false

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ImageRejected, RunRefused
from pipeline.finalize import REJECTED
from pipeline.fragment import (
    CLASS_STATS,
    IMAGES,
    PREDICTIONS,
    Header,
    decompress,
    read_index,
)
from pipeline.large import committed_region
from pipeline.layout import REGION
from pipeline.ledger import Commit, Ledger
from pipeline.records import Array, PlannedImage
from pipeline.storage import open_store
from pipeline.tables import read_rows, read_table

if TYPE_CHECKING:
    from torch.utils.data import Dataset


def open_run(uri: str) -> "Run":
    """Open a run folder to read it.

    Args:
        uri: local path or s3://bucket/prefix, as given to ``--out``.

    Raises:
        RunRefused: if there is no run.
    """
    return Run(Ledger.open(open_store(uri)))


class Run:
    """A run folder, read only. Tables are those of the newest final round, else of the commits."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._store = ledger.store

    @property
    def classes(self) -> list[dict[str, Any]]:
        """The ontology: id, name and color ([r, g, b]) of each class."""
        return self.ledger.classes

    @property
    def finished(self) -> bool:
        """Whether every planned round is final."""
        return self.ledger.rounds() == self.ledger.manifests()

    @cached_property
    def images(self) -> pa.Table:
        """One row per image that is done or rejected (`pipeline.fragment.IMAGES`)."""
        return self._table("images", IMAGES)

    @cached_property
    def class_stats(self) -> pa.Table:
        """One row per image and class that occurs in it (`pipeline.fragment.CLASS_STATS`)."""
        return self._table("class_stats", CLASS_STATS)

    @cached_property
    def rejected(self) -> pa.Table:
        """One row per image without an answer, with station, reason and detail."""
        return self._table("rejected", REJECTED)

    @cached_property
    def predictions(self) -> pa.Table:
        """One row per image that a classifier has seen (`pipeline.fragment.PREDICTIONS`).

        Raises:
            RunRefused: if the run's model is no classifier.
        """
        if self.ledger.layout.has_masks:
            raise RunRefused(
                f"{self._store.uri} holds masks, its model is no classifier; use mask(key)"
            )
        return self._table("predictions", PREDICTIONS)

    def _table(self, name: str, schema: pa.Schema) -> pa.Table:
        if self.ledger.manifests():
            return read_table(self._store.read(f"final/{name}.parquet"))
        rows = [getattr(self, f"_{name}_of")(header) for _, header in self._headers()]
        return pa.concat_tables(rows).cast(schema) if rows else schema.empty_table()

    def _headers(self) -> Iterator[tuple[Commit, Header]]:
        commits = self.ledger.commits()
        return self.ledger.headers([commits[f] for f in sorted(commits)])

    @staticmethod
    def _images_of(header: Header) -> pa.Table:
        place = header.images.column_names.index("byte_offset")
        absolute = pc.add(header.images["byte_offset"], header.nbytes)
        return header.images.set_column(place, "byte_offset", absolute).select(IMAGES.names)

    @staticmethod
    def _class_stats_of(header: Header) -> pa.Table:
        return header.class_stats

    @staticmethod
    def _rejected_of(header: Header) -> pa.Table:
        return header.images.filter(pc.equal(header.images["status"], "rejected")).select(
            REJECTED.names
        )

    @staticmethod
    def _predictions_of(header: Header) -> pa.Table:
        return PREDICTIONS.empty_table() if header.predictions is None else header.predictions

    @cached_property
    def _row_of_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.images["key"].to_pylist())}

    def row(self, key: str) -> dict[str, Any]:
        """The images row of a key.

        Raises:
            KeyError: if the run has no such image (yet).
        """
        if key not in self._row_of_key:
            raise KeyError(f"{key!r} is not in {self._store.uri}")
        return self.images.slice(self._row_of_key[key], 1).to_pylist()[0]

    def columns(self, names: list[str]) -> pa.Table:
        """Some columns of `images`, without reading the others."""
        return self._columns("images", names)

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Some rows of `images`, counted from 0, without reading the others."""
        return self._rows("images", numbers)

    def _columns(self, table: str, names: list[str]) -> pa.Table:
        if table in self.__dict__ or not self.ledger.manifests():  # it is in memory, or must be
            return getattr(self, table).select(names)
        with self.ledger.plan_file(f"final/{table}.parquet") as file:
            return read_table(file, names)

    def _rows(self, table: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
        if table in self.__dict__ or not self.ledger.manifests():
            return getattr(self, table).take(pa.array(numbers, pa.int64())).to_pylist()
        with self.ledger.plan_file(f"final/{table}.parquet") as file:
            return read_rows(file, numbers)

    @cached_property
    def _predicted(self) -> Array:
        """The image_id of each row of `predictions`, ascending."""
        return self._columns("predictions", ["image_id"])["image_id"].to_numpy()

    def prediction(self, key: str) -> dict[str, Any]:
        """The class of an image: its predictions row.

        Raises:
            KeyError: if the run has no such image, or it was rejected (with the reason).
            RunRefused: if the run's model is no classifier.
        """
        row = self.row(key)
        self.predictions  # noqa: B018 - all of them: more will be asked for
        return self.prediction_of(row)

    def prediction_of(self, row: dict[str, Any]) -> dict[str, Any]:
        """`prediction`, for those who have the images row."""
        image_id = _done(row, "class")["image_id"]
        return self._rows("predictions", [int(np.searchsorted(self._predicted, image_id))])[0]

    def _refuse_without_masks(self) -> None:
        if not self.ledger.layout.has_masks:
            raise RunRefused(
                f"{self._store.uri} holds one class per picture and no masks: its model is a "
                "classifier; use prediction(key)"
            )

    def mask(self, key: str) -> Array:
        """The mask of an image: [H, W], uint8 (uint16 beyond 255 classes), fill value = no data.

        Raises:
            KeyError: if the run has no such image, or it was rejected (with the reason).
            RunRefused: if the run's model is a classifier.
        """
        return self.mask_of(self.row(key))

    def mask_of(self, row: dict[str, Any]) -> Array:
        """`mask`, for those who have the images row."""
        self._refuse_without_masks()
        return self._pixels(row, confidence=False)

    def confidence(self, key: str) -> Array:
        """Confidence of each pixel, [H, W] uint8, 255 = certain; only of runs with --confidence."""
        self._refuse_without_masks()
        if not self.ledger.layout.confidence:
            raise RunRefused("this run stored no confidence; run with --confidence")
        return self._pixels(self.row(key), confidence=True)

    def _pixels(self, row: dict[str, Any], confidence: bool) -> Array:
        row, layout = _done(row, "mask"), self.ledger.layout
        shape = row["height"], row["width"]
        if row["path"]:
            level = "confidence" if confidence else "0"
            return self._large(
                f"{row['path']}/{level}", shape, "uint8" if confidence else layout.dtype
            )
        path = layout.commit_path(row["fragment"])
        if confidence:
            return self._confidence(path, row, shape)
        data = self._store.read(path, row["byte_offset"], sum(row["byte_nbytes"]))
        flat, at = [], 0
        for nbytes in row["byte_nbytes"]:
            flat.append(decompress(memoryview(data)[at : at + nbytes], layout.dtype))
            at += nbytes
        return np.concatenate(flat)[: shape[0] * shape[1]].reshape(shape)

    def _confidence(self, path: str, row: dict[str, Any], shape: tuple[int, int]) -> Array:
        layout = self.ledger.layout
        data = self._store.read(path)
        index = read_index(data, layout.index_entries)
        first = layout.slots + row["pixel_start"] // layout.slot % layout.slots
        spans = index[first : first + len(row["byte_nbytes"])].tolist()
        flat = [decompress(data[start : start + n], layout.dtype) for start, n in spans]
        return np.concatenate(flat)[: shape[0] * shape[1]].reshape(shape).astype(np.uint8)

    def _large(self, path: str, shape: tuple[int, int], dtype: str) -> Array:
        out = np.empty(shape, dtype)
        for y in range(0, shape[0], REGION):
            for x in range(0, shape[1], REGION):
                part = out[y : y + REGION, x : x + REGION]
                part[:], _ = committed_region(
                    self._store, f"{path}/c/{y // REGION}/{x // REGION}", part.shape, dtype, 0
                )
        return out

    def picture(self, key: str) -> Array:
        """The upright picture itself, [H, W, C] uint8 or uint16, fetched from the source again.

        Raises:
            ImageRejected: if it is no longer there or no longer the same.
        """
        return self.picture_of(self.row(key))

    def picture_of(self, row: dict[str, Any]) -> Array:
        """`picture`, for those who have the images row."""
        from pipeline.decode import DecodeLimits, decode

        plan = self._planned(row)
        source = open_store(self.ledger.config.source)
        from pipeline import formats

        limits = self.ledger.config.decode
        (item,) = formats.load(plan.format).fetch(source, [plan], 1, limits.max_bytes)
        if item.data is None:
            verdict = item.verdict
            raise (
                ImageRejected(verdict.station, verdict.reason, verdict.detail)
                if verdict
                else KeyError(row["key"])
            )
        return decode(
            item.data, DecodeLimits(max_bytes=limits.max_bytes, max_pixels=limits.max_pixels)
        ).values_HWC

    @cached_property
    def _group_of_fragment(self) -> dict[int, tuple[int, int]]:
        """The round of each fragment, and the row group of that round's plan."""
        groups = {}
        for number in self.ledger.rounds():
            table = self.ledger.fragments(number)
            pairs = zip(*(table[n].to_pylist() for n in ("fragment", "row_group")), strict=True)
            groups |= {fragment: (number, group) for fragment, group in pairs}
        return groups

    def _planned(self, row: dict[str, Any]) -> PlannedImage:
        images = self.ledger.planned(*self._group_of_fragment[row["fragment"]])
        return next(image for image in images if image.image_id == row["image_id"])

    def torch_dataset(self, pictures: bool = False) -> "Dataset":
        """A map-style torch data set of all masks, in image_id order.

        Args:
            pictures: also fetch each picture from the source.

        Returns:
            Items ``{"key": str, "mask": uint8 tensor [H, W]}`` and, if asked for,
            ``"image"``: tensor [C, H, W].

        Raises:
            RunRefused: if the run's model is a classifier.
        """
        self._refuse_without_masks()
        from pipeline.torch_dataset import MaskDataset  # torch: only for those who train

        return MaskDataset(self.ledger.store.uri, pictures)

    def manifest(self) -> dict[str, Any]:
        """The newest manifest: counts, and the hash of every final table."""
        return json.loads(self._store.read(f"manifest/{self.ledger.manifests()[-1]:03d}.json"))


def _done(row: dict[str, Any], what: str) -> dict[str, Any]:
    if row["status"] != "done":
        raise KeyError(f"{row['key']!r} has no {what}: {row['station']}: {row['reason']}")
    return row
