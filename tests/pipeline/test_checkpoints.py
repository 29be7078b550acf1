"""States on storage: the furthest whole one is found, whatever happened to the others."""

import itertools
import os
from pathlib import Path

import pytest
import torch

from models.training.states import State
from pipeline.checkpoints import ABANDONED_S, Checkpoints
from pipeline.errors import StorageBusy
from pipeline.patience import patiently
from pipeline.storage import LocalStore
from tests.archives import tree

WEIGHTS, FACTS = "state.safetensors", "state.json"


def state(done: int) -> State:
    """A model whose weights say how far it is."""
    weights = {"layer.weight": torch.full((8, 8), float(done))}
    return State(
        recipe={"batch": 4},
        epoch=3,
        done=done,
        best_figure=0.5,
        reports_since=1,
        model=weights,
        mean={"layer.weight": torch.zeros(8, 8)},
        best={},
        optimizer={"layer.weight/step": torch.tensor(float(done))},
    )


@pytest.fixture
def place(tmp_path):
    return tmp_path / "trainings" / "t"


@pytest.fixture
def checkpoints(place):
    return Checkpoints(str(place), "call-a")


def saved(checkpoints, *steps) -> list[Path]:
    """Their folders."""
    return [Path(checkpoints._store.uri) / checkpoints.save(state(done)) for done in steps]


def folders(place) -> set[str]:
    return {str(Path(path).parent) for path in tree(place) if path.endswith(FACTS)}


def test_a_training_that_has_not_begun_has_none(checkpoints):
    assert checkpoints.newest() is None
    checkpoints.prune()


def test_the_furthest_state_comes_back_as_it_was(checkpoints, place):
    saved(checkpoints, 4, 12, 8)

    found = checkpoints.newest()

    assert (found.done, found.epoch, found.best_figure, found.reports_since) == (12, 3, 0.5, 1)
    assert found.recipe == {"batch": 4}
    assert torch.equal(found.model["layer.weight"], torch.full((8, 8), 12.0))
    assert torch.equal(found.mean["layer.weight"], torch.zeros(8, 8))
    assert found.optimizer["layer.weight/step"] == 12
    assert folders(place) == {f"call-a/{done:09d}" for done in (4, 8, 12)}


def test_no_further_than_was_asked_for(checkpoints):
    saved(checkpoints, 4, 8, 12)

    assert checkpoints.newest(at_most=11).done == 8
    assert checkpoints.newest(at_most=12).done == 12
    assert checkpoints.newest(at_most=3) is None


def cut_short(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-40])


def flipped(folder: Path) -> None:
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def facts_cut_short(folder: Path) -> None:
    (folder / FACTS).write_bytes((folder / FACTS).read_bytes()[:50])


def facts_changed(folder: Path) -> None:
    text = (folder / FACTS).read_text()
    (folder / FACTS).write_text(text.replace('"reports_since":1', '"reports_since":0'))


def facts_empty(folder: Path) -> None:
    (folder / FACTS).write_bytes(b"")


def of_another(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder.parent / "000000004" / WEIGHTS).read_bytes())


@pytest.mark.parametrize(
    "harm",
    [
        cut_short, flipped, without_weights, facts_cut_short, facts_changed, facts_empty,
        of_another,
    ],
)  # fmt: skip
def test_a_damaged_one_is_passed_over_for_the_one_before_and_told(checkpoints, harm, caplog):
    *_, newest = saved(checkpoints, 4, 8, 12)
    harm(newest)

    found = checkpoints.newest()

    assert found.done == 8
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"the checkpoint {newest} is passed over: ")


def test_weights_without_facts_are_no_checkpoint_yet(checkpoints, caplog):
    *_, newest = saved(checkpoints, 4, 8)
    (newest / FACTS).unlink()

    assert checkpoints.newest().done == 4
    assert not caplog.records


def test_where_all_are_damaged_there_is_none(checkpoints):
    for folder in saved(checkpoints, 4, 8):
        cut_short(folder)

    assert checkpoints.newest() is None


def test_calls_that_overlap_never_write_into_each_others_folders(place, checkpoints):
    other = Checkpoints(str(place), "call-b")
    saved(checkpoints, 4, 8)
    saved(other, 8, 6)

    assert folders(place) == {
        "call-a/000000004", "call-a/000000008", "call-b/000000008", "call-b/000000006",
    }  # fmt: skip
    assert checkpoints.newest().done == other.newest().done == 8
    flipped(place / "call-b" / "000000008")
    flipped(place / "call-a" / "000000008")
    assert checkpoints.newest().done == 6


def test_only_the_newest_of_all_calls_are_kept(place, checkpoints):
    other = Checkpoints(str(place), "call-b")
    saved(checkpoints, 4, 8, 12)
    saved(other, 10, 14)

    other.prune()

    assert folders(place) == {"call-a/000000012", "call-b/000000010", "call-b/000000014"}
    assert {path for path in tree(place) if path.endswith(WEIGHTS)} == {
        f"{folder}/{WEIGHTS}" for folder in folders(place)
    }
    other.prune(kept=1)
    assert folders(place) == {"call-b/000000014"}
    assert other.newest().done == 14


def test_other_objects_of_a_training_are_no_checkpoints(place, checkpoints):
    saved(checkpoints, 4)
    for name in ("training.json", "history/000000001-000000004.json", "call-a/x/state.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"{}")

    checkpoints.prune(kept=0)

    assert checkpoints.newest() is None
    assert (place / "training.json").exists()
    assert (place / "call-a/x/state.json").exists()


# what killed writers leave


def half(place: Path, folder: str, *, name: str = WEIGHTS, ago: float = ABANDONED_S + 60) -> str:
    """A file of a state that never became whole, written a while before now."""
    path = place / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    when = path.stat().st_mtime - ago
    os.utime(path, (when, when))
    return f"{folder}/{name}"


def files(place: Path) -> set[str]:
    found = (path for path in place.rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix() for path in found}


@pytest.mark.parametrize("name", [WEIGHTS, ".tmp-0123"])
def test_what_killed_writers_left_is_removed_once_it_lies_behind(place, checkpoints, name):
    behind, beside = (half(place, f"call-dead/{done:09d}", name=name) for done in (8, 12))
    beyond = half(place, "call-dead/000000016", name=name)
    saved(checkpoints, 12)

    checkpoints.prune()

    assert files(place) & {behind, beside, beyond} == {beyond}
    saved(checkpoints, 16)
    checkpoints.prune()
    assert folders(place) == {"call-a/000000012", "call-a/000000016"}
    assert files(place) == {f"{one}/{name}" for one in folders(place) for name in (WEIGHTS, FACTS)}


@pytest.mark.parametrize("name", [WEIGHTS, ".tmp-0123"])
def test_what_another_writer_may_be_writing_is_left_alone(place, checkpoints, name):
    writing = half(place, "call-b/000000008", name=name, ago=ABANDONED_S - 60)
    saved(checkpoints, 12)

    checkpoints.prune()

    assert writing in files(place)


def test_nothing_is_removed_before_there_is_a_whole_state(place, checkpoints):
    left = half(place, "call-dead/000000008")

    checkpoints.prune()

    assert files(place) == {left}


def test_a_whole_state_is_kept_however_old_it_is(place, checkpoints):
    (folder,) = saved(checkpoints, 8)
    for name in (WEIGHTS, FACTS):
        os.utime(folder / name, (1e9, 1e9))
    saved(checkpoints, 12)

    checkpoints.prune()

    assert folders(place) == {"call-a/000000008", "call-a/000000012"}
    assert checkpoints.newest(at_most=8).done == 8


def test_a_state_that_a_killed_prune_left_half_removed_is_removed(place, checkpoints):
    (folder,) = saved(checkpoints, 4)
    (folder / FACTS).unlink()
    os.utime(folder / WEIGHTS, (1e9, 1e9))
    saved(checkpoints, 8)

    checkpoints.prune()

    assert files(place) == {f"call-a/000000008/{name}" for name in (WEIGHTS, FACTS)}


# a store that is away


class Busy:
    """A store that fails so many times before each thing it does."""

    def __init__(self, store, times):
        self._store, self._times, self._left = store, times, times
        self.uri = store.uri

    def __getattr__(self, name):
        call = getattr(self._store, name)

        def tried(*arguments):
            if self._left:
                self._left -= 1
                raise StorageBusy(f"{name}: 503 Slow Down")
            self._left = self._times
            return call(*arguments)

        return tried


@pytest.fixture
def busy(monkeypatch):
    """Every store is busy twice before each thing it does; nobody sleeps."""
    monkeypatch.setattr(
        "pipeline.checkpoints.open_store", lambda uri: Busy(LocalStore(Path(uri)), 2)
    )
    monkeypatch.setattr("pipeline.patience.WAIT_S", 0.0)


def test_a_busy_store_is_waited_out(busy, tmp_path, caplog):
    checkpoints = Checkpoints(str(tmp_path), "call-a")

    saved(checkpoints, 4, 8)

    assert checkpoints.newest().done == 8
    assert "list: 503 Slow Down; trying for 600 s more" in caplog.text
    checkpoints.prune(kept=0)  # not worth waiting for
    assert folders(tmp_path) == {"call-a/000000004", "call-a/000000008"}


def test_patience_ends(monkeypatch):
    seconds = itertools.count(0, 100)
    monkeypatch.setattr("pipeline.patience.time.monotonic", lambda: next(seconds))
    monkeypatch.setattr("pipeline.patience.time.sleep", lambda seconds: None)
    calls = []

    def away():
        calls.append(1)
        raise StorageBusy("503")

    with pytest.raises(StorageBusy):
        patiently(away, patience_s=350)
    assert len(calls) == 4
