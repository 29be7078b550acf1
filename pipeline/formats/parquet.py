"""Parquet shards with a column of encoded image bytes: one row is one image.

The index reads footers only; sizes are the row group's mean. The column is found by name, then by
type: ``image``, ``img``, ``image_bytes``, ``bytes``, ``content``, ``data``, ``jpg``, ``png``, …,
also the ``bytes`` leaf of a struct (the Hugging Face layout ``image: {bytes, path}``); else the
only binary column. A table without one is a single rejected row.

A table of labelled pictures has a column ``mask`` beside it, or ``label`` (pipeline/labels.py).

Parquet's reader ends its process at some damaged footers, so tables are read in a child process
(pipeline/apart.py, pipeline/foreign_table.py). One that ends it twice is no table.
"""

import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from pipeline.apart import IDLE, ProcessDied, Work, answers
from pipeline.errors import StorageBusy
from pipeline.fetching import LOST, lost, too_many_bytes
from pipeline.foreign_table import COLUMNS, MASKS, cells, notes_of, row_groups
from pipeline.formats import Entry
from pipeline.keys import path_of, printable
from pipeline.ranged import BLOCK, Ranged
from pipeline.records import EncodedImage, PlannedImage, Verdict
from pipeline.storage import Found, Store

SUFFIXES = (".parquet", ".pq")

TRIES = 2  # children that a table may cost: the first may have been the machine's fault

_few_at_a_time = threading.BoundedSemaphore(IDLE)
"""For indexing: what is computed takes a moment, and many threads would have as many children."""


def index(store: Store, found: Found) -> Iterator[Entry]:
    """One entry per row, in file order."""
    try:
        groups = _listed(store, found, row_groups)
    except LOST as error:
        verdict = lost(error)
        yield Entry(None, None, found.nbytes, problem=f"{verdict.reason}: {verdict.detail}")
        return
    except (ProcessDied, ValueError) as error:
        verdict = _verdict(error)
        reason = verdict.reason if found.nbytes else "empty"
        yield Entry(None, None, found.nbytes, problem=f"{reason}: {verdict.detail}")
        return
    ordinal = 0
    for rows, mean in groups:
        for _ in range(rows):
            yield Entry(str(ordinal), None, mean)
            ordinal += 1


def notes(
    store: Store, found: Found, names: Sequence[str]
) -> tuple[dict[str, list[str | None]], bool]:
    """The columns of these names as text, as far as the table has them, and whether it has masks.

    Raises:
        ValueError: it is no table, or such a column holds neither text nor numbers.
    """
    try:
        columns, masks = _listed(store, found, notes_of, names)
    except ProcessDied as error:
        raise ValueError(_why(error)) from error
    return dict(columns), masks


def _listed(store: Store, found: Found, work: Work, *arguments: object) -> list[Any]:
    """All answers of a work, which reads little beyond the footer."""
    file = Ranged(store, found.path, found.nbytes, found.etag)
    file.seek(-min(BLOCK, found.nbytes), io.SEEK_END)
    file.read(1)  # fetches the footer, before there is anybody who would wait for it
    for left in reversed(range(TRIES)):
        try:
            with _few_at_a_time:
                return list(answers(file, work, *arguments))
        except ProcessDied:
            if not left:
                raise
    raise AssertionError


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
        verdict = Verdict("fetch", "vanished", "the table has fewer rows now")
        for left in reversed(range(TRIES)):
            try:
                yield from _of_one_table(store, path, wanted, limit, names)
            except LOST as error:
                verdict = lost(error)
            except ProcessDied as error:
                if left and wanted:
                    continue
                verdict = _verdict(error)
            except ValueError as error:
                verdict = _verdict(error)
            break
        yield from (EncodedImage(image, None, verdict) for image in wanted)


def _verdict(error: ProcessDied | ValueError) -> Verdict:
    late = isinstance(error, ProcessDied) and error.late
    return Verdict("fetch", "timeout" if late else "corrupt", f"parquet shard: {_why(error)}")


def _why(error: ProcessDied | ValueError) -> str:
    return f"{error}, {TRIES} times" if isinstance(error, ProcessDied) else str(error)


def _of_one_table(
    store: Store, path: str, wanted: list[PlannedImage], limit: int, names: Sequence[str]
) -> Iterator[EncodedImage]:
    """The wanted rows of one table; ``wanted`` loses what was answered, so a caller can go on."""
    nbytes = _size(store, path, wanted[0].etag)
    file = Ranged(store, path, nbytes, wanted[0].etag)
    rows = [int(image.member or 0) for image in wanted]
    for cell in answers(file, cells, rows, limit, names):
        image = wanted.pop(0)
        if isinstance(cell, bytes):
            yield EncodedImage(image, cell)
        elif cell is None:
            yield EncodedImage(image, None, Verdict("fetch", "empty", "the cell is null"))
        else:
            verdict = too_many_bytes(replace(image, nbytes=cell), limit)
            yield EncodedImage(image, None, verdict)


def _size(store: Store, path: str, etag: str) -> int:
    """Of a table that was listed."""
    about = store.stat(path)
    if about is None:
        store.read(path, 0, 1, etag)  # says what is the matter, and asks again before "not there"
        about = store.stat(path)
    if about is None:
        raise StorageBusy(f"{printable(path)} comes and goes; run the same command again")
    return about.nbytes
