"""Pictures of a source without a framework: a list, members of shards, pixels by Pillow."""

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.corpora import PICTURES


def listed(source: Path) -> list[Path]:
    """The pictures below a folder, sorted."""
    return sorted(p for p in source.rglob("*") if p.suffix.lower() in PICTURES)


def key_of(path: str | Path, source: Path) -> str:
    """The path below the source."""
    return str(Path(path).relative_to(source))


def members(shards: Iterable[Path], source: Path) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of each member."""
    for shard in shards:
        with tarfile.open(shard) as tar:
            for entry in tar:
                if (file := tar.extractfile(entry)) is not None:
                    yield f"{key_of(shard, source)}#{entry.name}", file.read()


def pixels_of(file: Path | bytes) -> np.ndarray:
    """A decoded picture, uint8 HWC."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        return np.array(image.convert("RGB"))
