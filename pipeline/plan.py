"""The plan: the frozen, ordered list of images, cut into fragments, written in rounds.

Round 0 holds the whole archive. A later round holds what is new, what changed (by etag, then by
the SHA-256 of its bytes), what is tried again, and the keys that are gone. ``plan/NNN.parquet`` is
one create-only object with a row group per fragment; ``NNN.fragments.parquet`` is derived from it.
"""

# pyarrow.compute makes its functions when it is imported; no type checker can see them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import formats
from pipeline.config import Fragments, SegmentConfig
from pipeline.keys import escape
from pipeline.listing import Listing, discover, key_of
from pipeline.records import PlannedImage
from pipeline.storage import Found, Store

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("member", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("fragment", pa.int32(), nullable=False),
        pa.field("problem", pa.string()),
        pa.field("change", pa.string(), nullable=False),
        pa.field("replaces", pa.int64()),
    ]
)
"""One row per image. ``change``: new, changed, retried, removed (fragment -1: nothing to do).
``replaces``: the image_id whose answer this row supersedes."""

FRAGMENTS = pa.schema(
    [
        pa.field("fragment", pa.int32(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("images", pa.int32(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("first_image_id", pa.int64(), nullable=False),
    ]
)

CHUNK = 65_536  # rows collected before they become Arrow: bounds the driver's memory
SMALLEST, PARTS = 16, 64  # a fragment holds clamp(N / 64, 16, fragment.images) images


@dataclass(frozen=True, slots=True)
class Round:
    """One planned round, in memory only while it is written."""

    number: int
    table: pa.Table
    """`SCHEMA`, sorted by image_id, removed keys last."""

    @property
    def images(self) -> int:
        """How many images it asks for."""
        return pc.sum(pc.greater_equal(self.table["fragment"], 0)).as_py() or 0


# ----------------------------------------------------------------------------------------- rounds


class _Rows:
    """Rows on their way into Arrow; a million Python objects at once would be half a gigabyte."""

    def __init__(self) -> None:
        self._columns: dict[str, list] = {name: [] for name in SCHEMA.names}
        self._done: list[pa.RecordBatch] = []
        self.count = 0

    def add(self, **values: object) -> None:
        for name, column in self._columns.items():
            column.append(values[name])
        self.count += 1
        if len(self._columns["key"]) >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        self._done.append(pa.RecordBatch.from_pydict(self._columns, schema=SCHEMA))
        self._columns = {name: [] for name in SCHEMA.names}

    def table(self) -> pa.Table:
        self._flush()
        return pa.Table.from_batches(self._done, schema=SCHEMA)


def plan_round(
    store: Store,
    config: SegmentConfig,
    listing: Listing,
    known: "dict[str, Known]",
    first: "Start",
) -> Round:
    """What is to be done now that ``known`` is already planned.

    Args:
        store: the source.
        config: what is asked for.
        listing: learns what was skipped or left out.
        known: the live images of all earlier rounds, by key; empty for round 0.
        first: the numbers this round starts with.
    """
    rows, unseen = _Rows(), set(known)
    limit, known_or_new = config.limit, len(known)
    for found, name, entry in discover(store, config, listing):
        key = key_of(found, entry)
        before = known.get(key)
        unseen.discard(key)
        change = _change(store, found, entry, before, config)
        if change is None:
            continue
        if before is None:
            if limit is not None and known_or_new >= limit:
                listing.left_out += 1
                continue
            known_or_new += 1
        rows.add(
            image_id=first.image_id + rows.count,
            key=key,
            uri=f"{store.uri}/{escape(found.path) if not _plain(found.path) else found.path}",
            member=entry.member,
            offset=entry.offset,
            nbytes=entry.nbytes,
            etag=found.etag,
            format=name,
            fragment=0,
            problem=entry.problem,
            change=change,
            replaces=before.image_id if before else None,
        )
    table = _with_fragments(rows.table(), first.fragment, config.fragment, first.cap)
    gone = [] if limit is not None else sorted(known[key].image_id for key in unseen)
    by_id = {known[key].image_id: key for key in unseen} if gone else {}
    return Round(first.round, pa.concat_tables([table, _removed(gone, by_id)]))


@dataclass(frozen=True, slots=True)
class Start:
    """The numbers a new round starts with: ids and fragments go on from the rounds before."""

    round: int = 0
    image_id: int = 0
    fragment: int = 0
    cap: int | None = None
    """Images of a fragment at most, where an earlier round has frozen it."""


@dataclass(frozen=True, slots=True)
class Known:
    """A live image of an earlier round."""

    image_id: int
    etag: str
    nbytes: int
    offset: int | None
    sha256: str | None = None
    """Of its encoded bytes, where it was read."""
    reason: str | None = None
    """Why it was rejected, if it was."""


def _plain(path: str) -> bool:
    return (path.isprintable() and path.isascii()) or escape(path) == path


def _change(
    store: Store, found: Found, entry: formats.Entry, before: Known | None, config: SegmentConfig
) -> str | None:
    """Why this image is in the round, or None where it has not changed."""
    if before is None:
        return "new"
    if before.reason and before.reason in config.retry:
        return "retried"
    if before.etag == found.etag:
        return None
    if before.sha256 and entry.problem is None and _digest(store, found, entry) == before.sha256:
        return None  # touched or re-packed, but the same bytes
    return "changed"


def _digest(store: Store, found: Found, entry: formats.Entry) -> str | None:
    """SHA-256 of the encoded bytes as they are now; None for table rows, read by column."""
    if entry.member is not None and entry.offset is None:
        return None
    length = None if entry.offset is None else entry.nbytes
    return hashlib.sha256(store.read(found.path, entry.offset or 0, length)).hexdigest()


def _with_fragments(table: pa.Table, start: int, rule: Fragments, cap: int | None) -> pa.Table:
    """Number the fragments: consecutive images, bounded by bytes and count, never by time."""
    most = min(rule.images, max(SMALLEST, table.num_rows // PARTS), cap or rule.images)
    numbers, inside, nbytes, fragment = [], 0, 0, start
    for size in table["nbytes"].to_pylist():
        if inside and (inside >= most or nbytes + size > rule.bytes):
            fragment, inside, nbytes = fragment + 1, 0, 0
        numbers.append(fragment)
        inside, nbytes = inside + 1, nbytes + size
    place = SCHEMA.get_field_index("fragment")
    return table.set_column(place, SCHEMA.field("fragment"), pa.array(numbers, pa.int32()))


def _removed(ids: list[int], keys: dict[int, str]) -> pa.Table:
    rows = _Rows()
    for image_id in ids:
        rows.add(
            image_id=image_id, key=keys[image_id], uri="", member=None, offset=None, nbytes=0,
            etag="", format="", fragment=-1, problem=None, change="removed", replaces=image_id,
        )  # fmt: skip
    return rows.table()


# -------------------------------------------------------------------------------- as objects


def path_of_round(number: int) -> str:
    """Where a round's plan lies in the run folder."""
    return f"plan/{number:03d}.parquet"


def path_of_fragments(number: int) -> str:
    """Where the small table beside it lies."""
    return f"plan/{number:03d}.fragments.parquet"


def to_parquet(plan: Round, token: str, about: dict[str, object]) -> bytes:
    """The round as one object: a row group per fragment, removed keys in the last one."""
    sink = io.BytesIO()
    notes = {"maskfleet.token": token, "maskfleet.listing": json.dumps(about, sort_keys=True)}
    with pq.ParquetWriter(sink, SCHEMA.with_metadata(notes), compression="zstd") as writer:
        for _, start, count in runs(plan.table["fragment"]):
            writer.write_table(plan.table.slice(start, count), row_group_size=max(1, count))
    return sink.getvalue()


def fragments_table(plan: pa.Table) -> pa.Table:
    """The small table beside a plan: one row per fragment, removed keys left out."""
    rows = [
        (
            fragment,
            group,
            count,
            pc.sum(plan["nbytes"].slice(start, count)).as_py(),
            plan["image_id"][start].as_py(),
        )
        for group, (fragment, start, count) in enumerate(runs(plan["fragment"]))
        if fragment >= 0
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(FRAGMENTS.names)
    return pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, FRAGMENTS, strict=True)], schema=FRAGMENTS
    )


def runs(fragments: pa.ChunkedArray) -> Iterator[tuple[int, int, int]]:
    """(fragment, first row, rows) of each stretch of equal fragment numbers."""
    encoded = pc.run_end_encode(fragments.combine_chunks()) if len(fragments) else None
    if encoded is None:
        return
    start = 0
    for value, end in zip(encoded.values.to_pylist(), encoded.run_ends.to_pylist(), strict=True):
        yield value, start, end - start
        start = end


def read_fragment(file: pq.ParquetFile, row_group: int) -> list[PlannedImage]:
    """The images of one fragment, in plan order."""
    names = [f for f in PlannedImage.__dataclass_fields__ if f in SCHEMA.names]
    table = file.read_row_group(row_group, columns=names)
    return [PlannedImage(**row) for row in table.to_pylist()]
