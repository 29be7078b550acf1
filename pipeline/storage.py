"""Where bytes lie: a folder on this machine or a prefix of a bucket. S3 lives here alone.

One primitive carries all commits: `create`, which writes a whole object only if there is none.
S3: one plain PUT with ``If-None-Match: *``, never multipart. Local: fsync, ``link(2)``, fsync the
folder. After a refusal or a lost answer the stored object is compared with ours, so an answer
lost on the way is not mistaken for a defeat.

Credentials and endpoints come from the usual AWS chain (environment, profile, instance role).
A store is cheap to build and holds secrets once built: build it where it is used, pass its URI.
"""

import contextlib
import errno
import hashlib
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from pipeline.errors import (
    RunRefused,
    StorageBusy,
    StorageDenied,
    StorageError,
    StorageMissing,
)
from pipeline.keys import printable

T = TypeVar("T")

RETRIES = 6  # waits 0.5, 1, 2, 4, 8 s (with jitter): outlasts a restart of the server, FAULTS §A.6
MAX_PUT = 5 * 1024**3  # S3's limit for one plain PUT
CONNECT_S, READ_S = 5, 30  # botocore's defaults are 60 s each: a hung server would cost minutes
PREFLIGHT = ".preflight-"  # how the names of trial objects begin; a killed driver may leave one
COMPARED = 65_536  # bytes at each end that settle whose object it is; our tokens lie within them


@dataclass(frozen=True, slots=True)
class Found:
    """One object of a listing."""

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
    """This one object cannot be read, though others can: no permission on the file, archived."""


class Store(Protocol):
    """What the pipeline asks of a store. Paths are relative to its root."""

    uri: str

    def list(self, prefix: str = "") -> Iterator[Found]:
        """Every object below a folder, in byte order of the path."""
        ...

    def read(
        self, path: str, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> bytes:
        """Bytes of an object, fewer where it ends. `ObjectChanged` if the etag differs."""
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


def open_store(uri: str) -> Store:
    """The store at a URI.

    Args:
        uri: a local path, or ``s3://bucket/prefix``. Nothing else is accepted: no credentials,
            query, fragment or chained protocol can hide in it.

    Raises:
        RunRefused: on any other form, naming it.
    """
    if uri.startswith("s3://"):
        match = re.fullmatch(r"s3://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(?:/(.*))?", uri, re.DOTALL)
        if not match or "?" in uri or "#" in uri:
            raise RunRefused(
                f"{printable(_without_secrets(uri))} is not s3://bucket/prefix; "
                "give bucket and prefix only"
            )
        return S3Store(match.group(1), (match.group(2) or "").strip("/"))
    if "://" in uri or "::" in uri:
        raise RunRefused(
            f"{printable(_without_secrets(uri))}: "
            "only local paths and s3://bucket/prefix can be read and written"
        )
    return LocalStore(Path(uri))


def _without_secrets(uri: str) -> str:
    # Up to the last @: keys hold slashes, passwords anything. After ? or # may be a signature.
    return re.split("[?#]", re.sub(r"//.*@", "//***@", uri, flags=re.DOTALL), maxsplit=1)[0]


def absolute(uri: str) -> str:
    """The one spelling of a URI: absolute local path or s3:// without a trailing slash."""
    return open_store(uri).uri


def check_create_only(store: Store) -> None:
    """Refuse a store that does not keep the promise commits rest on.

    Raises:
        RunRefused: if a second create overwrites, or the place cannot be written.
    """
    path = f"{PREFLIGHT}{secrets.token_hex(8)}"
    try:
        first = store.create(path, b"first " + path.encode())
        second = store.create(path, b"second " + path.encode())
        kept = store.read(path)
        store.delete(path)
    except StorageMissing as error:
        raise RunRefused(f"cannot write to {store.uri}: {error}") from error
    except StorageDenied as error:
        raise RunRefused(
            f"cannot write to {store.uri}: {error}; check credentials and permissions"
        ) from error
    except OSError as error:
        raise RunRefused(f"cannot write to {store.uri}: {error}") from error
    if not first or second or not kept.startswith(b"first"):
        raise RunRefused(
            f"{store.uri} overwrites an object that must not exist (it ignores If-None-Match: *); "
            "commits would not be safe there. "
            "Use a store with conditional writes (AWS S3, Ceph, a local disk)"
        )


# ------------------------------------------------------------------------------------------ local


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
            inside = sorted(
                ((e.name + "/" if e.is_dir(follow_symlinks=False) else e.name, e) for e in entries),
                key=lambda pair: os.fsencode(pair[0]),
            )
        for name, entry in inside:
            if name.endswith("/"):
                yield from self._below(entry.path, shown + name)
            elif not entry.name.startswith(".tmp-"):
                yield self._found(entry.path, shown + name)

    def _found(self, full: str, path: str) -> Found:
        try:
            about = os.lstat(full)
            regular = os.path.isfile(full) and self._inside(full)  # noqa: PTH113 - never raises
            if regular:
                about = os.stat(full)  # noqa: PTH116 - full may hold undecodable bytes
        except OSError:
            return Found(path, 0, "", 0.0, regular=False)
        return Found(
            path, about.st_size, f"{about.st_mtime_ns:x}-{about.st_size:x}", about.st_mtime, regular
        )

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
            if etag is not None:
                about = os.fstat(file.fileno())
                if f"{about.st_mtime_ns:x}-{about.st_size:x}" != etag:
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
        made = folder / f".tmp-{secrets.token_hex(8)}"
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


# --------------------------------------------------------------------------------------------- S3


class S3Store:
    """A prefix of a bucket, through s3fs's connection (one per process and thread-safe)."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        return open_store, (self.uri,)

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def list(self, prefix: str = "") -> Iterator[Found]:
        """See `Store.list`."""
        below = self._key(prefix).rstrip("/")
        start = f"{below}/" if below else ""
        cut = len(self.prefix) + 1 if self.prefix else 0
        token: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=start, **token)
            for entry in page.get("Contents", ()):
                since = entry["LastModified"].timestamp()
                yield Found(entry["Key"][cut:], entry["Size"], _etag(entry), since)
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def read(
        self, path: str, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> bytes:
        """See `Store.read`. A whole object whose ETag is an MD5 is checked against it."""
        if length == 0:
            return b""
        span = (
            {}
            if not start and length is None
            else {"Range": f"bytes={start}-{'' if length is None else start + length - 1}"}
        )

        def attempt() -> bytes:
            try:
                answer, data = _connection().wait(self._body(path, span))
            except Exception as error:
                if _code(error) in {"InvalidRange", "416"}:  # begins beyond the end
                    return b""
                raise
            if etag is not None and _etag(answer) != etag:
                raise ObjectChanged(f"{printable(path)} was written again since it was planned")
            _check_arrived(answer, data, whole=not span)
            return data

        return self._patiently(attempt, path)

    async def _body(self, path: str, span: dict[str, str]) -> tuple[dict[str, Any], bytes]:
        answer = await _connection().call(
            "get_object", Bucket=self.bucket, Key=self._key(path), **span
        )
        async with answer["Body"] as stream:
            return answer, await stream.read()

    def stat(self, path: str) -> Found | None:
        """See `Store.stat`."""
        try:
            head = self._call("head_object", path, Key=self._key(path))
        except StorageMissing:
            return None
        return Found(path, head["ContentLength"], _etag(head), head["LastModified"].timestamp())

    def create(self, path: str, data: bytes) -> bool:
        """See `Store.create`."""
        if len(data) > MAX_PUT:
            raise StorageError(
                f"{printable(path)}: {len(data)} bytes do not fit one PUT; lower fragment.bytes"
            )

        def attempt() -> bool:
            try:
                _connection().do(
                    "put_object",
                    Bucket=self.bucket,
                    Key=self._key(path),
                    Body=data,
                    IfNoneMatch="*",
                )
            except Exception as error:
                # 412: exists (perhaps ours: an answer was lost and the client tried again);
                # 409: two of us at once. Anything unclear: look before trying again.
                if _code(error) in {"PreconditionFailed", "412"}:
                    return self._ours(path, data)
                if _code(error) in {"ConditionalRequestConflict", "OperationAborted", "409"}:
                    raise ConnectionError("two writers at once") from error
                raise
            return True

        return self._patiently(attempt, path)

    def _ours(self, path: str, data: bytes) -> bool:
        about = self.stat(path)
        if about is None:
            raise ConnectionError("refused as existing, yet not there")
        if about.nbytes != len(data):
            return False
        tail = max(0, len(data) - COMPARED)
        return (
            self.read(path, 0, COMPARED) == data[:COMPARED] and self.read(path, tail) == data[tail:]
        )

    def replace(self, path: str, data: bytes) -> None:
        """See `Store.replace`."""
        self._call("put_object", path, Key=self._key(path), Body=data)

    def delete(self, path: str) -> None:
        """See `Store.delete`."""
        self._call("delete_object", path, Key=self._key(path))

    def _call(self, method: str, path: str = "", **arguments: Any) -> Any:  # noqa: ANN401 - botocore's answers
        return self._patiently(
            lambda: _connection().do(method, Bucket=self.bucket, **arguments), path
        )

    def _patiently(self, attempt: Callable[[], T], path: str) -> T:
        """Try again what may pass, with jittered waits; say in our words what does not."""
        where = printable(f"{self.uri}/{path}" if path else self.uri)
        for turn in range(RETRIES):
            try:
                return attempt()
            except StorageError:
                raise
            except Exception as error:  # noqa: BLE001 - the border: every foreign error is translated here
                final = _verdict(error, where)
                if final is not None:
                    raise final from None  # botocore's text may quote headers
                if turn == RETRIES - 1:
                    raise StorageBusy(
                        f"{where}: {_short(error)} after {RETRIES} attempts"
                    ) from None
                time.sleep(0.5 * 2**turn * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        raise AssertionError


def _etag(answer: dict[str, Any]) -> str:
    return answer["ETag"].strip('"')


def _check_arrived(answer: dict[str, Any], data: bytes, *, whole: bool) -> None:
    """All the bytes, and of a whole object the right ones: its ETag is their MD5, mostly."""
    if len(data) != answer["ContentLength"]:
        raise ConnectionError(f"{len(data)} of {answer['ContentLength']} bytes arrived")
    encrypted = (
        answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    )
    if not whole or encrypted or not re.fullmatch(r"[0-9a-f]{32}", _etag(answer)):
        return
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != _etag(answer):
        raise ConnectionError("the body does not match its MD5 ETag")


class _Connection:
    """The one S3 client of this process: s3fs's, driven on its event loop."""

    def __init__(self) -> None:
        import s3fs  # slow to import and needed for S3 alone
        from fsspec.asyn import sync

        self._sync = sync
        self._files = s3fs.S3FileSystem(
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "connect_timeout": CONNECT_S,
                "read_timeout": READ_S,
                "max_pool_connections": 64,
                "retries": {"mode": "standard", "total_max_attempts": 1},
            },
        )

    async def call(self, method: str, **arguments: Any) -> Any:  # noqa: ANN401 - botocore's
        """One request, no retries: those are `_patiently`'s, which knows what was asked."""
        client = await self._files.set_session()
        return await getattr(client, method)(**arguments)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the client's loop."""

        async def waited() -> T:
            return await work

        return cast("T", self._sync(self._files.loop, waited))

    def do(self, method: str, **arguments: Any) -> Any:  # noqa: ANN401 - botocore's
        """`call`, waited for."""
        return self._sync(self._files.loop, self.call, method, **arguments)


_made: dict[int, _Connection] = {}
_making = threading.Lock()


def _connection() -> _Connection:
    """This process's connection (by process id: a fork must not share sockets)."""
    with _making:
        if os.getpid() not in _made:
            _made[os.getpid()] = _Connection()
        return _made[os.getpid()]


def forget_connections() -> None:
    """Drop the client, so that the next request reads endpoint and credentials anew."""
    with _making:
        _made.clear()


def _code(error: BaseException) -> str:
    answer = getattr(error, "response", None)
    if not isinstance(answer, dict):
        return ""
    return str(
        answer.get("Error", {}).get("Code")
        or answer.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
    )


def _short(error: BaseException) -> str:
    return _code(error) or f"{type(error).__name__}: {printable(str(error))}"


_MISSING = {"NoSuchKey", "NoSuchBucket", "404", "NotFound"}
_DENIED = {
    "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", "401", "ExpiredToken",
    "UserSuspended", "RequestTimeTooSkewed", "AllAccessDisabled", "InvalidToken",
    "TokenRefreshRequired", "Forbidden",
}  # fmt: skip
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError",
}  # fmt: skip


def _verdict(error: Exception, where: str) -> Exception | None:
    """What a foreign error means for good, or None where another try may help."""
    if (said := _verdict_of_code(_code(error), where)) is not None:
        return said
    name = type(error).__name__
    if name in _NO_CREDENTIALS:
        return StorageDenied(
            f"{where}: no usable credentials "
            "(set the AWS environment variables, a profile or a role)"
        )
    if name in {"ParamValidationError", "InvalidRegionError", "NoRegionError"}:
        return StorageError(f"{where}: {printable(str(error))}")
    ours = isinstance(error, TypeError | AttributeError | NameError)  # a bug
    return error if ours else None


def _verdict_of_code(code: str, where: str) -> StorageError | None:
    """What the server's own word means."""
    if code == "NoSuchBucket":
        return StorageMissing(f"{where}: there is no such bucket")
    if code in _MISSING:
        return StorageMissing(f"{where}: not there ({code})")
    if code == "InvalidObjectState":
        return ObjectUnreadable(f"{where}: archived; restore it first")
    if code == "QuotaExceeded":
        return StorageBusy(f"{where}: the quota is full; raise it and run the same command again")
    if code in _DENIED:
        return StorageDenied(f"{where}: {code}")
    if code in {"InvalidBucketName", "MethodNotAllowed", "NotImplemented", "KeyTooLongError"}:
        return StorageError(f"{where}: {code}")
    return None
