"""Seconds are booked where they are spent; fragments wait their turn."""

import threading
import time

from pipeline.clock import Clock, Pass
from pipeline.run import Turn


def work(seconds: float) -> None:
    """Keep a core busy."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_leg_is_not_charged_for_the_legs_that_feed_it():
    clock = Clock()

    def fed():
        for _ in range(3):
            work(0.01)
            yield 1

    def feeding(items):
        for item in items:
            work(0.005)
            yield item

    assert list(clock.over("outer", feeding(clock.over("inner", fed())))) == [1, 1, 1]
    assert clock.busy["inner"] >= 0.03
    assert 0.015 <= clock.busy["outer"] < clock.busy["inner"]
    assert clock.seconds["inner"] >= 0.999 * clock.busy["inner"]  # two clocks, read in turn


def test_waiting_is_not_working():
    clock = Clock()

    with clock.during("load"):
        time.sleep(0.05)

    assert clock.seconds["load"] >= 0.05
    assert clock.busy["load"] < 0.02


def test_what_another_clock_has_said_is_added():
    there, here = Clock(), Clock()
    with there.during("load"):
        work(0.005)
    there.saw(Pass(tiles=2, pixels=100, padded=128))
    here.saw(Pass(tiles=1, pixels=50, padded=64, device_s=0.5))

    here.hear(there.said())

    assert here.said()["passed"] == {"passes": 2, "tiles": 3, "pixels": 150, "padded": 192}
    assert here.busy["load"] == there.busy["load"]
    assert here.busy["device"] == 0.5


def test_only_so_many_have_their_turn_at_once_and_after_a_stop_nobody():
    stop = threading.Event()
    turn = Turn(1, stop.is_set)
    second = threading.Event()

    def another():
        with turn as wanted:
            assert not wanted
            second.set()

    with turn as wanted:
        assert wanted
        thread = threading.Thread(target=another)
        thread.start()
        assert not second.wait(0.05)
        stop.set()
    thread.join(5)
    assert second.is_set()


def test_whoever_waits_for_a_turn_that_is_closed_learns_that_it_is_not_wanted():
    turn = Turn(1, lambda: False)
    turn.close()
    with turn as wanted:
        assert not wanted
