"""How any format gets bytes out of a store: many requests in flight, answers in order, verdicts.

Neighbours in a shard share a request: S3 answers so many requests a second and no more, whatever
their size (5,500 below a prefix, STORE §6), and each costs a round trip and its price.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar, cast

from pipeline.errors import StorageBusy, StorageError, StorageMissing
from pipeline.keys import path_of, printable
from pipeline.records import EncodedImage, PlannedImage, Verdict
from pipeline.storage import ObjectChanged, ObjectUnreadable, Store


def too_many_bytes(image: PlannedImage, limit: int) -> Verdict:
    """The verdict on an image whose encoded size is beyond ``decode.max_bytes``."""
    return Verdict(
        "fetch", "too_large", f"{image.nbytes} encoded bytes, decode.max_bytes is {limit}"
    )


In = TypeVar("In")
Out = TypeVar("Out")

SPAN = 4 * 1024**2  # of one request: some tens of milliseconds of a network, 16 of them in flight
GAP = 64 * 1024  # read and thrown away between neighbours: sidecars, headers of the shard
TRIES = 3  # at a loose object of which not all bytes arrive

LOST = (StorageMissing, ObjectChanged, ObjectUnreadable)
"""What can befall one object while all others are well."""
LOST_WORDS = ("vanished", "unreadable")
"""Reasons that all objects have together once their store is gone."""


def lost(error: StorageError) -> Verdict:
    """The verdict on an image whose object is `LOST`."""
    if isinstance(error, StorageMissing):
        return Verdict("fetch", "vanished", "was listed, is no longer there")
    return Verdict(
        "fetch", "changed" if isinstance(error, ObjectChanged) else "unreadable", str(error)
    )


def believed(store: Store, answers: Iterable[EncodedImage]) -> Iterator[EncodedImage]:
    """The answers, and then an error if one says that a picture is lost and the store is gone too.

    A disk that is unmounted, or a bucket that is deleted, looks like one lost picture after the
    other, and they would be rejected for good. One question settles it, once all is answered: what
    went meanwhile has gone by then.

    Raises:
        StorageError: the store is gone, and what it said of its pictures is not to be believed.
    """
    doubtful = False
    for answer in answers:
        doubtful |= answer.verdict is not None and answer.verdict.reason in LOST_WORDS
        yield answer
    if doubtful:
        store.ensure_there()


def read_span(store: Store, limit: int, image: PlannedImage) -> EncodedImage:
    """An image's bytes, a whole object or its part of a shard, or why there are none."""
    if image.nbytes > limit:
        return EncodedImage(image, None, too_many_bytes(image, limit))
    try:
        if image.offset is None:
            return EncodedImage(image, _whole(store, image))
        data = store.read(path_of(image.key), image.offset, image.nbytes, etag=image.etag)
    except LOST as error:
        return EncodedImage(image, None, lost(error))
    return _part(image, data)


def _whole(store: Store, image: PlannedImage) -> bytes:
    """A loose object. The version that was planned has a known length: less is lost on the way."""
    path, data = path_of(image.key), b""
    for _ in range(TRIES):
        data = store.read(path, etag=image.etag)
        if len(data) == image.nbytes:
            return data
    raise StorageBusy(
        f"{printable(path)}: {len(data)} of {image.nbytes} bytes arrived, {TRIES} times; "
        "is there a proxy on the way that cuts answers?"
    )


def together(images: Sequence[PlannedImage], limit: int) -> Iterator[list[PlannedImage]]:
    """Parts of shards that one request can bring: neighbours, in order, with little between them.

    Args:
        images: of any shards, in plan order.
        limit: encoded bytes beyond which an image is not read at all.
    """
    group: list[PlannedImage] = []
    for image in images:
        if group and not _joins(group, image, limit):
            yield group
            group = []
        group.append(image)
    if group:
        yield group


def _joins(group: list[PlannedImage], image: PlannedImage, limit: int) -> bool:
    first, last = group[0], group[-1]
    if first.offset is None or last.offset is None or image.offset is None:
        return False
    gap = image.offset - (last.offset + last.nbytes)
    return (
        (path_of(image.key), image.etag) == (path_of(first.key), first.etag)
        and 0 <= gap <= GAP
        and image.offset + image.nbytes - first.offset <= SPAN
        and max(image.nbytes, last.nbytes) <= limit
    )


def read_together(store: Store, limit: int, group: list[PlannedImage]) -> list[EncodedImage]:
    """The bytes of neighbours from one request, or why there are none."""
    first, last = group[0], group[-1]
    if len(group) == 1 or first.offset is None or last.offset is None:
        return [read_span(store, limit, image) for image in group]
    length = last.offset + last.nbytes - first.offset
    try:
        data = store.read(path_of(first.key), first.offset, length, etag=first.etag)
    except LOST as error:
        return [EncodedImage(image, None, lost(error)) for image in group]
    places = [(image, (image.offset or 0) - first.offset) for image in group]
    return [_part(image, data[at : at + image.nbytes]) for image, at in places]


def _part(image: PlannedImage, data: bytes) -> EncodedImage:
    """An image's part of a shard, if all of it is there."""
    if len(data) < image.nbytes:
        detail = f"its shard ends after {len(data)} of {image.nbytes} bytes"
        return EncodedImage(image, None, Verdict("fetch", "truncated", detail))
    return EncodedImage(image, data)


def in_flight(read: Callable[[In], Out], items: Sequence[In], threads: int) -> Iterator[Out]:
    """`read` every item with so many requests in flight; answers in order."""
    if threads == 1 or len(items) == 1:
        yield from map(read, items)
        return
    left = iter(enumerate(items))  # one `next` of it is one step: threads may share it
    landed: SimpleQueue[tuple[int, Out | None, BaseException | None]] = SimpleQueue()

    def work() -> None:
        for number, item in left:
            answer = problem = None
            try:
                answer = read(item)
            except BaseException as error:  # noqa: BLE001 - raised in its turn, where it is waited for
                problem = error
            landed.put((number, answer, problem))

    # Not a future each: those of small files took a tenth of all that is done in Python.
    with ThreadPoolExecutor(min(threads, len(items)), thread_name_prefix="fetch") as pool:
        try:
            for _ in range(min(threads, len(items))):
                pool.submit(work)
            yield from _in_turn(landed, len(items))
        finally:
            deque(left, maxlen=0)  # nobody wants the rest


def _in_turn(
    landed: "SimpleQueue[tuple[int, Out | None, BaseException | None]]", count: int
) -> Iterator[Out]:
    """So many answers, or what went wrong, in order, whatever order they come in."""
    early: dict[int, tuple[Out | None, BaseException | None]] = {}
    for wanted in range(count):
        while wanted not in early:
            number, answer, problem = landed.get()
            early[number] = answer, problem
        answer, problem = early.pop(wanted)
        if problem is not None:
            raise problem
        yield cast("Out", answer)
