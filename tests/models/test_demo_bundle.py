"""The bundle that ships: small, honest about itself, and it finds nuclei."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import models
from models.training.demo import normalised

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo"
PICTURES = ROOT / "docs" / "pictures"


@pytest.fixture(scope="module")
def demo():
    return models.load_bundle(DEMO)


def mask_of(model, path):
    with Image.open(path) as picture:
        pixels_HWC = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    x_1CHW = normalised(torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None] / 255)
    with torch.inference_mode():
        return model(x_1CHW)[0].argmax(0).numpy()


def test_the_bundle_is_small():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 2_000_000


def test_the_card_says_what_it_is_and_how_good(demo):
    _, bundle = demo

    assert [entry.name for entry in bundle.classes] == ["background", "nucleus"]
    assert bundle.metrics["test"]["miou"] >= 80
    assert bundle.provenance["licence"] == "CC0-1.0"
    assert len(bundle.provenance["data_sha256"]) == 64


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("fluorescence-small.png", 0.15, 0.30),
        ("fluorescence-dense.png", 0.20, 0.35),
        ("histology.png", 0.20, 0.50),
        ("histology-held-sideways.jpg", 0.12, 0.40),
    ],
)
def test_it_finds_about_as_much_nucleus_as_people_did(demo, name, low, high):
    model, _ = demo

    share = mask_of(model, PICTURES / "loose" / name).mean()

    assert low < share < high


def test_a_picture_held_sideways_must_be_turned_first():
    with Image.open(PICTURES / "loose" / "histology-held-sideways.jpg") as picture:
        assert picture.size == (256, 320)
        assert ImageOps.exif_transpose(picture).size == (320, 256)


def test_the_pictures_are_few_enough_to_ship():
    assert sum(p.stat().st_size for p in PICTURES.rglob("*") if p.is_file()) < 1_500_000
