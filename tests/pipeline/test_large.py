"""A mask too large for slots: regions, levels, metadata, and what a second writer does."""

import json

import numpy as np
import pytest
import zarr

from pipeline import large
from pipeline.fragment import FragmentDamaged
from pipeline.large import LargeMask, committed_region
from pipeline.layout import LEVELS, Layout
from pipeline.measure import SlotMask
from pipeline.records import Pixels, PlannedImage
from pipeline.storage import LocalStore
from pipeline.tile import Picture, Rows

CLASSES = [
    {"id": 0, "name": "background", "color": [0, 0, 0]},
    {"id": 7, "name": "nucleus", "color": [255, 170, 0]},
]
REGION = 1024  # instead of 4096, so that a small mask has several
PATH = "masks.zarr/large/5"


@pytest.fixture
def store(tmp_path, monkeypatch):
    for module in (large, __import__("pipeline.layout", fromlist=["layout"])):
        monkeypatch.setattr(module, "REGION", REGION)
    return LocalStore(tmp_path)


def picture_of(height, width) -> Picture:
    plan = PlannedImage(5, "big.tif", "s3://b/big.tif", None, None, 1, "e", "files", 0)
    values = np.broadcast_to(np.uint8(0), (height, width, 1))
    return Picture(plan, Pixels(values, None), 1, "sha", large=True, rows=(0,), columns=(0,))


def rows_of(labels, sure) -> Rows:
    counts = np.array([(labels == entry["id"]).sum() for entry in CLASSES])
    sums = np.array([sure[labels == entry["id"]].sum() / 255 for entry in CLASSES])
    return Rows(labels, sure, counts, sums)


def mask_of(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array([0, 7, 255], np.uint8), (height // 8 + 1, width // 8 + 1))
    labels = np.kron(coarse, np.ones((8, 8), np.uint8))[:height, :width]
    sure = np.where(labels == 255, 0, rng.integers(128, 256, (height, width))).astype(np.uint8)
    return labels, sure


def written(store, labels, sure, confidence=False, step=300):
    height, width = labels.shape
    picture = picture_of(height, width)
    sink = LargeMask(store, picture, CLASSES, "uint8", 255, confidence)
    for y in range(0, height, step):
        sink.add(rows_of(labels[y : y + step], sure[y : y + step]))
    return sink.close(picture, 0.25)


def test_the_mask_is_a_zarr_array_with_levels_that_are_strides_of_the_first(store):
    labels, sure = mask_of(2500, 1300)

    written(store, labels, sure)

    group = zarr.open_group(store.root / PATH, mode="r")
    for level in range(LEVELS):
        expected = labels[:: 2**level, :: 2**level]
        assert group[str(level)].shape == expected.shape
        assert np.array_equal(group[str(level)][:], expected)


def test_regions_are_objects_that_carry_their_counts(store):
    labels, sure = mask_of(2500, 1300)

    mask = written(store, labels, sure)

    regions = [f.path for f in store.list(f"{PATH}/0/c")]
    assert regions == [f"{PATH}/0/c/{y}/{x}" for y in range(3) for x in range(2)]
    counts = np.zeros(2, int)
    for y in range(3):
        for x in range(2):
            part = labels[y * REGION : (y + 1) * REGION, x * REGION : (x + 1) * REGION]
            pixels, about = committed_region(store, f"{PATH}/0/c/{y}/{x}", part.shape, "uint8", 255)
            assert np.array_equal(pixels, part)
            counts += about["counts"]
    assert mask.counts_K.tolist() == counts.tolist() == rows_of(labels, sure).counts_K.tolist()
    assert (mask.path, mask.frames, mask.seam_score) == (PATH, (), 0.25)


def test_confidences_are_those_of_the_stored_steps(store):
    labels, sure = mask_of(700, 600)

    mask = written(store, labels, sure, confidence=True)

    np.testing.assert_allclose(mask.confidences_K, rows_of(labels, sure).confidences_K)
    stored = zarr.open_array(store.root / PATH / "confidence", mode="r")
    assert np.array_equal(stored[:], sure)


def test_who_comes_second_adopts_the_regions_that_are_there(store):
    first, sure = mask_of(1500, 700, seed=1)
    second, _ = mask_of(1500, 700, seed=2)
    written(store, first, sure)
    store.delete(f"{PATH}/0/c/1/0")  # the first writer was killed before its second region
    for level in range(1, LEVELS):
        store.delete(f"{PATH}/{level}/c/0/0")  # and before the levels of its first one

    mask = written(store, second, sure)

    expected = np.concatenate([first[:REGION], second[REGION:]])
    group = zarr.open_group(store.root / PATH, mode="r")
    for level in range(LEVELS):
        assert np.array_equal(group[str(level)][:], expected[:: 2**level, :: 2**level])
    assert mask.counts_K.tolist() == [(expected == 0).sum(), (expected == 7).sum()]


def test_a_damaged_region_is_not_adopted(store):
    labels, sure = mask_of(700, 600)
    written(store, labels, sure)
    path = store.root / PATH / "0/c/0/0"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))

    with pytest.raises(FragmentDamaged, match=r"0/c/0/0"):
        written(store, labels, sure)


def test_the_metadata_is_that_of_an_ome_zarr_label(store):
    written(store, *mask_of(700, 600))

    about = json.loads(store.read(f"{PATH}/zarr.json"))["attributes"]["ome"]

    assert set(about) == {"version", "multiscales", "image-label"}
    assert about["version"] == "0.5"
    (scales,) = about["multiscales"]
    assert scales["axes"] == [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    assert [d["path"] for d in scales["datasets"]] == ["0", "1", "2", "3"]
    assert [d["coordinateTransformations"][0]["scale"] for d in scales["datasets"]] == [
        [1, 1], [2, 2], [4, 4], [8, 8],
    ]  # fmt: skip
    label = about["image-label"]
    assert label["source"] == {"image": "s3://b/big.tif"}
    assert [c["label-value"] for c in label["colors"]] == [0, 7, 255]
    assert [p["label-value"] for p in label["properties"]] == [0, 7, 255]  # the same, or refused
    assert label["colors"][-1]["rgba"] == [0, 0, 0, 0]
    for level in range(LEVELS):
        array = json.loads(store.read(f"{PATH}/{level}/zarr.json"))
        assert array["dimension_names"] == ["y", "x"]


# -- a mask in slots -----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [7, 64, 1000])
def test_strips_of_a_small_mask_make_the_same_frames_however_they_are_cut(step):
    labels, sure = mask_of(150, 130)
    layout = Layout("flat", "uint8", 255, 16, 4096, confidence=True)
    picture = picture_of(150, 130)

    sink = SlotMask(layout)
    for y in range(0, 150, step):
        sink.add(rows_of(labels[y : y + step], sure[y : y + step]))
    mask = sink.close(picture, None)

    whole = SlotMask(layout)
    whole.add(rows_of(labels, sure))
    expected = whole.close(picture, None)
    assert mask.frames == expected.frames
    assert mask.confidence_frames == expected.confidence_frames
    assert len(mask.frames) == -(-150 * 130 // 4096)
    assert mask.counts_K.tolist() == expected.counts_K.tolist()
    np.testing.assert_allclose(mask.confidences_K, expected.confidences_K)
