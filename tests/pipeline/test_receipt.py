"""How near to the limit a call came, and what was in the way."""

import pytest

from pipeline.place import Capacity
from pipeline.progress import Tally
from pipeline.receipt import bottleneck, limits_of


def tally(done: int, busy: dict[str, float], waited: dict[str, float] | None = None) -> Tally:
    seconds = {leg: s + (waited or {}).get(leg, 0.0) for leg, s in busy.items()}
    return Tally(done, done=done, busy=busy, seconds=seconds)


def test_the_limit_is_what_all_cores_could_do_if_they_always_worked():
    done = tally(100, {"decode": 5.0, "predict": 15.0})

    assert limits_of(done, Capacity(2)) == {"cores": pytest.approx(10.0)}


def test_a_gpu_has_a_limit_of_its_own():
    done = tally(100, {"decode": 5.0, "device": 2.0})

    assert limits_of(done, Capacity(8, 1)) == {"cores": 160.0, "gpus": 50.0}


def test_where_nothing_was_done_there_is_no_limit():
    assert limits_of(tally(0, {}), Capacity(2)) == {}
    assert bottleneck(tally(0, {}), {}) is None


def test_busy_cores_are_named_with_what_keeps_them_busy():
    said = bottleneck(tally(10, {"decode": 2.0, "predict": 6.0}), {"cores": 0.93})

    assert said == "cores (93% busy, 75% of it predict)"


def test_a_busy_gpu_is_named():
    said = bottleneck(tally(10, {"decode": 2.0, "device": 6.0}), {"cores": 0.3, "gpus": 0.9})

    assert said == "gpus (90% busy)"


def test_where_nobody_is_busy_the_longest_wait_is_named():
    done = tally(10, {"load": 0.5, "predict": 6.0}, {"load": 30.0, "predict": 1.0})

    assert bottleneck(done, {"cores": 0.2}) == "waiting (cores 20% busy; longest for load)"
