"""A prefix of a bucket. The only file that knows S3, its client and its errors."""

import hashlib
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from pipeline.errors import StorageBusy, StorageDenied, StorageError, StorageMissing
from pipeline.keys import printable
from pipeline.storage.contract import Found, ObjectChanged, ObjectUnreadable

T = TypeVar("T")

RETRIES = 6  # waits 0.5, 1, 2, 4, 8 s (with jitter): outlasts a restart of the server, FAULTS §A.6
DOUBTS = 2  # of a 404 for what was listed: a replica or a cache may be behind for a second
SAME = 2  # times that a body comes alike and yet unlike its ETag: that is what the store holds
STRANGERS = 8  # objects of which no body is like its ETag: there, ETags are no MD5s
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
            page = self._patiently(partial(self._page, Prefix=start, **token), "")
            for entry in page.get("Contents", ()):
                since = entry["LastModified"].timestamp()
                yield Found(entry["Key"][cut:], entry["Size"], _etag(entry), since)
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - botocore's
        """A page of a listing, whole: what a cut one leaves out would count as removed."""
        page = _connection().do("list_objects_v2", Bucket=self.bucket, **arguments)
        known = len(page.get("Contents", ()))
        if page.get("IsTruncated", True) and "NextContinuationToken" not in page:
            raise ConnectionError("the answer is no listing, or half of one")
        if page.get("KeyCount", known) != known:
            raise ConnectionError(f"{known} of {page['KeyCount']} objects of a listing arrived")
        return page

    def ensure_there(self) -> None:
        """See `Store.ensure_there`."""
        start = f"{self.prefix}/" if self.prefix else ""
        if not self._patiently(partial(self._page, Prefix=start, MaxKeys=1), "").get("Contents"):
            raise StorageBusy(f"{self.uri} holds nothing any more: is it still the same store?")

    def unfinished(self) -> Iterator[Found]:
        """See `Store.unfinished`. A PUT that is cut off leaves nothing."""
        yield from ()

    def read(
        self, path: str, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> bytes:
        """See `Store.read`. Of a range all bytes must arrive; a whole object must be like its ETag.

        An ETag is the MD5 of the object, mostly, so a body that is unlike it was damaged on the
        way and is fetched again. The same body twice, as long as the store says it is, is what
        the store holds. Either it is rotten, or here ETags are something else (S3 Express, MinIO
        where it encrypts): it is rotten if another body of this bucket, encrypted like this one,
        was like its ETag.
        """
        if length == 0:
            return b""
        span = (
            {}
            if not start and length is None
            else {"Range": f"bytes={start}-{'' if length is None else start + length - 1}"}
        )

        bodies: Counter[str] = Counter()

        def attempt() -> bytes:
            try:
                answer, data = _connection().wait(self._body(path, span))
            except Exception as error:
                if _code(error) in {"InvalidRange", "416"}:  # begins beyond the end
                    return b""
                raise
            if etag is not None and _etag(answer) != etag:
                raise ObjectChanged(f"{printable(path)} was written again since it was planned")
            _check_arrived(answer, data, start, length)
            if not span and (md5 := _md5_of(answer)):
                etags = _etags_of(self.bucket, answer.get("ServerSideEncryption", ""))
                self._check_body(path, md5, data, bodies, etags)
            return data

        return self._patiently(attempt, path, doubts=DOUBTS if etag is not None else 0)

    def _check_body(
        self, path: str, md5: str, data: bytes, bodies: Counter[str], etags: "_Etags"
    ) -> None:
        """A body against the MD5 that its ETag seems to be; `bodies` came so far."""
        if not etags.are_md5s:
            return
        body = hashlib.md5(data, usedforsecurity=False).hexdigest()
        bodies[body] += 1
        if body == md5:
            etags.like += 1
            return
        settled = bodies[body] >= SAME or bodies.total() == RETRIES
        if not settled or not self._is_whole(path, data):
            raise ConnectionError("the body does not match its MD5 ETag")
        if etags.like:
            raise ObjectUnreadable(f"{printable(path)}: corrupt_read: its MD5 is {body}, not {md5}")
        if bodies[body] < SAME:
            raise ConnectionError("no body matches its MD5 ETag")
        etags.unlike += 1

    def _is_whole(self, path: str, data: bytes) -> bool:
        about = self.stat(path)
        return about is not None and about.nbytes == len(data)

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

    def _patiently(self, attempt: Callable[[], T], path: str, doubts: int = 0) -> T:
        """Try again what may pass, with jittered waits; say in our words what does not.

        Args:
            attempt: what is tried.
            path: of the object it is about.
            doubts: how often "there is no such object" is not yet believed.
        """
        where = printable(f"{self.uri}/{path}" if path else self.uri)
        for turn in range(RETRIES):
            try:
                return attempt()
            except StorageError:
                raise
            except Exception as error:  # noqa: BLE001 - the border: every foreign error is translated here
                final = _verdict(error, where)
                if final is not None and not (turn < doubts and _code(error) in _NO_OBJECT):
                    raise final from None  # botocore's text may quote headers
                if turn == RETRIES - 1:
                    raise StorageBusy(
                        f"{where}: {_short(error)} after {RETRIES} attempts"
                    ) from None
                time.sleep(0.5 * 2**turn * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        raise AssertionError


def _etag(answer: dict[str, Any]) -> str:
    return answer["ETag"].strip('"')


def _check_arrived(answer: dict[str, Any], data: bytes, start: int, length: int | None) -> None:
    """All the bytes. What a short answer says of its length is no proof, its range's total is."""
    expected = answer["ContentLength"]
    if start or length is not None:
        said = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("ContentRange", ""))
        if not said or int(said[1]) != start:
            raise ConnectionError("another range was answered")
        left = int(said[2]) - start
        expected = left if length is None else min(length, left)
    if len(data) != expected:
        raise ConnectionError(f"{len(data)} of {expected} bytes arrived")


def _md5_of(answer: dict[str, Any]) -> str | None:
    """The MD5 that an ETag seems to be."""
    encrypted = (
        answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    )
    return _etag(answer) if not encrypted and re.fullmatch("[0-9a-f]{32}", _etag(answer)) else None


@dataclass
class _Etags:
    """What this process has seen of the ETags of objects of a bucket that are encrypted alike."""

    like: int = 0
    """Bodies whose MD5 they were."""
    unlike: int = 0

    @property
    def are_md5s(self) -> bool:
        """As far as is known. Where they are not, each object would be fetched twice for ever."""
        return self.like > 0 or self.unlike < STRANGERS


_seen: dict[tuple[str, str], _Etags] = {}


def _etags_of(bucket: str, encryption: str) -> _Etags:
    return _seen.setdefault((bucket, encryption), _Etags())


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


_NO_OBJECT = {"NoSuchKey", "404", "NotFound"}
_DENIED = {
    "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", "401", "ExpiredToken",
    "UserSuspended", "AllAccessDisabled", "InvalidToken", "TokenRefreshRequired", "Forbidden",
}  # fmt: skip
_FOR_GOOD = {
    "InvalidBucketName", "MethodNotAllowed", "NotImplemented", "KeyTooLongError", "InvalidRequest",
    "InvalidArgument", "InvalidURI", "EntityTooLarge", "405", "501",
}  # fmt: skip
_SENTENCES: dict[str, tuple[type[StorageError], str]] = {
    "NoSuchBucket": (StorageMissing, "there is no such bucket"),
    "InvalidObjectState": (ObjectUnreadable, "archived; restore it first"),
    "QuotaExceeded": (StorageBusy, "the quota is full; raise it and run the same command again"),
    "RequestTimeTooSkewed": (StorageDenied, "RequestTimeTooSkewed: this machine's clock is off"),
    **{
        code: (StorageError, f"{code}: the bucket is in another region; set AWS_DEFAULT_REGION")
        for code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301")
    },
}
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
    if code in _SENTENCES:
        kind, sentence = _SENTENCES[code]
        return kind(f"{where}: {sentence}")
    if code in _NO_OBJECT:
        return StorageMissing(f"{where}: not there ({code})")
    if code in _DENIED:
        return StorageDenied(f"{where}: {code}")
    if code in _FOR_GOOD:
        return StorageError(f"{where}: {code}")
    return None
