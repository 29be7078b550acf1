"""A prefix of a bucket. The only file that knows S3, its client and its errors."""

import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar, cast

from pipeline.errors import StorageBusy, StorageDenied, StorageError, StorageMissing
from pipeline.keys import printable
from pipeline.storage.contract import Found, ObjectChanged, ObjectUnreadable

T = TypeVar("T")

RETRIES = 6  # waits 0.5, 1, 2, 4, 8 s (with jitter): outlasts a restart of the server, FAULTS §A.6
MAX_PUT = 5 * 1024**3  # S3's limit for one plain PUT
CONNECT_S, READ_S = 5, 30  # botocore's defaults are 60 s each: a hung server would cost minutes
COMPARED = 65_536  # bytes at each end that settle whose object it is; our tokens lie within them


class S3Store:
    """A prefix of a bucket, through s3fs's connection (one per process and thread-safe)."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"

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

    def unfinished(self) -> Iterator[Found]:
        """See `Store.unfinished`. A PUT that is cut off leaves nothing."""
        yield from ()

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
