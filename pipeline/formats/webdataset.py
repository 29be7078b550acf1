"""Tar shards (WebDataset and any other plain tar): members are read by offset, never extracted.

The index walks the headers only. A shard that is damaged keeps the members before the damage,
and the rest is one rejected row with the shard's own key, so nothing vanishes silently.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial

from pipeline.fetching import LOST, in_flight, lost, read_together, together
from pipeline.formats import Entry
from pipeline.keys import member_part, printable
from pipeline.kinds import kind_of_name
from pipeline.records import EncodedImage, PlannedImage
from pipeline.storage import Found, Store

SUFFIXES = (".tar",)
LABEL = ".cls"  # WebDataset's name for the class of a picture

BLOCK = 256 * 1024  # one request reads so much: small members share it, large ones are jumped over
MAX_HEADER = 64 * 1024**2  # the most bytes one header (long names, pax records) may ask for
MAX_MEMBERS = 10_000_000  # a tar of empty members costs 512 bytes each; beyond this it is an attack


def index(store: Store, found: Found) -> Iterator[Entry]:
    """Regular members with an image suffix, or none, in the shard's order; others are skipped.

    Masks are entries that say so, and labels of whole pictures (``NAME.cls``) skipped ones with a
    name: whoever reads labelled data wants them.
    """
    seen: dict[str, int] = {}
    try:
        forward = _Forward(store, found)
        with tarfile.open(fileobj=forward, mode="r:") as shard:
            for count, member in enumerate(shard):
                if count >= MAX_MEMBERS:
                    raise tarfile.ReadError(f"more than {MAX_MEMBERS} members")
                kind = kind_of_name(member.name)
                label = member.isreg() and member.name.endswith(LABEL)
                if not member.isreg() or (kind not in {"image", "mask"} and not label):
                    yield Entry(None, None, 0, skipped=True)
                    continue
                entry = _entry(member, member_part(member.name, seen), found.nbytes)
                yield entry._replace(mask=kind == "mask", skipped=label)
        if forward.last.strip(b"\0"):  # tarfile takes a header it cannot read for the end
            whole = len(forward.last) == tarfile.BLOCKSIZE
            raise tarfile.ReadError("a header is damaged" if whole else "unexpected end of data")
    except (
        tarfile.TarError,
        ValueError,
        EOFError,
        OverflowError,
        RecursionError,
        IndexError,
    ) as error:
        reason = (
            "empty" if found.nbytes == 0 else "truncated" if "end of" in str(error) else "corrupt"
        )
        yield Entry(
            None, None, found.nbytes, problem=f"{reason}: tar shard: {printable(str(error))}"
        )
    except LOST as error:
        verdict = lost(error)
        yield Entry(None, None, found.nbytes, problem=f"{verdict.reason}: {verdict.detail}")


def _entry(member: tarfile.TarInfo, part: str, end: int) -> Entry:
    if member.size < 0:
        problem = f"corrupt: its header says {member.size} bytes"
        return Entry(part, member.offset_data, 0, problem=problem)
    if member.sparse is not None:
        return Entry(
            part, member.offset_data, member.size, problem="unsupported_format: sparse tar member"
        )
    if member.offset_data + member.size > end:
        kept = max(0, end - member.offset_data)
        return Entry(
            part,
            member.offset_data,
            kept,
            problem=f"truncated: {kept} of {member.size} bytes are in the shard",
        )
    return Entry(part, member.offset_data, member.size)


def fetch(
    store: Store, images: Sequence[PlannedImage], threads: int, limit: int
) -> Iterator[EncodedImage]:
    """Byte ranges of the shard, neighbours in one, many requests in flight, in order."""
    groups = list(together(images, limit))
    for group in in_flight(partial(read_together, store, limit), groups, threads):
        yield from group


class _Forward(io.RawIOBase):
    """A shard as a file that can only go forward.

    tarfile of Python below 3.11.14 loops for ever on headers with a negative size
    (CVE-2025-8194): going backwards is what gives them away, so it is an error here.
    """

    def __init__(self, store: Store, found: Found) -> None:
        self._store, self._found = store, found
        self._at = 0
        self._block, self._start = b"", 0
        self.last = b""
        """What was read last."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._at:
            raise tarfile.ReadError(f"header at byte {self._at} points back to {offset}")
        self._at = offset
        return offset

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0 or size > min(self._found.nbytes, MAX_HEADER):
            raise tarfile.ReadError(f"header at byte {self._at} asks for {size} bytes")
        if not (self._start <= self._at and self._at + size <= self._start + len(self._block)):
            self._block = self._store.read(
                self._found.path, self._at, max(BLOCK, size), etag=self._found.etag
            )
            self._start = self._at
        self.last = self._block[self._at - self._start :][:size]
        self._at += len(self.last)
        return self.last
