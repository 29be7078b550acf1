"""Pictures and containers that many tests build."""

import io
import tarfile
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ORIENTATION = 274  # the EXIF tag


def blobs(height: int, width: int, seed: int) -> np.ndarray:
    """Bright round blobs on a dark, slightly noisy ground, like stained nuclei: uint8 HWC."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    picture_HWC = rng.integers(8, 24, (height, width, 3)).astype(np.float32)
    for _ in range(max(1, height * width // 1500)):
        row, column = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(3, 12)
        near = _around(row, 1.2 * radius), _around(column, 1.2 * radius)
        distance = np.hypot(rows[near] - row, columns[near] - column) / radius
        colour = rng.uniform(120, 230, 3)
        picture_HWC[near] += np.clip(1.2 - distance, 0, 1)[..., None] * colour
    return np.clip(picture_HWC, 0, 255).astype(np.uint8)


def _around(middle: float, reach: float) -> slice:
    return slice(max(0, int(middle - reach)), int(middle + reach) + 2)


def encoded(array: np.ndarray, format: str, **save_options: object) -> bytes:  # noqa: A002
    """One picture, HW or HWC, as Pillow writes it."""
    image = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    return saved(image, format, **save_options)


def saved(image: Image.Image, format: str, **save_options: object) -> bytes:  # noqa: A002
    """A Pillow image in a mode that no array says (P, CMYK, LAB, ...)."""
    buffer = io.BytesIO()
    image.save(buffer, format, **save_options)
    return buffer.getvalue()


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera held that way stores this upright picture."""
    stored = {
        1: array,
        2: np.fliplr(array),
        3: np.rot90(array, 2),
        4: np.flipud(array),
        5: array.swapaxes(0, 1),
        6: np.rot90(array, 1),
        7: np.rot90(array, 2).swapaxes(0, 1),
        8: np.rot90(array, -1),
    }[orientation]
    return np.ascontiguousarray(stored)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def with_orientation(array: np.ndarray, n: int) -> bytes:
    """A JPEG, stored turned and tagged so that it is upright as this array."""
    options = {"exif": exif_of(n), "quality": 100, "subsampling": 0}
    return encoded(turned(array, n), "JPEG", **options)


def tar_of(members: Mapping[str, bytes]) -> bytes:
    """A tar shard with these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def parquet_of(images: Sequence[bytes | None], column: str = "image") -> bytes:
    """A Parquet table with one image a row."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: pa.array(images, pa.binary())}), buffer)
    return buffer.getvalue()
