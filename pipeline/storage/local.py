"""A folder of this machine, with the promises of a bucket: whole objects, create-only writes."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from pipeline.errors import RunRefused, StorageBusy, StorageDenied, StorageError, StorageMissing
from pipeline.keys import printable
from pipeline.storage.contract import Found, ObjectChanged, ObjectUnreadable

PART = ".tmp-"  # begins the name of what is being written


class LocalStore:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root.expanduser()))  # noqa: PTH100 - resolve() would follow links
        self.uri = str(self.root)

    def _at(self, path: str) -> Path:
        return self.root / path if path else self.root

    def list(self, prefix: str = "") -> Iterator[Found]:
        """See `Store.list`. Links to files inside the root are followed, all others are not."""
        with _translated(self.uri):
            if not self._at(prefix).is_dir():
                raise StorageMissing(f"{self._at(prefix)} is not a folder")
        yield from self._below(str(self._at(prefix)), f"{prefix}/" if prefix else "")

    def _below(self, folder: str, shown: str) -> Iterator[Found]:
        with _translated(folder), os.scandir(folder) as entries:
            # A folder sorts as "name/": so the walk is in byte order of whole paths, like S3's.
            # Only names are kept: one folder may hold a million.
            names = [e.name + "/" if e.is_dir(follow_symlinks=False) else e.name for e in entries]
        names.sort(key=None if "".join(names).isascii() else os.fsencode)
        for name in names:
            if name.endswith("/"):
                yield from self._below(f"{folder}/{name[:-1]}", shown + name)
            elif not name.startswith(PART):
                yield self._found(f"{folder}/{name}", shown + name)

    def unfinished(self) -> Iterator[Found]:
        """See `Store.unfinished`."""
        for folder, _, names in os.walk(self.root):
            for name in (name for name in names if name.startswith(PART)):
                path = Path(folder, name)
                yield self._found(str(path), path.relative_to(self.root).as_posix())

    def _found(self, full: str, path: str) -> Found:
        try:
            about, regular = os.lstat(full), True
            if not S_ISREG(about.st_mode):
                regular = os.path.isfile(full) and self._inside(full)  # noqa: PTH113 - never raises
                about = os.stat(full) if regular else about  # noqa: PTH116 - full may be undecodable
        except OSError:
            return Found(path, 0, "", 0.0, regular=False)
        return Found(path, about.st_size, _etag(about), about.st_mtime, regular)

    def _inside(self, full: str) -> bool:
        if not Path(full).is_symlink():
            return True
        real = os.path.realpath(full)
        return real.startswith(os.path.realpath(self.root) + os.sep)

    def read(
        self, path: str, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> bytes:
        """See `Store.read`."""
        with _translated(self.uri), self._opened(path) as file:
            if etag is not None and _etag(os.fstat(file.fileno())) != etag:
                raise ObjectChanged(f"{printable(path)} was written again since it was planned")
            if start:
                file.seek(start)
            return file.read() if length is None else file.read(length)

    def _opened(self, path: str) -> BinaryIO:
        try:
            return self._at(path).open("rb")
        except PermissionError as error:
            raise ObjectUnreadable(f"{printable(path)}: {error.strerror}") from error

    def stat(self, path: str) -> Found | None:
        """See `Store.stat`."""
        full = str(self._at(path))
        if not os.path.isfile(full):  # noqa: PTH113 - Path.is_file raises on a folder we may not enter
            return None
        return self._found(full, path)

    def create(self, path: str, data: bytes) -> bool:
        """See `Store.create`."""
        target = self._at(path)
        with _translated(self.uri):
            made = self._written(target.parent, data)
            try:
                os.link(made, target)
            except FileExistsError:
                return target.read_bytes() == data
            except OSError as error:
                if error.errno in {
                    errno.EPERM,
                    errno.EOPNOTSUPP,
                    errno.EMLINK,
                    errno.ENOSYS,
                    errno.EXDEV,
                }:
                    raise RunRefused(
                        f"the file system of {self.root} has no hard links ({error.strerror}), "
                        "which commits need; write to a local disk or to S3"
                    ) from error
                raise
            finally:
                made.unlink()
            _sync_folder(target.parent)
            return True

    def replace(self, path: str, data: bytes) -> None:
        """See `Store.replace`."""
        target = self._at(path)
        with _translated(self.uri):
            self._written(target.parent, data).replace(target)
            _sync_folder(target.parent)

    def _written(self, folder: Path, data: bytes) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{PART}{secrets.token_hex(8)}"
        try:
            with made.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            made.unlink(missing_ok=True)
            raise
        return made

    def delete(self, path: str) -> None:
        """See `Store.delete`."""
        with _translated(self.uri):
            self._at(path).unlink(missing_ok=True)


def _etag(about: os.stat_result) -> str:
    return f"{about.st_mtime_ns:x}-{about.st_size:x}"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _translated(where: str) -> Iterator[None]:
    """Operating-system errors in our own words."""
    try:
        yield
    except (StorageError, RunRefused):
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise StorageMissing(
            f"{printable(str(error.filename or where))}: {error.strerror}"
        ) from error
    except PermissionError as error:
        raise StorageDenied(
            f"{printable(str(error.filename or where))}: {error.strerror}"
        ) from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise StorageDenied(f"{where}: {error.strerror}") from error
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageBusy(
                f"{where}: {error.strerror}; free some space and run the same command again"
            ) from error
        raise StorageError(f"{where}: {error}") from error
