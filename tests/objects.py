"""An archive with everything in it, as keys and bytes, put where a test wants it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests import pictures

BAD = {
    "bad/cut.png": "truncated",
    "bad/empty.jpg": "empty",
    "bad/page.png": "not_an_image",
    "shards/a.tar#in/broken.jpg": "not_an_image",
    "shards/rows.parquet#3": "empty",
}
"""The images of `mixed` that get no mask, and why."""

SKIPPED = 3
"""Objects and members of `mixed` that are no images at all."""


def mixed(count: int = 60, seed: int = 3) -> dict[str, bytes]:
    """`count` good pictures and the `BAD` ones: loose, in a tar, in a table; some need tiles."""
    sizes = np.random.default_rng(seed).integers(20, 250, (count, 2)).tolist()
    made = [_picture(n, height, width, seed) for n, (height, width) in enumerate(sizes)]
    loose, tarred, tabled = made[: count // 2], made[count // 2 : -count // 6], made[-count // 6 :]
    members = {f"in/{n:03d}.jpg": content for n, content in enumerate(tarred)}
    members |= {"in/broken.jpg": b"<html>no picture</html>", "in/000.json": b"{}"}
    objects = {f"loose/{n % 3}/{n:03d}.png": content for n, content in enumerate(loose)}
    objects |= {
        "bad/cut.png": made[1][: len(made[1]) // 2],
        "bad/empty.jpg": b"",
        "bad/page.png": b"<html>404</html>",
        "shards/a.tar": pictures.tar_of(members),
        "shards/rows.parquet": pictures.parquet_of([*tabled[:3], None, *tabled[3:]]),
        "README.md": b"not a picture",
        "loose/0/000.json": b"{}",
    }
    return objects


def _picture(number: int, height: int, width: int, seed: int) -> bytes:
    # every third is a JPEG, whatever its name says: content decides
    kind = "JPEG" if number % 3 == 0 else "PNG"
    return pictures.encoded(pictures.blobs(height, width, seed + number), kind)


def into_bucket(objects: Mapping[str, bytes], s3: Any, bucket: str, prefix: str) -> str:
    """Put the objects below a prefix; returns its URI."""
    for key, content in objects.items():
        s3.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=content)
    return f"s3://{bucket}/{prefix}"
