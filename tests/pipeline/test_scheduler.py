"""Rounds over schedules: one start per tick, whoever races, freezes or is killed at any call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from pipeline.errors import RunRefused, StorageBusy
from pipeline.lease import LASTS_S
from pipeline.rounds import Rounds
from pipeline.schedule import MOST_LOST
from pipeline.scheduler import Scheduler, Seen
from pipeline.storage import LocalStore
from pipeline.submission import Unreachable
from pipeline.timetable import Timetable
from tests.schedules import (
    START,
    Clock,
    Cluster,
    Crash,
    Crashing,
    Machine,
    MemoryStore,
    spec,
)

TEN = timedelta(minutes=10)
FIRST = "mf-nightly-1d-2026-11-20T1210Z-1"
HEAD = "http://head:8265"


class World:
    """Storage, clock and cluster, which outlive the schedulers' processes."""

    def __init__(self, store=None):
        self.store = store or MemoryStore()
        self.clock = Clock()
        self.cluster = Cluster()
        self.said = []

    def add(self, name="nightly", **more):
        timetable = Timetable(self.store)
        before = timetable.version(name)
        timetable.change(name, 0 if before is None else before.number, spec(**more))

    def process(self, store=None, machine=None, **more):
        """Another scheduler; without a machine all its jobs are the cluster's."""
        machine = machine or Machine()

        def runner(address):
            return machine if address is None else self.cluster

        return Scheduler(
            Timetable(store or self.store), runner, self.said.append,
            now=self.clock.now, monotonic=self.clock.monotonic, **more,
        )  # fmt: skip

    def tick(self, scheduler=None, *, wait=False, names=("nightly",)):
        """`maskfleet schedule tick` in a process of its own."""
        return self.rounds(scheduler or self.process()).tick(list(names), wait=wait)

    def rounds(self, scheduler):
        return Rounds(scheduler, self.said.append, self.clock.sleep)

    def history(self, name="nightly"):
        return [(r.number, r.outcome) for r in Timetable(self.store).history(name)]


@pytest.fixture
def world():
    made = World()
    made.add(address=HEAD)
    made.clock.jump(TEN)
    return made


def test_what_is_due_starts_once_and_its_end_is_written_down(world):
    world.tick()
    world.tick()
    assert world.cluster.started == [FIRST]
    assert world.history() == [(1, None)]
    world.cluster.ended[FIRST] = 3
    assert world.tick() == 0
    assert world.history() == [(1, 3)]
    world.clock.jump(TEN)
    world.tick()
    assert len(world.cluster.started) == 2


def test_an_idle_round_writes_nothing(world):
    world.tick()
    before = dict(world.store.objects)
    world.tick()  # the job runs
    assert world.store.objects == before
    world.cluster.ended[FIRST] = 0
    world.tick()
    before = dict(world.store.objects)
    world.tick()  # nothing is due
    assert world.store.objects == before


def test_a_rounds_cost_does_not_grow_with_the_history(world):
    class Counting(MemoryStore):
        calls = 0

        def list(self, prefix=""):
            self.calls += 1
            found = list(super().list(prefix))
            assert len(found) < 10, f"all of {prefix} is listed"
            return iter(found)

        def read(self, path, *more):
            self.calls += 1
            return super().read(path, *more)

    world.store = Counting()
    world.add(address=HEAD)
    costs = []
    for _ in range(30):
        world.tick()
        world.cluster.ended[world.cluster.started[-1]] = 0
        before = world.store.calls
        world.tick()
        costs.append(world.store.calls - before)
        world.clock.jump(TEN)
    assert len(world.cluster.started) == 30
    assert max(costs[1:]) == costs[1]


def test_a_failure_is_reported_and_tried_again_by_the_rule(world):
    world.add(address=HEAD, retries=1, retry_after_s=120)
    world.tick()
    world.cluster.ended[FIRST] = 1
    assert world.tick() == 1
    assert any("FAILED nightly" in line and "exit code 1" in line for line in world.said)
    assert world.cluster.started == [FIRST]
    world.clock.jump(timedelta(seconds=121))
    assert world.tick() == 0
    assert world.cluster.started == [FIRST, FIRST[:-1] + "2"]
    world.cluster.ended[FIRST[:-1] + "2"] = 1
    world.tick()
    world.clock.jump(timedelta(minutes=5))
    world.tick()
    assert len(world.cluster.started) == 2
    assert world.history() == [(1, 1), (2, 1)]


def test_a_waiting_tick_stays_for_the_retry_and_its_end(world):
    world.add(address=HEAD, retries=1, retry_after_s=120)
    codes = iter([4, 0])
    world.cluster.before = lambda record: world.cluster.ended.update({record.id: next(codes)})
    assert world.tick(wait=True) == 0
    assert world.history() == [(1, 4), (2, 0)]


class Lasting(Machine):
    """Every job takes so many seconds."""

    def __init__(self, clock, seconds):
        super().__init__()
        self._clock, self._seconds = clock, seconds
        self.before = lambda record: setattr(self, "_since", clock.since_boot)

    def state(self, job_id):
        if job_id in self.started and self._clock.since_boot - self._since >= self._seconds:
            return 0
        return super().state(job_id)


def test_a_tick_waits_for_its_child_and_ends_though_the_next_time_has_come(world):
    world.add(cron="* * * * *")
    machine = Lasting(world.clock, 150)
    assert world.tick(world.process(machine=machine)) == 0
    assert len(machine.started) == 1
    assert world.history() == [(1, 0)]


# -- killed --------------------------------------------------------------------------------------


def life(world, scheduler):
    """A tick that starts the job, and one that sees it end."""
    world.tick(scheduler)
    for job_id in world.cluster.started:
        world.cluster.ended[job_id] = 0
    world.tick(scheduler)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_call_to_the_store_a_clusters_job_starts_exactly_once(after):
    killed, call = True, 0
    while killed:
        world = World()
        world.add(address=HEAD)
        world.clock.jump(TEN)
        store = Crashing(world.store, call, after=after)
        try:
            life(world, world.process(store))
            killed = False
        except Crash:
            life(world, world.process())
        assert world.cluster.started == [FIRST], f"killed at call {call}"
        assert world.history() == [(1, 0)], f"killed at call {call}"
        call += 1
    assert call > 15  # or the tick never came to its work


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_call_and_back_after_the_next_time_no_two_jobs_run_at_once(after):
    killed, call = True, 0
    while killed:
        world = World()
        world.add(address=HEAD)
        world.clock.jump(TEN)
        cluster = world.cluster

        def alone(record, cluster=cluster, call=call):
            running = set(cluster.started) - set(cluster.ended) - {record.id}
            assert not running, f"killed at call {call}: {running} run still"

        cluster.before = alone
        try:
            world.tick(world.process(Crashing(world.store, call, after=after)))
            killed = False
        except Crash:
            pass
        world.clock.jump(TEN)
        world.tick()
        cluster.ended |= dict.fromkeys(cluster.started, 0)
        world.tick()
        cluster.ended |= dict.fromkeys(cluster.started, 0)
        world.tick()
        assert all(outcome == 0 for _, outcome in world.history()), f"killed at call {call}"
        assert cluster.started[-1] == FIRST.replace("1210", "1220")
        call += 1
    assert call > 15


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_call_a_child_process_runs_again_and_never_beside_itself(after):
    killed, call, again = True, 0, 0
    while killed:
        world = World()
        world.add()
        world.clock.jump(TEN)
        first, second = Machine(), Machine()  # the first's jobs die with it

        def soon(machine):
            return lambda record: machine.ended.update({record.id: 0})

        first.before, second.before = soon(first), soon(second)
        store = Crashing(world.store, call, after=after)
        try:
            world.tick(world.process(store, first))
            killed = False
        except Crash:
            world.tick(world.process(machine=second))
        outcomes = [outcome for _, outcome in world.history()]
        assert outcomes in ([0], ["lost", 0]), f"killed at call {call}"
        assert len(second.started) <= 1
        again += bool(first.started and second.started)
        call += 1
    assert call > 10
    assert again  # at-least-once is what it is: the kill may come between start and record


def visited(world, scheduler):
    """Visit until the lease is ours or somebody is seen to renew it."""
    seen, _ = scheduler.visit("nightly")
    while seen is Seen.BUSY:
        world.clock.sleep(1)
        seen, _ = scheduler.visit("nightly")
    return seen


def test_a_job_that_kills_its_machine_again_and_again_is_given_up(world):
    world.add(cron="0 * * * *", since=START - TEN)
    seen = [visited(world, world.process(machine=Machine())) for _ in range(MOST_LOST + 2)]
    assert seen == [*[Seen.HERE] * (MOST_LOST + 1), Seen.IDLE]
    assert world.history() == [(n + 1, "lost") for n in range(MOST_LOST + 1)]


def test_a_cluster_that_forgot_a_job_gets_it_again_as_the_next_attempt(world):
    world.tick()
    world.cluster.started.clear()  # its head was started anew
    world.tick()
    assert world.cluster.started == [FIRST[:-1] + "2"]
    assert world.history() == [(1, "lost"), (2, None)]


def out_of_reach(record):
    raise Unreachable("http://head:8265 does not answer")


def test_a_cluster_out_of_reach_leaves_the_tick_open_and_the_next_round_starts_it(world):
    world.cluster.before = out_of_reach
    assert world.tick() == 4
    world.cluster.before = lambda record: None
    assert world.tick() == 0
    assert world.cluster.started == [FIRST]


# -- raced, frozen, fenced -----------------------------------------------------------------------


def test_of_racing_ticks_one_starts_the_job(tmp_path):
    for number in range(5):
        world = World(LocalStore(tmp_path / str(number)))
        world.add(address=HEAD)
        world.clock.jump(TEN)
        schedulers = [world.process() for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(world.tick, schedulers))
        assert world.cluster.asked == [FIRST]


def test_a_scheduler_frozen_at_the_last_moment_asks_for_a_job_that_is_there(world):
    def frozen(record):
        world.cluster.before = lambda record: None
        world.clock.sleep(2 * LASTS_S)
        world.tick()  # the other one takes over

    world.cluster.before = frozen
    world.tick()
    assert world.cluster.asked == [FIRST, FIRST]
    assert world.cluster.started == [FIRST]


def test_a_scheduler_frozen_before_it_starts_a_child_leaves_it_to_the_other(world):
    class Freezing(MemoryStore):
        def create(self, path, data):
            answer = super().create(path, data)
            if path.endswith("begun.json") and not others:
                others.append(world.process(machine=Machine()))
                assert visited(world, others[0]) is Seen.HERE
            return answer

    others, mine = [], Machine()
    world.store = Freezing()
    world.add()
    seen, _ = world.process(machine=mine).visit("nightly")
    assert seen is Seen.ELSEWHERE
    assert mine.started == []
    assert any("took over" in line for line in world.said)


def test_a_scheduler_frozen_while_its_child_ran_stops_it_when_it_wakes(world):
    world.add()
    mine, others = Machine(), Machine()
    scheduler = world.process(machine=mine)
    assert visited(world, scheduler) is Seen.HERE
    assert visited(world, world.process(machine=others)) is Seen.HERE
    world.clock.sleep(LASTS_S)
    assert scheduler.visit("nightly")[0] is Seen.ELSEWHERE
    assert mine.ended == {FIRST: 143}
    assert world.history() == [(1, "lost"), (2, None)]


def test_a_living_scheduler_keeps_others_out_for_as_long_as_its_child_runs(world):
    world.add()
    scheduler, others = world.process(machine=Machine()), Machine()
    other = world.process(machine=others)
    for _ in range(300):
        assert scheduler.visit("nightly")[0] is Seen.HERE
        assert other.visit("nightly")[0] in {Seen.BUSY, Seen.ELSEWHERE}
        world.clock.sleep(5)
    assert others.started == []


# -- stopped, paused, wrong ----------------------------------------------------------------------


def test_a_scheduler_that_is_stopped_takes_its_child_along_and_the_next_one_goes_on_at_once(world):
    world.add()
    machine = Machine()
    scheduler = world.process(machine=machine)
    assert visited(world, scheduler) is Seen.HERE
    scheduler.close()
    assert machine.ended == {FIRST: 143}
    assert world.process(machine=Machine()).visit("nightly")[0] is Seen.HERE
    assert world.history() == [(1, "lost"), (2, None)]


def test_a_paused_schedule_starts_nothing_but_sees_its_job_end(world):
    world.tick()
    world.add(address=HEAD, state="paused")
    world.cluster.ended[FIRST] = 0
    world.clock.jump(10 * TEN)
    world.tick()
    assert world.history() == [(1, 0)]
    assert world.cluster.started == [FIRST]


def test_what_was_written_down_but_not_started_before_a_pause_is_not_started(world):
    world.cluster.before = out_of_reach
    world.tick()
    world.add(address=HEAD, state="paused")
    world.tick()
    assert world.cluster.started == []
    assert world.history() == [(1, "lost")]


def test_an_address_for_all_overrides_the_schedules(world):
    world.add()
    world.tick(world.process(address=HEAD))
    assert world.cluster.started == [FIRST]


def test_one_bad_schedule_does_not_keep_the_others(world):
    world.add("other", address=HEAD)
    world.store.objects["nightly/spec/000002.json"] = b"{"
    assert world.tick(names=("nightly", "other")) == 2
    assert world.cluster.started == [FIRST.replace("nightly", "other")]
    assert any("nightly/spec/000002.json is damaged" in line for line in world.said)


def test_two_changes_at_once_do_not_overwrite_each_other(world):
    timetable = Timetable(world.store)
    timetable.change("nightly", 1, spec(retries=1))
    with pytest.raises(RunRefused, match="somebody else changed"):
        timetable.change("nightly", 1, spec(retries=2))


def test_staying_survives_an_outage_and_ends_when_told(world):
    class Flaky(MemoryStore):
        down = 0

        def list(self, prefix=""):
            if self.down:
                self.down -= 1
                raise StorageBusy("throttled")
            return super().list(prefix)

    world.store = Flaky()
    world.add(cron="* * * * *", address=HEAD)
    world.store.down = 10
    scheduler = world.process()
    paused = []

    def pause(seconds):
        paused.append(seconds)
        world.clock.sleep(seconds)
        world.cluster.ended |= dict.fromkeys(world.cluster.started, 0)
        return len(paused) == 40

    rounds = Rounds(scheduler, world.said.append, pause)
    rounds.stay(Timetable(world.store).names, 20.0, world.clock.monotonic)
    assert 5 <= len(world.cluster.started) <= 13
    assert len(set(world.cluster.started)) == len(world.cluster.started)
    assert "throttled" in world.said


def test_staying_looks_at_a_child_every_second_and_renews_its_lease(world):
    world.add(cron="0 * * * *", since=START - TEN)
    machine = Lasting(world.clock, 200)
    scheduler = world.process(machine=machine)
    paused = []

    def pause(seconds):
        paused.append(seconds)
        world.clock.sleep(seconds)
        return world.clock.since_boot > 300

    Rounds(scheduler, world.said.append, pause).stay(
        Timetable(world.store).names, 20.0, world.clock.monotonic
    )
    assert paused.count(1.0) >= 200
    assert world.history() == [(1, 0)]
