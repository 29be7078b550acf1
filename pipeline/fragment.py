"""One fragment as one object: a Zarr v3 shard that carries its own tables.

Byte layout:

    "MSKFRAG1" | u32 len(J) | u32 len(T) | J | T | zeros up to a multiple of 64
    zstd frame | zstd frame | … | index: n_slots x [u64 offset, u64 nbytes] | u32 crc32c(index)

J is JSON (what this object is, who wrote it, checksums), T is the images and the class_stats
table as Parquet; of a classifier's fragment also the predictions table, and then there are no
frames. The Zarr specification (sharding_indexed) lets inner chunks lie anywhere in the
shard, so the header is unused space to every Zarr reader. Numbers are little-endian. The same
container holds a region of a large image (2-D, one frame per inner chunk).

Checksums: ``self_crc32c`` covers J (with that field zeroed), ``tables_crc32c`` T, ``data_crc32c``
everything after T; each frame has zstd's own.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from numcodecs.zstd import Zstd

from pipeline.errors import StorageError, refuse_other_format
from pipeline.records import Array
from pipeline.tables import read_table, write_table

MAGIC = b"MSKFRAG1"
HEAD = len(MAGIC) + 8
EMPTY = 2**64 - 1
FORMAT_VERSION = 1
LEVEL = 1  # never larger than level 3 on three mask sets and twice as fast (STORE §1.4)
_zstd = Zstd(level=LEVEL, checksum=True)

IMAGES = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("station", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("input_bytes", pa.int64()),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("fragment", pa.int32(), nullable=False),
        pa.field("pixel_start", pa.int64()),
        pa.field("mask_index", pa.int64()),
        pa.field("path", pa.string()),
        pa.field("byte_offset", pa.int64()),
        pa.field("byte_nbytes", pa.list_(pa.int32())),
        pa.field("nodata_pixels", pa.int64()),
        pa.field("seam_score", pa.float32()),
        pa.field("mean_confidence", pa.float32()),
        pa.field("model_version", pa.string(), nullable=False),
    ]
)
"""The images table, a contract: one row per image that is done or rejected."""

DETAIL = pa.field("detail", pa.string())
"""In the header and in `rejected` beside the contract's columns: the reason as a sentence."""

CLASS_STATS = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("class_id", pa.uint16(), nullable=False),
        pa.field("pixel_count", pa.int64(), nullable=False),
        pa.field("fraction", pa.float32(), nullable=False),
        pa.field("mean_confidence", pa.float32()),
    ]
)
"""The class_stats table, a contract: one row per image and class that occurs in it."""

PREDICTIONS = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("label", pa.uint16(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("probabilities", pa.list_(pa.float32()), nullable=False),
    ]
)
"""The predictions table of a classifier, a contract: one row per image that is done. ``label`` is a
class id, ``confidence`` its probability; probabilities are in the order of the ontology."""


class FragmentDamaged(StorageError):
    """An object that is not what was written; the text says where."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an object says of itself, checked."""

    about: dict[str, Any]
    images: pa.Table
    class_stats: pa.Table
    nbytes: int
    """Bytes of the header, up to the first frame."""
    predictions: pa.Table | None = None
    """Of a classifier's fragment."""


def compress(chunk: Array) -> bytes:
    """One inner chunk as a zstd frame with a content checksum."""
    return bytes(_zstd.encode(np.ascontiguousarray(chunk)))


def decompress(frame: bytes | memoryview, dtype: str) -> Array:
    """Undo `compress`, flat.

    Raises:
        FragmentDamaged: if the frame or its checksum is broken.
    """
    try:
        return np.frombuffer(_zstd.decode(frame), dtype)
    except RuntimeError as error:
        raise FragmentDamaged(f"zstd: {error}") from error


def slots_of(values: Array, chunk: int, fill: int) -> list[bytes]:
    """A flat run of values as frames of ``chunk`` values each, the last one filled up."""
    flat = values.reshape(-1)
    whole = len(flat) // chunk * chunk
    frames = [compress(flat[start : start + chunk]) for start in range(0, whole, chunk)]
    if whole < len(flat):
        last = np.full(chunk, fill, flat.dtype)
        last[: len(flat) - whole] = flat[whole:]
        frames.append(compress(last))
    return frames


def assemble(
    about: dict[str, Any],
    images: pa.Table,
    class_stats: pa.Table,
    frames: Sequence[bytes | None],
    slots: Sequence[int],
    n_slots: int,
    predictions: pa.Table | None = None,
) -> bytes:
    """The object: header, frames in the given order, index.

    Args:
        about: JSON-able facts; lengths and checksums are added here.
        images: rows whose ``byte_offset`` counts from the first frame.
        class_stats: their statistics.
        frames: compressed inner chunks.
        slots: the index entry each frame belongs to.
        n_slots: entries of the index; all others stay empty.
        predictions: one row per image that is done; None where there are masks.
    """
    named = {"images": images, "class_stats": class_stats}
    if predictions is not None:
        named["predictions"] = predictions
    places, tables = _laid_out(named)
    data = b"".join(frame for frame in frames if frame is not None)
    sizes = np.array([len(f or b"") for f in frames], dtype="<u8")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype("<u8") if len(sizes) else sizes
    about = {
        **about,
        "format_version": FORMAT_VERSION,
        **places,
        "tables_crc32c": google_crc32c.value(tables),
        "data_crc32c": 0,
        "self_crc32c": 0,
    }
    # The index holds absolute offsets, so the header's length must be known first: checksums have
    # ten digits at most, and the JSON is padded with spaces to that length.
    room = len(_json(about)) + 2 * 10
    nbytes = _header_nbytes(room, len(tables))
    index = np.full((n_slots, 2), EMPTY, dtype="<u8")
    if len(sizes):
        index[list(slots), 0] = starts + nbytes
        index[list(slots), 1] = sizes
    packed = index.tobytes()
    tail = struct.pack("<I", google_crc32c.value(packed))
    padding = bytes(nbytes - HEAD - room - len(tables))
    about["data_crc32c"] = google_crc32c.value(b"".join((padding, data, packed, tail)))
    about["self_crc32c"] = google_crc32c.value(_json(about))
    text = _json(about).ljust(room)
    header = MAGIC + struct.pack("<II", room, len(tables)) + text + tables
    return b"".join((header, padding, data, packed, tail))


def _laid_out(named: dict[str, pa.Table]) -> tuple[dict[str, list[int]], bytes]:
    """Where each table lies in T, and T."""
    places, data = {}, b""
    for name, table in named.items():
        # Of at most some thousand rows dictionaries are larger than what they save, and take longer
        # (both tables, 16 rows: 10.4 -> 9.4 KB, 2.9 -> 1.8 ms; 1024: 82 -> 69 KB, 3.5 -> 2.4 ms).
        written = write_table(table, dictionaries=False)
        places[name] = [len(data), len(data) + len(written)]
        data += written
    return places, data


def read_header(start: bytes) -> Header:
    """The header at the beginning of an object.

    Raises:
        FragmentDamaged: if it is not one, or damaged; or if `header_nbytes` says that more
            bytes are needed than ``start`` has.
    """
    if len(start) < header_nbytes(start):
        raise FragmentDamaged(
            f"the header needs {header_nbytes(start)} bytes, there are {len(start)}"
        )
    room, length = struct.unpack("<II", start[len(MAGIC) : HEAD])
    try:
        about = json.loads(start[HEAD : HEAD + room])
        said, zeroed = about["self_crc32c"], {**about, "self_crc32c": 0}
        body = start[HEAD + room : HEAD + room + length]
        if (
            google_crc32c.value(_json(zeroed)) != said
            or google_crc32c.value(body) != about["tables_crc32c"]
        ):
            raise FragmentDamaged("the header does not match its checksum")
        refuse_other_format("it", about["format_version"], FORMAT_VERSION)
        names = ["images", "class_stats", *(["predictions"] if "predictions" in about else [])]
        tables = {name: read_table(body[slice(*about[name])]) for name in names}
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise FragmentDamaged(f"the header cannot be read: {error}") from error
    return Header(about, nbytes=_header_nbytes(room, length), **tables)


def header_nbytes(start: bytes) -> int:
    """How many bytes the header has, from its first 16."""
    if len(start) < HEAD or start[: len(MAGIC)] != MAGIC:
        raise FragmentDamaged("it does not begin like a Maskfleet object")
    return _header_nbytes(*struct.unpack("<II", start[len(MAGIC) : HEAD]))


def read_index(data: bytes, n_slots: int) -> Array:
    """The index of a whole object, [n_slots, 2] of uint64, checked."""
    nbytes = n_slots * 16
    packed, crc = data[-nbytes - 4 : -4], data[-4:]
    if len(packed) != nbytes or struct.unpack("<I", crc)[0] != google_crc32c.value(packed):
        raise FragmentDamaged("the index does not match its checksum")
    return np.frombuffer(packed, "<u8").reshape(n_slots, 2)


def check_data(data: bytes, header: Header) -> None:
    """Every byte after the header against its checksum."""
    end = HEAD + sum(struct.unpack("<II", data[len(MAGIC) : HEAD]))
    if google_crc32c.value(data[end:]) != header.about["data_crc32c"]:
        raise FragmentDamaged("its bytes do not match their checksum")


def _header_nbytes(room: int, tables: int) -> int:
    return -(-(HEAD + room + tables) // 64) * 64


def _json(about: dict[str, Any]) -> bytes:
    return json.dumps(about, sort_keys=True, separators=(",", ":")).encode()
