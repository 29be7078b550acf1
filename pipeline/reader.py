"""A finished (or unfinished) run, read back: masks or classes by key, tables, a torch data set.

Nothing here is needed to read a run: zarr, xarray, DuckDB and polars do (README). It adds comfort
and speed: a mask is one range request and one decompression per slot.
"""

# pyarrow.compute makes its functions when it is imported; no type checker can see them.
# pyright: reportAttributeAccessIssue=false

import json
from collections.abc import Iterator
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
from pipeline.tables import read_table

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

    @cached_property
    def _prediction_of_image(self) -> dict[int, int]:
        ids = self.predictions["image_id"].to_pylist()
        return {image_id: row for row, image_id in enumerate(ids)}

    def prediction(self, key: str) -> dict[str, Any]:
        """The class of an image: its predictions row.

        Raises:
            KeyError: if the run has no such image, or it was rejected (with the reason).
            RunRefused: if the run's model is no classifier.
        """
        places, row = self._prediction_of_image, _done(self.row(key), "class")
        return self.predictions.slice(places[row["image_id"]], 1).to_pylist()[0]

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
        self._refuse_without_masks()
        return self._pixels(self.row(key), confidence=False)

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
        from pipeline.decode import DecodeLimits, decode

        plan = self._planned(key)
        source = open_store(self.ledger.config.source)
        from pipeline import formats

        limits = self.ledger.config.decode
        item = next(iter(formats.load(plan.format).fetch(source, [plan], 1, limits.max_bytes)))
        if item.data is None:
            verdict = item.verdict
            raise (
                ImageRejected(verdict.station, verdict.reason, verdict.detail)
                if verdict
                else KeyError(key)
            )
        return decode(
            item.data, DecodeLimits(max_bytes=limits.max_bytes, max_pixels=limits.max_pixels)
        ).values_HWC

    @cached_property
    def _plans(self) -> pa.Table:
        names = list(PlannedImage.__dataclass_fields__)
        return pa.concat_tables([self.ledger.plan(n, names) for n in self.ledger.rounds()])

    def _planned(self, key: str) -> PlannedImage:
        image_id = self.row(key)["image_id"]
        found = self._plans.filter(
            pc.and_(
                pc.equal(self._plans["image_id"], image_id),
                pc.greater_equal(self._plans["fragment"], 0),
            )
        )
        return PlannedImage(**found.to_pylist()[0])

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
