"""Labelled pictures as a training sees them: the same everywhere, and as a run reads them."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from models import Bundle, ClassInfo, InputInfo
from models.training.augment import Augment, unchanged
from models.training.batches import batch_of
from models.training.recipes import Recipe
from pipeline.infer import Segmenter
from pipeline.labels import open_labelled
from pipeline.records import Pixels, PlannedImage
from pipeline.tile import Picture, Tile
from pipeline.trainset import TrainSet, as_read
from tests import learning
from tests.bundles import files_of
from tests.bundles import tiny_bundle as bundle_of
from tests.labelled import folder_pair
from tests.pictures import blobs, encoded

SIZE = (40, 48)
PICTURES = 12
AS_THEY_ARE = Recipe(batch=4, augment=unchanged(SIZE))
ASTRAY = replace(AS_THEY_ARE, augment=Augment(size=(32, 32), balanced=0.5, rotation=9.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return learning.folder(tmp_path_factory.mktemp("labels") / "data", PICTURES)


@pytest.fixture(scope="module")
def card(tiny_bundle):
    return Bundle.from_json((tiny_bundle / "model.json").read_bytes())


@pytest.fixture(scope="module")
def made(data, card):
    """The set of a recipe."""
    labelled = open_labelled(str(data))
    return lambda recipe: TrainSet.of(labelled.items, labelled.loader, recipe, card)


def one_picture(folder, picture, mask_HW, card, **how):
    """A set of one picture, one a step."""
    pair = picture if isinstance(picture, bytes) else encoded(picture, "PNG")
    folder_pair(folder, {"a.png": (pair, encoded(mask_HW, "PNG"))})
    labelled = open_labelled(str(folder), **how)
    about, void = card.input, labelled.ontology.ignored
    recipe = replace(AS_THEY_ARE, batch=1, ignore_id=void, mean=about.mean, std=about.std)
    return TrainSet.of(labelled.items, labelled.loader, recipe, card)


def whole(parts):
    """Pixels and labels of a step that came in parts, and the step."""
    return (
        {part.step for part in parts},
        np.concatenate([part.pixels_BhwC for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


def pictures(pixels_BHWC) -> list[int]:
    """Which ones these are."""
    known = {blobs(*SIZE, seed=n).tobytes(): n for n in range(PICTURES)}
    return [known[pixels_HWC.tobytes()] for pixels_HWC in pixels_BHWC]


def shown(train: TrainSet, steps) -> list[int]:
    return [n for step in steps for n in pictures(train.part(step, 0, 1).pixels_BhwC)]


# a part follows from the seed and the step alone


def test_a_part_is_the_same_wherever_and_whenever_it_is_made(made):
    here = made(ASTRAY)
    there = pickle.loads(pickle.dumps(made(ASTRAY)))

    places = [(step, slot) for step in range(3) for slot in range(2)]
    first = [here.part(*place, 2) for place in places]
    backwards = [there.part(*place, 2) for place in reversed(places)]

    for one, other in zip(first, reversed(backwards), strict=True):
        assert one.step == other.step
        assert one.rejected == other.rejected == ()
        assert one.pixels_BhwC.shape == (2, 32, 32, 3)
        assert one.pixels_BhwC.tobytes() == other.pixels_BhwC.tobytes()
        assert one.labels.tobytes() == other.labels.tobytes()


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_shows_the_same_pictures_in_order_however_many_parts_it_comes_in(made, parts):
    train = made(ASTRAY)
    for step in (0, 5):
        steps, pixels, labels = whole([train.part(step, slot, parts) for slot in range(parts)])

        _, once, labels_once = whole([train.part(step, 0, 1)])

        assert steps == {step}
        assert (pixels == once).all()
        assert (labels == labels_once).all()


def test_two_looks_at_a_picture_differ(made):
    first, second = (made(ASTRAY).part(step, 0, 1).pixels_BhwC for step in (0, 3))

    assert first.tobytes() != second.tobytes()


def test_an_epoch_shows_every_picture_once_and_the_next_one_in_another_order(made):
    train = made(AS_THEY_ARE)

    epochs = [shown(train, range(first, first + 3)) for first in (0, 3, 6)]

    assert [sorted(epoch) for epoch in epochs] == [list(range(PICTURES))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_epoch_may_end_in_the_middle_of_a_step(made):
    train = made(replace(AS_THEY_ARE, batch=5))

    seen = shown(train, range(5))

    assert sorted(seen[:12]) == sorted(seen[12:24]) == list(range(PICTURES))


def test_another_seed_is_another_order(made):
    one, other = (shown(made(replace(AS_THEY_ARE, seed=seed)), range(3)) for seed in (0, 1))

    assert sorted(one) == sorted(other)
    assert one != other


# what the model reads


def picture(kind: str) -> np.ndarray:
    gray_HWC = blobs(*SIZE, seed=3)[..., :1]
    return {
        "gray": gray_HWC,
        "colour": blobs(*SIZE, seed=3),
        "deep gray": (gray_HWC.astype(np.uint16) << 8) + 77,
    }[kind]


@pytest.mark.parametrize("limits", [None, (2000.0, 30_000.0)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["gray", "colour", "deep gray"])
def test_a_picture_reaches_the_model_as_a_run_would_bring_it(tmp_path, kind, channels, limits):
    folder = bundle_of(tmp_path / "model", channels=channels, limits=limits)
    segmenter = Segmenter(*files_of(folder), "cpu")
    card, values_HWC = segmenter.bundle, picture(kind)
    train = one_picture(tmp_path / "data", values_HWC, np.zeros(SIZE, np.uint8), card)

    part = train.part(0, 0, 1)
    learnt_BCHW, _ = batch_of(part.pixels_BhwC, part.labels, train.recipe)
    run_BCHW = segmenter._input((tile_of(values_HWC),), *SIZE)

    assert learnt_BCHW.shape == run_BCHW.shape == (1, channels, *SIZE)
    assert run_BCHW.std() > 0.1  # a picture of nothing would prove nothing
    off_BCHW = (learnt_BCHW - run_BCHW).numpy() * np.reshape(card.input.std, (-1, 1, 1))
    assert abs(off_BCHW).max() <= 1 / 255


def tile_of(values_HWC) -> Tile:
    plan = PlannedImage(0, "", "", None, None, 0, "", "", 0)
    pixels = Pixels(values_HWC, None)
    return Tile(Picture(plan, pixels, 0, "", large=False, rows=(0,), columns=(0,)), 0, 0, *SIZE)


def test_16_bits_of_colour_become_gray_within_a_step_of_8_bits():
    deep_HWC = blobs(*SIZE, seed=5).astype(np.uint16) * 257
    gray = InputInfo(1, (0.0,), (1.0,))

    found = as_read(deep_HWC, gray)

    luma = blobs(*SIZE, seed=5) @ np.array([0.299, 0.587, 0.114])
    assert found.shape == (*SIZE, 1)
    assert found.dtype == np.uint8
    assert abs(found[..., 0] - luma).max() <= 1


# labels


def test_the_masks_classes_find_their_places_among_the_models_and_ignored_stays_ignored(
    tmp_path, card
):
    mask_HW = np.zeros(SIZE, np.uint8)
    mask_HW[:10], mask_HW[30:] = 7, 9  # of tests.labelled: 7 is nucleus, 9 is ignored
    turned = replace(card, classes=card.classes[::-1])

    straight, crossed = (
        one_picture(tmp_path / name, blobs(*SIZE, seed=1), mask_HW, one).part(0, 0, 1)
        for name, one in (("1", card), ("2", turned))
    )

    rows = [0, 20, 39]
    assert [entry.name for entry in card.classes] == ["background", "nucleus"]
    assert straight.labels[0, rows, 5].tolist() == [1, 0, 255]
    assert crossed.labels[0, rows, 5].tolist() == [0, 1, 255]


def test_more_classes_than_8_bits_hold_stay_apart(tmp_path, card):
    classes = [{"id": n, "name": f"c{n}"} for n in range(300)]
    (tmp_path / "many.json").write_text(json.dumps({"classes": classes, "ignore_id": 400}))
    mask_HW = np.minimum(np.arange(40) * 9, 299).astype(np.uint16)[:, None].repeat(48, axis=1)
    mask_HW[39] = 400
    infos = tuple(ClassInfo(n, f"c{n}", (0, 0, 0)) for n in reversed(range(300)))
    many = replace(card, classes=infos, ignore_id=400)

    train = one_picture(
        tmp_path / "data", blobs(*SIZE, 1), mask_HW, many, ontology=str(tmp_path / "many.json")
    )
    labels_HW = train.part(0, 0, 1).labels[0]

    assert labels_HW[[0, 1, 2, 38, 39], 0].tolist() == [299, 290, 281, 0, 65_535]


def test_a_broken_picture_is_blank_teaches_nothing_and_is_told(tmp_path, card):
    good, mask = encoded(blobs(*SIZE, seed=1), "PNG"), encoded(np.zeros(SIZE, np.uint8), "PNG")
    folder_pair(tmp_path, {"a.png": (good[: len(good) // 2], mask), "b.png": (good, mask)})
    labelled = open_labelled(str(tmp_path))
    recipe = replace(AS_THEY_ARE, batch=2)

    part = TrainSet.of(labelled.items, labelled.loader, recipe, card).part(0, 0, 1)

    ((key, station, reason, detail),) = part.rejected
    assert (key, station, reason) == ("a.png", "decode", "truncated")
    assert detail
    blank = int(part.pixels_BhwC[0].any())  # the place of the broken one: not the bright one's
    assert not part.pixels_BhwC[blank].any()
    assert (part.labels[blank] == 255).all()
    assert (part.labels[1 - blank] == 0).all()
