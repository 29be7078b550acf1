"""Labelled pictures in all the ways they can lie."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.archives import filled
from tests.pictures import blobs, encoded, tar_of

ONTOLOGY = {
    "classes": [
        {"id": 0, "name": "background", "color": [0, 0, 0]},
        {"id": 7, "name": "nucleus", "color": [255, 170, 0]},
    ],
    "ignore_id": 9,
}
SIZES = {"a.jpg": (64, 80), "sub/b.png": (33, 47), "sub/c.png": (240, 200), "d.jpg": (48, 48)}


def truth(pixels_HWC: np.ndarray) -> np.ndarray:
    """Nucleus (7) where it is bright; a strip on the left is ignored (9)."""
    mask_HW = np.where(pixels_HWC.mean(2) > 60, 7, 0).astype(np.uint8)
    mask_HW[:, :3] = 9
    return mask_HW


def pairs() -> dict[str, tuple[bytes, bytes]]:
    """Encoded picture and mask by key."""
    found = {}
    for seed, (key, (height, width)) in enumerate(SIZES.items()):
        pixels = blobs(height, width, seed)
        format_name = "JPEG" if key.endswith("jpg") else "PNG"
        options = {"quality": 92} if format_name == "JPEG" else {}
        found[key] = encoded(pixels, format_name, **options), encoded(truth(pixels), "PNG")
    return found


def stem(key: str) -> str:
    return key.rpartition(".")[0]


def about(**more: object) -> dict[str, bytes]:
    return {"ontology.json": json.dumps({**ONTOLOGY, **more}).encode()}


def folder_pair(folder: Path, both: dict[str, tuple[bytes, bytes]] | None = None) -> Path:
    both = pairs() if both is None else both
    images = {f"images/{key}": image for key, (image, _) in both.items()}
    masks = {f"masks/{stem(key)}.png": mask for key, (_, mask) in both.items()}
    return filled(folder, {**images, **masks, **about()})


def shard(both: dict[str, tuple[bytes, bytes]], ending: str = ".mask.png") -> bytes:
    members = {}
    for key, (image, mask) in both.items():
        members |= {key: image, f"{stem(key)}{ending}": mask}
    return tar_of(members)


def table(both: dict[str, tuple[bytes | None, bytes | None]], **columns: list[str | None]) -> bytes:
    """A Parquet table of pictures and masks, two rows a row group."""
    sink = io.BytesIO()
    values = {
        "image": pa.array([image for image, _ in both.values()], pa.binary()),
        "mask": pa.array([mask for _, mask in both.values()], pa.binary()),
        **{name: pa.array(column, pa.string()) for name, column in columns.items()},
    }
    pq.write_table(pa.table(values), sink, row_group_size=2)
    return sink.getvalue()


def gray_png(values_HW: np.ndarray, bits: int) -> bytes:
    """A gray PNG of so few bits a pixel that Pillow does not write it."""
    height, width = values_HW.shape
    per = 8 // bits
    rows = []
    for row in values_HW:
        padded = np.pad(row, (0, -width % per)).reshape(-1, per).astype(int)
        shifts = np.arange(per)[::-1] * bits
        rows.append(b"\0" + (padded << shifts).sum(1).astype(np.uint8).tobytes())

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(rows))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
