"""An object of a store as a file, for readers (Parquet) that jump to what they need."""

import io

from pipeline.storage import Store

BLOCK = 128 * 1024  # what one request fetches at least: the columns of small row groups share it


class Ranged(io.RawIOBase):
    """An object of a store as a seekable file of range requests."""

    def __init__(self, store: Store, path: str, nbytes: int, etag: str | None) -> None:
        self._store, self._path, self._etag = store, path, etag
        self.nbytes = nbytes
        self._at = 0
        self._block, self._start = b"", 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes: every byte can be asked for."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move there; nothing is fetched."""
        self._at = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.nbytes}[whence]
        )
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Fetch so many bytes from here on, or all that are left."""
        left = max(0, self.nbytes - self._at)
        length = left if size is None or size < 0 else min(size, left)
        data = self._fetched(length) if length >= BLOCK else self._of_block(length, left)
        self._at += len(data)
        return data

    def _of_block(self, length: int, left: int) -> bytes:
        at = self._at - self._start
        if at < 0 or at + length > len(self._block):
            self._block, self._start, at = self._fetched(min(BLOCK, left)), self._at, 0
        return self._block[at : at + length]

    def _fetched(self, length: int) -> bytes:
        return self._store.read(self._path, self._at, length, etag=self._etag) if length else b""
