"""`maskfleet evaluate` in process: exit codes, words, frozen JSON."""

import json

import pytest

from jobs import evaluate
from tests.labelled import folder_pair, pairs

FAST = ("--batch.pixels", "65536", "--compute.workers", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_pair(tmp_path_factory.mktemp("labelled") / "data")


def ran(*words) -> int:
    return evaluate.main([*map(str, words), *FAST])


def test_it_says_the_figures_and_ends_with_0(data, tiny_bundle, capsys):
    assert ran(tiny_bundle, data) == 0

    said = capsys.readouterr().out
    assert f"on 4 pictures of {data}, all" in said
    for word in ("background", "nucleus", "mean", "calibration error", "s per MP"):
        assert word in said


def test_the_json_has_frozen_keys(data, tiny_bundle, capsys):
    assert ran(tiny_bundle, data, "--json", "--border", "2") == 0

    told = json.loads(capsys.readouterr().out)
    assert set(told) == {
        "about", "images", "rejected", "miou", "pixel_accuracy", "mean_accuracy", "mean_dice",
        "boundary_f", "calibration_error", "classes", "strata", "confusion", "megapixels",
        "model_seconds_per_megapixel", "seconds_per_megapixel",
    }  # fmt: skip
    assert set(told["about"]) == {
        "model", "task", "bundle", "data", "split", "evalset", "ontology", "border", "on", "device",
        "seconds",
    }  # fmt: skip
    assert set(told["classes"][0]) == {
        "name", "iou", "dice", "accuracy", "boundary_f", "labelled", "answered",
    }  # fmt: skip
    assert told["about"]["border"] == 2


def test_rejected_pictures_are_named_and_end_with_3(tiny_bundle, tmp_path, capsys):
    both = pairs()
    image, mask = both["a.jpg"]
    folder = folder_pair(tmp_path, {**both, "a.jpg": (image[:300], mask)})

    assert ran(tiny_bundle, folder) == 3
    assert "rejected: a.jpg: decode: truncated" in capsys.readouterr().out


def test_refusals_end_with_2_and_say_why(data, tiny_bundle, tmp_path, capsys):
    assert ran(tiny_bundle, tmp_path / "nowhere") == 2
    assert "refused: cannot read the source" in capsys.readouterr().err
    assert ran(tmp_path / "nothing", data) == 2
    assert "refused: --model" in capsys.readouterr().err
    assert ran(tiny_bundle, data, "--on", "ray://127.0.0.1:1") == 2


def test_the_demo_model_can_be_measured_by_its_name(data, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"

    assert ran("demo", data, "--out", tmp_path / "out", "--picture-sheet", sheet) == 0
    assert sheet.exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.parquet", "rejected.parquet", "figures.json",
    }  # fmt: skip
