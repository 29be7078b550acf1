"""Schedules in a bucket: the lease and the attempts rest on conditional writes alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from pipeline.lease import Lease
from pipeline.rounds import Rounds
from pipeline.scheduler import Scheduler
from pipeline.storage import open_store
from pipeline.timetable import Timetable
from tests.schedules import Cluster, spec


def test_of_racing_ticks_on_a_bucket_one_starts_the_job(bucket):
    uri, cluster, said = f"s3://{bucket}/schedules", Cluster(), []
    since = datetime.now(UTC) - timedelta(days=1)
    Timetable(open_store(uri)).change("nightly", 0, spec(since=since, address="http://head:8265"))

    def tick(_):
        scheduler = Scheduler(Timetable(open_store(uri)), lambda _: cluster, said.append)
        return Rounds(scheduler, said.append, lambda seconds: False).tick(["nightly"], wait=False)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(tick, range(4))) == {0}
    assert len(cluster.asked) == 1, said
    cluster.ended[cluster.started[0]] = 0
    assert tick(None) == 0
    assert [r.outcome for r in Timetable(open_store(uri)).history("nightly")] == [0]


def test_of_eight_who_ask_at_once_one_holds_the_lease(bucket):
    leases = [Lease(open_store(f"s3://{bucket}"), "l", str(n)) for n in range(8)]
    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            (held,) = [h for h in pool.map(lambda lease: lease.take(), leases) if h is not None]
        held.release()
