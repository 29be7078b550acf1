"""A scheduler that is killed takes its job along, and the next one makes up for it."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from pipeline.schedule import Spec
from pipeline.storage import open_store
from pipeline.timetable import Timetable
from tests import runs


@pytest.fixture
def timetable(tmp_path) -> Timetable:
    """A schedule that is due, of a job that lasts: a scheduler of nothing."""
    (tmp_path / "nothing").mkdir()
    made = Timetable(open_store(str(tmp_path / "schedules")))
    since = datetime.now(UTC) - timedelta(days=3)
    job = {"command": "schedule", "arguments": ("run", str(tmp_path / "nothing"))}
    made.change("nightly", 0, Spec(cron="0 0 * * *", identity="1d", since=since, **job))
    return made


def jobs_below(pid: int) -> list[psutil.Process]:
    """The children of a scheduler that have become a job and heed signals."""
    found = psutil.Process(pid).children()
    return [child for child in found if "jobs.schedule" in child.cmdline()]


def outcomes(timetable: Timetable) -> list[object]:
    return [record.outcome for record in timetable.history("nightly")]


@pytest.mark.timeout(240)
def test_kill_9_ends_the_job_and_the_next_tick_starts_it_again(timetable):
    words = ["tick", timetable.store.uri]
    with runs.command(words, job="schedule") as first:
        runs.until(lambda: jobs_below(first.pid), "the job")
        (job,) = jobs_below(first.pid)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        runs.until(lambda: not alive(job), "the job to die with its scheduler", 5.0)
    with runs.command(words, job="schedule") as second:
        runs.until(lambda: jobs_below(second.pid), "the job again", 100.0)
        assert outcomes(timetable)[-1] is None
        assert len([o for o in outcomes(timetable) if o is None]) == 1


@pytest.mark.timeout(120)
def test_sigterm_ends_the_job_in_order_and_the_next_tick_need_not_wait(timetable):
    words = ["tick", timetable.store.uri]
    with runs.command(words, job="schedule") as first:
        runs.until(lambda: jobs_below(first.pid), "the job")
        (job,) = jobs_below(first.pid)
        runs.until(lambda: heeds(job, signal.SIGTERM), "the job to be up")
        os.kill(first.pid, signal.SIGTERM)
        assert first.ended() == 4, first.err
        assert not alive(job)
    assert outcomes(timetable) == ["lost"]
    with runs.command(words, job="schedule") as second:
        runs.until(lambda: outcomes(timetable) == ["lost", None], "the next attempt", 30.0)
        assert "took over" not in second.err


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def heeds(process: psutil.Process, number: int) -> bool:
    """Whether a process has a handler for a signal of its own."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & (1 << (number - 1)))
