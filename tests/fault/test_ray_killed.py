"""Kill what Ray runs: an actor or a node costs time, a driver one more call, no one an image."""

from __future__ import annotations

import signal
from contextlib import suppress

import psutil
import pytest

from pipeline.errors import EXIT_REJECTIONS, EXIT_UNFINISHED
from tests import runs

pytestmark = pytest.mark.timeout(240)
IN_FLIGHT = 2  # fragments that an actor may hold
RECOVERY_S = 180.0  # Ray notices a lost node after 15 s or more, then starts actors anew


def kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def is_agent(process: psutil.Process) -> bool:
    """Two agents without work look for their raylet once a minute only."""
    if process.name() in ("raylet", "gcs_server"):
        return False
    return "agent" in " ".join(process.cmdline()).lower()


def below(driver: runs.Command) -> list[psutil.Process]:
    """What runs below a driver, but for agents."""
    found = psutil.Process(driver.pid).children(recursive=True)
    return [process for process in found if not is_agent(process)]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, 60)  # one that was just starting looks late
    assert not left, "Ray outlives its driver"


def test_actors_killed_at_several_points_cost_no_image(
    ray_own_nodes, long_archive, tiny_bundle, long_oracle, tmp_path
):
    run = tmp_path / "run"
    words = runs.words(long_archive, run, tiny_bundle, "--on", ray_own_nodes.address)
    with runs.command(words) as driver:
        for commits in (1, 8):
            runs.until(
                lambda n=commits: runs.committed(run) >= n or driver.poll() is not None,
                f"{commits} commits",
            )
            killed = runs.actors(*ray_own_nodes.raylets)[:1]
            assert killed, f"no actor was alive after {commits} commits"
            before = runs.commits(run)
            kill(killed[0])
        assert driver.ended(RECOVERY_S) == EXIT_REJECTIONS, driver.out + driver.err

    assert before.items() <= runs.commits(run).items()
    assert runs.this_call(run)["adopted"] == 0
    assert runs.rework(run) <= 2 * IN_FLIGHT
    runs.assert_same(run, long_oracle)


def test_a_driver_on_this_machines_ray_is_killed_and_the_run_goes_on(
    long_archive, tiny_bundle, long_oracle, tmp_path
):
    run = tmp_path / "run"
    words = runs.words(long_archive, run, tiny_bundle)
    with runs.command([*words, "--on", "local"]) as driver:
        runs.until(lambda: runs.committed(run) >= 2 or driver.poll() is not None, "two commits")
        workers = below(driver)
        assert len(workers) > 3
        driver.kill()
        assert driver.ended() == -signal.SIGKILL
    assert_gone(workers)
    before = runs.commits(run)
    assert len(before) < len(long_oracle["fragments"])

    runs.finished(words, tmp_path / "log")
    runs.assert_went_on(run, before, long_oracle)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_once_to_stop_a_ray_run_finishes_what_was_begun_and_begins_nothing_more(
    long_archive, tiny_bundle, long_oracle, tmp_path, number
):
    run = tmp_path / "run"
    words = runs.words(long_archive, run, tiny_bundle)
    with runs.command([*words, "--on", "local"]) as driver:
        runs.until(lambda: runs.committed(run) >= 3 or driver.poll() is not None, "three commits")
        workers = below(driver)
        driver.send_signal(number)
        assert driver.ended(60) == EXIT_UNFINISHED, driver.out + driver.err
    assert "Traceback" not in driver.err
    assert "run the same command again" in driver.err
    assert_gone(workers)
    assert runs.rework(run) == 0, "work on a fragment was begun and given up"
    stopped = runs.commits(run)
    assert len(stopped) < len(long_oracle["fragments"])

    runs.finished(words, tmp_path / "log")
    runs.assert_went_on(run, stopped, long_oracle)


def test_asked_twice_to_stop_a_driver_with_a_ray_of_its_own_ends_at_once_and_leaves_nothing_behind(
    archive, tiny_bundle, oracle, tmp_path
):
    run = tmp_path / "run"
    words = runs.words(archive, run, tiny_bundle)
    with runs.command([*words, "--on", "local"]) as driver:
        runs.until(lambda: runs.committed(run) >= 1 or driver.poll() is not None, "a commit")
        workers = below(driver)
        for _ in range(2):
            driver.send_signal(signal.SIGINT)
        assert driver.ended(60) in {EXIT_UNFINISHED, EXIT_REJECTIONS}, driver.out + driver.err
    assert "Traceback" not in driver.err
    assert_gone(workers)
    before = runs.commits(run)

    runs.finished(words, tmp_path / "log")
    assert before.items() <= runs.commits(run).items()
    runs.assert_same(run, oracle)


def test_a_node_killed_in_the_middle_costs_no_image(
    ray_own_nodes, long_archive, tiny_bundle, long_oracle, tmp_path
):
    """The last test of this file: it leaves one node."""
    run = tmp_path / "run"
    words = runs.words(long_archive, run, tiny_bundle, "--compute.workers", "3")
    with runs.command([*words, "--on", ray_own_nodes.address]) as driver:
        runs.until(lambda: runs.committed(run) >= 2 or driver.poll() is not None, "two commits")
        before = runs.commits(run)
        ray_own_nodes.kill(1)
        assert len(runs.commits(run)) < len(long_oracle["fragments"]), "too late to matter"
        assert driver.ended(RECOVERY_S) == EXIT_REJECTIONS, driver.out + driver.err

    assert before.items() <= runs.commits(run).items()
    runs.assert_same(run, long_oracle)
    assert runs.rework(run) <= 3 * IN_FLIGHT  # if all three actors were on that node
