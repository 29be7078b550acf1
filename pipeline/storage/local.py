"""A folder of this machine, with the promises of a bucket: whole objects, create-only writes."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

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
        if path.startswith("/") or "\0" in path or ".." in path.split("/"):  # a plan may be hostile
            raise StorageDenied(f"{printable(path)} leads out of {self.root}; who wrote that?")
        return self.root / path if path else self.root

    def list(self, prefix: str = "") -> Iterator[Found]:
        """See `Store.list`. Links to files inside the root are followed, all others are not."""
        with _translated(self.uri):
            if not self._at(prefix).is_dir():
                raise StorageMissing(f"{self._at(prefix)} is not a folder")
        gone = False
        for found in self._below(str(self._at(prefix)), f"{prefix}/" if prefix else ""):
            gone |= not found.etag
            yield found
        if gone:  # since their folder was read: some files, or the disk?
            self.ensure_there()

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

    def ensure_there(self) -> None:
        """See `Store.ensure_there`. Where nothing is mounted any more is an empty folder."""
        with _translated(self.uri), os.scandir(self.root) as entries:
            if next(entries, None) is None:
                raise StorageBusy(f"{self.root} is empty: is the disk still mounted?")

    def _found(self, full: str, path: str) -> Found:
        try:
            about, regular = os.lstat(full), True
            if not S_ISREG(about.st_mode):
                regular = os.path.isfile(full) and self._inside(full)  # noqa: PTH113 - never raises
                about = os.stat(full) if regular else about  # noqa: PTH116 - full may be undecodable
        except PermissionError as error:  # of its folder: all that is in there would be missed
            raise StorageDenied(f"{printable(full)}: {error.strerror}") from error
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
        """See `Store.read`. The version is compared before and after: it may be written meanwhile.

        A file system tells time in ticks (some ms): what is written twice in one looks the same.
        """
        target = self._at(path)
        with _translated(self.uri), _of_one_file(target), _opened(target) as handle:
            _refuse_changed(handle, path, etag)
            data = _bytes_of(handle, start, length)
            _refuse_changed(handle, path, etag)
            return data

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
        _made(folder)
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


@contextlib.contextmanager
def _opened(target: Path) -> Iterator[int]:
    """A regular file, open. A name may lead to a FIFO by now, and nobody waits for its writer."""
    handle = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not S_ISREG(os.fstat(handle).st_mode):
            raise StorageMissing(f"{printable(str(target))} is no regular file")
        yield handle
    finally:
        os.close(handle)


def _refuse_changed(handle: int, path: str, etag: str | None) -> None:
    if etag is not None and _etag(os.fstat(handle)) != etag:
        raise ObjectChanged(f"{printable(path)} was written again since it was planned")


def _bytes_of(handle: int, start: int, length: int | None) -> bytes:
    """So many bytes, or all there are; mostly in one go, from the system straight into place."""
    left = max(0, os.fstat(handle).st_size - start)
    wanted = left if length is None else min(left, length)
    data = os.pread(handle, wanted, start)
    if data and len(data) == wanted:
        return data
    # It ends early, is beyond the 2 GB of one go, or of a size that the system does not know.
    with open(handle, "rb", closefd=False) as file:
        file.seek(start)
        return file.read() if length is None else file.read(length)


def _etag(about: os.stat_result) -> str:
    return f"{about.st_mtime_ns:x}-{about.st_size:x}"


def _made(folder: Path) -> None:
    """Make a folder and those above it, each on the disk before something lies in it."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _made(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:  # made meanwhile; or it is a file, and no place to write to
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder)) from None
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _of_one_file(target: Path) -> Iterator[None]:
    """What is wrong with this file alone. A folder we may not enter is more than that."""
    try:
        yield
    except StorageError:
        raise
    except PermissionError as error:
        if not os.access(target.parent, os.X_OK):
            raise
        raise ObjectUnreadable(f"{printable(str(target))}: {error.strerror}") from error
    except OSError as error:
        if error.errno in {errno.EIO, errno.ESTALE}:
            said = f"{printable(str(target))}: corrupt_read: {error.strerror}"
            raise ObjectUnreadable(said) from error
        if error.errno in {errno.ENXIO, errno.ELOOP}:  # a socket, or a link to itself
            raise StorageMissing(f"{printable(str(target))} is no regular file") from error
        raise


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
