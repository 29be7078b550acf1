"""Stand-ins for schedules: stores in memory, clocks, machines and clusters that take jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.errors import StorageMissing
from pipeline.schedule import Spec
from pipeline.scheduler import JobState
from pipeline.storage import Found
from pipeline.submission import MARK, Job, Unreachable
from pipeline.timetable import Record

START = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


class MemoryStore:
    """Create-only objects as a bucket has them, in a dictionary."""

    uri = "s3://bucket/schedules"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def list(self, prefix: str = "") -> Iterator[Found]:
        with self._lock:
            paths = sorted(p for p in self.objects if p.startswith(f"{prefix}/" if prefix else ""))
        yield from (Found(path, 0, "", 0.0) for path in paths)

    def read(self, path: str, start: int = 0, length: int | None = None, etag: Any = None) -> bytes:
        if path not in self.objects:
            raise StorageMissing(path)
        return self.objects[path]

    def stat(self, path: str) -> Found | None:
        return Found(path, 0, "", 0.0) if path in self.objects else None

    def create(self, path: str, data: bytes) -> bool:
        with self._lock:
            return self.objects.setdefault(path, data) == data

    def replace(self, path: str, data: bytes) -> None:
        self.objects[path] = data

    def delete(self, path: str) -> None:
        self.objects.pop(path, None)


class Crash(BaseException):
    """The process is killed: nothing of ours may catch it."""


class Crashing:
    """A store whose process is killed at its so-manieth call, before or after the call's effect."""

    def __init__(self, store: Any, at: int, *, after: bool = False) -> None:
        self.uri = store.uri
        self._store, self._left, self._after = store, at, after
        self.dead = False

    def _counted(self, call: Callable[[], Any]) -> Any:
        self._left -= 1
        if self.dead or (self._left < 0 and not self._after):
            self.dead = True
            raise Crash
        answer = call()
        if self._left < 0:
            self.dead = True
            raise Crash
        return answer

    def list(self, prefix: str = "") -> list[Found]:
        return self._counted(lambda: list(self._store.list(prefix)))

    def read(self, path: str, *arguments: Any) -> bytes:
        return self._counted(lambda: self._store.read(path, *arguments))

    def stat(self, path: str) -> Found | None:
        return self._counted(lambda: self._store.stat(path))

    def create(self, path: str, data: bytes) -> bool:
        return self._counted(lambda: self._store.create(path, data))

    def replace(self, path: str, data: bytes) -> None:
        self._counted(lambda: self._store.replace(path, data))

    def delete(self, path: str) -> None:
        self._counted(lambda: self._store.delete(path))


class Clock:
    """A wall clock that a test sets, and a monotonic one that only ever goes on."""

    def __init__(self, now: datetime = START) -> None:
        self.wall = now
        self.since_boot = 0.0

    def now(self) -> datetime:
        return self.wall

    def monotonic(self) -> float:
        return self.since_boot

    def sleep(self, seconds: float) -> None:
        self.since_boot += seconds
        self.wall += timedelta(seconds=seconds)

    def jump(self, by: timedelta) -> None:
        """Somebody sets the wall clock."""
        self.wall += by


class Cluster:
    """A runner that takes a job of one id once and remembers it: jobs outlive their scheduler."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.asked: list[str] = []
        self.ended: dict[str, int] = {}
        self.before: Callable[[Record], None] = lambda record: None
        """What happens between the last look at the lease and the job's start."""

    def start(self, record: Record, environment: dict[str, str]) -> None:
        self.before(record)
        self.asked.append(record.id)
        if record.id not in self.started:
            self.started.append(record.id)

    def state(self, job_id: str) -> JobState | int:
        if job_id in self.ended:
            return self.ended[job_id]
        return JobState.RUNNING if job_id in self.started else JobState.UNKNOWN

    def stop(self, job_ids: list[str]) -> None:
        for job_id in job_ids:
            self.ended[job_id] = 143


class Machine(Cluster):
    """Jobs that die with their scheduler: each scheduler has one of its own."""


class JobServer:
    """A cluster's job server: takes an id once, runs what a test says, and may be out of reach."""

    def __init__(self) -> None:
        self.known: dict[str, Job] = {}
        self.logs: dict[str, str] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.outages = 0
        """How many questions go unanswered from now on."""
        self.lost_answers = 0
        """How many submissions land without anybody being told."""
        self.taken: list[str] = []
        self.polled: Callable[[str], None] = lambda job_id: None
        """What happens whenever a job is asked for."""
        self.breaks: list[int] = []
        """After how many characters the log's connection breaks, one time each."""

    def _answer(self) -> None:
        if self.outages:
            self.outages -= 1
            raise Unreachable("http://head:8265 does not answer (ConnectionError)")

    def submit(
        self, job_id: str, entrypoint: str, environment: dict[str, str], metadata: dict[str, str]
    ) -> bool:
        self._answer()
        if job_id in self.known:
            return False
        self.taken.append(job_id)
        self.environments[job_id] = environment
        self.known[job_id] = Job(job_id, "RUNNING", entrypoint, metadata=metadata)
        if self.lost_answers:
            self.lost_answers -= 1
            raise Unreachable("the answer was lost")
        return True

    def job(self, job_id: str) -> Job | None:
        self._answer()
        self.polled(job_id)
        return self.known.get(job_id)

    def jobs(self) -> list[Job]:
        self._answer()
        return [job for job in self.known.values() if MARK in job.metadata]

    def tail(self, job_id: str) -> Iterator[str]:
        text = self.logs.get(job_id, "")
        if self.breaks:
            yield text[: self.breaks.pop(0)]
            raise Unreachable("the connection broke")
        yield from (text[at : at + 7] for at in range(0, len(text), 7))

    def log(self, job_id: str) -> str:
        self._answer()
        return self.logs.get(job_id, "")

    def stop(self, job_id: str) -> None:
        self._answer()
        self.end(job_id, "STOPPED", None)

    def end(self, job_id: str, status: Any, code: int | None, error: str = "") -> None:
        job = self.known[job_id]
        self.known[job_id] = Job(
            job.id, status, job.entrypoint, code, error, metadata=job.metadata
        )  # fmt: skip


def spec(cron: str = "*/10 * * * *", **more: Any) -> Spec:
    """A schedule of ten minutes that was added at `START`."""
    known = {"command": "status", "since": START, "identity": "1d", "cron": cron}
    return Spec(**{**known, **more})
