"""Parquet tables to and from bytes, in the calling thread; every page with its CRC-32.

pyarrow's dataset reader (`pq.read_table`) pre-buffers in threads of its own, which may drop the
last reference to a Python buffer while the interpreter shuts down: the process then aborts after
its work is done (pyarrow 26, seen in one of ten `maskfleet status`). `ParquetFile` reads in this
thread.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError

WRITTEN: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""How every table of ours is written."""


class TableDamaged(StorageError, OSError):
    """An object that should be a Parquet table and is not."""


def read_table(source: bytes | io.IOBase, columns: list[str] | None = None) -> pa.Table:
    """A whole table, or some columns of it.

    Raises:
        TableDamaged: if it cannot be read.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with in_our_words():
        return open_table(file).read(columns=columns, use_threads=False)


def read_batches(source: io.IOBase, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a table, part by part: a large one never lies in memory.

    Raises:
        TableDamaged: if it cannot be read.
    """
    with in_our_words():
        table = open_table(source)
        yield from table.iter_batches(columns=list(columns), use_threads=False)


def read_rows(source: io.IOBase, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Some rows of a table by number, counted from 0: only their row groups are read.

    Raises:
        TableDamaged: if it cannot be read.
    """
    found = {}
    with in_our_words():
        table = open_table(source)
        start = 0
        for group in range(table.num_row_groups):
            end = start + table.metadata.row_group(group).num_rows
            if inside := [number for number in numbers if start <= number < end]:
                rows = table.read_row_group(group, use_threads=False)
                chosen = rows.take(pa.array([number - start for number in inside]))
                found |= dict(zip(inside, chosen.to_pylist(), strict=True))
            start = end
    return [found[number] for number in numbers]


def open_table(source: io.IOBase, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """One of our own tables: pages that have a checksum are compared with it."""
    return pq.ParquetFile(
        source, metadata=footer, pre_buffer=False, page_checksum_verification=True
    )


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """Say pyarrow's errors as `TableDamaged`."""
    try:
        yield
    except StorageError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise TableDamaged(f"not a readable Parquet table: {error}") from error


def write_table(table: pa.Table) -> bytes:
    """A table as one Parquet object; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, **WRITTEN)
    return sink.getvalue()
