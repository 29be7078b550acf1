"""The S3 server of the tests is a real one, and its proxy lies exactly as told."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import botocore.session
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, HTTPClientError

from tests.faultproxy import FaultProxy, Rule
from tests.s3server import Credentials, S3Server

HOSTILE_KEYS = [
    "a b.jpg", "ünï/cödé.png", "e\u0301.jpg", "é.jpg", "%2e%2e%2fetc", "../up", "a//b", "./dot",
    "'quote'",
    '"double"', "<img src=x onerror=alert(1)>.jpg", "$(reboot)", "-rf", "~", "a;b|c", "new\nline",
    "tab\tkey",
    "trailing ", "back\\slash", "hash#?query", "star*[glob]?", "con", "Case", "case", "x" * 900,
    "😀.tif",
    "folder", "folder/", "folder/inside", "a+b=c&d",
]  # fmt: skip


def refusal(call, **arguments) -> str:
    """Make a call that must be refused and return the store's word for why."""
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response["Error"]["Code"]


def status(call, **arguments) -> int:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response["ResponseMetadata"]["HTTPStatusCode"]


@pytest.fixture
def s3(s3_server: S3Server):
    with s3_server.client() as client:
        yield client


@pytest.fixture
def through_proxy(fault_proxy: FaultProxy, s3_server: S3Server):
    with s3_server.client(endpoint=fault_proxy.endpoint) as client:
        yield client


def read(s3, bucket: str, key: str = "k") -> bytes:
    return s3.get_object(Bucket=bucket, Key=key)["Body"].read()


# -- the server ----------------------------------------------------------------------------------


def test_of_eight_who_create_the_same_object_exactly_one_wins(bucket, s3):
    def create(writer: int) -> int:
        try:
            s3.put_object(Bucket=bucket, Key=key, Body=b"%d" % writer, IfNoneMatch="*")
        except ClientError as error:
            return error.response["ResponseMetadata"]["HTTPStatusCode"]
        return writer

    with ThreadPoolExecutor(8) as pool:
        for key in map(str, range(10)):
            outcomes = list(pool.map(create, range(8)))
            winners = [o for o in outcomes if o < 8]
            assert len(winners) == 1
            assert set(outcomes) - set(winners) <= {412, 409}
            assert read(s3, bucket, key) == b"%d" % winners[0]


@pytest.mark.parametrize("who", ["wrong secret", "unknown key"])
def test_a_wrong_signature_is_refused_with_403(who, bucket, s3_server):
    access = s3_server.owner.access_key if who == "wrong secret" else "NOSUCHKEY"
    with s3_server.client(Credentials(access, "not the secret")) as stranger:
        assert status(stranger.get_object, Bucket=bucket, Key="k") == 403
        assert status(stranger.put_object, Bucket=bucket, Key="k", Body=b"") == 403


def test_a_reader_reads_and_lists_and_writes_nothing(bucket, s3, s3_server):
    s3.put_object(Bucket=bucket, Key="k", Body=b"body")
    with s3_server.client(s3_server.add_reader(bucket)) as reader:
        assert read(reader, bucket) == b"body"
        assert reader.list_objects_v2(Bucket=bucket)["KeyCount"] == 1
        assert refusal(reader.put_object, Bucket=bucket, Key="k", Body=b"") == "AccessDenied"


def test_a_full_bucket_refuses_the_next_object(bucket, s3, s3_server):
    s3_server.set_quota(bucket, objects=1)
    s3.put_object(Bucket=bucket, Key="first", Body=b"")
    assert refusal(s3.put_object, Bucket=bucket, Key="second", Body=b"") == "QuotaExceeded"


def test_hostile_keys_come_back_as_they_were_put(bucket, s3):
    for key in HOSTILE_KEYS:
        s3.put_object(Bucket=bucket, Key=key, Body=key.encode())
    listed = [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    assert listed == sorted(HOSTILE_KEYS, key=str.encode)
    assert [read(s3, bucket, key).decode() for key in listed] == listed


def test_every_test_finds_an_empty_bucket_and_its_environment(bucket):
    client = botocore.session.Session().create_client("s3")
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    client.close()


def test_what_was_acknowledged_survives_kill_9_of_the_whole_server(bucket, s3, s3_server):
    s3.put_object(Bucket=bucket, Key="k", Body=b"acknowledged")
    for name in ("rgw", "osd", "mon"):
        s3_server.kill(name)
    with pytest.raises(EndpointConnectionError):
        read(s3, bucket)
    s3_server.recover()
    assert read(s3, bucket) == b"acknowledged"


def test_a_paused_server_goes_on_where_it_stopped(bucket, s3, s3_server):
    s3_server.pause("rgw")
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(s3.put_object, Bucket=bucket, Key="k", Body=b"late")
        with pytest.raises(TimeoutError):
            put.result(timeout=0.5)
        s3_server.resume("rgw")
        put.result(timeout=10)
    assert read(s3, bucket) == b"late"


# -- the proxy -----------------------------------------------------------------------------------


def test_without_a_rule_the_proxy_changes_nothing(bucket, through_proxy, fault_proxy):
    body = bytes(range(256)) * 4000
    through_proxy.put_object(Bucket=bucket, Key="dir/ü k", Body=body, Metadata={"token": "t"})
    assert read(through_proxy, bucket, "dir/ü k") == body
    assert through_proxy.head_object(Bucket=bucket, Key="dir/ü k")["Metadata"] == {"token": "t"}
    assert through_proxy.list_objects_v2(Bucket=bucket)["KeyCount"] == 1
    assert fault_proxy.seen("PUT", f"/{bucket}/dir/ü k") == 1
    assert fault_proxy.done == {"pass": 4}


def test_a_put_whose_answer_is_lost_has_landed_and_its_retry_is_told_it_lost(
    bucket, s3, s3_server, fault_proxy
):
    fault_proxy.fault("lost_answer", "PUT", times=1)
    with s3_server.client(endpoint=fault_proxy.endpoint, attempts=3) as patient:
        code = refusal(patient.put_object, Bucket=bucket, Key="k", Body=b"mine", IfNoneMatch="*")
    assert code == "PreconditionFailed"
    assert read(s3, bucket) == b"mine"
    assert fault_proxy.seen("PUT") == 2


def test_a_lost_answer_without_a_retry_looks_like_a_put_that_failed(
    bucket, s3, through_proxy, fault_proxy
):
    fault_proxy.fault("lost_answer", "PUT")
    with pytest.raises(HTTPClientError):
        through_proxy.put_object(Bucket=bucket, Key="k", Body=b"landed", IfNoneMatch="*")
    assert read(s3, bucket) == b"landed"


def test_a_store_that_ignores_the_condition_overwrites(bucket, s3, through_proxy, fault_proxy):
    fault_proxy.fault("ignore_condition", "PUT")
    s3.put_object(Bucket=bucket, Key="ü k", Body=b"first")
    through_proxy.put_object(Bucket=bucket, Key="ü k", Body=b"second", IfNoneMatch="*")
    assert read(s3, bucket, "ü k") == b"second"


def test_a_put_delivered_twice_hears_that_it_lost_to_itself(bucket, s3, through_proxy, fault_proxy):
    fault_proxy.fault("duplicate", "PUT")
    code = refusal(through_proxy.put_object, Bucket=bucket, Key="k", Body=b"m", IfNoneMatch="*")
    assert code == "PreconditionFailed"
    assert read(s3, bucket) == b"m"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("500", "InternalError"),
        ("503", "SlowDown"),
        ("403", "AccessDenied"),
        ("stale404", "NoSuchKey"),
    ],
)
def test_an_injected_refusal_never_reaches_the_server(
    fault, code, bucket, s3, through_proxy, fault_proxy
):
    fault_proxy.fault(fault, "GET", times=1)
    s3.put_object(Bucket=bucket, Key="k", Body=b"there")
    assert refusal(through_proxy.get_object, Bucket=bucket, Key="k") == code
    assert read(through_proxy, bucket) == b"there"


@pytest.mark.parametrize("fault", ["reset", "drop", "hang"])
def test_a_request_lost_on_the_way_leaves_no_object(fault, bucket, s3, through_proxy, fault_proxy):
    fault_proxy.fault(fault, "PUT", seconds=0.1)
    with pytest.raises(HTTPClientError):
        through_proxy.put_object(Bucket=bucket, Key="k", Body=b"lost")
    assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_a_truncated_body_is_noticed_by_the_client(bucket, s3, through_proxy, fault_proxy):
    s3.put_object(Bucket=bucket, Key="k", Body=b"0123456789")
    fault_proxy.fault("truncate", "GET")
    with pytest.raises(HTTPClientError):
        read(through_proxy, bucket)


def test_a_short_body_and_a_flipped_bit_are_not_noticed_by_the_client(
    bucket, s3, through_proxy, fault_proxy
):
    body = b"0123456789"
    s3.put_object(Bucket=bucket, Key="k", Body=body)
    fault_proxy.fault("short", "GET", times=1)
    fault_proxy.fault("bitflip", "GET", times=1)
    assert read(through_proxy, bucket) == body[:5]
    flipped = read(through_proxy, bucket)
    assert sum((a ^ b).bit_count() for a, b in zip(flipped, body, strict=True)) == 1


def test_a_delayed_request_arrives(bucket, s3, through_proxy, fault_proxy):
    fault_proxy.fault("delay", seconds=0.3)
    start = time.monotonic()
    through_proxy.put_object(Bucket=bucket, Key="k", Body=b"late")
    assert time.monotonic() - start >= 0.3
    assert read(s3, bucket) == b"late"


def test_a_slow_body_arrives_piece_by_piece(bucket, s3, through_proxy, fault_proxy):
    s3.put_object(Bucket=bucket, Key="k", Body=b"0123456789")
    fault_proxy.fault("slow", "GET", seconds=0.3)
    start = time.monotonic()
    assert read(through_proxy, bucket) == b"0123456789"
    assert time.monotonic() - start >= 0.3


def test_an_error_in_the_body_of_a_200_is_an_error(bucket, s3, through_proxy, fault_proxy):
    s3.put_object(Bucket=bucket, Key="k", Body=b"there")
    fault_proxy.fault("200_error", times=2)
    assert refusal(through_proxy.list_objects_v2, Bucket=bucket) == "InternalError"
    assert refusal(through_proxy.put_object, Bucket=bucket, Key="new", Body=b"") == "InternalError"
    assert through_proxy.list_objects_v2(Bucket=bucket)["KeyCount"] == 1


def test_a_rule_speaks_about_its_paths_only(bucket, through_proxy, fault_proxy):
    fault_proxy.fault("503", "PUT", "*/c/*")
    through_proxy.put_object(Bucket=bucket, Key="plan/c", Body=b"")
    assert refusal(through_proxy.put_object, Bucket=bucket, Key="c/plan", Body=b"") == "SlowDown"


def test_equal_seeds_choose_the_same_requests(bucket, s3_server):
    def busy(seed: int) -> list[bool]:
        with FaultProxy(s3_server, seed) as proxy, s3_server.client(endpoint=proxy.endpoint) as s3:
            rule = proxy.fault("503", probability=0.5)
            return [_is_hit(s3, bucket, rule) for _ in range(20)]

    assert busy(seed=7) == busy(seed=7)
    assert busy(seed=7) != busy(seed=8)


def _is_hit(s3, bucket: str, rule: Rule) -> bool:
    before = rule.done
    with suppress(ClientError):
        s3.put_object(Bucket=bucket, Key="k", Body=b"")
    return rule.done > before


def test_a_fault_nobody_knows_is_refused_with_the_list(fault_proxy):
    with pytest.raises(ValueError, match="lost_answer"):
        fault_proxy.fault("gremlin")
