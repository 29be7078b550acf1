"""What a Parquet table of somebody else's holds: read where it may end the process (apart.py).

Each function takes the table as a file and yields what can travel; what is wrong with a table is a
`ValueError`.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.keys import printable

COLUMNS = (
    "image", "img", "image_bytes", "image.bytes", "img_bytes", "bytes", "content", "data",
    "jpg", "jpeg", "png", "webp", "tif", "tiff", "picture", "photo",
)  # fmt: skip
MASKS = ("mask",)
LABEL = "label"
"""Of whole pictures; where there are masks, nothing is read there."""
MAX_ROWS = 10_000_000  # a footer may lie about its rows; beyond this it is an attack
FREE_ROWS = 10_000  # that may take no bytes (nulls); further ones take one each, or it lies
PART = 32 * 1024**2  # of a column that is read at a time: they can be as long as the table
ROWS = 64  # decoded at a time, at most
EXPANDED = 256 * 1024**2
"""Bytes that rows decoded together may come to if each were all that their column holds: a
dictionary of one value that every row repeats is a small file."""


def row_groups(file: io.RawIOBase) -> Iterator[tuple[int, int]]:
    """Of each row group how many rows it has, and the mean of their images' bytes."""
    with _as_value_errors():
        table = _opened(file)
        leaf = _leaf(table)
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        if lies := [group.num_rows for group in groups if group.num_rows < 0]:
            raise ValueError(f"its footer says that a row group has {lies[0]} rows")
        rows = sum(group.num_rows for group in groups)
        nbytes = file.seek(0, io.SEEK_END)
        if rows > (most := min(MAX_ROWS, FREE_ROWS + nbytes)):
            raise ValueError(f"its footer says {rows} rows; in {nbytes} bytes are {most} at most")
        for group in groups:
            total = group.column(leaf).total_uncompressed_size
            yield group.num_rows, max(1, total // max(1, group.num_rows))


def notes_of(
    file: io.RawIOBase, names: Sequence[str]
) -> Iterator[list[tuple[str, list[str | None]]] | bool]:
    """The columns of these names as text, as far as there are any; whether there are masks."""
    with _as_value_errors():
        table = _opened(file)
        there = [name for name in names if name in table.schema_arrow.names]
        masks = LABEL not in there or any(name in table.schema_arrow.names for name in MASKS)
        if masks:
            _leaf(table, MASKS)
            there = [name for name in there if name != LABEL]
        columns = table.read(columns=there, use_threads=False)
        yield [(name, columns[name].cast(pa.string()).to_pylist()) for name in there]
        yield masks


def cells(
    file: io.RawIOBase, wanted: list[int], limit: int, names: Sequence[str]
) -> Iterator[bytes | int | None]:
    """The bytes in these rows (in order, counted from 0), as far as there are so many rows.

    In the place of bytes stands their number where it is beyond ``limit``, None for a null.
    """
    with _as_value_errors():
        table = _opened(file)
        leaf = _leaf(table, names)
        first = 0
        for group in range(table.num_row_groups):
            after = first + table.metadata.row_group(group).num_rows
            if wanted and first <= wanted[0] < after:
                yield from _of_one_group(table, group, leaf, first, wanted, limit)
            first = after


def _opened(file: io.RawIOBase) -> pq.ParquetFile:
    """Read part by part, and by this thread: it alone may speak with the parent."""
    return pq.ParquetFile(file, buffer_size=PART, pre_buffer=False)


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


def _of_one_group(
    table: pq.ParquetFile, group: int, leaf: int, first: int, wanted: list[int], limit: int
) -> Iterator[bytes | int | None]:
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
        while wanted and wanted[0] < row + len(values):
            yield _cell(values[wanted.pop(0) - row], limit)
        row += len(values)
        if not wanted:
            return


def _cell(value: pa.Scalar, limit: int) -> bytes | int | None:
    if not value.is_valid:
        return None
    size = value.as_buffer().size
    return size if size > limit else value.as_py()


@contextlib.contextmanager
def _as_value_errors() -> Iterator[None]:
    try:
        yield
    except ConnectionError:  # not of the table: the parent is gone
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(printable(str(error))) from error
