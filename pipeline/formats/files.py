"""Loose files below a prefix: one object is one image."""

from collections.abc import Iterator, Sequence
from functools import partial

from pipeline.fetching import in_flight, read_span
from pipeline.formats import Entry
from pipeline.kinds import OURS
from pipeline.records import EncodedImage, PlannedImage
from pipeline.storage import Found, Store

SUFFIXES = tuple(sorted(OURS))


def index(store: Store, found: Found) -> Iterator[Entry]:  # noqa: ARG001 - the contract
    """The object itself."""
    yield Entry(None, None, found.nbytes)


def fetch(
    store: Store, images: Sequence[PlannedImage], threads: int, limit: int
) -> Iterator[EncodedImage]:
    """Whole objects, many requests in flight, in order."""
    yield from in_flight(partial(read_span, store, limit), images, threads)
