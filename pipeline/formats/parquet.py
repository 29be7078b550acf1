"""Parquet shards with a column of encoded image bytes: one row is one image.

The index reads footers only; sizes are the row group's mean. The column is found by name, then by
type: ``image``, ``img``, ``image_bytes``, ``bytes``, ``content``, ``data``, ``jpg``, ``png``, …,
also the ``bytes`` leaf of a struct (the Hugging Face layout ``image: {bytes, path}``); else the
only binary column. A table without one is a single rejected row.

A table of labelled pictures has a column ``mask`` beside it, or ``label`` (pipeline/labels.py).
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageBusy, StorageError
from pipeline.fetching import LOST, lost, too_many_bytes
from pipeline.formats import Entry
from pipeline.keys import path_of, printable
from pipeline.ranged import Ranged
from pipeline.records import EncodedImage, PlannedImage, Verdict
from pipeline.storage import Found, Store

SUFFIXES = (".parquet", ".pq")

COLUMNS = (
    "image", "img", "image_bytes", "image.bytes", "img_bytes", "bytes", "content", "data",
    "jpg", "jpeg", "png", "webp", "tif", "tiff", "picture", "photo",
)  # fmt: skip
MASKS = ("mask",)
LABEL = "label"
"""Of whole pictures; where there are masks, nothing is read there."""
MAX_ROWS = 10_000_000  # a footer may lie about its rows; beyond this it is an attack
ROWS = 64  # decoded at a time, at most
EXPANDED = 256 * 1024**2
"""Bytes that rows decoded together may come to if each were all that their column holds: a
dictionary of one value that every row repeats is a small file."""


def index(store: Store, found: Found) -> Iterator[Entry]:
    """One entry per row, in file order."""
    try:
        table = pq.ParquetFile(Ranged(store, found.path, found.nbytes, found.etag))
        leaf = _leaf(table)
        _refuse_too_many_rows(table)
        ordinal = 0
        for group in range(table.num_row_groups):
            about = table.metadata.row_group(group)
            total = about.column(leaf).total_uncompressed_size
            mean = max(1, total // max(1, about.num_rows))
            for _ in range(about.num_rows):
                yield Entry(str(ordinal), None, mean)
                ordinal += 1
    except LOST as error:
        verdict = lost(error)
        yield Entry(None, None, found.nbytes, problem=f"{verdict.reason}: {verdict.detail}")
    except StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = "empty" if found.nbytes == 0 else "corrupt"
        yield Entry(
            None, None, found.nbytes, problem=f"{reason}: parquet shard: {printable(str(error))}"
        )


def _refuse_too_many_rows(table: pq.ParquetFile) -> None:
    rows = sum(table.metadata.row_group(g).num_rows for g in range(table.num_row_groups))
    if rows > MAX_ROWS:
        raise ValueError(f"its footer says {rows} rows, more than {MAX_ROWS}")


def notes(
    store: Store, found: Found, names: Sequence[str]
) -> tuple[dict[str, list[str | None]], bool]:
    """The columns of these names as text, as far as the table has them, and whether it has masks.

    Raises:
        ValueError: it is no table, or such a column holds neither text nor numbers.
    """
    try:
        table = pq.ParquetFile(Ranged(store, found.path, found.nbytes, found.etag))
        there = [name for name in names if name in table.schema_arrow.names]
        masks = LABEL not in there or any(name in table.schema_arrow.names for name in MASKS)
        if masks:
            _leaf(table, MASKS)
            there = [name for name in there if name != LABEL]
        columns = table.read(columns=there, use_threads=False)
        return {name: columns[name].cast(pa.string()).to_pylist() for name in there}, masks
    except StorageError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(printable(str(error))) from error


def _leaf(table: pq.ParquetFile, names: Sequence[str] = COLUMNS) -> int:
    """Index of the leaf column that holds the bytes."""
    schema = table.schema
    binary = {
        schema.column(i).path: i
        for i in range(len(schema.names))
        if schema.column(i).physical_type in {"BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"}
        and schema.column(i).logical_type.type in {"NONE", "UNKNOWN"}
        and schema.column(i).max_repetition_level == 0
    }
    for name in names:
        for candidate in (name, f"{name}.bytes"):
            if candidate in binary:
                return binary[candidate]
    others = [place for path, place in binary.items() if path.partition(".")[0] not in MASKS]
    if len(others) == 1 and names == COLUMNS:
        return others[0]
    what = "image" if names == COLUMNS else "mask"
    raise ValueError(f"no column of {what} bytes among {', '.join(schema.names)[:200]}")


def fetch(
    store: Store,
    images: Sequence[PlannedImage],
    threads: int,  # noqa: ARG001 - the contract
    limit: int,
) -> Iterator[EncodedImage]:
    """Rows in order; each row group that is touched is read once, a few rows at a time."""
    yield from _fetched(store, images, limit, COLUMNS)


def fetch_masks(store: Store, images: Sequence[PlannedImage], limit: int) -> Iterator[EncodedImage]:
    """The same of the masks beside the images."""
    yield from _fetched(store, images, limit, MASKS)


def _fetched(
    store: Store, images: Sequence[PlannedImage], limit: int, names: Sequence[str]
) -> Iterator[EncodedImage]:
    for path, rows in groupby(images, key=lambda image: path_of(image.key)):
        wanted = list(rows)
        try:
            yield from _of_one_table(store, path, wanted, limit, names)
        except LOST as error:
            yield from (EncodedImage(image, None, lost(error)) for image in wanted)
        except StorageError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            verdict = Verdict("fetch", "corrupt", f"parquet shard: {printable(str(error))}")
            yield from (EncodedImage(image, None, verdict) for image in wanted)


def _of_one_table(
    store: Store, path: str, wanted: list[PlannedImage], limit: int, names: Sequence[str]
) -> Iterator[EncodedImage]:
    """The wanted rows of one table; ``wanted`` loses what was answered, so a caller can go on."""
    nbytes = _size(store, path, wanted[0].etag)
    table = pq.ParquetFile(Ranged(store, path, nbytes, wanted[0].etag))
    leaf = _leaf(table, names)
    first = 0
    for group in range(table.num_row_groups):
        after = first + table.metadata.row_group(group).num_rows
        if wanted and first <= int(wanted[0].member or 0) < after:
            yield from _of_one_group(table, group, leaf, first, wanted, limit)
        first = after
    while wanted:
        yield EncodedImage(
            wanted.pop(0), None, Verdict("fetch", "vanished", "the table has fewer rows now")
        )


def _size(store: Store, path: str, etag: str) -> int:
    """Of a table that was listed."""
    about = store.stat(path)
    if about is None:
        store.read(path, 0, 1, etag)  # says what is the matter, and asks again before "not there"
        about = store.stat(path)
    if about is None:
        raise StorageBusy(f"{printable(path)} comes and goes; run the same command again")
    return about.nbytes


def _of_one_group(
    table: pq.ParquetFile,
    group: int,
    leaf: int,
    first: int,
    wanted: list[PlannedImage],
    limit: int,
) -> Iterator[EncodedImage]:
    row = first
    column = table.schema.column(leaf).path
    most = max(1, table.metadata.row_group(group).column(leaf).total_uncompressed_size)
    rows = min(ROWS, max(1, EXPANDED // most))
    for batch in table.iter_batches(
        batch_size=rows, row_groups=[group], columns=[column], use_threads=False
    ):
        values = batch.column(0)
        while pa.types.is_struct(values.type):
            values = values.field(0)
        while wanted and int(wanted[0].member or 0) < row + len(values):
            image = wanted.pop(0)
            value = values[int(image.member or 0) - row]
            yield _encoded(image, value, limit)
        row += len(values)
        if not wanted:
            return


def _encoded(image: PlannedImage, value: pa.Scalar, limit: int) -> EncodedImage:
    if not value.is_valid:
        return EncodedImage(image, None, Verdict("fetch", "empty", "the cell is null"))
    if value.as_buffer().size > limit:
        return EncodedImage(image, None, too_many_bytes(image, limit))
    return EncodedImage(image, value.as_py())
