"""The end of a round: the headers of all fragments, compacted into the tables people query.

``final/`` is derived: it can be made again from the commits at any time, byte for byte. The
manifest is create-only and names the tables with their hashes; its presence says the round is done.
"""

# pyarrow.compute makes its functions when it is imported; no type checker can see them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import RunUnfinished
from pipeline.fragment import CLASS_STATS, DETAIL, IMAGES, PREDICTIONS, Header
from pipeline.layout import Layout
from pipeline.ledger import FORMAT_VERSION, Commit, Ledger, digest_of, now
from pipeline.tables import WRITTEN, TableDamaged, in_our_words, open_table, sealed

REJECTED = pa.schema(
    [IMAGES.field(name) for name in ("image_id", "key", "uri", "station", "reason")]
    + [DETAIL]
    + [IMAGES.field(name) for name in ("input_bytes", "etag", "sha256", "fragment")]
)

FRAGMENTS = pa.schema(
    [
        pa.field("fragment", pa.int32(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("header_nbytes", pa.int64(), nullable=False),
        pa.field("data_crc32c", pa.uint32(), nullable=False),
        pa.field("n_done", pa.int32(), nullable=False),
        pa.field("n_rejected", pa.int32(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
    ]
)

ROUND = b"maskfleet.round"
"""In the footer of each final table: the newest round that it knows."""
ROW_GROUP = 32_768  # STORE §4.1: sorted by image_id, small enough that a lookup reads little


@dataclass(frozen=True, slots=True)
class Counts:
    """The live images of a run: the newest answer of every key that is still there."""

    planned: int
    done: int
    rejected: dict[str, int]
    """By reason."""
    fragments: int
    pixels: int

    @property
    def n_rejected(self) -> int:
        """All reasons together."""
        return sum(self.rejected.values())


def superseded(ledger: Ledger, rounds: list[int]) -> set[int]:
    """Images whose answer no longer counts: changed, tried again or gone since."""
    ids: set[int] = set()
    for number in rounds:
        if number:
            column = ledger.plan(number, ["replaces"])["replaces"]
            ids.update(i for i in column.to_pylist() if i is not None)
    return ids


def finalize(ledger: Ledger) -> Counts | None:
    """Write ``final/`` and the manifest of the newest round.

    None if another driver has planned a further round meanwhile: ``final/`` is then its business.
    Should that happen only after the look (this process may be frozen between any two writes), its
    tables are those of an older round, which `final_counts` notices.

    Raises:
        RunUnfinished: if a fragment is missing.
    """
    rounds = ledger.rounds()
    made, counts = final_tables(ledger, rounds)
    if ledger.rounds() != rounds:
        return None
    entries = {}
    for name, (data, rows) in made.items():
        ledger.store.replace(f"final/{name}.parquet", data)
        digest = hashlib.sha256(data).hexdigest()
        entries[name] = {
            "path": f"final/{name}.parquet",
            "rows": rows,
            "bytes": len(data),
            "sha256": digest,
        }
    _write_manifest(ledger, rounds[-1], counts, entries)
    return counts


def final_tables(ledger: Ledger, rounds: list[int]) -> tuple[dict[str, tuple[bytes, int]], Counts]:
    """The final tables of these rounds as Parquet bytes with their rows.

    From plan and commits alone: the same rounds give the same bytes.

    Raises:
        RunUnfinished: if a fragment is missing.
    """
    plans = [ledger.fragments(n) for n in rounds]
    planned = [f for plan in plans for f in plan["fragment"].to_pylist()]
    commits = ledger.commits()
    missing = [f for f in planned if f not in commits]
    if missing:
        raise RunUnfinished(
            f"{len(missing)} of {len(planned)} fragments are not committed; "
            "run the same command again"
        )
    replaced = superseded(ledger, rounds)
    dropped = pa.array(sorted(replaced), pa.int64())
    tables = _Tables(final_schemas(ledger.layout), rounds[-1])
    for commit, header in ledger.headers([commits[f] for f in planned]):
        tables.add(commit, header, dropped)
    asked = sum(pc.sum(plan["images"]).as_py() or 0 for plan in plans)
    counts = tables.counts(asked - len(replaced))
    return tables.closed(), counts


def _write_manifest(ledger: Ledger, number: int, counts: Counts, entries: dict[str, Any]) -> None:
    manifest = {
        "format_version": FORMAT_VERSION,
        "run_id": ledger.run["run_id"],
        "round": number,
        "finished": now(),
        "token": ledger.run["token"],
        "model": {"version": ledger.model_version, "sha256": ledger.run["bundle"]["sha256"]},
        "counts": in_manifest(counts),
        "tables": entries,
    }
    manifest["sha256"] = digest_of(manifest)
    path, data = f"manifest/{number:03d}.json", json.dumps(manifest, indent=1).encode() + b"\n"
    if not ledger.store.create(path, data) and _manifest(ledger, number).get("tables") != entries:
        ledger.store.replace(path, data)  # a damaged object was deleted and made again


def final_counts(ledger: Ledger) -> Counts | None:
    """The counts of the newest round, if its manifest and all its tables are there."""
    rounds, manifests = ledger.rounds(), ledger.manifests()
    if not manifests or manifests[-1] != rounds[-1]:
        return None
    manifest = _manifest(ledger, manifests[-1])
    for entry in manifest.get("tables", {}).values():
        about = ledger.store.stat(entry["path"])
        if about is None or about.nbytes != entry["bytes"]:
            return None
        if round_of(ledger, entry["path"]) != rounds[-1]:
            return None
    said = manifest.get("counts")
    if said is None:
        return None
    return Counts(
        said["planned"], said["done"], said["rejected_by_reason"], said["fragments"], said["pixels"]
    )


def round_of(ledger: Ledger, path: str) -> int | None:
    """The round that a table was made for, from its footer; None where it does not say."""
    try:
        with ledger.plan_file(path) as file, in_our_words():
            return int(open_table(file).schema_arrow.metadata[ROUND])
    except (TableDamaged, KeyError, TypeError, ValueError):
        return None


def _manifest(ledger: Ledger, number: int) -> dict[str, Any]:
    """A manifest, or nothing where it is damaged: it can be made again."""
    try:
        return ledger.manifest(number)
    except ValueError:
        return {}


def in_manifest(counts: Counts) -> dict[str, Any]:
    """The counts as they stand in a manifest."""
    return {
        "planned": counts.planned,
        "done": counts.done,
        "rejected": counts.n_rejected,
        "rejected_by_reason": counts.rejected,
        "fragments": counts.fragments,
        "pixels": counts.pixels,
    }


def final_schemas(layout: Layout) -> dict[str, pa.Schema]:
    """The tables below ``final/``; class_stats counts pixels and is empty where there are none."""
    schemas = {
        "images": IMAGES,
        "class_stats": CLASS_STATS,
        "rejected": REJECTED,
        "fragments": FRAGMENTS,
    }
    return schemas if layout.has_masks else {**schemas, "predictions": PREDICTIONS}


class _Tables:
    """The tables while they grow, already compressed: a million rows are some tens of MB."""

    def __init__(self, schemas: dict[str, pa.Schema], newest: int) -> None:
        self._sinks = {name: io.BytesIO() for name in schemas}
        said = {ROUND: str(newest).encode()}
        self._writers = {
            name: pq.ParquetWriter(
                self._sinks[name], schema.with_metadata(said), write_page_index=True, **WRITTEN
            )
            for name, schema in schemas.items()
        }
        self._waiting: dict[str, list[pa.Table]] = {name: [] for name in schemas}
        self._rows: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._done = self._pixels = 0

    def add(self, commit: Commit, header: Header, dropped: pa.Array) -> None:
        """One fragment's rows, less the superseded ones."""
        images, stats = _less(header.images, dropped), _less(header.class_stats, dropped)
        rejected = images.filter(pc.equal(images["status"], "rejected"))
        done = images.filter(pc.equal(images["status"], "done"))
        self._done += done.num_rows
        self._pixels += (
            pc.sum(pc.multiply(done["height"].cast("int64"), done["width"])).as_py() or 0
        )
        self._reasons.update(rejected["reason"].to_pylist())
        place = images.column_names.index("byte_offset")
        absolute = pc.add(
            images["byte_offset"], header.nbytes
        )  # in a header they count from the first frame
        self._write(
            "images",
            images.set_column(place, "byte_offset", absolute).select(IMAGES.names).cast(IMAGES),
        )
        self._write("class_stats", stats.cast(CLASS_STATS))
        self._write("rejected", rejected.select(REJECTED.names).cast(REJECTED))
        if header.predictions is not None:
            self._write("predictions", _less(header.predictions, dropped).cast(PREDICTIONS))
        self._write("fragments", _fragment_row(commit, header))

    def _write(self, name: str, table: pa.Table) -> None:
        self._rows[name] += table.num_rows
        self._waiting[name].append(table)
        if sum(t.num_rows for t in self._waiting[name]) >= ROW_GROUP:
            self._flush(name)

    def _flush(self, name: str) -> None:
        if self._waiting[name]:
            self._writers[name].write_table(
                pa.concat_tables(self._waiting[name]).combine_chunks(), row_group_size=ROW_GROUP
            )
            self._waiting[name] = []

    def counts(self, planned: int) -> Counts:
        """What was added."""
        return Counts(
            planned,
            self._done,
            dict(sorted(self._reasons.items())),
            self._rows["fragments"],
            self._pixels,
        )

    def closed(self) -> dict[str, tuple[bytes, int]]:
        """Bytes and rows of each table."""
        for name in self._writers:
            self._flush(name)
        return {
            name: (sealed(writer, self._sinks[name]), self._rows[name])
            for name, writer in self._writers.items()
        }


def _less(table: pa.Table, dropped: pa.Array) -> pa.Table:
    """The rows of live images."""
    return table.filter(pc.invert(pc.is_in(table["image_id"], dropped)))


def _fragment_row(commit: Commit, header: Header) -> pa.Table:
    about = header.about
    row = {
        "fragment": commit.fragment,
        "round": about["round"],
        "path": commit.path,
        "token": about["token"],
        "nbytes": commit.found.nbytes,
        "header_nbytes": header.nbytes,
        "data_crc32c": about["data_crc32c"],
        "n_done": about["n_done"],
        "n_rejected": about["n_rejected"],
        "etag": commit.found.etag,
    }
    return pa.Table.from_pylist([row], FRAGMENTS)
