"""A classifier from its labels to production: train, evaluate, promote, segment, retrain."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import evaluate, retrain, segment
from jobs import train as training
from models import Bundle
from models.training.augment import unchanged
from models.training.recipes import Recipe
from pipeline.labels import open_labelled
from pipeline.reader import open_run
from pipeline.scaling import scaled
from pipeline.train import train
from pipeline.trainset import TrainSet
from tests import learning
from tests.learning import CLASSIFIES, LEARNS_CLASSES, class_folders

PICTURES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("labels") / "data", PICTURES)


def words(data, registry, *more) -> list[str]:
    given = (data, "--out", registry, "--name", "light", *CLASSIFIES, *LEARNS_CLASSES, *more)
    return [str(word) for word in given]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A classifier that tells bright from dark, and where it lies."""
    registry = tmp_path_factory.mktemp("trained") / "registry"
    return train(training.parsed(words(data, registry)))


def test_it_is_trained_measured_and_published_as_any_model(trained):
    version = trained.version
    card = Bundle.from_json((Path(version.uri) / "model.json").read_bytes())

    assert card.task == "classify"
    assert card.input.resize == (32, 32)
    assert [entry.name for entry in card.classes] == ["bright", "dark"]
    assert version.metrics["miou"] == 1.0
    history = pq.read_table(f"{trained.folder}/history.parquet")
    assert history["loss"].to_pylist()[-1] < 0.3 < history["loss"].to_pylist()[0]
    assert (Path(trained.folder) / "sheet.png").stat().st_size > 0


def test_the_same_command_goes_on_where_it_was_left(data, trained, tmp_path):
    registry = tmp_path / "registry"
    for call, ending in (("replace", "000000020/state.json"), ("replace", "figures.json")):
        learning.killed(training.main, words(data, registry), call, ending)

    again = train(training.parsed(words(data, registry)))

    weights = [(Path(one.version.uri) / "weights.safetensors") for one in (again, trained)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_measured_is_what_a_run_answers(data, trained, tmp_path, capsys):
    model = trained.version.reference
    assert evaluate.main([model, str(data), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert segment.main([str(data), "--model", model, "--out", str(tmp_path / "run")]) == 0
    run = open_run(str(tmp_path / "run"))

    names = ["bright", "dark"]
    confusion = np.zeros((2, 2), int)
    for item in open_labelled(str(data)).items:
        called = run.prediction(item.key)["name"]
        confusion[names.index(item.label), names.index(called)] += 1
    assert figures["confusion"] == confusion.tolist()
    assert figures["pixel_accuracy"] == np.trace(confusion) / PICTURES
    assert figures["boundary_f"] is None
    assert figures["about"]["task"] == "classify"


def test_what_is_learnt_from_is_read_as_a_run_reads_it(data, trained):
    labelled = open_labelled(str(data))
    card = Bundle.from_json((Path(trained.version.uri) / "model.json").read_bytes())
    recipe = Recipe(batch=PICTURES, augment=unchanged((32, 32)))

    part = TrainSet.of(labelled.items, labelled.loader, recipe, card).part(0, 0, 1)

    assert part.labels.shape == (PICTURES,)
    expected = {
        (scaled(pixels_HWC, (32, 32)).tobytes(), labels_HW.item())
        for pixels_HWC, labels_HW in map(labelled.load, labelled.items)
    }
    shown = zip(part.pixels_BhwC, part.labels.tolist(), strict=True)
    assert {(pixels_hwC.tobytes(), place) for pixels_hwC, place in shown} == expected


def test_it_says_what_it_measured_in_pictures(data, trained, capsys):
    assert evaluate.main([trained.version.reference, str(data)]) == 0

    out = capsys.readouterr().out
    assert out.splitlines()[2].endswith("pictures")
    assert "\naccuracy 100.0 %, calibration error" in out
    assert "borders" not in out


def test_the_whole_loop_promotes_refuses_and_counts_what_changes(tmp_path, capsys):
    data, registry = class_folders(tmp_path / "data", PICTURES), str(tmp_path / "registry")
    assert retrain.main([*words(data, registry), "--canaries", str(data)]) == 0
    class_folders(data, PICTURES + 8)

    assert retrain.main([*words(data, registry), "--canaries", str(data)]) == 0

    assert "light/v0001, the first: promote" in capsys.readouterr().out
    (decision,) = Path(registry).glob("decisions/000002/decision.json")
    told = json.loads(decision.read_text())
    assert told["verdict"] in {"refuse", "undecided"}  # the champion makes no mistakes
    (flipped,) = [r for r in told["reasons"] if r["name"] == "flipped canary pixels"]
    assert (flipped["value"], flipped["note"]) == (0.0, f"{PICTURES + 8} pictures")


def test_2_masks_are_no_classes(tmp_path, trained, capsys):
    masks = learning.folder(tmp_path / "masks", 4)

    assert evaluate.main([trained.version.reference, str(masks)]) == 2
    assert "needs one label a picture" in capsys.readouterr().err


def test_2_dice_is_of_masks(data, tmp_path, capsys):
    assert training.main(words(data, tmp_path / "r", "--set", "loss.dice=1")) == 2
    assert "--set loss.dice=0" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
