"""Whether two entrants did the same work: their pixels by picture and class, compared."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

TOLERANCE = 1e-4
"""Pixels that may change class: kernels differ by batch size and fusing, so some ties flip."""

Counts = Counter[tuple[str, int]]
"""Pixels by key and class."""


def of_run(run: Path) -> Counts:
    """What a `segment` run stored."""
    images = pq.read_table(run / "final" / "images.parquet", columns=["image_id", "key"])
    return _counts(pq.read_table(run / "final" / "class_stats.parquet").join(images, "image_id"))


def of_peer(out: Path) -> Counts:
    """What a peer stored."""
    return _counts(ds.dataset(out / "statistics", format="parquet").to_table())


def _counts(table: pa.Table) -> Counts:
    columns = (table[name].to_pylist() for name in ("key", "class_id", "pixel_count"))
    return Counter(
        {(key, class_id): pixels for key, class_id, pixels in zip(*columns, strict=True)}
    )


def differing(ours: Counts, theirs: Counts) -> float:
    """The share of pixels that have another class, at least: what counts of each picture tell.

    Raises:
        ValueError: the pictures are not the same, or not as large.
    """
    odd = sizes(ours).items() ^ sizes(theirs).items()
    if odd:
        raise ValueError(f"not the same pictures or sizes: {sorted(dict(odd))[:3]} …")
    moved = sum(abs(ours[each] - theirs[each]) for each in ours.keys() | theirs.keys())
    return moved / 2 / ours.total()


def sizes(counts: Counts) -> Counter[str]:
    """Pixels of each picture."""
    total: Counter[str] = Counter()
    for (key, _), pixels in counts.items():
        total[key] += pixels
    return total
