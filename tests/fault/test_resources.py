"""Too little disk or memory: a run stops, nothing is half there, and with more of it it goes on."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import open_run
from pipeline.errors import EXIT_DONE, EXIT_REFUSED, EXIT_REJECTIONS, EXIT_UNFINISHED
from pipeline.ledger import Ledger
from pipeline.storage import open_store
from pipeline.storage.local import PART
from pipeline.verify import verify
from tests import poisons, runs
from tests.archives import filled, jpeg
from tests.conftest import OBJECT_STORE_BYTES

PAGE = 4096
MB = 1024**2
GROUPS = (
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),  # version 1
    ("/sys/fs/cgroup", "memory.max"),
)


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


def mounted(folder: Path, options: str) -> bool:
    """Whether a disk in memory is now mounted there so."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(mount, check=False, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A function that makes a small disk, or makes it larger."""
    if os.geteuid() != 0:
        pytest.skip("ONLY ROOT CAN MOUNT A SMALL DISK")
    folder, bounds = tmp_path / "disk", []
    folder.mkdir()

    def sized(bound: str, value: int) -> Path:
        if not mounted(folder, f"{'remount,' * len(bounds)}{bound}={value}"):
            pytest.skip("THIS MACHINE LETS NOBODY MOUNT A SMALL DISK")
        bounds[:] = [bound]
        return folder

    yield sized
    if bounds:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("bound", ["size", "nr_inodes"])
def test_a_disk_that_fills_up_stops_the_run_and_with_room_it_goes_on(
    archive, tiny_bundle, whole, disk, tmp_path, bound
):
    run = disk(bound, whole.half[bound]) / "run"
    words = runs.words(archive, run, tiny_bundle, "--compute.workers", "1")

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


def test_a_disk_that_becomes_read_only_stops_the_run_and_once_writable_it_goes_on(
    long_archive, tiny_bundle, long_oracle, disk, tmp_path
):
    """As the kernel does it to a disk that fails."""
    folder = disk("size", 500 * MB)
    run = folder / "run"
    words, log = runs.words(long_archive, run, tiny_bundle), tmp_path / "log"
    with runs.driver(words, log) as driver:
        runs.until(lambda: runs.committed(run) >= 2, "two commits")
        # what is being written to cannot be made read-only
        runs.until(lambda: mounted(folder, "remount,ro"), "a moment in which nothing is written")
        assert driver.wait() == EXIT_UNFINISHED, driver.said
    assert "Read-only file system; when that is mended, run the same command again" in driver.said
    before = runs.commits(run)
    assert 2 <= len(before) < len(long_oracle["fragments"])
    assert verify(Ledger.open(open_store(str(run)))).problems == []

    assert mounted(folder, "remount,rw")
    runs.finished(words, log)
    assert before.items() <= runs.commits(run).items()
    runs.assert_same(run, long_oracle)


def test_without_room_for_rays_session_a_run_is_refused_and_told_so(
    archive, tiny_bundle, disk, tmp_path
):
    folder = disk("size", MB)
    (folder / "full").write_bytes(bytes(MB - PAGE))
    words = runs.words(archive, tmp_path / "run", tiny_bundle, "--on", "local")
    with tempfile.TemporaryDirectory(prefix="mf-") as short:  # Ray's sockets want a short path
        link = Path(short, "t")
        link.symlink_to(folder)
        with runs.command(words, environment={"RAY_TMPDIR": str(link)}) as driver:
            assert driver.ended(100) == EXIT_REFUSED, driver.out + driver.err
    assert "where Ray keeps its session, has 0 MB left" in driver.err
    assert "Traceback" not in driver.err


# -- ports -------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_where_rays_usual_ports_are_taken_a_ray_of_its_own_takes_others(
    archive, tiny_bundle, tmp_path
):
    usual = (6379, 8265, 8076, 10001)  # GCS, dashboard, object manager, client
    with ExitStack() as taken:
        for port in usual:
            listening = taken.enter_context(socket.socket())
            with suppress(OSError):  # somebody else has it: as good
                listening.bind(("127.0.0.1", port))
                listening.listen()
        with runs.command(
            runs.words(archive, tmp_path / "run", tiny_bundle, "--on", "local")
        ) as driver:
            assert driver.ended(200) == EXIT_REJECTIONS, driver.out + driver.err
    runs.assert_sound(tmp_path / "run")


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_encoded_pictures_of_several_times_rays_object_store_pass_through_it(
    ray_gpu_nodes, tiny_bundle, tmp_path
):
    """What does not fit is spilled to disk, and Ray Data holds back what would come next."""
    behind = bytes(24 * MB)  # what decoders leave alone: much to carry, little to compute
    assert 40 * len(behind) > 3 * 2 * OBJECT_STORE_BYTES
    pictures = {f"{number}.jpg": jpeg(60, 80, number) + behind for number in range(40)}
    source = filled(tmp_path / "in", pictures)
    held = tmp_path / "held" / "run"
    words = runs.words(source, held, tiny_bundle, "--fragment.images", "2")
    runs.finished(words, tmp_path / "log", EXIT_DONE)

    run = tmp_path / "run"
    words = runs.words(source, run, tiny_bundle, "--fragment.images", "2")
    with runs.command([*words, "--on", ray_gpu_nodes.address]) as driver:
        assert driver.ended(200) == EXIT_DONE, driver.out + driver.err
    runs.assert_same(run, runs.content(held))


@pytest.fixture
def bounded():
    """A function that makes a control group of so many megabytes, for drivers to join."""
    made = []

    def group(megabytes: int) -> str:
        for top, limit in GROUPS:
            folder = Path(top) / f"maskfleet-{secrets.token_hex(4)}"
            try:
                folder.mkdir()
                made.append(folder)
                (folder / limit).write_text(str(megabytes * MB))
            except OSError:  # no such version, no rights, or the controller is another's
                continue
            return str(folder)
        pytest.skip("THIS MACHINE LETS NOBODY BOUND THE MEMORY OF A PROCESS")

    yield group
    for folder in made:
        runs.until(lambda folder=folder: not (folder / "cgroup.procs").read_text(), "its processes")
        folder.rmdir()


def join(group: str) -> None:
    """Bound this process, and let it fall for what is decoded."""
    poisons.spread()
    Path(group, "cgroup.procs").write_text(str(os.getpid()))


def test_an_image_for_which_the_kernel_kills_is_found_and_rejected(tiny_bundle, bounded, tmp_path):
    good = {f"good-{number}.jpg": jpeg(60, 80, number) for number in range(3)}
    bad = {"good-1-hungry.jpg": poisons.poison("decode", b"GULP", jpeg(60, 80, 9))}
    source, run = filled(tmp_path / "in", {**good, **bad}), tmp_path / "run"
    words, log = runs.words(source, run, tiny_bundle), tmp_path / "log"
    starved = (poisons.everywhere(tmp_path / "start", poisons.spread), join, bounded(900))

    with runs.driver(words, log, *starved) as driver:
        assert driver.wait() == -signal.SIGKILL, driver.said
    with runs.driver(words, log, *starved) as driver:
        assert driver.wait() == EXIT_REJECTIONS, driver.said

    (row,) = open_run(str(run)).rejected.to_pylist()
    assert (row["key"], row["station"], row["reason"]) == (*bad, "decode", "killed_decode")
    assert "with exit -9" in row["detail"]
    runs.assert_sound(run)


def test_a_machine_with_too_little_memory_is_told_so_and_nothing_is_written(
    archive, tiny_bundle, bounded, tmp_path
):
    words = runs.words(archive, tmp_path / "run", tiny_bundle)
    # Hardly less than the 128 that it wants, for it needs some to say so.
    with runs.driver(words, tmp_path / "log", None, join, bounded(125)) as driver:
        assert driver.wait() == EXIT_REFUSED, driver.said

    assert "this machine has 125 MB" in driver.said
    assert "more memory" in driver.said
    assert not list((tmp_path / "run").rglob("*"))
