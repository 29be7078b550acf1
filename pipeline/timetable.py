"""Schedules as they lie on storage: create-only objects, so that nobody overwrites anybody.

::

    .names/NAME                            there is such a schedule
    NAME/spec/000001.json …                its versions; the highest holds
    NAME/lease/000007.json                 who may start its jobs (lease.py)
    NAME/ticks/2026-11-20T0300Z/1.begun.json       an attempt, before anything is started
                                1.launched.json    after it was started
                                1.ended.json       how it ended
"""

import contextlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import RunRefused, StorageMissing
from pipeline.schedule import (
    Attempt,
    Lost,
    Spec,
    Start,
    check_name,
    job_id,
    tick_name,
    tick_of,
)
from pipeline.storage import Store

NAMES = ".names"  # no schedule's name begins with a dot


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a schedule and its number."""

    number: int
    spec: Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Attempt):
    """An attempt with all that lies on storage of it."""

    id: str
    """What the job is called where it runs."""
    command: str
    arguments: tuple[str, ...]
    address: str | None
    """Where it was to run."""
    begun: datetime
    launched: bool
    """False: it may have been started or not; starting it again by its id does no harm."""
    detail: str = ""
    """How it ended, for a person."""


class Timetable:
    """All schedules of a folder or prefix."""

    def __init__(self, store: Store) -> None:
        self.store = store

    # ------------------------------------------------------------------------------------- specs

    def names(self) -> list[str]:
        """The names that were ever added."""
        return [found.path.removeprefix(f"{NAMES}/") for found in self._listed(NAMES)]

    def version(self, name: str) -> Version | None:
        """The version of a schedule that holds, or None where there is no such schedule."""
        paths = [f.path for f in self._listed(f"{check_name(name)}/spec")]
        if not paths:
            return None
        values = self._read(max(paths))
        try:
            return Version(int(max(paths)[-11:-5]), Spec.from_json(values))
        except RunRefused as error:
            raise RunRefused(f"{self.store.uri}/{max(paths)}: {error}") from error

    def change(self, name: str, after: int, spec: Spec) -> Version:
        """Append a version.

        Raises:
            RunRefused: if somebody else appended one since.
        """
        self.store.create(f"{NAMES}/{check_name(name)}", b"")
        if not self._create(f"{name}/spec/{after + 1:06d}.json", spec.to_json()):
            raise RunRefused(
                f"somebody else changed schedule {name} at the same time; "
                "look at it and say it again"
            )
        return Version(after + 1, spec)

    # ------------------------------------------------------------------------------------- ticks

    def attempts(self, name: str, tick: datetime) -> list[Record]:
        """What was started for one tick, in order."""
        return self._records(name, f"{name}/ticks/{tick_name(tick)}")

    def history(self, name: str, last: int | None = None) -> list[Record]:
        """The last attempts of a schedule, in order of ticks: lists all, so not for every round."""
        return self._records(name, f"{check_name(name)}/ticks", last)

    def begin(
        self, name: str, version: Version, start: Start, address: str | None, now: datetime
    ) -> Record | None:
        """Write down that an attempt begins; None if it has been begun already."""
        spec = version.spec
        record = Record(
            tick=start.tick,
            number=start.attempt,
            id=job_id(spec, name, start.tick, start.attempt),
            command=spec.command,
            arguments=spec.words(start.tick),
            address=address,
            begun=now,
            launched=False,
        )
        about = {
            "id": record.id,
            "command": record.command,
            "arguments": list(record.arguments),
            "address": record.address,
            "spec": version.number,
            "begun": now.isoformat(),
        }
        return record if self._create(_path(name, record, "begun"), about) else None

    def launched(self, name: str, record: Record) -> Record:
        """Write down that an attempt was started."""
        self._create(_path(name, record, "launched"), {})
        return replace(record, launched=True)

    def end(
        self, name: str, record: Record, outcome: int | Lost, now: datetime, detail: str = ""
    ) -> bool:
        """Write down how an attempt ended; False if somebody has."""
        about = {"outcome": outcome, "ended": now.isoformat(), "detail": detail}
        return self._create(_path(name, record, "ended"), about)

    # ----------------------------------------------------------------------------------- objects

    def _records(self, name: str, folder: str, last: int | None = None) -> list[Record]:
        # e.g. {("2026-11-20T0300Z", 1): {"begun", "ended"}}
        found: dict[tuple[str, int], set[str]] = {}
        for path in (f.path for f in self._listed(folder)):
            tick, _, file = path.removeprefix(f"{name}/ticks/").partition("/")
            number, kind, *_ = file.split(".")
            found.setdefault((tick, int(number)), set()).add(kind)
        return [
            self._record(f"{name}/ticks/{tick}/{number}", tick, number, kinds)
            for (tick, number), kinds in sorted(found.items())[-last if last else None :]
            if "begun" in kinds
        ]

    def _record(self, stem: str, tick: str, number: int, kinds: set[str]) -> Record:
        begun = self._read(f"{stem}.begun.json")
        ended = self._read(f"{stem}.ended.json") if "ended" in kinds else None
        try:
            return Record(
                tick=tick_of(tick),
                number=number,
                id=begun["id"],
                command=begun["command"],
                arguments=tuple(begun["arguments"]),
                address=begun["address"],
                begun=_time(begun["begun"]),
                launched="launched" in kinds,
                outcome=None if ended is None else ended["outcome"],
                ended=None if ended is None else _time(ended["ended"]),
                detail="" if ended is None else ended["detail"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunRefused(
                f"{self.store.uri}/{stem}.*.json is damaged ({error!r}); restore or delete it"
            ) from error

    def _listed(self, folder: str) -> Iterator[Any]:
        with contextlib.suppress(StorageMissing):
            yield from self.store.list(folder)

    def _create(self, path: str, about: dict[str, Any]) -> bool:
        # the token tells our own object from an equal one of another scheduler
        data = {**about, "token": uuid.uuid4().hex}
        return self.store.create(path, json.dumps(data, indent=1).encode() + b"\n")

    def _read(self, path: str) -> dict[str, Any]:
        data = self.store.read(path)
        try:
            values = json.loads(data)
        except ValueError as error:
            raise RunRefused(
                f"{self.store.uri}/{path} is damaged ({error}); restore or delete it"
            ) from error
        values.pop("token", None)
        return values


def _path(name: str, attempt: Attempt, kind: str) -> str:
    return f"{name}/ticks/{tick_name(attempt.tick)}/{attempt.number}.{kind}.json"


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
