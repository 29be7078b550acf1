"""A lease: one holder at a time, whoever races, sleeps or sets clocks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RunRefused, StorageBusy
from pipeline.lease import LASTS_S, PART, Lease, LeaseLost
from pipeline.storage import LocalStore
from tests.schedules import Clock, MemoryStore


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lease(store, clock):
    """Make one process's view of the lease."""
    return lambda owner="a": Lease(store, "nightly/lease", owner, clock.monotonic)


def watch(lease, clock, seconds):
    """Ask for the lease every second; what was given in the end."""
    held = lease.take()
    for _ in range(round(seconds)):
        if held is not None:
            break
        clock.sleep(1)
        held = lease.take()
    return held


def test_the_second_one_gets_it_when_the_first_gives_it_up(lease):
    first, second = lease("a"), lease("b")
    held = first.take()
    assert held is not None
    assert second.take() is None
    held.release()
    taken = second.take()
    assert taken is not None
    assert taken.number > held.number


def test_a_dead_holders_lease_is_taken_over_once_it_has_expired(lease, clock):
    assert lease("a").take() is not None
    other = lease("b")
    assert watch(other, clock, LASTS_S - 2) is None
    assert not other.alive
    assert watch(other, clock, 3) is not None


def test_a_holder_that_renews_keeps_it(lease, clock):
    held, other = lease("a").take(), lease("b")
    for _ in range(50):
        clock.sleep(LASTS_S / PART)
        held.renew_if_due()
        assert other.take() is None
    assert other.alive
    held.check()


def test_a_frozen_holder_is_fenced_when_it_wakes(lease, clock):
    slept = lease("a").take()
    taken = watch(lease("b"), clock, LASTS_S + 1)
    assert taken is not None
    for attempt in (slept.check, slept.renew):
        with pytest.raises(LeaseLost, match="took over"):
            attempt()
    slept.release()
    taken.check()


def test_a_frozen_holder_is_fenced_even_where_its_next_number_was_tidied_away(lease, clock, store):
    slept = lease("a").take()
    taken = watch(lease("b"), clock, LASTS_S + 1)
    for _ in range(5):
        taken.renew()
    assert f"nightly/lease/{slept.number + 1:06d}.json" not in store.objects
    with pytest.raises(LeaseLost):
        slept.renew()
    taken.check()
    taken.renew()  # and tidies up what the sleeper left
    assert len(store.objects) <= 2


def test_an_observer_that_did_not_look_has_seen_nothing(lease, clock):
    held, other = lease("a").take(), lease("b")
    assert other.take() is None
    clock.sleep(100 * LASTS_S)  # the whole machine slept, the holder as well
    assert other.take() is None
    held.renew()
    assert other.take() is None


def test_an_outage_of_the_store_lets_no_living_holder_look_dead(store, clock):
    class Flaky(MemoryStore):
        down = False

        def list(self, prefix=""):
            if self.down:
                raise StorageBusy("throttled")
            return super().list(prefix)

    store = Flaky()
    held = Lease(store, "l", "a", clock.monotonic).take()
    other = Lease(store, "l", "b", clock.monotonic)
    assert other.take() is None
    store.down = True
    for _ in range(200):
        clock.sleep(1)
        with pytest.raises(StorageBusy):
            other.take()
    store.down = False
    assert other.take() is None
    held.renew()


def test_wall_clocks_decide_nothing(lease, clock):
    held, other = lease("a").take(), lease("b")
    for by in (2, -4, 10_000):
        clock.jump(timedelta(hours=by))
        assert other.take() is None
    held.check()


def test_the_note_reaches_whoever_comes_next_even_after_a_crash(lease, clock):
    lease("a").take().renew({"tick": "2026-11-20T1200Z"})
    taken = watch(lease("b"), clock, LASTS_S + 1)
    assert taken.note == {"tick": "2026-11-20T1200Z"}
    taken.release()
    assert lease("c").take().note == {"tick": "2026-11-20T1200Z"}


def test_old_numbers_go_away(lease, store):
    held = lease().take()
    for _ in range(100):
        held.renew()
    assert len(store.objects) <= 2


def test_a_damaged_lease_is_named(lease, store):
    store.objects["nightly/lease/000003.json"] = b"{"
    with pytest.raises(RunRefused, match=r"nightly/lease/000003\.json is damaged"):
        lease().take()


def test_an_answer_lost_on_the_way_is_no_defeat(clock):
    class Forgetful(MemoryStore):
        """Every write lands, and is then asked for again, as S3's client does."""

        def create(self, path, data):
            super().create(path, data)
            return super().create(path, data)

    held = Lease(Forgetful(), "l", "a", clock.monotonic).take()
    assert held is not None
    held.renew()


def test_of_many_racing_threads_one_holds_it_at_a_time(tmp_path):
    store = LocalStore(tmp_path)
    inside, seen, numbers = threading.Lock(), [], []

    def worker(owner):
        lease = Lease(store, "l", owner)
        won = 0
        while won < 3:
            held = lease.take()
            if held is None:
                continue
            assert inside.acquire(blocking=False), "two hold it"
            seen.append(owner)
            numbers.append(held.number)
            held.renew()
            held.check()
            inside.release()
            held.release()
            won += 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(worker, "abcdef"))

    assert sorted(seen) == sorted("abcdef" * 3)
    assert numbers == sorted(set(numbers))  # the fence only ever rises


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["take", "renew", "release", "die", "wait"])),
        max_size=60,
    )
)
def test_in_every_order_of_events_at_most_one_believes_it_holds_it(steps):
    store, clock = MemoryStore(), Clock()
    leases = [Lease(store, "l", str(n), clock.monotonic) for n in range(3)]
    held = [None, None, None]
    for who, what in steps:
        if what == "wait":
            clock.sleep(LASTS_S / PART)
        elif what == "die":
            held[who], leases[who] = None, Lease(store, "l", f"{who}'", clock.monotonic)
        elif what == "take" and held[who] is None:
            held[who] = leases[who].take()
        elif held[who] is not None and what == "renew":
            try:
                held[who].renew()
            except LeaseLost:
                held[who] = None
        elif held[who] is not None and what == "release":
            held[who].release()
            held[who] = None
        assert sum(holds(each) for each in held) <= 1


def holds(held):
    if held is None:
        return False
    try:
        held.check()
    except LeaseLost:
        return False
    return True
