"""Decoding ahead of the model: how far, and what memory bounds it."""

import threading
import time
from types import SimpleNamespace

import pytest

from pipeline.clock import Clock
from pipeline.config import Compute
from pipeline.decode import DecodeLimits
from pipeline.line import Line
from pipeline.pictures import RGB, ahead
from pipeline.records import EncodedImage
from pipeline.room import Room
from tests.archives import png

SIDE = 64
NBYTES = RGB * SIDE * SIDE
PATIENCE_S = 5.0


def line(room: Room, **limits: int) -> SimpleNamespace:
    return SimpleNamespace(limits=DecodeLimits(**limits), room=room)


def pictures(count: int) -> list[EncodedImage]:
    return [EncodedImage(None, png(SIDE, SIDE, seed)) for seed in range(count)]


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def decoded_while_the_first_is_in_use(room: Room, expected: int, threads: int = 2) -> int:
    seen, aside = [], []
    some = ahead(pictures(6), line(room), aside, seen.append, Clock(), threads)
    next(some)
    until(lambda: len(seen) >= expected)
    time.sleep(0.05)  # more would come now
    ahead_by = len(seen)
    assert len(list(some)) == 5
    assert aside == []
    return ahead_by


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (100 * NBYTES, 3),  # one per thread and the one in use
        (2 * NBYTES, 2),
        (2 * NBYTES - 1, 1),
        (1, 1),  # one may always, or nothing would go on
    ],
)
def test_pictures_are_decoded_ahead_as_far_as_there_is_room(share, expected):
    assert decoded_while_the_first_is_in_use(Room(share), expected) == expected


@pytest.mark.parametrize(
    ("asked", "device", "threads"),
    [(None, "cpu", 0), (None, "cuda", 2), (3, "cpu", 3), (0, "cuda", 0)],
)
def test_who_decodes_is_asked_for_or_follows_from_the_device(asked, device, threads):
    own = SimpleNamespace(config=SimpleNamespace(compute=Compute(decode_threads=asked)))

    assert Line.decoders(own, device) == threads


def test_without_threads_none_is_decoded_before_it_is_asked_for_and_by_who_asks():
    assert decoded_while_the_first_is_in_use(Room(100 * NBYTES), 1, threads=0) == 1

    by, clock = [], Clock()
    some = ahead(
        pictures(3), line(Room(1)), [], lambda _: by.append(threading.current_thread()), clock, 0
    )
    made = list(clock.over("decode", some))
    assert len(made) == 3
    assert set(by) == {threading.current_thread()}
    assert clock.busy["decode"] < 1.5 * clock.seconds["decode"]  # booked once


@pytest.mark.parametrize("threads", [0, 2])
def test_what_is_too_large_to_be_decoded_takes_no_room(threads):
    seen, aside = [], []
    small = line(Room(1), max_pixels=SIDE * SIDE - 1)

    assert list(ahead(pictures(4), small, aside, seen.append, Clock(), threads)) == []
    assert [one.verdict.reason for one in aside] == ["too_large"] * 4


@pytest.mark.parametrize("threads", [0, 2])
def test_a_fragment_that_is_given_up_gives_its_room_back(threads):
    room = Room(100 * NBYTES)
    some = ahead(pictures(6), line(room), [], lambda pixels: pixels, Clock(), threads)
    next(some)
    some.close()

    assert decoded_while_the_first_is_in_use(room, 3) == 3
    assert room.take(1000 * NBYTES, wait=True)  # nobody holds any


@pytest.mark.parametrize("decoders", [0, 2])
def test_fragments_share_their_room_and_none_waits_for_ever(decoders):
    room, most, held = Room(NBYTES), [], [0]
    lock = threading.Lock()

    def count(change: int) -> None:
        with lock:
            held[0] += change
            most.append(held[0])

    def fragment() -> None:
        for _ in ahead(pictures(20), line(room), [], lambda _: count(1), Clock(), decoders):
            count(-1)

    threads = [threading.Thread(target=fragment) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert len(most) == 160
    assert max(most) <= 4


def test_room_of_one_is_left_to_the_others():
    room = Room(NBYTES)
    with room.fragment(), room.fragment():
        assert room.take(2 * NBYTES, wait=False)
        assert not room.take(1, wait=False)
        room.give_back(NBYTES)
        assert room.take(NBYTES, wait=False)


def test_small_pictures_do_not_keep_a_large_one_waiting():
    room, came = Room(10), []
    with room.fragment():
        assert room.take(1, wait=False)
        large = threading.Thread(target=lambda: came.append(room.take(100, wait=True)))
        large.start()
        until(lambda: not room.take(1, wait=False) or room.give_back(1))
        assert came == []

        room.give_back(1)
        large.join(PATIENCE_S)
        assert came == [True]
