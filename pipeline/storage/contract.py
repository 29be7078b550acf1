"""What every store promises, and what it says of an object."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from pipeline.errors import StorageError


class Found(NamedTuple):
    """One object of a listing.

    A tuple: there may be millions, and one is made three times as fast as a frozen dataclass.
    """

    path: str
    """Below the store's root, ``/``-separated; undecodable bytes as surrogates."""
    nbytes: int
    etag: str
    """S3: the ETag without quotes. Local: ``mtime_ns-size`` in hexadecimal."""
    mtime: float
    """Seconds since 1970, by the store's clock."""
    regular: bool = True
    """False for what must never be opened: FIFOs, devices, links out of the root."""


class ObjectChanged(StorageError):
    """The object is no longer the version that was asked for."""


class ObjectUnreadable(StorageError):
    """This one object cannot be read, though others can: no permission, archived, rotten."""


class Store(Protocol):
    """What the pipeline asks of a store. Paths are relative to its root."""

    uri: str

    def list(self, prefix: str = "") -> Iterator[Found]:
        """Every object below a folder, in byte order of the path."""
        ...

    def ensure_there(self) -> None:
        """Ask whether the place itself is there and holds anything: one cheap question.

        Raises:
            StorageError: it is not (unmounted, deleted, closed to us), so no object of it is lost.
        """
        ...

    def unfinished(self) -> Iterator[Found]:
        """Parts of objects that are being written, or whose writers were killed: in no listing."""
        ...

    def read(
        self, path: str, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> bytes:
        """Bytes of an object, fewer only where it ends.

        Args:
            path: the object.
            start: the first byte.
            length: how many bytes, or all that follow.
            etag: the version that a listing told of: `ObjectChanged` if it is another now, and
                that it is not there is believed after some doubt only.
        """
        ...

    def stat(self, path: str) -> Found | None:
        """What a listing would say of one object, or None."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist. True: ours is there; False: another's is."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Write an object whole, over what may be there (derived data only)."""
        ...

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens if it is not there."""
        ...
