"""One round over a schedule: see what became of what was started, start what is due.

What may happen twice is arranged so that it does no harm. Under the lease an attempt is written
down before its job is started, and the lease says so even before that; a job is started by its id,
which a cluster accepts once. Killed anywhere, the next round finds the attempt, asks whether its
job is there, and starts it if not. Starting is at-least-once, under the same id.

The lease's note points at the newest attempt, so a round costs a few requests however long the
history is.
"""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Protocol

from pipeline.errors import StorageError
from pipeline.lease import Claim, Held, Lease, LeaseLost
from pipeline.schedule import Lost, Spec, Start, failed, plan, previous, tick_name, tick_of
from pipeline.timetable import Record, Timetable, Version


class JobState(Enum):
    """What is known of a job that has not ended."""

    RUNNING = "running"
    UNKNOWN = "unknown"
    """Not here: never started, or gone without a word."""


class Runner(Protocol):
    """Where jobs run: child processes, a cluster."""

    def start(self, record: Record, environment: dict[str, str]) -> None:
        """Start a job, unless one of that id is there."""
        ...

    def state(self, job_id: str) -> JobState | int:
        """What became of a job; the exit code if it has ended."""
        ...

    def stop(self, job_ids: list[str]) -> None:
        """End jobs, in order if they can, and return when they are gone."""
        ...


class Seen(Enum):
    """What a round over a schedule came to."""

    IDLE = "nothing to do"
    BUSY = "another scheduler is at it, or was until it died"
    ELSEWHERE = "another scheduler is at it"
    HERE = "a job runs in this process's care"
    THERE = "a job runs on a cluster"
    WAITING = "a job failed and is tried again later"


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt whose end this process wrote down."""

    name: str
    record: Record
    outcome: int | Lost


class Scheduler:
    """One process that looks after schedules."""

    def __init__(
        self,
        timetable: Timetable,
        runner: Callable[[str | None], Runner],
        tell: Callable[[str], None],
        address: str | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args are handed in, clocks too.

        Args:
            timetable: what lies on storage.
            runner: where the jobs of an address run; None: of this machine.
            tell: takes a line for a person whenever something happened.
            address: start jobs there, whatever their schedules say.
            now: the wall clock, which only says what is due.
            monotonic: the clock of leases.
        """
        self._timetable, self._runner, self._tell = timetable, runner, tell
        self._address = address
        self._now, self._monotonic = now, monotonic
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._leases: dict[str, Lease] = {}
        self._held: dict[str, Held] = {}
        self._mine: dict[str, Record] = {}  # attempts whose jobs run in this process's care
        self.ended: list[Ended] = []

    def visit(self, name: str, only: datetime | None = None) -> tuple[Seen, datetime | None]:
        """One round over a schedule.

        Args:
            name: the schedule.
            only: start nothing but this tick's job.

        Returns:
            What it came to, and the tick it is about.
        """
        version = self._timetable.version(name)
        if version is None:
            return Seen.IDLE, None
        if name not in self._held:
            answer = self._glance(name, version, only)
            if answer is not None:
                return answer
        try:
            held = self._held[name]
            held.renew_if_due()
            return self._round(name, version, held, only)
        except LeaseLost as error:
            self._tell(f"{name}: {error}; leaving it to that one")
            self._drop(name)
            return Seen.ELSEWHERE, None
        finally:
            if name in self._held and name not in self._mine:
                with contextlib.suppress(StorageError):  # or it is taken over once it has expired
                    self._held[name].release()
                del self._held[name]

    def cares_for(self, name: str) -> bool:
        """Whether a job of a schedule runs in this process's care."""
        return name in self._mine

    def close(self) -> None:
        """Leave: what runs in this process's care is stopped, and counts as lost."""
        if self._mine:
            self._runner(None).stop([record.id for record in self._mine.values()])
        for name, record in self._mine.items():
            with contextlib.suppress(StorageError, LeaseLost):
                self._end(name, record, "lost", "its scheduler was stopped")
                self._held[name].release()
        self._mine.clear()
        self._held.clear()

    # ----------------------------------------------------------------------------------- a round

    def _glance(
        self, name: str, version: Version, only: datetime | None
    ) -> tuple[Seen, datetime | None] | None:
        """An answer that needs no lease; None: there is something to do, and the lease is ours."""
        lease = self._leases.get(name)
        if lease is None:
            folder = f"{name}/lease"
            lease = Lease(self._timetable.store, folder, self._owner, self._monotonic)
            self._leases[name] = lease
        records = self._known(name, version.spec, lease.look())
        answer = self._nothing_to_do(version.spec, records, only)
        if answer is not None:
            return answer
        held = lease.take()
        if held is None:
            return (Seen.ELSEWHERE if lease.alive else Seen.BUSY), None
        self._held[name] = held
        return None

    def _nothing_to_do(
        self, spec: Spec, records: list[Record], only: datetime | None
    ) -> tuple[Seen, datetime | None] | None:
        for record in records:
            if record.outcome is None:
                running = self._state(record) is JobState.RUNNING
                return (Seen.THERE, record.tick) if running else None
        start = plan(spec, records, self._now())
        if start is None or only not in {None, start.tick}:
            return Seen.IDLE, None
        return (Seen.WAITING, start.tick) if start.at > self._now() else None

    def _round(
        self, name: str, version: Version, held: Held, only: datetime | None
    ) -> tuple[Seen, datetime | None]:
        spec = version.spec
        for record in self._known(name, spec, held):
            if record.outcome is None and (seen := self._settle(name, spec, held, record)):
                return seen, record.tick
        start = plan(spec, self._known(name, spec, held), self._now())
        if start is None or only not in {None, start.tick}:
            return Seen.IDLE, None
        if start.at > self._now():
            return Seen.WAITING, start.tick
        return self._start(name, version, held, start), start.tick

    def _known(self, name: str, spec: Spec, note: Claim | Held | None) -> list[Record]:
        """The attempts that matter: of the latest tick, and of the one last started."""
        tick = previous(spec.cron, spec.zone, self._now(), spec.since)
        ticks = set() if tick is None else {tick}
        if note is not None and "tick" in note.note:
            ticks.add(tick_of(note.note["tick"]))
        return [r for tick in sorted(ticks) for r in self._timetable.attempts(name, tick)]

    def _settle(self, name: str, spec: Spec, held: Held, record: Record) -> Seen | None:
        """See what became of an attempt that has not ended; None: it has now."""
        state = self._state(record)
        if state is JobState.RUNNING:
            return Seen.HERE if name in self._mine else Seen.THERE
        if state is JobState.UNKNOWN and not record.launched and spec.state == "active":
            return self._launch(name, held, record)
        if state is JobState.UNKNOWN:
            gone = "never started" if not record.launched else "vanished"
            self._end(name, record, "lost", f"its job {gone}")
        else:
            self._end(name, record, state)
        self._mine.pop(name, None)
        return None

    def _start(self, name: str, version: Version, held: Held, start: Start) -> Seen:
        # first, so that whoever comes next looks at this attempt, even if it is never begun
        held.renew({"tick": tick_name(start.tick), "attempt": start.attempt})
        address = version.spec.address if self._address is None else self._address
        record = self._timetable.begin(name, version, start, address, self._now())
        if record is None:
            return Seen.BUSY
        late = self._now() - start.tick
        behind = f" ({_span(late)} late)" if late > timedelta(minutes=5) else ""
        self._tell(f"{name}: {tick_name(start.tick)} attempt {start.attempt} starts{behind}")
        return self._launch(name, held, record)

    def _launch(self, name: str, held: Held, record: Record) -> Seen:
        held.check()
        variables = {
            "MASKFLEET_SCHEDULE": name,
            "MASKFLEET_TICK": tick_name(record.tick),
            "MASKFLEET_JOB": record.id,
        }
        self._runner(record.address).start(record, variables)
        if record.address is None:
            self._mine[name] = record
        self._timetable.launched(name, record)
        return Seen.HERE if record.address is None else Seen.THERE

    def _state(self, record: Record) -> JobState | int:
        return self._runner(record.address).state(record.id)

    def _end(self, name: str, record: Record, outcome: int | Lost, detail: str = "") -> None:
        if not self._timetable.end(name, record, outcome, self._now(), detail):
            return
        self.ended.append(Ended(name, record, outcome))
        what = "was lost" if outcome == "lost" else f"ended with exit code {outcome}"
        why = f": {detail}" if detail else ""
        sign = "FAILED " if failed(outcome) else ""
        tick = tick_name(record.tick)
        self._tell(f"{sign}{name}: {tick} attempt {record.number} {what}{why}")

    def _drop(self, name: str) -> None:
        self._held.pop(name, None)
        record = self._mine.pop(name, None)
        if record is not None:
            self._runner(None).stop([record.id])


def _span(late: timedelta) -> str:
    minutes = int(late.total_seconds() // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
