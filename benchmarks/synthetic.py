"""Archives and answers that are no more real than planning, resuming and finishing can tell.

`write` makes a local archive of a million pictures in seconds (hard links to a few files),
`write_tars` and `write_tables` shards of them, `Ready` is a bucket whose listing is there without
asking, `Pretended` a place that commits true fragment objects without a model.
"""

import hashlib
import io
import os
import tarfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.config import Compute, SegmentConfig
from pipeline.errors import StorageMissing
from pipeline.fragment import CLASS_STATS, DETAIL, IMAGES, assemble, slots_of
from pipeline.place import Capacity
from pipeline.place import Found as Said
from pipeline.records import PlannedImage, Receipt, Task
from pipeline.storage import Found

if TYPE_CHECKING:
    from pipeline.line import Line

SIDE = 16
LINKS = 1000  # names of one inode: file systems allow some ten thousand
IN_A_SHARD, IN_A_GROUP = 10_000, 100  # pictures of a shard, and rows of a row group
MEMBER = 100_000  # bytes of a tar member, as of a small photograph
REJECTED = 100  # every hundredth image has no mask
READY = "s3://ready-listing/"


def picture() -> bytes:
    """A PNG of 16 x 16 pixels."""
    sink = io.BytesIO()
    Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)).save(sink, "PNG")
    return sink.getvalue()


def name(number: int) -> str:
    """The path of a picture; in byte order as in number, about as long as real ones."""
    folder = number // LINKS
    return f"site-{folder // 100:04d}/batch-{folder:06d}/picture-{number:09d}.png"


def write(folder: Path, images: int) -> Path:
    """So many pictures below a folder."""
    data = picture()
    for first in range(0, images, LINKS):
        original = folder / name(first)
        original.parent.mkdir(parents=True)
        original.write_bytes(data)
        for number in range(first + 1, min(first + LINKS, images)):
            os.link(original, folder / name(number))
    return folder


def write_tars(folder: Path, images: int) -> Path:
    """Tar shards of members as long as photographs; their content is a hole in the file."""
    folder.mkdir()
    whole = -(-MEMBER // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    for first in range(0, images, IN_A_SHARD):
        with (folder / f"shard-{first // IN_A_SHARD:05d}.tar").open("wb") as shard:
            for number in range(first, min(first + IN_A_SHARD, images)):
                member = tarfile.TarInfo(name(number))
                member.size = MEMBER
                shard.write(member.tobuf())
                shard.seek(whole, io.SEEK_CUR)
            shard.write(bytes(2 * tarfile.BLOCKSIZE))
    return folder


def write_tables(folder: Path, images: int) -> Path:
    """Parquet shards of small pictures; an index reads their footers only."""
    folder.mkdir()
    data = picture()
    for first in range(0, images, IN_A_SHARD):
        table = pa.table({"image": [data] * min(IN_A_SHARD, images - first)})
        where = folder / f"shard-{first // IN_A_SHARD:05d}.parquet"
        pq.write_table(table, where, row_group_size=IN_A_GROUP)
    return folder


class Ready:
    """A bucket of so many pictures, from nowhere: ``s3://ready-listing/1000000``."""

    def __init__(self, images: int) -> None:
        self.images, self.uri = images, f"{READY}{images}"
        self._data = picture()

    def list(self, prefix: str = "") -> Iterator[Found]:
        """See `Store.list`."""
        if prefix:
            raise StorageMissing(prefix)
        nbytes = len(self._data)
        for number in range(self.images):
            yield Found(name(number), nbytes, f"{number:032x}", 0.0)

    def read(
        self, path: str, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> bytes:
        """See `Store.read`."""
        return self._data[start : None if length is None else start + length]


class Pretended:
    """A place that answers every image at once: true objects, made-up masks."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[: SIDE // 3] = 1
        self._mask = mask

    @property
    def capacity(self) -> Capacity:
        """See `Place.capacity`."""
        return Capacity(1)

    def found(self, bundle: tuple[bytes, bytes], images: int, config: SegmentConfig) -> Said:
        """See `Place.found`."""
        return Said(2**20, "cpu", 4, 16, None)

    def run(self, tasks: Iterable[Task], run_uri: str, stop: threading.Event) -> Iterator[Receipt]:
        """See `Place.run`."""
        if stop.is_set():
            return
        from pipeline.line import Line  # and torch with it: planning needs neither

        line = Line.open(run_uri, self._compute)
        frame = slots_of(self._mask, line.ledger.layout.slot, 255)[0]
        for task in tasks:
            if stop.is_set():
                return
            images = line.images(task)
            data, rejected = self._object(task, images, frame, line)
            line.ledger.commit(task.fragment, data)
            done = len(images) - rejected
            yield Receipt(task.fragment, done, rejected, done * SIDE**2, 0, len(data))

    def close(self) -> None:
        """See `Place.close`."""

    def _object(
        self, task: Task, images: list[PlannedImage], frame: bytes, line: "Line"
    ) -> tuple[bytes, int]:
        bad = [i.image_id % REJECTED == 0 for i in images]
        done = len(images) - sum(bad)
        at, slot = np.cumsum(~np.array(bad)) - 1, line.ledger.layout.slot
        first = task.fragment * line.ledger.layout.slots * slot

        def where_done(values: Iterable[object]) -> list[object]:
            return [None if no else value for no, value in zip(bad, values, strict=True)]

        def same(value: object) -> list[object]:
            return [value] * len(images)

        rows = {
            "image_id": [i.image_id for i in images],
            "key": [i.key for i in images],
            "uri": [i.uri for i in images],
            "status": ["rejected" if no else "done" for no in bad],
            "station": ["decode" if no else None for no in bad],
            "reason": ["truncated" if no else None for no in bad],
            "height": where_done(same(SIDE)),
            "width": where_done(same(SIDE)),
            "input_bytes": [i.nbytes for i in images],
            "etag": [i.etag for i in images],
            "sha256": [hashlib.sha256(i.key.encode()).hexdigest() for i in images],
            "fragment": same(task.fragment),
            "pixel_start": where_done((first + at * slot).tolist()),
            "mask_index": same(None),
            "path": same(None),
            "byte_offset": where_done((at * len(frame)).tolist()),
            "byte_nbytes": where_done(same([len(frame)])),
            "nodata_pixels": where_done(same(0)),
            "seam_score": where_done(same(0.0)),
            "mean_confidence": where_done((0.5 + 0.001 * (i.image_id % 500)) for i in images),
            "model_version": same(line.ledger.model_version),
            "detail": ["image data ends early" if no else None for no in bad],
        }
        ids = np.array([i.image_id for i in images])[~np.array(bad)]
        ones = int(self._mask.sum())
        counts = np.tile([SIDE**2 - ones, ones], done)
        stats = {
            "image_id": np.repeat(ids, 2),
            "class_id": np.tile(np.array([0, 1], np.uint16), done),
            "pixel_count": counts,
            "fraction": (counts / SIDE**2).astype(np.float32),
            "mean_confidence": np.full(2 * done, 0.9, np.float32),
        }
        about = {
            "fragment": task.fragment, "round": task.round, "token": uuid.uuid4().hex,
            "written": "2026-01-01T00:00:00.000+00:00", "n_done": done, "n_rejected": sum(bad),
            "n_pixels": done * SIDE**2, "model_version": line.ledger.model_version,
        }  # fmt: skip
        data = assemble(
            about,
            pa.Table.from_pydict(rows, schema=pa.schema([*IMAGES, DETAIL])),
            pa.Table.from_pydict(stats, schema=CLASS_STATS),
            [frame] * done,
            range(done),
            line.ledger.layout.index_entries,
        )
        return data, sum(bad)
