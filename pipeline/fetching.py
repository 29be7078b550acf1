"""How any format gets bytes out of a store: many requests in flight, answers in order, verdicts."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.errors import StorageError, StorageMissing
from pipeline.keys import path_of
from pipeline.records import EncodedImage, PlannedImage, Verdict
from pipeline.storage import ObjectChanged, ObjectUnreadable, Store


def too_many_bytes(image: PlannedImage, limit: int) -> Verdict:
    """The verdict on an image whose encoded size is beyond ``decode.max_bytes``."""
    return Verdict(
        "fetch", "too_large", f"{image.nbytes} encoded bytes, decode.max_bytes is {limit}"
    )


LOST = (StorageMissing, ObjectChanged, ObjectUnreadable)
"""What can befall one object while all others are well."""


def lost(error: StorageError) -> Verdict:
    """The verdict on an image whose object is `LOST`."""
    if isinstance(error, StorageMissing):
        return Verdict("fetch", "vanished", "was listed, is no longer there")
    return Verdict(
        "fetch", "changed" if isinstance(error, ObjectChanged) else "unreadable", str(error)
    )


def read_span(store: Store, limit: int, image: PlannedImage) -> EncodedImage:
    """An image's bytes, a whole object or its part of a shard, or why there are none."""
    if image.nbytes > limit:
        return EncodedImage(image, None, too_many_bytes(image, limit))
    length = None if image.offset is None else image.nbytes
    try:
        data = store.read(path_of(image.key), image.offset or 0, length, etag=image.etag)
    except LOST as error:
        return EncodedImage(image, None, lost(error))
    if length is not None and len(data) < length:
        return EncodedImage(
            image,
            None,
            Verdict("fetch", "truncated", f"its shard ends after {len(data)} of {length} bytes"),
        )
    return EncodedImage(image, data)


def in_flight(
    read: Callable[[PlannedImage], EncodedImage], images: Sequence[PlannedImage], threads: int
) -> Iterator[EncodedImage]:
    """`read` every image with so many requests in flight; answers in order."""
    if threads == 1 or len(images) == 1:
        yield from map(read, images)
        return
    with ThreadPoolExecutor(min(threads, len(images)), thread_name_prefix="fetch") as pool:
        yield from pool.map(read, images)
