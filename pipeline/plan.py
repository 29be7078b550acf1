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
import math
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import Fragments, SegmentConfig
from pipeline.fetching import LOST
from pipeline.keys import path_of
from pipeline.known import Known
from pipeline.listing import Item, Listing, discover, key_of
from pipeline.packed import Packed
from pipeline.records import Array, PlannedImage
from pipeline.storage import Store
from pipeline.tables import WRITTEN, sealed

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

URI = SCHEMA.get_field_index("uri")
IN_MEMORY = SCHEMA.remove(URI)
"""The columns of a plan before it is written: URIs follow from the keys."""

ROWS = pa.schema([f for f in IN_MEMORY if f.name not in {"image_id", "fragment"}])
"""The columns of images that have no numbers yet."""

FRAGMENTS = pa.schema(
    [
        pa.field("fragment", pa.int32(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("images", pa.int32(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("first_image_id", pa.int64(), nullable=False),
    ]
)

CHUNK = 16_384  # images that are Python objects at a time; of a million they are half a gigabyte
COMPARED, COMPARED_AT_ONCE = 1024, 16  # images read again: in all, and at the same time
NEW, CHANGED, RETRIED, REMOVED, SAME = "new", "changed", "retried", "removed", ""
SMALLEST, PARTS = 16, 64  # a fragment holds clamp(N / 64, 16, fragment.images) images


@dataclass(frozen=True, slots=True)
class Start:
    """The numbers a new round starts with: ids and fragments go on from the rounds before."""

    round: int = 0
    image_id: int = 0
    fragment: int = 0
    cap: int | None = None
    """Images of a fragment at most, where an earlier round has frozen it."""


@dataclass(frozen=True, slots=True)
class Round:
    """One planned round, packed until it is written."""

    first: Start
    rows: Packed
    """`ROWS`, in key order of the objects: what there is to do."""
    gone: pa.Table
    """Key and image_id of images that are not there any more."""
    source: str
    """URI of the source."""
    rule: Fragments

    @property
    def number(self) -> int:
        """Of the round."""
        return self.first.round

    @property
    def images(self) -> int:
        """How many there are to do."""
        return self.rows.num_rows

    @property
    def empty(self) -> bool:
        """Whether nothing has changed."""
        return not self.rows.num_rows and not self.gone.num_rows

    def tally(self, column: str) -> dict[str, int]:
        """How often each value occurs, removed keys included."""
        counts: Counter[str] = Counter()
        for rows in self.groups():
            counts.update(rows[column].to_pylist())
        return {value: count for value, count in counts.items() if value}

    @property
    def table(self) -> pa.Table:
        """The whole round as `IN_MEMORY`."""
        return pa.concat_tables([IN_MEMORY.empty_table(), *self.groups()])

    def groups(self) -> Iterator[pa.Table]:
        """Each fragment's images, and removed keys at the end, as `IN_MEMORY`."""
        most = min(self.rule.images, max(SMALLEST, self.rows.num_rows // PARTS))
        image_id = self.first.image_id
        cut = _cut(self.rows, min(most, self.first.cap or most), self.rule.bytes)
        for fragment, part in enumerate(cut, self.first.fragment):
            numbers = {
                "image_id": pa.array(range(image_id, image_id + part.num_rows), pa.int64()),
                "fragment": pa.repeat(pa.scalar(fragment, pa.int32()), part.num_rows),
            }
            columns = [numbers[n] if n in numbers else part[n] for n in IN_MEMORY.names]
            yield pa.table(columns, schema=IN_MEMORY)
            image_id += part.num_rows
        if self.gone.num_rows:
            yield _removed(self.gone)

    def fragments(self) -> pa.Table:
        """The small table beside the plan, `FRAGMENTS`."""
        parts = [FRAGMENTS.empty_table(), *map(fragments_table, self.groups())]
        table, place = pa.concat_tables(parts), FRAGMENTS.get_field_index("row_group")
        groups = pa.array(range(table.num_rows), pa.int32())
        return table.set_column(place, FRAGMENTS.field(place), groups)

    @property
    def nbytes(self) -> Array:
        """Encoded bytes of each image that is to be done, in order."""
        parts = [batch["nbytes"].to_numpy() for batch in self.rows]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def spread(self, count: int) -> list[PlannedImage]:
        """About so many images, or all there are, from one end to the other."""
        return self.picked(np.arange(0, self.rows.num_rows, max(1, self.rows.num_rows // count)))

    def picked(self, places: Array) -> list[PlannedImage]:
        """The images at these places, as they come; their fragments are not known yet."""
        names = [f for f in PlannedImage.__dataclass_fields__ if f in ROWS.names]
        places, start, chosen = np.sort(places), 0, []
        for batch in self.rows:
            here = places[(places >= start) & (places < start + batch.num_rows)]
            rows = batch.take(pa.array(here - start)).to_pylist()
            chosen += [
                PlannedImage(
                    image_id=self.first.image_id + int(place),
                    uri=_uri(self.source, row["key"]),
                    fragment=0,
                    **{name: row[name] for name in names},
                )
                for place, row in zip(here, rows, strict=True)
            ]
            start += batch.num_rows
        return chosen


# ----------------------------------------------------------------------------------------- rounds


def plan_round(
    store: Store, config: SegmentConfig, listing: Listing, known: Known, first: Start
) -> Round:
    """What is to be done now that ``known`` is already planned.

    Args:
        store: the source.
        config: what is asked for.
        listing: learns what was skipped or left out.
        known: the live images of all earlier rounds; none for round 0.
        first: the numbers this round starts with.
    """
    rows, before = _listed(store, config, listing, known), known.others()
    met = np.zeros(before.num_rows, bool)
    if len(known):
        rows = _compared(store, config, listing, rows, before, len(known), met)
    gone = before.filter(pa.array(~met & (config.limit is None)))
    return Round(first, rows, gone.sort_by("image_id"), store.uri, config.fragment)


def _listed(store: Store, config: SegmentConfig, listing: Listing, known: Known) -> Packed:
    """What the source holds and is not known as it is; all of it as new, for now."""
    images = discover(store, config, listing)
    if config.limit is not None and not len(known):
        images = _limited(images, config.limit, listing)
    rows = Packed(ROWS)
    for columns in _columns(images):
        other = ~known.unchanged(columns["key"], columns["etag"])
        if other.any():
            batch = pa.RecordBatch.from_pydict(columns, ROWS)
            rows.add(batch if other.all() else batch.filter(pa.array(other)))
    return rows


def _columns(images: Iterator[Item]) -> Iterator[dict[str, list[Any]]]:
    """The columns of `ROWS`, so many rows at a time.

    Values go into their columns at once: kept as records, a million of them would cost more time in
    the garbage collector than all else here.
    """
    while True:
        columns: dict[str, list[Any]] = {name: [] for name in ROWS.names}
        key, member, offset, nbytes, etag, form, problem = (
            columns[name].append
            for name in ("key", "member", "offset", "nbytes", "etag", "format", "problem")
        )
        for found, name, entry in islice(images, CHUNK):
            key(key_of(found, entry))
            member(entry.member)
            offset(entry.offset)
            nbytes(entry.nbytes)
            etag(found.etag)
            form(name)
            problem(entry.problem)
        if not (count := len(columns["key"])):
            return
        yield columns | {"change": [NEW] * count, "replaces": [None] * count}


def _limited(images: Iterator[Item], limit: int, listing: Listing) -> Iterator[Item]:
    yield from islice(images, limit)
    listing.left_out += sum(1 for _ in images)


def _compared(
    store: Store,
    config: SegmentConfig,
    listing: Listing,
    found: Packed,
    before: pa.Table,
    known: int,
    met: Array,
) -> Packed:
    """What of these images there is to do, and why.

    Args:
        store: the source.
        config: what is asked for.
        listing: learns what was left out.
        found: images that are listed and not known as they are.
        before: images that are known and were not met as they are.
        known: how many there are in all.
        met: learns which rows of ``before`` are listed.
    """
    rows, left = Packed(ROWS), math.inf if config.limit is None else config.limit - known
    for batch in found:
        place = pc.index_in(batch["key"], value_set=before["key"])  # null: not there before
        met[place.drop_null().to_numpy()] = True
        changes = np.array(_changes(store, batch, before, place, config.retry), object)
        new = changes == NEW
        beyond = new & (np.cumsum(new) > left)
        left -= int(new.sum())
        listing.left_out += int(beyond.sum())
        columns = {name: batch[name] for name in ROWS.names} | {
            "change": pa.array(changes, pa.string()),
            "replaces": before["image_id"].take(place).combine_chunks(),
        }
        compared = pa.RecordBatch.from_arrays(list(columns.values()), schema=ROWS)
        rows.add(compared.filter(pa.array((changes != SAME) & ~beyond)))
    return rows


def _changes(
    store: Store,
    found: pa.RecordBatch,
    before: pa.Table,
    place: pa.Array,
    retry: Collection[str],
) -> list[str]:
    """Why each image is in the round, or that it has not changed; ``place`` is its row before."""
    changes = [NEW] * found.num_rows
    met = pa.array(np.flatnonzero(place.is_valid()))
    now, then = found.take(met), before.take(place.take(met))

    def change(rows: tuple[dict[str, Any], dict[str, Any]]) -> str:
        return _change(store, *rows, retry)

    with ThreadPoolExecutor(COMPARED_AT_ONCE, thread_name_prefix="compare") as pool:
        for start in range(0, len(met), COMPARED):
            pairs = zip(*(t.slice(start, COMPARED).to_pylist() for t in (now, then)), strict=True)
            part = met.slice(start, COMPARED).to_pylist()
            for row, what in zip(part, pool.map(change, pairs), strict=True):
                changes[row] = what
    return changes


def _change(store: Store, now: dict[str, Any], then: dict[str, Any], retry: Collection[str]) -> str:
    """What became of an image, as listed now and as known then."""
    if then["reason"] in retry:
        return RETRIED
    if then["etag"] == now["etag"]:
        return SAME
    if then["sha256"] and now["problem"] is None and _digest(store, now) == then["sha256"]:
        return SAME  # touched or re-packed, but the same bytes
    return CHANGED


def _digest(store: Store, now: dict[str, Any]) -> str | None:
    """SHA-256 of the encoded bytes as they are now; None for table rows and where none are had."""
    if now["member"] is not None and now["offset"] is None:
        return None
    length = None if now["offset"] is None else now["nbytes"]
    try:
        data = store.read(path_of(now["key"]), now["offset"] or 0, length)
    except LOST:  # the fetch will say why
        return None
    return hashlib.sha256(data).hexdigest()


def _cut(rows: Packed, most: int, most_bytes: int) -> Iterator[pa.Table]:
    """Fragments: consecutive images, bounded by bytes and count, never by time."""
    waiting = rows.schema.empty_table()
    for batch in rows:
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
        *whole, _ = _sizes(waiting["nbytes"].to_numpy(), most, most_bytes)
        for size in whole:  # the last one may go on in the next batch
            yield waiting.slice(0, size)
            waiting = waiting.slice(size)
    if waiting.num_rows:
        yield waiting


def _sizes(nbytes: Array, most: int, most_bytes: int) -> Iterator[int]:
    """How many images each fragment has."""
    ends, at = np.cumsum(nbytes), 0
    while at < len(ends):
        before = ends[at - 1] if at else 0
        fitting = int(np.searchsorted(ends, before + most_bytes, "right")) - at
        size = min(most, max(1, fitting), len(ends) - at)
        yield size
        at += size


def _removed(gone: pa.Table) -> pa.Table:
    """Rows that ask for nothing: these images are not there any more."""
    said = {"image_id": gone["image_id"], "key": gone["key"], "replaces": gone["image_id"]}
    same = {"nbytes": 0, "etag": "", "format": "", "fragment": -1, "change": REMOVED}
    columns = {
        field.name: pa.repeat(pa.scalar(same.get(field.name), field.type), gone.num_rows)
        for field in IN_MEMORY
    }
    return pa.table({**columns, **said}, schema=IN_MEMORY)


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
    schema = SCHEMA.with_metadata(notes)
    # No statistics: every reader of a fragment reads the footer, which would be twice as long.
    writer = pq.ParquetWriter(sink, schema, write_statistics=False, **WRITTEN)
    for rows in plan.groups():
        there = rows["fragment"][0].as_py() >= 0
        uris = [_uri(plan.source, key) if there else "" for key in rows["key"].to_pylist()]
        rows = rows.add_column(URI, SCHEMA.field(URI), pa.array(uris, pa.string()))
        writer.write_table(rows, row_group_size=rows.num_rows)
    return sealed(writer, sink)


def _uri(source: str, key: str) -> str:
    """The object that holds an image; its path is escaped only where it could not be printed."""
    part = key.partition("#")[0]
    if "%" in part:
        path = path_of(key)
        part = path if path.isprintable() and path.isascii() else part
    return f"{source}/{part}"


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
