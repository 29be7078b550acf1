"""Parquet tables to and from bytes, in the calling thread; every page with its CRC-32.

A page is guarded by Parquet itself, the footer by nobody: a flipped bit there renames a column, or
leaves rows out. So ours carry a CRC-32C of their footer in a note of it, taken with zeros in its
place (`sealed`). Other readers see a note.

pyarrow's dataset reader (`pq.read_table`) pre-buffers in threads of its own, which may drop the
last reference to a Python buffer while the interpreter shuts down: the process then aborts after
its work is done (pyarrow 26, seen in one of ten `maskfleet status`). `ParquetFile` reads in this
thread.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError

MAGIC = b"PAR1"
SEAL = "maskfleet.footer_crc32c"
_UNSEALED = b"00000000"
_PLACE = SEAL.encode() + b"\x18\x08"  # Thrift: here ends a key, and its value has eight bytes
_TAIL = 64 * 1024  # read at the end of a table, as pyarrow does: most footers are in it

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
        return _bare(open_table(file).read(columns=columns, use_threads=False))


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
    """One of our own tables: footer and pages are compared with their checksums.

    Raises:
        TableDamaged: the footer is not what was written.
    """
    footer = footer or _footer(source)
    return pq.ParquetFile(
        source, metadata=footer, pre_buffer=False, page_checksum_verification=True
    )


def _footer(source: io.IOBase) -> pq.FileMetaData:
    nbytes = source.seek(0, io.SEEK_END)
    source.seek(max(0, nbytes - _TAIL))
    tail = source.read()
    start, end = nbytes - _size(tail) - 8, nbytes - 8
    if start < nbytes - len(tail):
        source.seek(max(0, start))
        tail = source.read()
    footer = tail[start - nbytes : end - nbytes]
    said, place = _seal(footer)
    if place and said != _crc(footer, place):
        raise TableDamaged("not a readable Parquet table: its footer is unlike its checksum")
    return pq.read_metadata(io.BytesIO(MAGIC + footer + tail[-8:]))


def _size(tail: bytes) -> int:
    if len(tail) < 8 or tail[-4:] != MAGIC:
        raise TableDamaged("not a readable Parquet table: it does not end like one")
    return int.from_bytes(tail[-8:-4], "little")


def _seal(footer: bytes) -> tuple[bytes, int]:
    """The checksum that a footer carries, and where; 0: tables before November 2026 have none."""
    place = footer.rfind(_PLACE) + len(_PLACE)
    return footer[place : place + 8], 0 if place < len(_PLACE) else place


def _crc(footer: bytes, place: int) -> bytes:
    plain = footer[:place] + _UNSEALED + footer[place + 8 :]
    return f"{google_crc32c.value(plain):08x}".encode()


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """Say pyarrow's errors as `TableDamaged`."""
    try:
        yield
    except StorageError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TableDamaged(f"not a readable Parquet table: {error}") from error


def write_table(table: pa.Table, *, dictionaries: bool = True) -> bytes:
    """A table as one Parquet object; equal tables give equal bytes.

    Args:
        table: what is written.
        dictionaries: whether values that come again are written once, for readers of many rows.
    """
    sink = io.BytesIO()
    writer = pq.ParquetWriter(sink, table.schema, use_dictionary=dictionaries, **WRITTEN)
    writer.write_table(table)
    return sealed(writer, sink)


def sealed(writer: pq.ParquetWriter, sink: io.BytesIO) -> bytes:
    """Close a table that was written part by part, and give its footer a checksum."""
    writer.add_key_value_metadata({SEAL: _UNSEALED.decode()})
    writer.close()
    end = sink.seek(-8, io.SEEK_END)
    start = end - _size(sink.read())
    sink.seek(start)
    footer = sink.read(end - start)
    _, place = _seal(footer)
    sink.seek(start + place)
    sink.write(_crc(footer, place))
    return sink.getvalue()


def _bare(table: pa.Table) -> pa.Table:
    """Without the seal, which is of the object and not of the table."""
    notes = {k: v for k, v in (table.schema.metadata or {}).items() if k != SEAL.encode()}
    return table.replace_schema_metadata(notes or None)
