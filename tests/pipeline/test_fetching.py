"""Neighbours in a shard share a request; what each gets is what it would get alone."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StorageBusy, StorageMissing
from pipeline.fetching import (
    GAP,
    SPAN,
    believed,
    in_flight,
    read_span,
    read_together,
    together,
)
from pipeline.records import PlannedImage

LIMIT = 2**30


class Shard:
    """A store with one object; remembers what was asked of it."""

    def __init__(self, content: bytes) -> None:
        self.content, self.asked = content, []

    def read(self, path, start=0, length=None, etag=None):
        if path != "a.tar":
            raise StorageMissing(path)
        self.asked.append((start, length))
        return self.content[start:] if length is None else self.content[start : start + length]


def member(number: int, offset: int | None, nbytes: int, shard: str = "a.tar") -> PlannedImage:
    return PlannedImage(
        number, f"{shard}#{number}", shard, str(number), offset, nbytes, "e", "webdataset", 0
    )


def fetched(store: Shard, images: list[PlannedImage], limit: int = LIMIT) -> list:
    return [one for g in together(images, limit) for one in read_together(store, limit, g)]


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 2000)), min_size=1, max_size=40),
    st.integers(0, 120_000),
    st.sampled_from([500, LIMIT]),
)
def test_together_they_get_what_each_would_get_alone(spans, end, limit):
    images, at = [], 0
    for number, (gap, nbytes) in enumerate(spans):
        images.append(member(number, at + gap, nbytes))
        at += gap + nbytes
    store = Shard(bytes(i % 251 for i in range(min(end, at))))

    expected = [read_span(store, limit, image) for image in images]

    assert fetched(store, images, limit) == expected


def test_neighbours_share_a_request():
    store = Shard(bytes(100_000))
    fetched(store, [member(n, 512 + 1536 * n, 1000) for n in range(50)])

    assert store.asked == [(512, 49 * 1536 + 1000)]


def test_a_request_has_a_size_and_does_not_read_what_nobody_wants():
    images = [member(n, n * 2**20, 2**20) for n in range(10)]
    far = [member(0, 0, 10), member(1, 10 + GAP + 1, 10)]

    assert all(g[-1].offset + g[-1].nbytes - g[0].offset <= SPAN for g in together(images, LIMIT))
    assert [len(group) for group in together(images, LIMIT)] == [4, 4, 2]
    assert [len(group) for group in together(far, LIMIT)] == [1, 1]


@pytest.mark.parametrize(
    "pair",
    [
        [member(0, 0, 10), member(1, 10, 10, "b.tar")],
        [member(0, 500, 10), member(1, 0, 10)],
        [member(0, None, 10), member(1, 10, 10)],
    ],
    ids=["another shard", "backwards", "no offset"],
)
def test_only_neighbours_go_together(pair):
    assert [len(group) for group in together(pair, LIMIT)] == [1, 1]


class Going(Shard):
    """A store that may be gone, and counts who asks."""

    there, questions = True, 0

    def ensure_there(self):
        self.questions += 1
        if not self.there:
            raise StorageBusy("is the disk still mounted?")


def answers(store, *shards) -> list:
    images = [member(n, 10 * n, 10, shard) for n, shard in enumerate(shards)]
    return list(believed(store, iter(fetched(store, images))))


def test_a_lost_picture_is_believed_once_the_store_itself_was_asked():
    store = Going(bytes(100))

    assert [a.verdict is None for a in answers(store, "a.tar", "gone.tar", "b.tar")] == [
        True, False, False,
    ]  # fmt: skip
    assert store.questions == 1
    answers(store, "a.tar", "a.tar")
    assert store.questions == 1


def test_no_picture_of_a_store_that_is_gone_is_lost():
    store = Going(bytes(100))
    store.there = False

    assert len(answers(store, "a.tar")) == 1
    with pytest.raises(StorageBusy):
        answers(store, "a.tar", "gone.tar")


def test_a_shard_that_is_gone_is_gone_for_all_of_them():
    images = [member(n, 10 * n, 10, "gone.tar") for n in range(3)]

    assert {one.verdict.reason for one in fetched(Shard(b""), images)} == {"vanished"}


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_answers_come_in_order_whoever_is_late(threads):
    def read(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(in_flight(read, range(20), threads)) == [n * n for n in range(20)]


def test_an_answer_is_there_before_all_are():
    late = threading.Event()
    answers = in_flight(lambda number: number if number < 4 else late.wait(5), range(5), 2)

    assert [next(answers) for _ in range(4)] == [0, 1, 2, 3]
    late.set()
    assert list(answers) == [True]


def test_an_error_comes_in_its_turn_and_nothing_more_is_asked_for_after_it():
    asked, got = [], []

    def read(number: int) -> int:
        asked.append(number)
        time.sleep(0.03 if number == 0 else 0.002)
        if number in (4, 5):
            raise StorageBusy(f"{number} is gone")
        return number

    with pytest.raises(StorageBusy, match="4 is gone"):
        got.extend(in_flight(read, range(1000), 3))
    assert got == [0, 1, 2, 3]
    assert len(asked) < 500


def test_who_gives_up_early_waits_for_what_was_asked_and_asks_no_more():
    asked, ended = [], []

    def read(number: int) -> None:
        asked.append(number)
        time.sleep(0.002)
        ended.append(number)

    answers = in_flight(read, range(1000), 3)
    next(answers)
    answers.close()

    assert sorted(asked) == sorted(ended)
    assert len(asked) < 500


def test_where_no_more_threads_can_be_started_nothing_more_is_asked_for(monkeypatch):
    asked, started = [], []
    start = threading.Thread.start

    def once(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    def read(number: int) -> None:
        asked.append(number)
        time.sleep(0.002)

    monkeypatch.setattr(threading.Thread, "start", once)
    with pytest.raises(RuntimeError, match="new thread"):
        list(in_flight(read, range(1000), 3))
    assert len(asked) < 500
