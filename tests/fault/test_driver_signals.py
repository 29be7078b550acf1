"""A driver that is asked to stop, one that is frozen, and two at the same time."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pipeline.errors import EXIT_REJECTIONS, EXIT_UNFINISHED
from tests import runs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_once_to_stop_it_finishes_what_is_in_flight_and_can_go_on(
    long_archive, tiny_bundle, long_oracle, tmp_path, number
):
    run, log = tmp_path / "run", tmp_path / "log"
    words = runs.words(long_archive, run, tiny_bundle)
    with runs.driver(words, log) as driver:
        runs.until(lambda: runs.committed(run) >= 3, "three commits")
        driver.signal(number)
        assert driver.wait() == EXIT_UNFINISHED, driver.said
    assert "stopping after the fragments in flight" in driver.said
    assert "run the same command again" in driver.said
    stopped = runs.commits(run)
    assert len(stopped) < len(long_oracle["fragments"])
    assert not list((run / "masks.zarr/mask/c").glob(".tmp-*"))

    runs.finished(words, log)
    runs.assert_went_on(run, stopped, long_oracle)


def test_asked_twice_to_stop_it_stops_at_once(archive, tiny_bundle, oracle, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    words = runs.words(archive, run, tiny_bundle)
    # Four are in flight: before the sixth is begun two have landed, whoever was first.
    with runs.driver(words, log, None, runs.hang_before, "link", "/c/5") as driver:
        runs.until(lambda: runs.committed(run) >= 1, "a commit")
        driver.signal(signal.SIGINT)
        runs.until(lambda: "once more to stop at once" in driver.said, "its answer")
        assert driver.alive
        driver.signal(signal.SIGINT)
        assert driver.wait(5) == EXIT_UNFINISHED

    runs.finished(words, log)
    runs.assert_same(run, oracle)


def test_a_writer_that_was_frozen_in_its_commit_adopts_what_another_driver_committed(
    archive, tiny_bundle, oracle, tmp_path
):
    run = tmp_path / "run"
    words = runs.words(archive, run, tiny_bundle)
    frozen = (runs.signal_before, "link", "/c/3", signal.SIGSTOP)
    with runs.driver(words, tmp_path / "late", None, *frozen) as late:
        runs.until(lambda: is_stopped(late.pid), "the writer to freeze")
        assert 3 not in runs.commits(run)

        runs.finished(words, tmp_path / "log")
        made = runs.commits(run)
        runs.assert_same(run, oracle)

        late.signal(signal.SIGCONT)
        assert late.wait() == EXIT_REJECTIONS, late.said
    assert runs.commits(run) == made
    # what was in flight beside it, with two workers: one more segmented, two fetched or stored
    assert 1 <= runs.this_call(run)["adopted"] <= 4
    runs.assert_same(run, oracle)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_two_drivers_at_once_end_in_one_run(long_archive, tiny_bundle, long_oracle, tmp_path):
    run = tmp_path / "run"
    words = runs.words(long_archive, run, tiny_bundle)
    with (
        runs.driver(words, tmp_path / "a") as a,
        runs.driver(words, tmp_path / "b") as b,
    ):
        assert (a.wait(), b.wait()) == (EXIT_REJECTIONS, EXIT_REJECTIONS), a.said + b.said
    runs.assert_same(run, long_oracle)


def test_a_second_driver_joins_a_run_in_the_middle(
    long_archive, tiny_bundle, long_oracle, tmp_path
):
    run = tmp_path / "run"
    words = runs.words(long_archive, run, tiny_bundle)
    with runs.driver(words, tmp_path / "a") as a:
        runs.until(lambda: runs.committed(run) >= 2, "two commits")
        first = runs.commits(run)
        with runs.driver(words, tmp_path / "b") as b:
            assert (a.wait(), b.wait()) == (EXIT_REJECTIONS, EXIT_REJECTIONS), a.said + b.said
    assert first.items() <= runs.commits(run).items()
    runs.assert_same(run, long_oracle)
