"""A disk that fills up in mid-run: the run stops, nothing is half there, with room it goes on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import EXIT_UNFINISHED
from pipeline.ledger import Ledger
from pipeline.storage import open_store
from pipeline.storage.local import PART
from pipeline.verify import verify
from tests import runs

PAGE = 4096


@pytest.fixture(scope="module")
def whole(archive, tiny_bundle, tmp_path_factory):
    """What a run holds, and what half of its commits take of a disk, in the words of mount."""
    run = tmp_path_factory.mktemp("whole") / "run"
    runs.finished(runs.words(archive, run, tiny_bundle), run.parent / "log")
    files = sorted((p for p in run.rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    commits = [number for number, path in enumerate(files) if path.parent.name == "c"]
    half = files[: commits[len(commits) // 2]]
    pages = sum(-(-path.stat().st_size // PAGE) for path in half)
    folders = len(
        {folder for path in half for folder in path.parents if folder.is_relative_to(run)}
    )
    takes = {"size": PAGE * pages, "nr_inodes": len(half) + folders + 1}
    return SimpleNamespace(half=takes, content=runs.content(run))


@pytest.fixture
def disk(tmp_path):
    """A function that makes a small disk, or makes it larger."""
    if os.geteuid() != 0:
        pytest.skip("ONLY ROOT CAN MOUNT A SMALL DISK")
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def sized(bound: str, value: int) -> Path:
        options = f"{'remount,' * len(mounted)}{bound}={value}"
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("THIS MACHINE LETS NOBODY MOUNT A SMALL DISK")
        mounted[:] = [bound]
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("bound", ["size", "nr_inodes"])
def test_a_disk_that_fills_up_stops_the_run_and_with_room_it_goes_on(
    archive, tiny_bundle, whole, disk, tmp_path, bound
):
    run = disk(bound, whole.half[bound]) / "run"
    words = runs.words(archive, run, tiny_bundle)

    said = runs.finished(words, tmp_path / "log", EXIT_UNFINISHED)
    assert "free some space and run the same command again" in said
    found = verify(Ledger.open(open_store(str(run))))
    assert found.problems == []
    assert found.pending > 0
    assert not list(run.rglob(f"{PART}*"))
    before = runs.commits(run)

    disk(bound, whole.half[bound] * 4)  # the attempts that failed are noted, too
    runs.finished(words, tmp_path / "log")
    assert before.items() <= runs.commits(run).items()
    runs.assert_same(run, whole.content)
