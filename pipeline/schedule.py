"""What is due: a pure function of a schedule, its history and the clock. Nothing here does it.

One rule carries everything: **the latest time of the cron expression that has passed is due,
unless it was started.** Times that were missed before it are skipped, so whatever was missed is
caught up once; a clock that jumps forward or back never starts a time twice, for what was started
is in the history; and none waits behind a time in the future.

Cron times are Debian's, from cronsim, in the schedule's own time zone. Where clocks are put
forward, a fixed time that does not exist (``30 2 * * *``) comes at the first minute after the gap;
where they are put back, it comes once, the first time. An expression whose minute or hour begins
with ``*`` follows the real hours: none is added and none left out.

Words: a **tick** is one time of the expression, in UTC; an **attempt** is one start of its job.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from cronsim import CronSim, CronSimError

from pipeline.errors import (
    EXIT_DONE,
    EXIT_NOT_PROMOTED,
    EXIT_REFUSED,
    EXIT_REJECTIONS,
    EXIT_UNDECIDED,
    RunRefused,
    refuse_other_format,
)

FORMAT_VERSION = 1
MOST_LOST = 3  # attempts of one tick that may vanish; a job that kills its machine must end
SUCCESSES = frozenset({EXIT_DONE, EXIT_REJECTIONS, EXIT_NOT_PROMOTED, EXIT_UNDECIDED})
"""Exit codes that are answers: done, done with rejections, and what `promote` decides."""
WINDOWS = tuple(timedelta(days=n) for n in (1 / 24, 1, 8, 32, 367, 8 * 366, 50 * 366))
"""How far back to look for the latest time: a minute's schedule costs 60 steps, a leap day's 13."""

Lost = Literal["lost"]
"""How an attempt ended of which nobody can say how it ended: its machine or its cluster is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One version of a schedule."""

    cron: str
    """Five fields: minute, hour, day, month, weekday."""
    zone: str = "UTC"
    """An IANA time zone, e.g. Europe/Berlin."""
    command: str
    """A command of jobs/."""
    arguments: tuple[str, ...] = ()
    """Its arguments; ``{tick}`` stands for the tick."""
    retries: int = 0
    """How often a job that failed is started again for the same tick."""
    retry_after_s: float = 300.0
    """Seconds between a failure and the next attempt."""
    address: str | None = None
    """Where a cluster takes jobs; None: child processes of the scheduler."""
    state: Literal["active", "paused", "removed"] = "active"
    since: datetime
    """Only ticks after this time count: when it was added or resumed."""
    identity: str
    """Random, kept by all versions: two schedules of one name on one cluster are not one."""

    def __post_init__(self) -> None:
        """Refuse what can never run.

        Raises:
            RunRefused: naming the value and a way out.
        """
        check_zone(self.zone)
        check_cron(self.cron, self.zone)
        if self.retries < 0 or self.retry_after_s < 0:
            raise RunRefused(
                f"retries ({self.retries}) and retry-after-s ({self.retry_after_s}) "
                "cannot be negative"
            )

    def words(self, tick: datetime) -> tuple[str, ...]:
        """The job's arguments for one tick."""
        return tuple(word.replace("{tick}", tick_name(tick)) for word in self.arguments)

    def to_json(self) -> dict[str, Any]:
        """As it lies on storage."""
        return {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "arguments": list(self.arguments),
            "since": self.since.isoformat(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Spec":
        """From storage.

        Raises:
            RunRefused: on another format version, or a field that is missing or unknown.
        """
        refuse_other_format("it", values.get("format_version"), FORMAT_VERSION)
        fields = {name: value for name, value in values.items() if name != "format_version"}
        try:
            since = datetime.fromisoformat(fields["since"]).astimezone(UTC)
            return cls(**{**fields, "arguments": tuple(fields["arguments"]), "since": since})
        except (TypeError, KeyError, ValueError) as error:
            raise RunRefused(f"not a schedule of this version ({error})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a tick's job, as the history has it."""

    tick: datetime
    number: int
    """1 is the first."""
    outcome: int | Lost | None = None
    """The exit code; None: it has not ended, or nobody has written down that it has."""
    ended: datetime | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """What is to be started."""

    tick: datetime
    attempt: int
    at: datetime
    """Not before; in the past where it is due."""


def due(spec: Spec, history: Iterable[Attempt], now: datetime) -> Start | None:
    """What is to be started now: at most one job, and none while another has not ended."""
    start = plan(spec, history, now)
    return start if start is not None and start.at <= now else None


def plan(spec: Spec, history: Iterable[Attempt], now: datetime) -> Start | None:
    """What is due, or is to be tried again later.

    Of the history only the latest tick's attempts matter, and those that have not ended.
    """
    attempts = list(history)
    if spec.state != "active" or any(a.outcome is None for a in attempts):
        return None
    tick = previous(spec.cron, spec.zone, now, spec.since)
    if tick is None:
        return None
    mine = sorted((a for a in attempts if a.tick == tick), key=lambda a: a.number)
    if not mine:
        return Start(tick, 1, tick)
    at = _again(spec, mine, now)
    return None if at is None else Start(tick, mine[-1].number + 1, at)


def _again(spec: Spec, attempts: list[Attempt], now: datetime) -> datetime | None:
    """When a tick that was started is to be tried again, if at all."""
    last = attempts[-1]
    if last.outcome == "lost":
        return now if sum(a.outcome == "lost" for a in attempts) <= MOST_LOST else None
    failures = sum(a.outcome != "lost" and failed(a.outcome) for a in attempts)
    # A refusal would be the same next time: somebody has to change something.
    if not failed(last.outcome) or last.outcome == EXIT_REFUSED or failures > spec.retries:
        return None
    ended = last.ended or now
    # An end in the future was written before the clock was put back: it says nothing about waiting.
    return now if ended > now else ended + timedelta(seconds=spec.retry_after_s)


def failed(outcome: int | Lost | None) -> bool:
    """Whether an attempt ended without an answer."""
    return outcome is not None and outcome not in SUCCESSES


# ---------------------------------------------------------------------------------------- times


def previous(cron: str, zone: str, now: datetime, after: datetime) -> datetime | None:
    """The latest time of a cron expression in (after, now], in UTC."""
    for window in WINDOWS:
        start = max(now - window, after)
        found = None
        for tick in itertools.takewhile(lambda t: t <= now, _ticks(cron, zone, start)):
            found = tick
        # cronsim may begin before `start` where it lies in the hour that comes twice
        if found is not None and found > after:
            return found
        if start == after:
            return None
    return None


def following(cron: str, zone: str, now: datetime) -> datetime | None:
    """The first time of a cron expression after now, in UTC; None if it never comes."""
    return next((tick for tick in _ticks(cron, zone, now) if tick > now), None)


def _ticks(cron: str, zone: str, start: datetime) -> Iterator[datetime]:
    for tick in CronSim(cron, start.astimezone(ZoneInfo(zone))):
        yield tick.astimezone(UTC)


def check_zone(zone: str) -> None:
    """Refuse a time zone that is none.

    Raises:
        RunRefused: with the nearest name.
    """
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        near = difflib.get_close_matches(zone, available_timezones(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RunRefused(f"{zone!r} is not a time zone{hint} (e.g. Europe/Berlin)") from error


def check_cron(cron: str, zone: str) -> None:
    """Refuse an expression that is none, or that never comes.

    Raises:
        RunRefused: naming the field.
    """
    fields = "minute hour day month weekday, e.g. '30 3 * * MON-FRI'"
    if len(cron.split()) != 5:
        raise RunRefused(f"{cron!r} has {len(cron.split())} fields, five are needed: {fields}")
    try:
        if following(cron, zone, datetime(2000, 1, 1, tzinfo=UTC)) is None:
            raise RunRefused(f"{cron!r} never comes; change day or month")
    except CronSimError as error:
        raise RunRefused(f"{cron!r}: {error}; five fields are needed: {fields}") from error


# ---------------------------------------------------------------------------------------- names


def check_name(name: str) -> str:
    """A schedule's name, as it may stand in object keys, job ids and Kubernetes names.

    Raises:
        RunRefused: on any other.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise RunRefused(
            f"{name!r} cannot name a schedule: up to 40 of a-z, 0-9 and '-', "
            "beginning and ending with a letter or digit"
        )
    return name


def tick_name(tick: datetime) -> str:
    """A tick in keys, ids and arguments, e.g. 2026-11-20T0300Z; sorts like the time."""
    return tick.astimezone(UTC).strftime("%Y-%m-%dT%H%MZ")


def tick_of(name: str) -> datetime:
    """The tick of such a name."""
    return datetime.strptime(name, "%Y-%m-%dT%H%MZ").replace(tzinfo=UTC)


def job_id(spec: Spec, name: str, tick: datetime, attempt: int) -> str:
    """What an attempt is called wherever it runs: the same for everyone who tries to start it."""
    return f"mf-{name}-{spec.identity}-{tick_name(tick)}-{attempt}"
