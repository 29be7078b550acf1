"""A collection of odd and broken files from public test suites, beside good pictures.

MASKFLEET_CORPUS names it: a tar with files and a `manifest.jsonl`. It may not ship with the
project, so without it this is skipped; .ci/nightly runs it where it is there.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import psutil
import pytest

from pipeline.errors import EXIT_DONE, EXIT_REJECTIONS, REASONS
from pipeline.reader import open_run
from tests import runs
from tests.archives import filled, jpeg, png, unpacked

CORPUS = os.environ.get("MASKFLEET_CORPUS")
GOOD = {f"good/{n}.png": png(40 + n, 60, n) for n in range(8)} | {
    f"good/{n}.jpg": jpeg(300, 200 + n, n) for n in range(8)
}
MEMORY_MB = 4096  # the largest pictures within the limits have 256 Mpx

pytestmark = pytest.mark.skipif(CORPUS is None, reason="MASKFLEET_CORPUS names no collection")


@pytest.fixture
def hostile(tmp_path) -> Path:
    return unpacked(CORPUS, tmp_path / "corpus")


@pytest.mark.timeout(900)
def test_every_file_is_accounted_for_in_bounded_memory_and_good_masks_are_untouched(
    hostile, tiny_bundle, tmp_path
):
    alone = filled(tmp_path / "alone", GOOD)
    runs.finished(runs.words(alone, tmp_path / "clean", tiny_bundle), tmp_path / "log", EXIT_DONE)
    clean = runs.content(tmp_path / "clean")["masks"]
    filled(hostile, GOOD)

    peak = 0
    words = runs.words(hostile, tmp_path / "run", tiny_bundle)
    with runs.driver(words, tmp_path / "log") as driver:
        process = psutil.Process(driver.pid)
        while driver.alive:
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            runs.until(lambda: True, "a moment", every=0.2)
        assert driver.wait(600) == EXIT_REJECTIONS, driver.said

    run = open_run(str(tmp_path / "run"))
    reasons = Counter(row["reason"] for row in run.rejected.to_pylist())
    assert set(reasons) <= set(REASONS)
    masks = runs.content(tmp_path / "run")["masks"]
    assert {key: masks[key] for key in clean} == clean
    assert peak < MEMORY_MB * 1024**2
    runs.assert_sound(tmp_path / "run")
    print(f"{len(masks)} masks, {dict(reasons)}, {peak >> 20} MB")
