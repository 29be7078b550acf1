"""An image that kills or hangs its process costs one image; the run goes on."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline import open_run
from pipeline.errors import EXIT_BUG, EXIT_DONE, EXIT_REJECTIONS, EXIT_UNFINISHED
from tests import runs
from tests.archives import filled, jpeg, png
from tests.hostile import ends_its_reader
from tests.pictures import parquet_of
from tests.poisons import everywhere, poison, spread, spread_further, stop_children

GOOD = {f"good-{number}.jpg": jpeg(60, 80, number) for number in range(4)}
PATIENT = ("--compute.no-progress-s", "60", "--compute.image-timeout-s", "3")
MEMORY = ("--compute.image-memory-mb", "512")


@pytest.fixture
def place(tmp_path, tiny_bundle):
    """Where a run over good and poisoned pictures, all in one fragment, is called repeatedly."""
    source, run = tmp_path / "source", tmp_path / "run"
    environment = everywhere(tmp_path / "start", spread_further)

    def words(*flags: str) -> list[str]:
        return runs.words(source, run, tiny_bundle, *flags)

    def driver(*flags: str, log: str = "log"):
        return runs.driver(words(*flags), tmp_path / log, environment, spread_further)

    def called(*flags: str) -> int:
        with driver(*flags) as started:
            code = started.wait()
            runs.until(lambda: not children(run), "its children to end", 5)
            called.said = started.said
            return code

    def hangs(process: psutil.Process) -> bool:
        return (tmp_path / "start" / str(process.pid)).exists()

    return SimpleNamespace(
        source=source, run=run, words=words, driver=driver, called=called, hangs=hangs
    )


@pytest.fixture(scope="module")
def clean(tiny_bundle, tmp_path_factory):
    """What a run over the good pictures alone holds."""
    folder = tmp_path_factory.mktemp("clean")
    words = runs.words(filled(folder / "in", GOOD), folder / "run", tiny_bundle)
    runs.finished(words, folder / "log", EXIT_DONE)
    return runs.content(folder / "run")


def children(run: Path) -> list[psutil.Process]:
    """The careful children of a run, whoever their parent is by now."""
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if {"pipeline.careful", str(run)} <= set(p.info["cmdline"] or ())]


def readers(start: Path) -> list[psutil.Process]:
    """Processes that read tables and fall for what is spread there, whoever their parent is."""
    found = psutil.process_iter(["cmdline", "environ"])
    return [
        p
        for p in found
        if "pipeline.apart" in (p.info["cmdline"] or ())
        and str(start) in (p.info["environ"] or {}).get("PYTHONPATH", "")
    ]


def rejections(run: Path) -> dict[str, tuple[str, str]]:
    rows = open_run(str(run)).rejected.to_pylist()
    return {row["key"]: (row["station"], row["reason"]) for row in rows}


def assert_good_as_in(clean, run: Path) -> None:
    """Sound, and the good pictures have the masks they have without the bad ones."""
    runs.assert_sound(run)
    mine, places = runs.content(run), ("image_id", "uri", "etag", "pixel_start")
    assert mine["masks"] == clean["masks"]
    done = [row for row in mine["images"] if row["status"] == "done"]
    assert runs.less(done, places) == runs.less(clean["images"], places)


def attempts(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "attempts/0").iterdir())


# -- what a poison does, and where ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "first_end", "verdicts"),
    [
        (b"KILL", -signal.SIGABRT, (("decode", "killed_decode"), ("predict", "killed_predict"))),
        (b"HANG", EXIT_UNFINISHED, (("decode", "timeout"), ("predict", "timeout"))),
        # of a tile that does not fit the model says so itself
        (b"EATS", -signal.SIGKILL, (("decode", "killed_decode"), ("predict", "too_large"))),
    ],
    ids=lambda value: value.decode() if isinstance(value, bytes) else "",
)
def test_two_poisons_in_a_fragment_cost_two_images(place, clean, deed, first_end, verdicts):
    bad = {
        "good-1-decode.jpg": poison("decode", deed, jpeg(60, 80, 8)),
        "good-2-predict.jpg": poison("predict", deed, jpeg(60, 80, 9)),
    }
    filled(place.source, {**GOOD, **bad})

    assert place.called("--compute.no-progress-s", "5", *MEMORY) == first_end
    assert place.called(*PATIENT, *MEMORY) == EXIT_REJECTIONS, place.called.said

    assert rejections(place.run) == dict(zip(bad, verdicts, strict=True))
    assert attempts(place.run) == ["0", "1"]
    assert_good_as_in(clean, place.run)


@pytest.mark.timeout(240)  # Ray's start, and a child's, on a crowded machine
def test_on_ray_an_image_that_kills_its_worker_is_rejected_within_one_call(
    clean, tiny_bundle, tmp_path
):
    bad = {"good-1-marked.jpg": poison("decode", b"KILL", jpeg(60, 80, 9))}
    source, run = filled(tmp_path / "in", {**GOOD, **bad}), tmp_path / "run"
    environment = everywhere(tmp_path / "start", spread)

    with runs.command(
        runs.words(source, run, tiny_bundle, "--on", "local"), environment=environment
    ) as driver:
        assert driver.ended() == EXIT_REJECTIONS, driver.out + driver.err

    assert rejections(run) == {"good-1-marked.jpg": ("decode", "killed_decode")}
    assert attempts(run) == ["0", "1"]
    assert_good_as_in(clean, run)
    assert not children(run)


@pytest.mark.timeout(240)  # Ray's start, and a child's, on a crowded machine
@pytest.mark.parametrize("where", ["process", "local"])
def test_a_table_that_kills_its_reader_costs_its_rows_from_there_on(
    clean, tiny_bundle, tmp_path, where
):
    rows = [jpeg(60, 80, 7), poison("read", b"KILL", jpeg(60, 80, 8)), jpeg(60, 80, 9)]
    source = filled(tmp_path / "in", {**GOOD, "table.parquet": parquet_of(rows)})
    (source / "ends_its_reader.parquet").write_bytes(ends_its_reader())
    run, start = tmp_path / "run", tmp_path / "start"

    with runs.command(
        runs.words(source, run, tiny_bundle, "--on", where),
        environment=everywhere(start, spread),
    ) as driver:
        runs.until(lambda: readers(start), "a reader", every=0.05)
        assert driver.ended() == EXIT_REJECTIONS, driver.out + driver.err

    assert rejections(run) == {
        "ends_its_reader.parquet": ("plan", "corrupt"),
        "table.parquet#1": ("fetch", "corrupt"),
        "table.parquet#2": ("fetch", "corrupt"),
    }
    runs.assert_sound(run)
    masks = runs.content(run)["masks"]
    assert masks.items() >= clean["masks"].items()
    assert masks.keys() - clean["masks"].keys() == {"table.parquet#0"}
    assert attempts(run) == ["0"]
    assert not readers(start)


# -- what is no kill -----------------------------------------------------------------------------


def test_a_bug_met_in_a_child_is_a_bug_and_rejects_nothing(place):
    bad = poison("predict", b"FAIL", jpeg(60, 80, 9))
    filled(place.source, {**GOOD, "good-1-marked.jpg": bad})

    assert place.called() == EXIT_BUG
    assert place.called() == EXIT_BUG

    assert attempts(place.run) == ["0", "1"]
    assert "ZeroDivisionError: a bug" in place.called.said
    assert "in a child process" in place.called.said
    assert runs.commits(place.run) == {}


def test_a_store_that_fails_a_child_rejects_nothing_and_stops_the_run(tiny_bundle, tmp_path):
    pictures = {"small.png": png(60, 50, 2), "tall.png": png(300, 200, 1)}
    source = filled(tmp_path / "source", pictures)
    misfit = ("--layout", "stacked", "--size", "60x50")  # large: written where it is segmented
    runs.finished(
        runs.words(source, tmp_path / "oracle", tiny_bundle, *misfit), tmp_path / "log", EXIT_DONE
    )
    run = tmp_path / "run"
    words = runs.words(source, run, tiny_bundle, *misfit)
    first = (runs.signal_before, "link", "/large/1/0/c/0/0", signal.SIGKILL)
    with runs.driver(words, tmp_path / "first", None, *first) as driver:
        assert driver.wait() == -signal.SIGKILL, driver.said
    shutil.rmtree(run / "masks.zarr/large")
    (run / "masks.zarr/large").touch()  # so that nothing can be written below it

    said = runs.finished(words, tmp_path / "second", EXIT_UNFINISHED)
    assert "masks.zarr/large" in said
    assert "run the same command again" in said
    assert runs.commits(run) == {}

    (run / "masks.zarr/large").unlink()
    runs.finished(words, tmp_path / "third", EXIT_DONE)
    assert attempts(run) == ["0", "1", "2"]
    runs.assert_same(run, runs.content(tmp_path / "oracle"))


def test_memory_that_runs_out_stops_the_run_and_the_second_call_finds_the_image(place, clean):
    bad = poison("decode", b"LACK", jpeg(60, 80, 9))
    filled(place.source, {**GOOD, "good-1-marked.jpg": bad})

    assert place.called() == EXIT_UNFINISHED
    assert "memory ran out (MemoryError('asked for too much'))" in place.called.said
    assert "fewer --compute.workers" in place.called.said
    assert place.called() == EXIT_REJECTIONS

    assert rejections(place.run) == {"good-1-marked.jpg": ("decode", "killed_decode")}
    assert_good_as_in(clean, place.run)


def test_a_child_that_cannot_start_stops_the_run_and_rejects_nothing(place, tmp_path):
    bad = poison("decode", b"KILL", jpeg(60, 80, 9))
    filled(place.source, {**GOOD, "good-1-marked.jpg": bad})
    assert place.called() == -signal.SIGABRT

    words, environment = place.words(), everywhere(tmp_path / "short", stop_children)
    with runs.driver(words, tmp_path / "second", environment) as driver:
        assert driver.wait() == EXIT_UNFINISHED, driver.said
    assert "ended before it could begin (exit -9)" in driver.said
    assert "run the same command again with fewer --compute.workers" in driver.said
    assert runs.commits(place.run) == {}


# -- the child and its parent --------------------------------------------------------------------


@pytest.mark.parametrize("end", ["SIGKILL", "interrupted twice", "stuck"])
def test_a_child_that_hangs_ends_with_its_parent(place, end):
    bad = {
        "a.jpg": poison("decode", b"KILL", jpeg(60, 80, 9)),  # ends the first attempt at once
        "b.jpg": poison("decode", b"HANG", jpeg(60, 80, 8)),
    }
    filled(place.source, bad)
    assert place.called() == -signal.SIGABRT

    flags = ("--compute.no-progress-s", "8") if end == "stuck" else ()
    with place.driver(*flags, log="second") as driver:
        if end != "stuck":
            runs.until(lambda: any(map(place.hangs, children(place.run))), "a child that hangs")
            # a terminal's Ctrl-C is for a group of processes: it is not for the child
            assert all(os.getpgid(child.pid) == child.pid for child in children(place.run))
        if end == "SIGKILL":
            driver.kill()
        elif end == "interrupted twice":
            driver.signal(signal.SIGINT)
            runs.until(lambda: "once more to stop at once" in driver.said, "its answer")
            driver.signal(signal.SIGINT)
            assert driver.wait() == EXIT_UNFINISHED
        else:
            assert driver.wait() == EXIT_UNFINISHED
            assert "nothing has moved" in driver.said
    runs.until(lambda: not children(place.run), "the child to end", 5)
