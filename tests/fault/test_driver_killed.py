"""Kill the driver, whenever, however often: the same command again ends in the same run."""

from __future__ import annotations

import random
import signal
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import EXIT_DONE, EXIT_REJECTIONS
from tests import runs
from tests.archives import filled, png
from tests.objects import mixed
from tests.pictures import blobs, encoded

PARTS = 3  # of the longest test, each below pytest's time-out
AT_ONCE = 2  # drivers side by side: as many as the smallest machine has cores
RACED = 4
"""Steps a run may have more or fewer: of its three fragments, two more may find `attempts` or
`masks.zarr/mask/c` missing while the first makes it, and each of them syncs what it then made."""


@pytest.fixture(scope="module")
def short_archive(tmp_path_factory) -> Path:
    return filled(tmp_path_factory.mktemp("short"), mixed(12))


def resumed(words: list[str], run: Path, log: Path) -> None:
    """Run to the end, and see that nothing committed was computed or written again."""
    before = runs.commits(run)
    runs.finished(words, log)
    assert_only_the_missing(run, before)


def assert_only_the_missing(run: Path, before: dict[int, str]) -> None:
    """What was committed before still is; the newest call did the others, once each."""
    after = runs.commits(run)
    assert before.items() <= after.items(), "a committed fragment was replaced"
    done = runs.this_call(run)
    assert (done["fragments"], done["adopted"]) == (len(after) - len(before), 0)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_between_any_two_steps_of_any_write_it_resumes_to_the_same_run(
    short_archive, tiny_bundle, tmp_path, part
):
    words = runs.words(short_archive, tmp_path / "oracle", tiny_bundle)
    steps = tmp_path / "steps"
    with runs.driver(words, tmp_path / "log", None, runs.record_steps, str(steps)) as driver:
        assert driver.wait() == EXIT_REJECTIONS, driver.said
    oracle, count = runs.content(tmp_path / "oracle"), len(steps.read_text().splitlines())
    assert count > 60

    failed = {}
    mine = range(1 + part, count + 1, PARTS)
    for first in range(0, len(mine), AT_ONCE):
        some = [tmp_path / str(step) for step in mine[first : first + AT_ONCE]]
        lines = [runs.words(short_archive, folder / "run", tiny_bundle) for folder in some]
        for folder in some:
            folder.mkdir()
        with ExitStack() as stack:
            killed = [
                stack.enter_context(
                    runs.driver(line, f / "log", None, runs.signal_at_step, int(f.name))
                )
                for f, line in zip(some, lines, strict=True)
            ]
            for folder, driver in zip(some, killed, strict=True):
                over = int(folder.name) > count - RACED  # it may have had fewer steps than that
                codes = {-signal.SIGKILL, EXIT_REJECTIONS} if over else {-signal.SIGKILL}
                assert driver.wait() in codes, (folder.name, count, driver.said)
            left = [runs.commits(folder / "run") for folder in some]
            resumed = [
                stack.enter_context(runs.driver(line, folder / "log"))
                for folder, line in zip(some, lines, strict=True)
            ]
            for folder, driver, before in zip(some, resumed, left, strict=True):
                try:
                    assert driver.wait() == EXIT_REJECTIONS, driver.said
                    assert_only_the_missing(folder / "run", before)
                    runs.assert_same(folder / "run", oracle)
                except AssertionError as error:
                    failed[folder.name] = str(error)[-500:]
    assert not failed, f"of {count} steps: {failed}"


@pytest.mark.timeout(300)  # a fragment killed twice goes picture by picture, each in a child
def test_killed_again_and_again_it_ends_in_the_same_run(archive, tiny_bundle, oracle, tmp_path):
    run, log, chance = tmp_path / "run", tmp_path / "log", random.Random(5)
    words = runs.words(archive, run, tiny_bundle)
    kills, seen = 0, {}
    while True:
        step = chance.randrange(3, 60)  # to make a run final takes 22
        with runs.driver(words, log, None, runs.signal_at_step, step) as driver:
            code = driver.wait()
        now = runs.commits(run)
        assert seen.items() <= now.items(), "a committed fragment was replaced"
        seen = now
        if code != -signal.SIGKILL:
            break
        kills += 1
    assert (code, kills > 3) == (EXIT_REJECTIONS, True), driver.said
    runs.assert_same(run, oracle)


@pytest.mark.parametrize("commits", [1, 9, 20])
def test_killed_right_after_a_commit_it_computes_only_what_is_missing(
    long_archive, tiny_bundle, long_oracle, tmp_path, commits
):
    run, log = tmp_path / "run", tmp_path / "log"
    words = runs.words(long_archive, run, tiny_bundle)
    with runs.driver(words, log) as driver:
        runs.until(lambda: runs.committed(run) >= commits, f"{commits} commits")
        driver.kill()

    resumed(words, run, log)
    runs.assert_same(run, long_oracle)


def test_killed_while_a_large_mask_is_half_written_it_keeps_the_half(tiny_bundle, tmp_path):
    tall = encoded(np.tile(blobs(300, 200, 1), (15, 1, 1)), "PNG")  # two regions of 4096 rows
    source = filled(tmp_path / "source", {"small.png": png(60, 50, 2), "tall.png": tall})
    misfit = ("--layout", "stacked", "--size", "60x50")  # has no place in the stack
    words = runs.words(source, tmp_path / "oracle", tiny_bundle, *misfit)
    runs.finished(words, tmp_path / "log", EXIT_DONE)
    oracle = runs.content(tmp_path / "oracle")
    run = tmp_path / "run"
    words = runs.words(source, run, tiny_bundle, *misfit)
    regions = run / "masks.zarr/large/1/0/c"

    second = (runs.signal_before, "link", "/large/1/0/c/1/0", signal.SIGKILL)
    with runs.driver(words, tmp_path / "log", None, *second) as driver:
        assert driver.wait() == -signal.SIGKILL, driver.said
    first = (regions / "0/0").stat()
    assert not (regions / "1/0").exists()

    runs.finished(words, tmp_path / "log", EXIT_DONE)
    runs.assert_same(run, oracle)
    assert (regions / "0/0").stat().st_ino == first.st_ino, "it was written again"
