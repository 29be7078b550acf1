"""What is due: cron times by a slow oracle, and due() over restarts, clock jumps and downtime."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline.errors import RunRefused
from pipeline.schedule import (
    MOST_LOST,
    Attempt,
    Spec,
    Start,
    check_name,
    due,
    failed,
    following,
    plan,
    previous,
    tick_name,
    tick_of,
)
from tests.schedules import START, spec

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
CHANGES = {
    "Europe/Berlin": [datetime(2026, 3, 29, 1, tzinfo=UTC), datetime(2026, 10, 25, 1, tzinfo=UTC)],
    "America/New_York": [
        datetime(2026, 3, 8, 7, tzinfo=UTC), datetime(2026, 11, 1, 6, tzinfo=UTC)
    ],
}  # fmt: skip
# By half an hour, and at midnight. Expressions with * may be off there within the hour of the
# change (cronsim walks hour by hour), so only fixed times are tested.
ODD_CHANGES = {
    "Australia/Lord_Howe": [
        datetime(2026, 4, 4, 15, tzinfo=UTC), datetime(2026, 10, 3, 15, 30, tzinfo=UTC)
    ],
    "America/Havana": [datetime(2026, 3, 8, 5, tzinfo=UTC), datetime(2026, 11, 1, 5, tzinfo=UTC)],
}  # fmt: skip


# -- cron times ----------------------------------------------------------------------------------


def slowly(cron: str, zone: str, start: datetime, end: datetime) -> set[datetime]:
    """Debian's cron, minute by minute: every time of an expression in (start, end]."""
    minute, hour, day, _, weekday = cron.split()
    fixed = not minute.startswith("*") and not hour.startswith("*")
    either = not day.startswith("*") and not weekday.startswith("*")

    def matches(local: datetime) -> bool:
        days = local.day in values(day, 1, 31), local.isoweekday() % 7 in values(weekday, 0, 6)
        return (
            local.minute in values(minute, 0, 59)
            and local.hour in values(hour, 0, 23)
            and (any(days) if either else all(days))
        )

    found = set()
    if fixed:
        local = start.astimezone(ZoneInfo(zone)).replace(tzinfo=None) - DAY
        for wall in (local + n * MINUTE for n in range(round((end - start) / MINUTE) + 2 * 1440)):
            if matches(wall):
                found.add(first_real(wall, zone))
    else:
        count = round((end - start) / MINUTE) + 1
        for moment in (start + n * MINUTE for n in range(count)):
            if matches(moment.astimezone(ZoneInfo(zone))):
                found.add(moment)
    return {moment for moment in found if start < moment <= end}


def values(field: str, first: int, last: int) -> set[int]:
    if field.startswith("*"):
        return set(range(first, last + 1, int(field.partition("/")[2] or 1)))
    return {int(value) for value in field.split(",")}


def first_real(wall: datetime, zone: str) -> datetime:
    """A wall time's moment: the first of two, or the first minute after the gap it lies in."""
    while True:
        moment = wall.replace(tzinfo=ZoneInfo(zone), fold=0).astimezone(UTC)
        if moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None) == wall:
            return moment
        wall += MINUTE


def some(first: int, last: int) -> st.SearchStrategy[str]:
    numbers = st.lists(st.integers(first, last), min_size=1, max_size=3, unique=True)
    return numbers.map(lambda found: ",".join(map(str, sorted(found))))


def expressions(minute: st.SearchStrategy[str], hour: st.SearchStrategy[str]) -> Any:
    days, weekdays = ["*", "*", "*", "8,29", "*/2"], ["*", "*", "*", "0", "1,6"]
    rest = st.sampled_from(days), st.just("*"), st.sampled_from(weekdays)
    return st.tuples(minute, hour, *rest).map(" ".join)


hours = some(0, 23) | st.sampled_from(["0", "1", "2", "3", "1,2"])
fixed = expressions(some(0, 59), hours)
starred = expressions(
    some(0, 59) | st.sampled_from(["*", "*/7", "*/30"]), hours | st.sampled_from(["*", "*/2"])
)


@st.composite
def moments(draw: st.DrawFn, changes: dict[str, list[datetime]]) -> tuple[str, datetime]:
    """A zone, and a moment around one of its changes."""
    zone = draw(st.sampled_from(sorted(changes)))
    change = draw(st.sampled_from(changes[zone]))
    return zone, change + draw(st.integers(-1500, 1500)) * MINUTE


@settings(max_examples=60, deadline=None)
@given(st.tuples(starred, moments(CHANGES)) | st.tuples(fixed, moments({**CHANGES, **ODD_CHANGES})))
def test_previous_and_following_are_debians_around_every_change_of_clocks(drawn):
    cron, (zone, now) = drawn
    after = now - DAY
    times = slowly(cron, zone, after, now + DAY)
    passed = [t for t in times if t <= now]
    coming = [t for t in times if t > now]

    assert previous(cron, zone, now, after) == max(passed, default=None)
    if coming:
        assert following(cron, zone, now) == min(coming)


@pytest.mark.parametrize(
    ("zone", "night", "comes"),
    [
        ("Europe/Berlin", (2026, 3, 29), ["2026-03-29T0100Z"]),  # 03:00 summer time
        ("Europe/Berlin", (2026, 10, 25), ["2026-10-25T0030Z"]),  # 02:30 summer time
        ("America/New_York", (2026, 3, 8), ["2026-03-08T0700Z"]),
        ("America/New_York", (2026, 11, 1), ["2026-11-01T0730Z"]),  # 01:30 comes twice, 02:30 not
    ],
)
def test_half_past_two_comes_once_on_the_night_the_clocks_change(zone, night, comes):
    start = datetime(*night, tzinfo=ZoneInfo(zone)).astimezone(UTC)
    times = [start + n * MINUTE for n in range(24 * 60)]
    seen = {previous("30 2 * * *", zone, now, start) for now in times} - {None}
    assert [tick_name(t) for t in sorted(seen)] == comes


def test_every_half_hour_goes_on_through_the_hour_that_comes_twice():
    start = datetime(2026, 10, 25, 0, tzinfo=UTC)
    now = start + timedelta(hours=3)
    ticks = list(itertools.takewhile(lambda t: t <= now, walked("*/30 * * * *", start)))
    assert ticks == [start + n * timedelta(minutes=30) for n in range(1, 7)]


def walked(cron: str, start: datetime) -> Iterator[datetime]:
    while True:
        found = following(cron, "Europe/Berlin", start)
        assert found is not None
        start = found
        yield start


@pytest.mark.parametrize("years", [0, 1, 3, 7, 30])
def test_the_latest_leap_day_is_found_however_long_ago_it_was(years):
    now = datetime(2027 + years, 2, 28, tzinfo=UTC)
    leap = max(y for y in range(2024, 2027 + years, 4))
    after = datetime(1990, 1, 1, tzinfo=UTC)
    assert previous("0 0 29 2 *", "UTC", now, after) == datetime(leap, 2, 29, tzinfo=UTC)


def test_a_time_at_which_it_was_added_has_passed():
    assert previous("0 * * * *", "UTC", START, START) is None
    assert previous("0 * * * *", "UTC", START + timedelta(hours=1), START) is not None


@given(st.integers(0, 10**9))
def test_a_ticks_name_says_its_minute_and_sorts_like_it(minutes):
    tick = datetime(1971, 1, 1, tzinfo=UTC) + minutes * MINUTE
    assert tick_of(tick_name(tick)) == tick
    assert tick_name(tick) < tick_name(tick + MINUTE)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cron": "0 3 * *"}, "has 4 fields"),
        ({"cron": "0 3 * * * *"}, "has 6 fields"),
        ({"cron": "61 3 * * *"}, "Bad minute"),
        ({"cron": "0 3 31 2 *"}, "Bad day-of-month"),
        ({"zone": "Europa/Berlin"}, "did you mean Europe/Berlin"),
        ({"zone": "../etc/passwd"}, "not a time zone"),
        ({"retries": -1}, "negative"),
    ],
)
def test_a_schedule_that_can_never_run_is_refused(wrong, said):
    with pytest.raises(RunRefused, match=said):
        spec(**wrong)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "..", "a" * 41, "a_b", "ä"])
def test_a_name_that_is_no_key_is_refused(name):
    with pytest.raises(RunRefused, match="cannot name a schedule"):
        check_name(name)


def test_a_schedule_survives_storage_and_an_unknown_version_is_refused():
    before = spec(zone="Europe/Berlin", arguments=("a", "--b", "{tick}"), retries=2)
    assert Spec.from_json(before.to_json()) == before
    with pytest.raises(RunRefused, match="format version 2"):
        Spec.from_json({**before.to_json(), "format_version": 2})
    with pytest.raises(RunRefused, match="not a schedule"):
        Spec.from_json({**before.to_json(), "surprise": 1})


def test_arguments_may_name_the_tick():
    assert spec(arguments=("--out", "run-{tick}")).words(START) == ("--out", "run-2026-11-20T1200Z")


# -- what is due ---------------------------------------------------------------------------------


def test_nothing_is_due_before_the_first_time_and_one_start_at_it():
    ten = spec()
    assert due(ten, [], START + 9 * MINUTE) is None
    assert due(ten, [], START + 10 * MINUTE) == Start(START + 10 * MINUTE, 1, START + 10 * MINUTE)


def test_after_a_long_downtime_only_the_latest_missed_time_is_caught_up():
    now = START + 400 * DAY + 5 * MINUTE
    start = due(spec(), [], now)
    assert start is not None
    assert (start.tick, start.attempt) == (now - 5 * MINUTE, 1)
    done = Attempt(tick=start.tick, number=1, outcome=0, ended=now)
    assert due(spec(), [done], now) is None


def test_nothing_starts_while_another_tick_has_not_ended():
    running = Attempt(tick=START + 10 * MINUTE, number=1)
    assert due(spec(), [running], START + 25 * MINUTE) is None


@pytest.mark.parametrize("state", ["paused", "removed"])
def test_a_paused_schedule_starts_nothing(state):
    assert due(spec(state=state), [], START + DAY) is None


def ended(outcome, minutes=10, number=1):
    at = START + minutes * MINUTE
    return Attempt(tick=START + 10 * MINUTE, number=number, outcome=outcome, ended=at)


@pytest.mark.parametrize("code", [0, 3, 5, 6])
def test_an_answer_is_not_tried_again(code):
    assert plan(spec(retries=5), [ended(code)], START + 11 * MINUTE) is None


def test_a_refusal_is_not_tried_again_for_it_would_be_the_same():
    assert plan(spec(retries=5), [ended(2)], START + 11 * MINUTE) is None


def test_a_failure_is_tried_again_after_its_time_and_so_often():
    twice = spec("0 12 * * *", retries=2, retry_after_s=120, since=START - DAY)
    tick = START
    tries = [Attempt(tick=tick, number=1, outcome=1, ended=START + MINUTE)]
    assert due(twice, tries, START + 2 * MINUTE) is None
    assert due(twice, tries, START + 3 * MINUTE) == Start(tick, 2, START + 3 * MINUTE)
    tries.append(Attempt(tick=tick, number=2, outcome=4, ended=START + 4 * MINUTE))
    assert due(twice, tries, START + 6 * MINUTE) == Start(tick, 3, START + 6 * MINUTE)
    tries.append(Attempt(tick=tick, number=3, outcome=1, ended=START + 7 * MINUTE))
    assert due(twice, tries, START + 600 * MINUTE) is None


def test_the_next_time_supersedes_a_retry():
    failing = spec(retries=9, retry_after_s=60)
    start = due(failing, [ended(1)], START + 20 * MINUTE)
    assert start == Start(START + 20 * MINUTE, 1, START + 20 * MINUTE)


def test_a_lost_attempt_is_made_good_without_counting_as_a_failure_but_not_for_ever():
    lost = []
    for number in range(1, MOST_LOST + 2):
        start = due(spec(), lost, START + 11 * MINUTE)
        assert start is not None
        assert start.attempt == number
        lost.append(ended("lost", number=number))
    assert due(spec(), lost, START + 11 * MINUTE) is None


def test_an_end_that_lies_in_the_future_does_not_hold_up_a_retry():
    failing = spec(retries=1, retry_after_s=60)
    wrong = ended(1, minutes=10_000_000)
    assert due(failing, [wrong], START + 11 * MINUTE) is not None


# -- every order of events -----------------------------------------------------------------------

SPECS = [
    spec("30 2 * * *", zone="Europe/Berlin", retries=1, retry_after_s=600),
    spec("30 1 * * *", zone="America/New_York"),
    spec("15 * * * *", zone="Europe/Berlin", retries=2, retry_after_s=0),
    spec("*/10 * * * *", zone="America/New_York", retries=1, retry_after_s=900),
]


class Days(RuleBasedStateMachine):
    """A scheduler's life: rounds, ends, restarts (which due() cannot even notice), clocks."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Attempt] = []
        self.spec = SPECS[0]
        self.now = START

    @precondition(lambda self: not self.history and self.now == START)
    @rule(
        which=st.integers(0, len(SPECS) - 1),
        change=st.sampled_from([c for both in CHANGES.values() for c in both]),
        early=st.integers(0, 3000),
    )
    def begins(self, which: int, change: datetime, early: int) -> None:
        self.now = change - early * MINUTE
        given = SPECS[which].to_json()
        self.spec = Spec.from_json({**given, "since": self.now.isoformat()})

    @rule(minutes=st.sampled_from([1, 5, 29, 60, 61, 600, 1440, 100_000]))
    def time_passes(self, minutes: int) -> None:
        self.now += minutes * MINUTE

    @rule(minutes=st.integers(-3000, 3000))
    def the_clock_is_set(self, minutes: int) -> None:
        self.now += minutes * MINUTE

    @rule()
    def a_round(self) -> None:
        start = due(self.spec, self.history, self.now)
        tick = previous(self.spec.cron, self.spec.zone, self.now, self.spec.since)
        free = all(a.outcome is not None for a in self.history)
        if start is not None:
            assert free, "two at once"
            assert start.tick == tick, "not the latest time"
            before = [a for a in self.history if a.tick == tick]
            assert start.attempt == len(before) + 1, "one attempt twice"
            if before:
                last = max(before, key=lambda a: a.number)
                assert failed(last.outcome), "what was done is done again"
            self.history.append(Attempt(tick=start.tick, number=start.attempt))
        elif free and tick is not None:
            assert any(a.tick == tick for a in self.history), "the latest time is lost"
        relevant = [a for a in self.history if a.tick == tick or a.outcome is None]
        if start is None:
            assert due(self.spec, relevant, self.now) is None, "the older history matters"

    @precondition(lambda self: any(a.outcome is None for a in self.history))
    @rule(outcome=st.sampled_from([0, 1, 2, 3, 4, "lost"]))
    def it_ends(self, outcome: int) -> None:
        self.history = [
            a if a.outcome is not None
            else Attempt(tick=a.tick, number=a.number, outcome=outcome, ended=self.now)
            for a in self.history
        ]  # fmt: skip

    @invariant()
    def no_tick_is_started_too_often(self) -> None:
        for tick in {a.tick for a in self.history}:
            mine = [a for a in self.history if a.tick == tick]
            failures = [a for a in mine if a.outcome != "lost"]
            assert len({a.number for a in mine}) == len(mine)
            assert len(failures) <= 1 + self.spec.retries
            assert len(mine) <= 1 + self.spec.retries + MOST_LOST


TestDays = Days.TestCase
TestDays.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
