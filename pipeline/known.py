"""The live images of a run's finished rounds, small enough to hold a whole listing against.

Of each a digest of key and etag is kept, 16 bytes: an image that is listed with a digest that is
here has not changed. All others are looked up by name, in the table itself, which is read once more
for the rows that were not met; mostly there are few of them, or none.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa

from pipeline.records import Array

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("image_id", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("reason", pa.string()),
    ]
)
"""What is asked of the images table: ``sha256`` of the encoded bytes, where they were read;
``reason`` why it was rejected, if it was."""

Rows = Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
"""Reads these columns of the images table, part by part, its rows always in the same order."""


class Known:
    """The live images of the finished rounds, and which of them were met in a listing."""

    def __init__(self, rows: Rows | None = None, retry: Collection[str] = ()) -> None:
        """The images of a table; none without one.

        Args:
            rows: reads the table.
            retry: images that were rejected for these reasons count as changed.
        """
        self._rows = rows or (lambda _: iter(()))
        digests, again = [np.empty((2, 0), np.int64)], [np.empty(0, bool)]
        for batch in self._rows(["key", "etag", *(["reason"] if retry else [])]):
            digests.append(_digests(batch["key"].to_pylist(), batch["etag"].to_pylist()))
            reasons = batch["reason"].to_pylist() if retry else [None] * batch.num_rows
            again.append(np.array([reason in retry for reason in reasons], bool))
        made = np.concatenate(digests, axis=1)
        kept = np.flatnonzero(~np.concatenate(again))
        self._row = kept[np.argsort(made[0, kept])]
        self._made = made[:, self._row]
        self._met = np.zeros(made.shape[1], bool)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._met)

    def unchanged(self, keys: Sequence[str], etags: Sequence[str]) -> Array:
        """Which of these listed images are known as they are, [N] bool; they are met now.

        An image of which it is not true may still be known: see `others`.
        """
        same = np.zeros(len(keys), bool)
        if not len(self._row):
            return same
        asked = _digests(keys, etags)
        order = np.argsort(asked[0])  # neighbours are looked up together
        place = np.searchsorted(self._made[0], asked[0, order])
        place[place == len(self._row)] = 0
        same[order] = np.all(self._made[:, place] == asked[:, order], axis=0)
        self._met[self._row[place[same[order]]]] = True
        return same

    def others(self) -> pa.Table:
        """The images that were not met unchanged, as `SCHEMA`: changed, tried again or gone."""
        parts, start = [], 0
        for batch in () if self._met.all() else self._rows(SCHEMA.names):
            missing = ~self._met[start : start + batch.num_rows]
            parts.append(batch.select(SCHEMA.names).filter(pa.array(missing)))
            start += batch.num_rows
        return pa.Table.from_batches(parts).cast(SCHEMA) if parts else SCHEMA.empty_table()


def _digests(keys: Sequence[str], etags: Sequence[str]) -> Array:
    """Two numbers of each image, [2, N]: Python's own hash (SipHash, 64 bits) of key and etag.

    BLAKE2 would take twice the time.
    """
    made = np.empty((2, len(keys)), np.int64)
    for row, (one, other) in enumerate(((keys, etags), (etags, keys))):
        texts = (f"{a}\0{b}" for a, b in zip(one, other, strict=True))
        made[row] = np.fromiter(map(hash, texts), np.int64, len(keys))
    return made
