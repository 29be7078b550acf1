"""Runs from and into a bucket: as on a disk, whatever the store or the network does."""

from __future__ import annotations

import io
import secrets
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import EXIT_DONE, EXIT_REFUSED, EXIT_REJECTIONS, EXIT_UNFINISHED
from pipeline.keys import unescape
from pipeline.ledger import Ledger
from pipeline.reader import open_run
from pipeline.status import status
from pipeline.storage import open_store
from tests import objects, runs
from tests.archives import png
from tests.s3.test_server import HOSTILE_KEYS
from tests.s3server import Credentials

OF_THE_PLACE = ("uri", "etag")  # columns that say where an image lies
FEW = ("--fragment.images", "8", "--compute.workers", "1", "--compute.fetch-threads", "4")
COMMIT = "*/mask/c/*"


@pytest.fixture(autouse=True)
def connection(monkeypatch):
    """Let this process connect anew, through the test's proxy if it has one."""
    monkeypatch.setattr("pipeline.storage.s3._made", {})


@pytest.fixture
def s3(s3_server):
    with s3_server.client() as client:
        yield client


@pytest.fixture
def source(bucket, s3) -> str:
    return objects.into_bucket(objects.mixed(), s3, bucket, "in")


@pytest.fixture
def run(bucket) -> str:
    return f"s3://{bucket}/out/run"


def everything(s3, bucket: str, prefix: str = "") -> dict[str, bytes]:
    found = s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", ())
    return {o["Key"]: s3.get_object(Bucket=bucket, Key=o["Key"])["Body"].read() for o in found}


# -- where things lie ----------------------------------------------------------------------------


def test_a_bucket_to_a_bucket_is_the_run_that_a_disk_makes(
    source, run, tiny_bundle, oracle, tmp_path
):
    runs.finished(runs.words(source, run, tiny_bundle), tmp_path / "log")

    runs.assert_same(run, oracle, OF_THE_PLACE)
    now = status(Ledger.open(open_store(run)))
    assert (now.done, now.pending, now.finished) == (60, 0, True)
    assert now.rejected == {"empty": 2, "not_an_image": 2, "truncated": 1}


def test_a_disk_to_a_bucket_is_the_same_run(archive, run, tiny_bundle, oracle, tmp_path):
    runs.finished(runs.words(archive, run, tiny_bundle), tmp_path / "log")
    runs.assert_same(run, oracle)


def test_a_bucket_to_a_disk_is_the_same_run(source, tiny_bundle, oracle, tmp_path):
    runs.finished(runs.words(source, tmp_path / "run", tiny_bundle), tmp_path / "log")
    runs.assert_same(tmp_path / "run", oracle, OF_THE_PLACE)


def test_a_killed_run_in_a_bucket_goes_on_with_what_is_missing(
    source, run, tiny_bundle, oracle, tmp_path
):
    words = runs.words(source, run, tiny_bundle)
    with runs.driver(words, tmp_path / "log") as driver:
        runs.until(lambda: len(runs.commits(run)) >= 3, "three commits")
        driver.kill()
    before = runs.commits(run)

    runs.finished(words, tmp_path / "log")
    assert before.items() <= runs.commits(run).items()
    assert runs.this_call(run)["fragments"] == len(oracle["fragments"]) - len(before)
    runs.assert_same(run, oracle, OF_THE_PLACE)


# -- what a network does -------------------------------------------------------------------------


def test_a_commit_whose_answer_is_lost_is_neither_computed_nor_counted_twice(
    fault_proxy, source, run, tiny_bundle, oracle, tmp_path
):
    lost = fault_proxy.fault("lost_answer", "PUT", COMMIT, times=3)
    runs.finished(runs.words(source, run, tiny_bundle), tmp_path / "log")

    assert lost.done == 3
    call = runs.this_call(run)
    assert (call["fragments"], call["adopted"]) == (len(oracle["fragments"]), 0)
    assert fault_proxy.seen("PUT", COMMIT) == len(oracle["fragments"]) + 3
    assert fault_proxy.seen("GET", "*/in/loose/0/003.png") <= 2  # fetched once, shown once
    runs.assert_same(run, oracle, OF_THE_PLACE)


def test_a_request_that_arrives_twice_changes_nothing(
    fault_proxy, source, run, tiny_bundle, oracle, tmp_path
):
    fault_proxy.fault("duplicate", "PUT", "*", probability=0.5)
    runs.finished(runs.words(source, run, tiny_bundle), tmp_path / "log")

    assert fault_proxy.done["duplicate"]
    assert runs.this_call(run)["adopted"] == 0
    runs.assert_same(run, oracle, OF_THE_PLACE)


@pytest.mark.timeout(180)
def test_bursts_of_503_resets_and_broken_bodies_are_survived(
    fault_proxy, source, run, tiny_bundle, oracle, tmp_path
):
    for fault in ("503", "reset", "truncate"):
        fault_proxy.fault(fault, probability=0.05)
    runs.finished(runs.words(source, run, tiny_bundle), tmp_path / "log")

    assert min(fault_proxy.done[fault] for fault in ("503", "reset", "truncate")) > 0
    fault_proxy.clear()
    runs.assert_same(run, oracle, OF_THE_PLACE)


@pytest.mark.parametrize("fault", ["short", "bitflip"])
def test_a_damaged_body_is_noticed_and_fetched_again(
    fault_proxy, source, run, tiny_bundle, oracle, tmp_path, fault
):
    damaged = fault_proxy.fault(fault, "GET", "*/in/loose/*", times=4)
    runs.finished(runs.words(source, run, tiny_bundle), tmp_path / "log")

    assert damaged.done == 4
    runs.assert_same(run, oracle, OF_THE_PLACE)


@pytest.mark.timeout(180)
def test_false_answers_are_not_believed_in_planning_nor_in_fetching_nor_of_our_own(
    fault_proxy, source, run, tiny_bundle, oracle, tmp_path
):
    told = [
        fault_proxy.fault("short", "GET", "*/in/shards/*", probability=0.3, times=5),
        fault_proxy.fault("short", "GET", "*/out/*", probability=0.2, times=5),
        # three in a row about one object are believed, so there are no three
        fault_proxy.fault("stale404", "GET", "*/in/*", probability=0.2, times=2),
        fault_proxy.fault("200_error", probability=0.05, times=5),
    ]
    runs.finished(runs.words(source, run, tiny_bundle), tmp_path / "log")

    assert min(lie.done for lie in told) > 0
    fault_proxy.clear()
    runs.assert_same(run, oracle, OF_THE_PLACE)


def test_a_slow_body_is_waited_for_as_long_as_bytes_come(fault_proxy, s3, bucket, monkeypatch):
    s3.put_object(Bucket=bucket, Key="k", Body=b"0123456789" * 10)
    monkeypatch.setattr("pipeline.storage.s3.READ_S", 1)
    fault_proxy.fault("slow", "GET", seconds=3.0)

    assert open_store(f"s3://{bucket}").read("k") == b"0123456789" * 10
    assert fault_proxy.seen("GET") == 1


# -- what a store does ---------------------------------------------------------------------------


def test_a_store_that_ignores_conditions_is_refused_before_anything_is_spent(
    fault_proxy, s3, bucket, source, run, tiny_bundle, tmp_path
):
    fault_proxy.fault("ignore_condition", "PUT")
    said = runs.finished(runs.words(source, run, tiny_bundle), tmp_path / "log", EXIT_REFUSED)

    assert "ignores If-None-Match" in said
    assert everything(s3, bucket, "out/") == {}


@pytest.mark.timeout(180)
def test_a_store_that_is_down_for_good_ends_the_run_and_a_later_one_finishes_it(
    fault_proxy, source, run, tiny_bundle, oracle, tmp_path
):
    words = runs.words(source, run, tiny_bundle, *FEW)
    with runs.driver(words, tmp_path / "log") as driver:
        runs.until(lambda: fault_proxy.seen("PUT", COMMIT) >= 3, "three commits")
        fault_proxy.fault("reset")
        assert driver.wait(120) == EXIT_UNFINISHED, driver.said
    assert "run the same command again" in driver.said
    fault_proxy.clear()
    before = runs.commits(run)
    assert 2 <= len(before) < len(oracle["fragments"])

    runs.finished(words, tmp_path / "log")
    assert before.items() <= runs.commits(run).items()
    runs.assert_same(run, oracle, OF_THE_PLACE)


@pytest.mark.timeout(180)
def test_a_full_store_ends_the_run_and_a_later_one_finishes_it(
    s3_server, s3, bucket, archive, run, tiny_bundle, oracle, tmp_path
):
    s3_server.set_quota(bucket, 12)
    words = runs.words(archive, run, tiny_bundle, *FEW)
    said = runs.finished(words, tmp_path / "log", EXIT_UNFINISHED)
    assert "quota" in said

    s3_server.set_quota(bucket, 10_000)
    runs.finished(words, tmp_path / "log")
    runs.assert_same(run, oracle)


def test_access_lost_in_the_middle_stops_the_run_and_rejects_nothing(
    fault_proxy, source, run, tiny_bundle, oracle, tmp_path
):
    words = runs.words(source, run, tiny_bundle, *FEW)
    with runs.driver(words, tmp_path / "log") as driver:
        runs.until(lambda: fault_proxy.seen("PUT", COMMIT) >= 2, "two commits")
        fault_proxy.fault("403", "*", "*/in/*")
        assert driver.wait() == EXIT_UNFINISHED, driver.said
    fault_proxy.clear()

    runs.finished(words, tmp_path / "log")
    runs.assert_same(run, oracle, OF_THE_PLACE)


def test_a_table_that_may_not_be_read_in_the_middle_rejects_nothing(
    fault_proxy, source, run, tiny_bundle, oracle, tmp_path
):
    words = runs.words(source, run, tiny_bundle, *FEW)
    with runs.driver(words, tmp_path / "log") as driver:
        runs.until(lambda: fault_proxy.seen("PUT", COMMIT) >= 1, "a commit")
        fault_proxy.fault("403", "*", "*.parquet")
        assert driver.wait() == EXIT_UNFINISHED, driver.said
    fault_proxy.clear()

    runs.finished(words, tmp_path / "log")
    runs.assert_same(run, oracle, OF_THE_PLACE)


@pytest.fixture
def archive_of_its_own(bucket, s3) -> str:
    """A bucket that holds the source and nothing of the run."""
    s3.create_bucket(Bucket=f"{bucket}-source")
    return objects.into_bucket(objects.mixed(), s3, f"{bucket}-source", "in")


def test_a_bucket_that_goes_in_the_middle_stops_the_run_and_rejects_nothing(
    fault_proxy, s3, archive_of_its_own, run, tiny_bundle, oracle, tmp_path
):
    words, own = runs.words(archive_of_its_own, run, tiny_bundle, *FEW), archive_of_its_own[5:-3]
    held = fault_proxy.fault("delay", "PUT", COMMIT, seconds=3.0, times=2)
    with runs.driver(words, tmp_path / "log") as driver:
        runs.until(lambda: held.done, "the first commit")
        for key in everything(s3, own):
            s3.delete_object(Bucket=own, Key=key)
        s3.delete_bucket(Bucket=own)
        assert driver.wait() == EXIT_UNFINISHED, driver.said
    assert "no such bucket" in driver.said

    s3.create_bucket(Bucket=own)
    objects.into_bucket(objects.mixed(), s3, own, "in")
    runs.finished(words, tmp_path / "log")
    runs.assert_same(run, oracle, OF_THE_PLACE)


def test_no_listing_that_is_cut_or_an_error_removes_an_image(
    fault_proxy, archive_of_its_own, run, tiny_bundle, oracle, tmp_path
):
    words, own = runs.words(archive_of_its_own, run, tiny_bundle), archive_of_its_own[4:-3]
    runs.finished(words, tmp_path / "log")

    for fault in ("200_error", "short", "truncate"):
        fault_proxy.fault(fault, "GET", own, times=1)
    runs.finished(words, tmp_path / "log")
    assert fault_proxy.seen("GET", own) == 5  # of both calls
    fault_proxy.fault("200_error", "GET", own)
    runs.finished(words, tmp_path / "log", EXIT_UNFINISHED)

    fault_proxy.clear()
    assert Ledger.open(open_store(run)).rounds() == [0]
    runs.assert_same(run, oracle, OF_THE_PLACE)


@pytest.mark.timeout(240)
def test_a_gateway_that_restarts_freezes_and_says_slow_down_costs_time_only(
    s3_server, source, run, tiny_bundle, oracle, tmp_path
):
    words = runs.words(source, run, tiny_bundle, "--compute.fetch-threads", "16")
    few = "--rgw_max_concurrent_requests=4"
    try:
        with runs.driver(words, tmp_path / "log") as driver:
            runs.until(lambda: runs.commits(run), "a commit")
            s3_server.kill("rgw")
            time.sleep(4)
            s3_server.start("rgw", few)
            s3_server.wait_until_it_answers()
            s3_server.pause("rgw")
            time.sleep(4)
            s3_server.resume("rgw")
            assert driver.wait(120) == EXIT_REJECTIONS, driver.said
    finally:
        s3_server.stop("rgw")
        s3_server.start("rgw")
        s3_server.wait_until_it_answers()
    runs.assert_same(run, oracle, OF_THE_PLACE)


@pytest.mark.timeout(180)
def test_a_user_suspended_in_the_middle_stops_the_run_and_rejects_nothing(
    s3_server, fault_proxy, source, run, tiny_bundle, oracle, tmp_path
):
    words = runs.words(source, run, tiny_bundle, *FEW)
    held = fault_proxy.fault("delay", "PUT", COMMIT, seconds=3.0, times=2)
    try:
        with runs.driver(words, tmp_path / "log") as driver:
            runs.until(lambda: held.done, "the first commit")
            s3_server.admin("user", "suspend", "--uid=owner")
            assert driver.wait() == EXIT_UNFINISHED, driver.said
    finally:
        s3_server.admin("user", "enable", "--uid=owner")
    assert "UserSuspended" in driver.said

    runs.finished(words, tmp_path / "log")
    runs.assert_same(run, oracle, OF_THE_PLACE)


@pytest.mark.timeout(180)
def test_hangs_drops_and_errors_of_ranges_and_of_our_own_objects_are_survived(
    fault_proxy, source, run, tiny_bundle, oracle, tmp_path
):
    told = [
        fault_proxy.fault("drop", "GET", "*/in/shards/*", probability=0.3, times=4),
        fault_proxy.fault("500", "GET", "*/out/*", probability=0.2, times=4),
        fault_proxy.fault("reset", "PUT", "*/out/*", probability=0.2, times=4),
        fault_proxy.fault("hang", "*", "*/c/*", seconds=2.0, probability=0.2, times=2),
        fault_proxy.fault("truncate", "GET", "*/out/*", probability=0.2, times=4),
    ]
    runs.finished(runs.words(source, run, tiny_bundle), tmp_path / "log")

    assert min(lie.done for lie in told) > 0
    assert max(Counter(fault_proxy.requests).values()) < 40  # nobody asks without end
    fault_proxy.clear()
    runs.assert_same(run, oracle, OF_THE_PLACE)


def test_two_drivers_at_once_end_in_one_run_in_a_bucket(source, run, tiny_bundle, oracle, tmp_path):
    words = runs.words(source, run, tiny_bundle)
    with (
        runs.driver(words, tmp_path / "a") as a,
        runs.driver(words, tmp_path / "b") as b,
    ):
        assert (a.wait(), b.wait()) == (EXIT_REJECTIONS, EXIT_REJECTIONS), a.said + b.said
    runs.assert_same(run, oracle, OF_THE_PLACE)


# -- what a clock does ---------------------------------------------------------------------------

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
needs_faketime = pytest.mark.skipif(FAKETIME is None, reason="apt-get install faketime")


def with_a_clock(offset: str) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip


@needs_faketime
@pytest.mark.parametrize("offset", ["+2h", "-2h"])
def test_a_clock_two_hours_off_is_named_and_nothing_is_written(
    s3, bucket, source, run, tiny_bundle, offset
):
    words = runs.words(source, run, tiny_bundle)
    with runs.command(words, environment=with_a_clock(offset)) as driver:
        assert driver.ended() == EXIT_REFUSED, driver.out + driver.err
    assert "clock" in driver.err
    assert "Traceback" not in driver.err
    assert everything(s3, bucket, "out/") == {}


@needs_faketime
def test_a_clock_ten_minutes_off_does_not_matter(source, run, tiny_bundle, oracle):
    words = runs.words(source, run, tiny_bundle)
    with runs.command(words, environment=with_a_clock("+10m")) as driver:
        assert driver.ended() == EXIT_REJECTIONS, driver.out + driver.err
    runs.assert_same(run, oracle, OF_THE_PLACE)


# -- names ---------------------------------------------------------------------------------------


def test_a_key_may_be_anything_and_is_given_back_as_it_was(s3, bucket, run, tiny_bundle, tmp_path):
    picture = png(20, 24, 1)
    source = objects.into_bucket(dict.fromkeys(HOSTILE_KEYS, picture), s3, bucket, "in")

    runs.finished(runs.words(source, run, tiny_bundle), tmp_path / "log", EXIT_DONE)

    done = {unescape(key) for key in open_run(run).images["key"].to_pylist()}
    assert done == {key for key in HOSTILE_KEYS if not key.endswith("/")}
    log = (tmp_path / "log").read_text()
    assert all(character.isprintable() or character == "\n" for character in log)
    runs.assert_sound(run)


# -- what people do ------------------------------------------------------------------------------


def refused(words: list[str], log: Path, environment: dict[str, str]) -> str:
    with runs.driver(words, log, environment) as driver:
        assert driver.wait() == EXIT_REFUSED, driver.said
    assert driver.said.startswith("refused: ")
    assert "Traceback" not in driver.said
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert environment[name] not in driver.said
    return driver.said


def test_wrong_keys_are_refused_without_repeating_them(
    s3_server, source, run, tiny_bundle, tmp_path
):
    words = runs.words(source, run, tiny_bundle)
    wrong = {
        "a secret": Credentials(s3_server.owner.access_key, secrets.token_hex(20)),
        "a name": Credentials("NOBODYWEKNOW", secrets.token_hex(20)),
    }
    for what, keys in wrong.items():
        said = refused(words, tmp_path / what, s3_server.environment(keys))
        assert "SignatureDoesNotMatch" in said or "InvalidAccessKeyId" in said


def test_a_bucket_that_is_not_there_is_refused(s3_server, source, archive, tiny_bundle, tmp_path):
    keys = s3_server.environment()
    nowhere = "s3://no-such-bucket-here/x"
    said = refused(runs.words(archive, nowhere, tiny_bundle), tmp_path / "out", keys)
    assert "no such bucket" in said
    said = refused(runs.words(nowhere, tmp_path / "run", tiny_bundle), tmp_path / "in", keys)
    assert "no such bucket" in said
    assert not (tmp_path / "run").exists()


def test_an_output_that_may_only_be_read_is_refused_before_anything_is_spent(
    s3_server, s3, bucket, source, run, tiny_bundle, tmp_path
):
    before = everything(s3, bucket)
    reader = s3_server.environment(s3_server.add_reader(bucket))
    said = refused(runs.words(source, run, tiny_bundle), tmp_path / "log", reader)
    assert "cannot write to" in said
    assert "AccessDenied" in said
    assert everything(s3, bucket) == before


def test_no_credential_appears_in_the_run_or_in_any_output(
    s3_server, s3, bucket, source, run, tiny_bundle, tmp_path
):
    words = runs.words(source, run, tiny_bundle)
    runs.finished([*words, "--log", "json"], tmp_path / "log")
    runs.finished([*words, "--dry-run"], tmp_path / "log", EXIT_DONE)
    # a failure has more to say: of requests, of places, of those who asked
    nowhere = runs.words("s3://no-such-bucket-here/x", f"{run}-2", tiny_bundle)
    runs.finished(nowhere, tmp_path / "log", EXIT_REFUSED)

    written = {**everything(s3, bucket, "out/"), "log": (tmp_path / "log").read_bytes()}
    assert len(written) > 20
    tables = {k: decoded(v) for k, v in written.items() if k.endswith(".parquet")}
    assert tables
    assert_none_of(s3_server.owner, {**written, **tables})


def decoded(table: bytes) -> bytes:
    """What a table holds, in which a word cannot hide behind a compression."""
    return repr(pq.read_table(io.BytesIO(table)).to_pylist()).encode()


def assert_none_of(owner: Credentials, written: dict[str, bytes]) -> None:
    found = [name for name, data in written.items() if any(d in data for d in owner.disguises())]
    assert not found


# -- an archive that changes ---------------------------------------------------------------------


def test_a_bucket_that_grew_and_lost_is_followed_by_computing_only_what_is_new(
    s3, bucket, source, run, tiny_bundle, tmp_path
):
    words = runs.words(source, run, tiny_bundle)
    runs.finished(words, tmp_path / "log")
    before = runs.commits(run)
    more = objects.mixed(24, seed=99)
    grown = {f"loose/new/{n}.png": more[f"loose/{n % 3}/{n:03d}.png"] for n in range(5)}
    objects.into_bucket(grown, s3, bucket, "in")
    s3.delete_object(Bucket=bucket, Key="in/loose/1/001.png")

    runs.finished(words, tmp_path / "log")
    assert before.items() <= runs.commits(run).items()
    assert runs.this_call(run)["images"] == len(grown)
    keys = open_run(run).images["key"].to_pylist()
    assert set(grown) <= set(keys)
    assert "loose/1/001.png" not in keys
    runs.assert_sound(run)


def test_objects_deleted_or_replaced_after_planning_are_rejected_as_such(
    fault_proxy, s3, bucket, source, run, tiny_bundle, tmp_path
):
    # the plan is there as soon as the first commit is tried: hold that up, and the fragment that is
    # in flight beside it
    held = fault_proxy.fault("delay", "PUT", COMMIT, seconds=3.0, times=2)
    with runs.driver(runs.words(source, run, tiny_bundle, *FEW), tmp_path / "log") as driver:
        runs.until(lambda: held.done, "the first commit")
        s3.delete_object(Bucket=bucket, Key="in/loose/2/029.png")
        s3.put_object(Bucket=bucket, Key="in/loose/2/026.png", Body=objects.mixed()["bad/cut.png"])
        assert driver.wait() == EXIT_REJECTIONS, driver.said

    reasons = {row["key"]: row["reason"] for row in open_run(run).rejected.to_pylist()}
    assert reasons["loose/2/029.png"] == "vanished"
    assert reasons["loose/2/026.png"] == "changed"
    assert len(reasons) == len(objects.BAD) + 2
    runs.assert_sound(run)
