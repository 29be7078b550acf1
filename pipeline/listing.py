"""What lies in the source: a walk that finds every image and the format that fetches it."""

import fnmatch
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice

from pipeline import formats
from pipeline.config import SegmentConfig
from pipeline.errors import RunRefused, StorageMissing
from pipeline.fetching import LOST, LOST_WORDS
from pipeline.headers import sniff
from pipeline.keys import escape, path_of
from pipeline.kinds import is_mask, kind_of_name
from pipeline.records import PlannedImage
from pipeline.storage import Found, Store

INDEXED_AT_ONCE = 16  # shards whose headers are read at the same time
LOOK_AHEAD = 2 * INDEXED_AT_ONCE  # objects beyond the awaited one; their members wait in memory
HELD = 100_000  # members of each (20 MB); those beyond are read when its turn comes, by one thread


@dataclass(slots=True)
class Listing:
    """What a walk through the source has met, beside the images themselves."""

    skipped: Counter[str] = field(default_factory=Counter)
    """Objects and members that are no images, by the suffix or the reason that says so."""
    left_out: int = 0
    """Images that --include, --exclude or --limit left out."""


Item = tuple[Found, str, formats.Entry]
"""The object that holds an image, the format that fetches it, and what it is in there."""


def discover(
    store: Store, config: SegmentConfig, listing: Listing, *, masks: bool = False
) -> Iterator[Item]:
    """Every image below the source with the format that fetches it, in key order of the objects.

    Args:
        store: the source.
        config: what is asked for.
        listing: learns what was skipped or left out.
        masks: masks and labels that lie beside their pictures are wanted too, instead of counted.

    Raises:
        RunRefused: if the source is not there or the format unknown.
    """
    if config.format != "auto":
        formats.load(config.format, config.format)
    picky = bool(config.include or config.exclude)
    with ThreadPoolExecutor(INDEXED_AT_ONCE, thread_name_prefix="index") as pool:
        for found, name, entries in _in_order(pool, store, config.format):
            if name == "skip":
                listing.skipped[_suffix(found)] += 1
            for entry in entries:
                if entry.skipped and not (masks and entry.member):
                    listing.skipped[f"{name} member"] += 1
                elif entry.mask and not masks:
                    listing.skipped["mask"] += 1
                elif picky and not _chosen(key_of(found, entry), config):
                    listing.left_out += 1
                else:
                    yield found, name, entry


def _objects(store: Store) -> Iterator[Found]:
    try:
        yield from store.list()
    except StorageMissing as error:
        raise RunRefused(f"cannot read the source: {error}") from error


Indexed = tuple[Found, str, Iterable[formats.Entry]]
_NOT_READ = frozenset({"skip", "files"})
"""Formats of which the listing says all."""


def _in_order(pool: ThreadPoolExecutor, store: Store, wanted: str) -> Iterator[Indexed]:
    """Every object with its entries, in listing order; what must be read is read in threads.

    It looks ahead a little only: a listing may have millions of objects.
    """
    waiting: deque[Indexed | Future[Indexed]] = deque()
    for found in _objects(store):
        name = _format_of_name(found, wanted)
        if name not in _NOT_READ:
            waiting.append(pool.submit(_indexed, store, found, name))
        else:
            entries = (_alone(found),) if name == "files" else ()
            if not waiting:  # most archives are nothing but loose files
                yield found, name, entries
                continue
            waiting.append((found, name, entries))
        while waiting and (isinstance(waiting[0], tuple) or len(waiting) >= LOOK_AHEAD):
            yield _settled(waiting.popleft())
    while waiting:
        yield _settled(waiting.popleft())


def _alone(found: Found) -> formats.Entry:
    return formats.Entry(None, None, found.nbytes, mask=is_mask(found.path))


def _settled(answer: "Indexed | Future[Indexed]") -> Indexed:
    return answer if isinstance(answer, tuple) else answer.result()


def _indexed(store: Store, found: Found, name: str | None) -> Indexed:
    name = name or _format_of_content(store, found)
    if name == "skip":
        return found, name, ()
    entries = _believed(store, formats.load(name).index(store, found))
    first = list(islice(entries, HELD))
    return found, name, first if len(first) < HELD else chain(first, entries)


def _believed(store: Store, entries: Iterable[formats.Entry]) -> Iterator[formats.Entry]:
    """The entries; an error if one says that the shard is lost and the whole source is."""
    for entry in entries:
        if (entry.problem or "").startswith(LOST_WORDS):
            store.ensure_there()
        yield entry


def _format_of_name(found: Found, wanted: str) -> str | None:
    """The format, or None where the content must be asked."""
    kind = kind_of_name(found.path)
    if not found.regular or kind == "skip":
        return "skip"
    if kind == "mask":
        return "files"
    if wanted != "auto":
        return wanted
    return "files" if kind == "image" else None


def _format_of_content(store: Store, found: Found) -> str:
    """A shard by name, or a suffix that says nothing: its first bytes decide."""
    kind = kind_of_name(found.path)
    try:
        start = store.read(found.path, 0, 512, found.etag) if found.nbytes else b""
    except LOST:  # its reason is told by whoever reads it: a shard's index, or the fetch of a file
        return "files" if kind == "unknown" else kind
    content = sniff(start) if start else None
    by_content = {"TAR": "webdataset", "PARQUET": "parquet", None: None}.get(content, "files")
    if kind == "unknown":
        return by_content or "skip"
    return "files" if by_content == "files" else by_content or kind


def _suffix(found: Found) -> str:
    if not found.regular:
        return "not a regular file"
    name = found.path.rstrip("/").rpartition("/")[2]
    return (
        "folder marker"
        if found.path.endswith("/")
        else "." + escape(name.rpartition(".")[2])
        if "." in name
        else escape(name)
    )


def key_of(found: Found, entry: formats.Entry) -> str:
    """The key of an image: the escaped path of its object, and its member in there."""
    path = escape(found.path)
    return path if entry.member is None else f"{path}#{entry.member}"


def _chosen(key: str, config: SegmentConfig) -> bool:
    if config.include and not any(fnmatch.fnmatchcase(key, glob) for glob in config.include):
        return False
    return not any(fnmatch.fnmatchcase(key, glob) for glob in config.exclude)


def head(store: Store, image: PlannedImage, nbytes: int) -> bytes:
    """The first bytes of an image, for a look at its size; b"" where there are none to be had."""
    if image.problem or (image.member is not None and image.offset is None):
        return b""
    length = min(nbytes, image.nbytes) if image.offset is not None else nbytes
    try:
        return store.read(path_of(image.key), image.offset or 0, length)
    except LOST:
        return b""
