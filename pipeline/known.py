"""The live images of a run's finished rounds, small enough to hold a whole listing against.

Of each a digest of key and etag is kept, 16 bytes: an image that is listed with a digest that is
here has not changed. All others are looked up by name, in the table itself, which is read once more
for the rows that were not met; mostly there are few of them, or none.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from hashlib import blake2b

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

_DIGEST = np.dtype([("first", "<u8"), ("second", "<u8")])


class Known:
    """The live images of the finished rounds, and which of them were met in a listing."""

    def __init__(self, rows: Rows | None = None, retry: Collection[str] = ()) -> None:
        """The images of a table; none without one.

        Args:
            rows: reads the table.
            retry: images that were rejected for these reasons count as changed.
        """
        self._rows = rows or (lambda _: iter(()))
        digests, again = [np.empty(0, _DIGEST)], [np.empty(0, bool)]
        for batch in self._rows(["key", "etag", *(["reason"] if retry else [])]):
            digests.append(_digests(batch["key"].to_pylist(), batch["etag"].to_pylist()))
            reasons = batch["reason"].to_pylist() if retry else [None] * batch.num_rows
            again.append(np.array([reason in retry for reason in reasons], bool))
        made = np.concatenate(digests)
        asked = np.flatnonzero(~np.concatenate(again))
        self._row = asked[np.argsort(made["first"][asked])]
        self._made = made[self._row]
        self._met = np.zeros(len(made), bool)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._met)

    def unchanged(self, keys: Sequence[str], etags: Sequence[str]) -> Array:
        """Which of these listed images are known as they are, [N] bool; they are met now.

        An image of which it is not true may still be known: see `others`.
        """
        if not len(self._made):
            return np.zeros(len(keys), bool)
        asked = _digests(keys, etags)
        place = np.searchsorted(self._made["first"], asked["first"])
        place[place == len(self._made)] = 0
        same = self._made[place] == asked
        self._met[self._row[place[same]]] = True
        return same

    def others(self) -> pa.Table:
        """The images that were not met unchanged, as `SCHEMA`: changed, tried again or gone."""
        parts, start = [], 0
        for batch in () if self._met.all() else self._rows(SCHEMA.names):
            missing = ~self._met[start : start + batch.num_rows]
            parts.append(batch.select(SCHEMA.names).filter(pa.array(missing)))
            start += batch.num_rows
        return pa.Table.from_batches(parts).cast(SCHEMA) if parts else SCHEMA.empty_table()


def _digests(keys: Iterable[str], etags: Iterable[str]) -> Array:
    made = (
        blake2b(f"{key}\0{etag}".encode(), digest_size=_DIGEST.itemsize).digest()
        for key, etag in zip(keys, etags, strict=True)
    )
    return np.frombuffer(b"".join(made), _DIGEST)
