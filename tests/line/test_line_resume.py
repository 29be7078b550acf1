"""Stopped, killed, doubled, grown: the same command again, and all is as if nothing had been."""

import contextlib
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import open_run
from pipeline.errors import (
    EXIT_DONE,
    EXIT_REJECTIONS,
    RunRefused,
    RunUnfinished,
    StorageDenied,
)
from pipeline.ledger import Ledger
from pipeline.status import status
from pipeline.storage import PREFLIGHT, LocalStore, open_store
from tests import archives
from tests.archives import filled, png, problems, segment, tree, uniform
from tests.bundles import InProcess, NoProbe
from tests.bundles import tiny_bundle as another_bundle
from tests.faultstore import WRITES, Killed, faulty
from tests.runs import commits, content


class Counting(InProcess):
    """This process; remembers which fragments it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def run(self, tasks, run_uri, stop):
        tasks = list(tasks)
        self.asked += [task.fragment for task in tasks]
        yield from super().run(tasks, run_uri, stop)


class Mortal(Counting):
    """Dies after so many fragments."""

    def __init__(self, receipts: int) -> None:
        super().__init__()
        self.left = receipts

    def run(self, tasks, run_uri, stop):
        for receipt in super().run(tasks, run_uri, stop):
            yield receipt
            self.left -= 1
            if not self.left:
                raise Killed


@pytest.fixture(scope="module", params=["tiny_bundle", "tiny_classifier"], ids=["masks", "classes"])
def bundle(request):
    """Both kinds of answers: they are committed and resumed alike."""
    return request.getfixturevalue(request.param)


# -- stopped and killed --------------------------------------------------------------------------


def test_after_a_kill_only_what_is_missing_is_computed(tmp_path, bundle, in_process):
    source, out = uniform(tmp_path / "in", 14), tmp_path / "out"
    segment(source, tmp_path / "undisturbed", bundle)

    with pytest.raises(Killed):
        segment(source, out, bundle, Mortal(2))
    before = commits(out)
    now = status(Ledger.open(open_store(str(out))))
    assert (now.planned, now.done + now.pending, now.finished) == (14, 14, False)

    place = Counting()
    outcome = segment(source, out, bundle, place)

    assert sorted([*before, *place.asked]) == [0, 1, 2, 3]
    assert commits(out).items() >= before.items()  # not one of them was written again
    assert outcome.receipt["this_call"]["images"] == 14 - now.done
    assert content(out) == content(tmp_path / "undisturbed")
    assert problems(out) == []


def test_a_stop_finishes_what_is_in_flight_and_says_how_to_go_on(tmp_path, tiny_bundle):
    source, out, stop = uniform(tmp_path / "in", 14), tmp_path / "out", threading.Event()

    class Stopped(Counting):
        def run(self, tasks, run_uri, stop):
            for receipt in super().run(tasks, run_uri, stop):
                stop.set()
                yield receipt

    with pytest.raises(RunUnfinished, match="run the same command again"):
        segment(source, out, tiny_bundle, Stopped(), stop)
    begun, done = (
        {path.name for path in (out / "attempts").iterdir()},
        {str(f) for f in commits(out)},
    )
    assert begun == done  # nothing was left half done
    assert 1 <= len(done) < 4

    place = Counting()
    assert segment(source, out, tiny_bundle, place).exit_code == EXIT_DONE
    assert not done & {str(f) for f in place.asked}
    assert problems(out) == []


def test_a_finished_run_does_nothing_when_it_is_called_again(tmp_path, tiny_bundle):
    source, out = uniform(tmp_path / "in", 5), tmp_path / "out"
    first = segment(source, out, tiny_bundle)
    before = {p: (out / p).read_bytes() for p in tree(out) if p != "receipt.json"}

    place = Counting()
    again = segment(source, out, tiny_bundle, place)

    assert place.asked == []
    assert again.counts == first.counts
    assert {p: (out / p).read_bytes() for p in tree(out) if p != "receipt.json"} == before


# -- every point where a driver can die ----------------------------------------------------------


def shape(out) -> set[str]:
    """The files of a run, without what tells of its accidents."""
    return {p for p in tree(out) if not p.startswith(("attempts/", PREFLIGHT))}


def writes_of(source, out, model) -> int:
    with faulty(out, -1, "killed_before", WRITES) as faults:
        segment(source, out, model, NoProbe())
    return len(faults.asked)


@pytest.fixture(scope="module")
def small(tmp_path_factory, bundle):
    """Five tiny pictures in two fragments; and a later state: one more, one less, one changed."""
    folder = tmp_path_factory.mktemp("small")
    sources = {}
    for state in ("fresh", "grown"):
        names = "abcde" if state == "fresh" else "abdef"
        seeds = {n: ord(n) + (n == "b" and state == "grown") for n in names}
        sources[state] = {f"{n}.png": png(16, 20, seed) for n, seed in seeds.items()}
    return SimpleNamespace(folder=folder, sources=sources, model=bundle)


def filled_exactly(folder, contents):
    shutil.rmtree(folder, ignore_errors=True)
    filled(folder, contents)
    for number, name in enumerate(sorted(contents)):  # etags are times: the same in every test
        os.utime(folder / name, ns=(10**18 + number, 10**18 + number + len(contents[name])))
    return folder


@pytest.mark.parametrize("way", ["killed_before", "killed_after"])
@pytest.mark.parametrize("state", ["fresh", "grown"])
def test_wherever_a_driver_dies_the_next_one_ends_where_an_undisturbed_one_would(
    small, tmp_path, in_process, state, way
):
    source = tmp_path / "in"
    base = tmp_path / "base"
    if state == "grown":
        segment(filled_exactly(source, small.sources["fresh"]), base, small.model, NoProbe())
    filled_exactly(source, small.sources[state])

    def begun(name):
        out = tmp_path / name
        if state == "grown":
            shutil.copytree(base, out)
        return out

    undisturbed = begun("undisturbed")
    count = writes_of(source, undisturbed, small.model)
    expected, files = content(undisturbed), shape(undisturbed)
    assert count >= 12

    for call in range(1, count + 1):
        out = begun(f"dies-at-{call}")
        with faulty(out, call, way, WRITES), pytest.raises(Killed):
            segment(source, out, small.model, NoProbe())
        segment(source, out, small.model, NoProbe())

        assert content(out) == expected, call
        assert shape(out) == files, call
        assert problems(out) == [], call


def test_a_driver_that_dies_again_and_again_gets_there_in_the_end(small, tmp_path, in_process):
    source = filled_exactly(tmp_path / "in", small.sources["fresh"])
    out, deaths = tmp_path / "out", 0
    while True:
        with faulty(out, 7, "killed_after", WRITES):  # every life is seven writes long
            try:
                segment(source, out, small.model, NoProbe())
            except Killed:
                deaths += 1
                assert deaths < 40
                continue
            break
    assert deaths > 2
    assert problems(out) == []


def test_a_fragment_that_was_begun_before_is_answered_in_a_child_the_same_way(tmp_path, bundle):
    source, out = archives.mixed(tmp_path / "in"), tmp_path / "out"
    knobs = {"fragment": {"images": 16}}
    segment(source, tmp_path / "undisturbed", bundle, **knobs)

    class Dies(InProcess):
        def run(self, tasks, run_uri, stop):
            Ledger.open(open_store(run_uri)).begin_attempt(0)
            raise Killed
            yield

    with pytest.raises(Killed):
        segment(source, out, bundle, Dies(), **knobs)
    segment(source, out, bundle, **knobs)

    assert content(out) == content(tmp_path / "undisturbed")
    assert problems(out) == []


@pytest.mark.parametrize("lost", ["final/images.parquet", "receipt.json", "overview.png"])
def test_access_lost_after_the_last_fragment_is_no_refusal(tmp_path, bundle, monkeypatch, lost):
    source, out = uniform(tmp_path / "in", 6), tmp_path / "out"

    def denied(store, path, data):
        if path == lost:
            raise StorageDenied(f"{store.uri}/{path}: access denied")
        write(store, path, data)

    write = LocalStore.replace
    monkeypatch.setattr(LocalStore, "replace", denied)
    with pytest.raises(RunUnfinished, match="access denied; when that is mended"):
        segment(source, out, bundle)

    monkeypatch.setattr(LocalStore, "replace", write)
    place = Counting()
    assert segment(source, out, bundle, place).exit_code == EXIT_DONE
    assert place.asked == []


# -- two drivers ---------------------------------------------------------------------------------


def test_two_drivers_on_one_run_waste_work_and_break_nothing(tmp_path, bundle, in_process):
    source = uniform(tmp_path / "in", 18)
    segment(source, tmp_path / "undisturbed", bundle)
    out, together = tmp_path / "out", threading.Barrier(2)

    def drive(_):
        together.wait()
        return segment(source, out, bundle)

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(drive, range(2)))

    assert [o.exit_code for o in outcomes] == [EXIT_DONE, EXIT_DONE]
    assert content(out) == content(tmp_path / "undisturbed")
    assert problems(out) == []


FROZEN = ["final/images.parquet", "final/fragments.parquet", "manifest/000.json"]


@pytest.mark.parametrize("frozen", FROZEN)
def test_a_driver_that_sleeps_before_a_final_write_while_another_adds_a_round_doubles_nothing(
    tmp_path, tiny_bundle, monkeypatch, frozen
):
    source, out = uniform(tmp_path / "in", 6), tmp_path / "out"
    asked = []

    def asleep(write):
        def woken(store, path, data):
            if path == frozen and not asked:
                asked.append(None)  # the other one writes there too
                segment(source, out, tiny_bundle)
                filled(source, {"new.png": png(30, 31, 78)})
                asked.append(segment(source, out, tiny_bundle))
            return write(store, path, data)

        return woken

    for name in ("create", "replace"):
        monkeypatch.setattr(LocalStore, name, asleep(getattr(LocalStore, name)))
    with contextlib.suppress(RunUnfinished):  # it may find the other's tables gone
        segment(source, out, tiny_bundle)

    place = Counting()
    again = segment(source, out, tiny_bundle, place)
    assert asked[1].counts.planned == again.counts.planned == 7
    assert place.asked == []
    assert keys_of(out) == sorted({f"{i:03}.png" for i in range(6)} | {"new.png"})
    assert problems(out) == []


# -- rounds --------------------------------------------------------------------------------------


def keys_of(out) -> list[str]:
    return sorted(open_run(str(out)).images["key"].to_pylist())


def test_a_grown_archive_costs_only_what_is_new_and_final_holds_the_newest(tmp_path, tiny_bundle):
    source = uniform(tmp_path / "in", 6)
    filled(source, {"bad.png": b"\x89PNG\r\n\x1a\n"})
    out = tmp_path / "out"
    first = segment(source, out, tiny_bundle)
    old = open_run(str(out)).mask("003.png")
    assert first.counts.rejected == {"truncated": 1}

    (source / "000.png").unlink()  # removed
    filled(source, {"003.png": png(64, 20, 77), "new.png": png(30, 31, 78)})  # changed and new
    os.utime(source / "001.png", ns=(5, 5))  # only touched
    os.utime(source / "bad.png", ns=(5, 5))
    place = Counting()
    second = segment(source, out, tiny_bundle, place)

    run_now = open_run(str(out))
    assert place.asked == [2]
    assert second.exit_code == EXIT_REJECTIONS
    assert keys_of(out) == [
        "001.png",
        "002.png",
        "003.png",
        "004.png",
        "005.png",
        "bad.png",
        "new.png",
    ]
    assert run_now.mask("003.png").shape == (64, 20) != old.shape
    assert run_now.row("003.png")["image_id"] == 7
    assert run_now.row("001.png")["image_id"] == 1
    live = set(run_now.images["image_id"].to_pylist())
    assert set(run_now.class_stats["image_id"].to_pylist()) < live
    assert (second.counts.planned, second.counts.done) == (7, 6)
    assert second.receipt["this_call"]["images"] == 2
    assert Ledger.open(open_store(str(out))).manifests() == [0, 1]
    now = status(Ledger.open(open_store(str(out))))
    assert (now.planned, now.done, now.pending, now.rounds) == (7, 6, 0, 2)
    assert problems(out) == []

    third = Counting()
    segment(source, out, tiny_bundle, third)
    assert third.asked == []
    assert Ledger.open(open_store(str(out))).manifests() == [0, 1]


def test_a_round_that_only_removes_leaves_nothing_to_compute(tmp_path, tiny_bundle):
    source, out = uniform(tmp_path / "in", 3), tmp_path / "out"
    segment(source, out, tiny_bundle)
    (source / "001.png").unlink()

    place = Counting()
    outcome = segment(source, out, tiny_bundle, place)

    assert place.asked == []
    assert keys_of(out) == ["000.png", "002.png"]
    assert (outcome.counts.planned, outcome.counts.done) == (2, 2)
    assert problems(out) == []


def test_most_of_an_archive_is_not_given_up_unless_somebody_says_so(tmp_path, tiny_bundle):
    source, out = uniform(tmp_path / "in", 5), tmp_path / "out"
    segment(source, out, tiny_bundle)
    before = tree(out)
    for path in sorted(source.iterdir())[:3]:
        path.unlink()

    with pytest.raises(RunRefused, match=r"3 of 5 images are no longer in .*--allow-removals"):
        segment(source, out, tiny_bundle)
    assert tree(out) == before
    (source / "000.png").write_bytes(png(20, 20, 0))

    assert segment(source, out, tiny_bundle).counts.planned == 3  # less than half may go


def test_an_archive_that_is_empty_now_leaves_an_empty_table(tmp_path, tiny_bundle):
    source, out = uniform(tmp_path / "in", 2), tmp_path / "out"
    segment(source, out, tiny_bundle)
    for path in source.iterdir():
        path.unlink()

    outcome = segment(source, out, tiny_bundle, allow_removals=True)

    assert (outcome.counts.planned, outcome.counts.done) == (0, 0)
    assert keys_of(out) == []
    assert problems(out) == []


def test_a_retry_tries_the_named_reason_again_and_nothing_else(tmp_path, tiny_bundle):
    source, out = uniform(tmp_path / "in", 4), tmp_path / "out"
    filled(source, {"empty.png": b""})
    missing = source / "002.png"

    class Hiding(InProcess):
        def run(self, tasks, run_uri, stop):
            hidden = missing.rename(tmp_path / "hidden")
            yield from super().run(tasks, run_uri, stop)
            hidden.rename(missing)

    first = segment(source, out, tiny_bundle, Hiding())
    assert first.counts.rejected == {"empty": 1, "vanished": 1}
    assert segment(source, out, tiny_bundle).counts == first.counts  # not without being asked

    place = Counting()
    second = segment(source, out, tiny_bundle, place, retry=["vanished"])

    assert second.counts.rejected == {"empty": 1}
    assert second.receipt["this_call"]["images"] == 1
    assert np.array_equal(open_run(str(out)).mask("002.png").shape, (40, 48))
    assert problems(out) == []


def test_a_limit_can_be_raised_later(tmp_path, tiny_bundle):
    source, out = uniform(tmp_path / "in", 6), tmp_path / "out"

    first = segment(source, out, tiny_bundle, limit=2)
    assert (first.counts.planned, first.receipt["left_out"]) == (2, 4)

    second = segment(source, out, tiny_bundle)
    assert second.counts.planned == 6
    assert keys_of(out) == [f"{i:03}.png" for i in range(6)]
    segment(source, tmp_path / "whole", tiny_bundle)
    one, other = open_run(str(out)), open_run(str(tmp_path / "whole"))
    assert all(np.array_equal(one.mask(k), other.mask(k)) for k in keys_of(out))
    assert problems(out) == []


def test_rounds_of_shards_and_tables_go_by_key(tmp_path, tiny_bundle):
    def shards(seed):
        return {
            "s.tar": archives.tar_of({"1.png": png(20, 20, 1), "2.png": png(20, 20, seed)}),
            "t.parquet": archives.parquet_of([png(20, 20, 3), png(20, 20, seed)]),
        }

    source, out = filled(tmp_path / "in", shards(4)), tmp_path / "out"
    segment(source, out, tiny_bundle)
    filled(source, shards(5))

    outcome = segment(source, out, tiny_bundle)

    # Of a tar the bytes tell what has changed; rows of a table are all read again.
    assert outcome.receipt["this_call"]["images"] == 3
    assert outcome.counts.planned == 4
    segment(source, tmp_path / "fresh", tiny_bundle)
    one, other = open_run(str(out)), open_run(str(tmp_path / "fresh"))
    for key in keys_of(out):
        assert np.array_equal(one.mask(key), other.mask(key))
    assert problems(out) == []


def test_a_stacked_run_grows_too(tmp_path, tiny_bundle):
    source, out = uniform(tmp_path / "in", 5), tmp_path / "out"
    segment(source, out, tiny_bundle, layout="stacked")
    filled(source, {f"1{i:02}.png": png(40, 48, i) for i in range(40)})

    segment(source, out, tiny_bundle, layout="stacked")

    assert len(keys_of(out)) == 45
    assert problems(out) == []


# -- whose folder it is --------------------------------------------------------------------------


def test_a_run_of_another_model_or_config_is_refused_and_left_alone(tmp_path, tiny_bundle):
    source, out = uniform(tmp_path / "in", 2), tmp_path / "out"
    segment(source, out, tiny_bundle)
    before = {p: (out / p).read_bytes() for p in tree(out)}

    with pytest.raises(RunRefused, match="model"):
        segment(source, out, another_bundle(tmp_path / "b", seed=7))
    with pytest.raises(RunRefused, match=r"decode\.max_pixels"):
        segment(source, out, tiny_bundle, decode={"max_pixels": 99})

    assert {p: (out / p).read_bytes() for p in tree(out)} == before


def test_a_run_whose_json_is_damaged_or_from_the_future_is_refused(tmp_path, tiny_bundle):
    source, out = uniform(tmp_path / "in", 2), tmp_path / "out"
    segment(source, out, tiny_bundle)
    text = (out / "run.json").read_text()

    (out / "run.json").write_text(text[:50])
    with pytest.raises(RunRefused, match="damaged"):
        segment(source, out, tiny_bundle)

    (out / "run.json").write_text(text.replace('"budget": ', '"budget": 1'))
    with pytest.raises(RunRefused, match="not what was written"):
        segment(source, out, tiny_bundle)

    (out / "run.json").write_text(json.dumps({**json.loads(text), "format_version": 99}))
    with pytest.raises(RunRefused, match="format version 99"):
        segment(source, out, tiny_bundle)
