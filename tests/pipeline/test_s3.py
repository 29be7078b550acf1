"""A bucket that lies: nothing false is believed, nothing true is asked twice.

The bucket is a fake below our own code, where botocore would be; s3/ has the real server.
"""

import asyncio
import hashlib
import pickle
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import ray.cloudpickle

from pipeline.errors import StorageBusy, StorageDenied, StorageError, StorageMissing
from pipeline.storage import ObjectChanged, ObjectUnreadable, S3Store, open_store, s3
from tests.canaries import STORE_KEYS
from tests.contracts.formats import PICTURES, fetched, planned
from tests.pictures import parquet_of, tar_of


class Refusal(Exception):
    """What botocore raises when a server says no."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


class Body:
    """A body on its way."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def read(self) -> bytes:
        return self.data


class Bucket:
    """In memory; `lies` are told one after the other, then the truth.

    A lie is an error to raise or a change to an answer; None is the truth.
    """

    def __init__(self, objects: dict[str, bytes], page: int = 1000) -> None:
        self.objects, self.page = objects, page
        self.etags = {key: hashlib.md5(data).hexdigest() for key, data in objects.items()}
        self.more: dict[str, str] = {}
        """What else every answer says."""
        self.lies: list = []
        self.asked: list[str] = []

    def wait(self, work):
        return asyncio.run(work)

    def do(self, method, **arguments):
        return asyncio.run(self.call(method, **arguments))

    async def call(self, method, **arguments):
        self.asked.append(method)
        lie = self.lies.pop(0) if self.lies else None
        if isinstance(lie, Exception):
            raise lie
        answer = getattr(self, method)(**arguments)
        return lie(answer) if lie else answer

    def get_object(self, Bucket, Key, Range=None):
        data = self.objects.get(Key)
        if data is None:
            raise Refusal("NoSuchKey")
        answer = {"ETag": f'"{self.etags[Key]}"', **self.more}
        if Range:
            first, last = Range.removeprefix("bytes=").split("-")
            total, start = len(data), int(first)
            if start >= total:
                raise Refusal("InvalidRange")
            data = data[start : int(last or total) + 1]
            answer["ContentRange"] = f"bytes {start}-{start + len(data) - 1}/{total}"
        return {**answer, "ContentLength": len(data), "Body": Body(data)}

    def head_object(self, Bucket, Key):
        if Key not in self.objects:
            raise Refusal("404")
        return {**self._about(Key), "ContentLength": len(self.objects[Key])}

    def list_objects_v2(self, Bucket, Prefix="", MaxKeys=None, ContinuationToken=""):
        keys = sorted(k for k in self.objects if k.startswith(Prefix) and k > ContinuationToken)
        now = keys[: MaxKeys or self.page]
        entries = [{"Key": k, "Size": len(self.objects[k]), **self._about(k)} for k in now]
        more = {"NextContinuationToken": now[-1]} if len(now) < len(keys) else {}
        return {"Contents": entries, "KeyCount": len(now), "IsTruncated": bool(more), **more}

    def _about(self, key):
        return {"ETag": self.etags[key], "LastModified": datetime(2026, 1, 1, tzinfo=UTC)}


def short(answer: dict) -> dict:
    """Half of the body, and a length that says so; what else is true stays."""
    if "Body" not in answer:
        return answer
    half = answer["Body"].data[: len(answer["Body"].data) // 2]
    return {**answer, "ContentLength": len(half), "Body": Body(half)}


def flipped(place: int):
    """One bit of the body is another."""

    def lie(answer):
        data = bytearray(answer["Body"].data)
        data[place] ^= 1
        return {**answer, "Body": Body(bytes(data))}

    return lie


def absent(answer: dict) -> dict:
    """Not there, unless it is a listing that was asked for."""
    if "Contents" not in answer:
        raise Refusal("404")
    return answer


class Unsteady(Bucket):
    """Lies whenever it is asked something for the first time, or always."""

    def __init__(self, objects, lie) -> None:
        super().__init__(objects)
        self.lie, self.always = lie, False
        self.answered: set[str] = set()

    async def call(self, method, **arguments):
        question = f"{method} {arguments}"
        answer = await super().call(method, **arguments)
        if question in self.answered and not self.always:
            return answer
        self.answered.add(question)
        return self.lie(answer)


def contents() -> dict[str, bytes]:
    return {
        "a.png": PICTURES[0],
        "s.tar": tar_of({f"{n}.png": picture for n, picture in enumerate(PICTURES)}),
        "t.parquet": parquet_of(PICTURES),
    }


@pytest.fixture
def open_bucket(monkeypatch):
    """Make a bucket that all stores read from, and nobody waits."""

    def made(objects, page=1000, lie=None):
        bucket = Unsteady(objects, lie) if lie else Bucket(objects, page)
        monkeypatch.setattr(s3, "_connection", lambda: bucket)
        monkeypatch.setattr(s3, "_seen", {})
        monkeypatch.setattr(s3, "time", SimpleNamespace(sleep=lambda _: None))
        return bucket, S3Store("bucket", "")

    return made


# -- what was listed and is not there ------------------------------------------------------------


def test_what_was_listed_is_asked_for_again_before_it_is_missing(open_bucket):
    bucket, store = open_bucket({"x": b"data"})
    bucket.lies = [Refusal("NoSuchKey"), Refusal("404")]

    assert store.read("x", etag=bucket.etags["x"]) == b"data"


@pytest.mark.parametrize(("etag", "asked"), [("e", 3), (None, 1)], ids=["listed", "perhaps there"])
def test_what_is_not_there_is_missing_and_only_what_was_listed_is_doubted(open_bucket, etag, asked):
    bucket, store = open_bucket({})

    with pytest.raises(StorageMissing):
        store.read("x", etag=etag)
    assert len(bucket.asked) == asked

    assert store.stat("x") is None
    assert len(bucket.asked) == asked + 1


@pytest.mark.parametrize("name", ["a.png", "s.tar", "t.parquet"])
def test_an_archive_that_says_not_there_now_and_then_is_planned_and_read(open_bucket, name):
    bucket, store = open_bucket({name: contents()[name]}, lie=absent)

    images = planned(store)
    assert {image.problem for image in images} == {None}
    bucket.answered.clear()
    assert {item.data for item in fetched(store, images)} <= set(PICTURES)


def test_a_bucket_that_is_gone_or_empty_is_not_there(open_bucket):
    bucket, store = open_bucket({"x": b"1", "y": b"2"})
    store.ensure_there()
    assert bucket.asked == ["list_objects_v2"]

    bucket.lies = [Refusal("NoSuchBucket")]
    with pytest.raises(StorageMissing, match="no such bucket"):
        store.ensure_there()
    bucket.objects.clear()
    with pytest.raises(StorageBusy, match="holds nothing"):
        store.ensure_there()


# -- bodies that are short -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "s.tar", "t.parquet"])
@pytest.mark.parametrize("etag", ["md5", "0123456789-2"], ids=["md5", "multipart"])
def test_a_short_body_is_fetched_again_in_planning_and_in_fetching(open_bucket, name, etag):
    bucket, store = open_bucket({name: contents()[name]}, lie=short)
    if etag != "md5":
        bucket.etags[name] = etag
    expected = PICTURES if name != "a.png" else PICTURES[:1]

    images = planned(store)
    assert [image.problem for image in images] == [None] * len(expected)
    bucket.answered.clear()
    assert [item.data for item in fetched(store, images)] == expected

    bucket.always = True
    with pytest.raises(StorageBusy):
        fetched(store, images)
    if name != "a.png":
        with pytest.raises(StorageBusy):
            planned(store)


def test_a_range_ends_where_the_object_ends_and_no_other_is_taken_for_it(open_bucket):
    bucket, store = open_bucket({"x": b"0123456789"})

    assert store.read("x", 3, 4) == b"3456"
    assert store.read("x", 8, 100) == b"89"
    assert store.read("x", 5) == b"56789"
    assert store.read("x", 50, 10) == b""
    bucket.lies = [lambda _: bucket.get_object("bucket", "x"), None]
    assert store.read("x", 3, 4) == b"3456"
    bucket.lies = [lambda _: bucket.get_object("bucket", "x", Range="bytes=0-3"), None]
    assert store.read("x", 3, 4) == b"3456"


# -- bodies that are wrong -----------------------------------------------------------------------


def test_a_flipped_bit_is_fetched_again(open_bucket):
    bucket, store = open_bucket({"x": b"0123456789"})
    bucket.lies = [flipped(3), flipped(5), flipped(7)]

    assert store.read("x") == b"0123456789"
    assert bucket.asked == ["get_object"] * 4


def test_an_object_that_is_rotten_in_its_bucket_costs_only_itself(open_bucket):
    bucket, store = open_bucket({"good": b"0123456789", "rotten": b"0123456789"})
    bucket.etags["rotten"] = "0" * 32
    store.read("good")

    with pytest.raises(ObjectUnreadable, match="corrupt_read"):
        store.read("rotten")
    assert bucket.asked[1:] == ["get_object", "get_object", "head_object"]
    assert store.read("good") == b"0123456789"


def test_an_object_that_never_comes_twice_alike_costs_only_itself(open_bucket):
    bucket, store = open_bucket({"good": b"0123456789", "x": b"0123456789"})
    store.read("good")
    bucket.lies = [flipped(n) for n in range(10)]

    with pytest.raises(ObjectUnreadable, match="corrupt_read"):
        store.read("x")


def test_a_way_that_damages_everything_stops_the_run(open_bucket):
    bucket, store = open_bucket({"x": b"0123456789"})
    bucket.lies = [flipped(n) for n in range(10)]

    with pytest.raises(StorageBusy, match="MD5"):
        store.read("x")


def test_where_etags_are_no_md5s_the_same_body_twice_is_the_object(open_bucket):
    objects = {f"{n}": b"data of %d" % n for n in range(20)}
    bucket, store = open_bucket(objects)
    bucket.etags = {key: f"{n:032x}" for n, key in enumerate(objects)}

    assert {key: store.read(key) for key in objects} == objects
    assert bucket.asked.count("get_object") == len(objects) + s3.STRANGERS


def test_what_is_encrypted_is_measured_by_what_is_encrypted_too(open_bucket):
    bucket, store = open_bucket({"plain": b"plain", "encrypted": b"encrypted"})
    bucket.etags["encrypted"] = "0" * 32  # MinIO, where it encrypts
    store.read("plain")
    bucket.more = {"ServerSideEncryption": "AES256"}

    assert store.read("encrypted") == b"encrypted"


def test_an_object_that_was_written_again_is_another(open_bucket):
    _, store = open_bucket({"x": b"data"})

    with pytest.raises(ObjectChanged):
        store.read("x", etag="of before")


# -- listings ------------------------------------------------------------------------------------

NO_LISTINGS = pytest.mark.parametrize(
    "lie",
    [
        lambda answer: {},
        lambda answer: {**answer, "Contents": answer["Contents"][:1]},
        lambda answer: {k: answer[k] for k in ("Contents", "KeyCount")} | {"IsTruncated": True},
        Refusal("InternalError"),
    ],
    ids=["empty-body", "cut", "no-way-on", "error"],
)


@NO_LISTINGS
def test_a_listing_is_whole_or_there_is_none(open_bucket, lie):
    objects = {f"{n}": b"x" for n in range(7)}
    bucket, store = open_bucket(objects, page=3)
    bucket.lies = [None, lie, lie, None]

    assert [found.path for found in store.list()] == sorted(objects)

    bucket.lies = [None, *[lie] * 10]
    with pytest.raises(StorageBusy):
        list(store.list())


# -- what is for good ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("RequestTimeTooSkewed", StorageDenied, "this machine's clock is off"),
        ("PermanentRedirect", StorageError, "another region"),
        ("InvalidRequest", StorageError, "InvalidRequest"),
        ("AccessDenied", StorageDenied, "AccessDenied"),
    ],
)
def test_what_no_second_try_mends_is_said_at_once(open_bucket, code, kind, said):
    bucket, store = open_bucket({"x": b"data"})
    bucket.lies = [Refusal(code)]

    with pytest.raises(kind, match=said):
        store.read("x")
    assert len(bucket.asked) == 1


# -- patience ------------------------------------------------------------------------------------


def test_what_may_pass_is_asked_a_few_times_after_growing_waits_no_two_alike(
    open_bucket, monkeypatch
):
    bucket, store = open_bucket(contents())
    waits: list[float] = []
    monkeypatch.setattr(s3, "time", SimpleNamespace(sleep=waits.append))
    bucket.lies = [Refusal("SlowDown")] * 100

    for _ in range(2):
        with pytest.raises(StorageBusy, match=f"after {s3.RETRIES} attempts"):
            store.read("a.png")

    assert len(bucket.asked) == 2 * s3.RETRIES
    assert len(waits) == 2 * (s3.RETRIES - 1) == len(set(waits))
    for turn, waited in enumerate(waits[: s3.RETRIES - 1]):
        assert 0.25 * 2**turn <= waited <= 0.5 * 2**turn
    assert sum(waits[: s3.RETRIES - 1]) < 16


def test_a_store_travels_without_credentials(monkeypatch):
    for name, value in STORE_KEYS.items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://bucket/prefix")

    for packed in (pickle.dumps(store), ray.cloudpickle.dumps(store), repr(vars(store)).encode()):
        assert not [value for value in STORE_KEYS.values() if value.encode() in packed]
    assert pickle.loads(pickle.dumps(store)).uri == store.uri
