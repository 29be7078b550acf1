"""Pictures seen many ways: whatever happens, picture and labels stay together."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.training.augment import Augment, drawing, unchanged

VOID = 255
STILL = {
    "flip": 0.0,
    "contrast": (1.0, 1.0),
    "gamma": (1.0, 1.0),
    "saturation": (1.0, 1.0),
    "shift": 0.0,
}
sides = st.integers(1, 60)
zooms = st.floats(0.3, 3.0)


@st.composite
def augments(draw, **fixed):
    whole = draw(st.booleans())
    low, high = sorted((draw(zooms), draw(zooms)))
    turns = draw(st.booleans())
    height = draw(sides)
    return Augment(
        size=(height, height if turns else draw(sides)),
        whole=whole,
        zoom=(1.0, 1.0) if whole else (low, high),
        balanced=0.0 if whole else draw(st.sampled_from([0.0, 0.5, 1.0])),
        turns=turns,
        rotation=draw(st.sampled_from([0.0, 10.0, 180.0])),
        **fixed,
    )


def blocks(height, width, side=16, seed=0):
    """Labels in large squares."""
    cells = np.random.default_rng(seed).integers(0, 4, (height // side + 1, width // side + 1))
    return cells.repeat(side, 0).repeat(side, 1)[:height, :width].astype(np.uint8)


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


# what holds for all


@settings(max_examples=150, deadline=None)
@given(augments(), sides, sides, st.sampled_from([1, 3]), st.integers(0, 99))
def test_what_comes_out_has_its_size_and_no_label_but_those_that_went_in(
    augment, height, width, channels, seed
):
    labels_HW = blocks(height, width, side=5, seed=seed)
    pixels_HWC = noise(height, width, channels)
    before = pixels_HWC.copy(), labels_HW.copy()

    pixels_hwC, labels_hw = augment(pixels_HWC, labels_HW, drawing(seed), VOID)

    assert pixels_hwC.shape == (*augment.size, channels)
    assert labels_hw.shape == augment.size
    assert pixels_hwC.dtype == labels_hw.dtype == np.uint8
    assert set(np.unique(labels_hw)) <= {*np.unique(labels_HW), VOID}
    assert np.array_equal(before[0], pixels_HWC)
    assert np.array_equal(before[1], labels_HW)


@settings(max_examples=100, deadline=None)
@given(augments(**{**STILL, "flip": 0.5}), st.integers(20, 90), st.integers(20, 90), st.integers(0))
def test_picture_and_labels_move_together(augment, height, width, seed):
    """The picture is painted from the labels: where those around a pixel agree, it is theirs."""
    labels_HW = blocks(height, width, seed=seed)
    pixels_HW1 = 60 * labels_HW[:, :, None]

    pixels_hw1, labels_hw = augment(pixels_HW1, labels_HW, drawing(seed), VOID)

    reach = 5  # a pixel blends what lies within 1 / zoom of it, and rotation blends once more
    if min(labels_hw.shape) > 2 * reach:
        around = np.lib.stride_tricks.sliding_window_view(labels_hw, (2 * reach + 1,) * 2)
        same = around.min((2, 3)) == around.max((2, 3))
        middle = labels_hw[reach:-reach, reach:-reach]
        painted = pixels_hw1[reach:-reach, reach:-reach, 0]
        inside = same & (middle != VOID)
        assert (
            np.abs(painted[inside].astype(int) - 60 * middle[inside]).max(initial=0) <= 6
        )  # a tenth of a step: the tip of a corner


@settings(max_examples=60, deadline=None)
@given(augments(), st.integers(0, 2**63))
def test_equal_draws_give_equal_pictures(augment, seed):
    pixels_HWC, labels_HW = noise(40, 50), blocks(40, 50)

    one, two = (augment(pixels_HWC, labels_HW, drawing(seed, 3, 8), VOID) for _ in range(2))

    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])


def test_other_numbers_give_other_draws():
    seen = {drawing(*numbers).random() for numbers in [(0,), (1,), (0, 1), (1, 0), (0, 1, 1)]}

    assert len(seen) == 5


# where


@pytest.mark.parametrize("rotation", [0.0, 30.0])
def test_a_marked_pixel_stays_marked(rotation):
    labels_HW = np.zeros((81, 101), dtype=np.uint8)
    labels_HW[36:45, 56:65] = 1
    pixels_HW1 = 255 * labels_HW[:, :, None]
    augment = Augment(size=(96, 128), zoom=(0.7, 1.3), rotation=rotation, **{**STILL, "flip": 0.5})
    seen = 0

    for seed in range(40):
        pixels_hw1, labels_hw = augment(pixels_HW1, labels_HW, drawing(seed))
        if (labels_hw == 1).sum() > 30:
            seen += 1
            places = np.indices(labels_hw.shape)
            of_picture = places[:, pixels_hw1[:, :, 0] > 127].mean(1)
            of_labels = places[:, labels_hw == 1].mean(1)
            assert np.abs(of_picture - of_labels).max() < 0.6

    assert seen > 20


@pytest.mark.parametrize("size", [(24, 30), (40, 20), (64, 64)])
def test_a_window_at_zoom_1_is_a_piece_of_the_picture(size):
    pixels_HWC, labels_HW = noise(64, 64), noise(64, 64, 1)[:, :, 0]
    augment = Augment(size=size, zoom=(1.0, 1.0), **STILL)
    windows_NC = np.lib.stride_tricks.sliding_window_view(pixels_HWC, (*size, 3)).reshape(
        -1, *size, 3
    )
    places = set()

    for seed in range(20):
        pixels_hwC, labels_hw = augment(pixels_HWC, labels_HW, drawing(seed))
        place = np.flatnonzero((windows_NC == pixels_hwC).all((1, 2, 3)))
        assert len(place) == 1
        top, left = divmod(int(place[0]), 64 - size[1] + 1)
        assert np.array_equal(labels_hw, labels_HW[top : top + size[0], left : left + size[1]])
        places.add((top, left))

    assert len(places) > 10 or size == (64, 64)


def test_a_picture_smaller_than_the_window_lies_somewhere_in_it():
    pixels_HWC, labels_HW = noise(8, 12), np.ones((8, 12), dtype=np.uint8)
    augment = Augment(size=(32, 32), zoom=(1.0, 1.0), **STILL)
    corners = set()

    for seed in range(30):
        pixels_hwC, labels_hw = augment(pixels_HWC, labels_HW, drawing(seed), VOID)
        rows, columns = np.nonzero(labels_hw == 1)
        top, left = rows.min(), columns.min()
        corners.add((top, left))
        assert (labels_hw == 1).sum() == 8 * 12
        assert (labels_hw == VOID).sum() == 32 * 32 - 8 * 12
        assert np.array_equal(pixels_hwC[top : top + 8, left : left + 12], pixels_HWC)
        outside_NC = pixels_hwC[labels_hw == VOID]
        assert np.abs(outside_NC - pixels_HWC.mean((0, 1))).max() <= 1  # the mean colour

    assert len(corners) > 20
    assert min(corners)[0] == 0 or max(corners)[0] > 16


def test_a_picture_below_one_pixel_is_still_there():
    labels_HW = np.full((1, 1), 3, dtype=np.uint8)
    augment = Augment(size=(16, 16), zoom=(0.25, 0.25), **STILL)

    for seed in range(50):
        pixels_hwC, labels_hw = augment(np.full((1, 1, 3), 77, np.uint8), labels_HW, drawing(seed))
        assert (labels_hw == 3).sum() == 1
        assert (pixels_hwC == 77).all()


def test_balanced_windows_show_rare_classes():
    labels_HW = np.zeros((200, 200), dtype=np.uint8)
    labels_HW[150, 30], labels_HW[0, 199] = 1, 2
    labels_HW[100, 100] = VOID
    pixels_HWC = noise(200, 200)

    def shown(balanced):
        augment = Augment(size=(32, 32), zoom=(1.0, 1.0), balanced=balanced, **STILL)
        found = [augment(pixels_HWC, labels_HW, drawing(i), VOID)[1] for i in range(150)]
        return np.mean([[(labels_hw == k).any() for k in (1, 2)] for labels_hw in found], axis=0)

    assert (shown(1.0) > 0.2).all()  # a third of the windows for each of three classes
    assert (shown(0.0) < 0.1).all()


def test_a_balanced_window_of_a_picture_without_labels_is_any_window():
    augment = Augment(size=(8, 8), balanced=1.0)

    _, labels_hw = augment(noise(20, 20), np.full((20, 20), VOID, np.uint8), drawing(0), VOID)

    assert (labels_hw == VOID).all()


def test_whole_pictures_are_squeezed():
    labels_HW = np.zeros((40, 100), dtype=np.uint8)
    labels_HW[:, 50:] = 1
    augment = Augment(size=(20, 20), whole=True, zoom=(1.0, 1.0), **STILL)

    pixels_hw1, labels_hw = augment(200 * labels_HW[:, :, None], labels_HW, drawing(0))

    expected_hw = np.zeros((20, 20), dtype=np.uint8)
    expected_hw[:, 10:] = 1
    assert np.array_equal(labels_hw, expected_hw)
    assert (pixels_hw1[:, :9] == 0).all()
    assert (pixels_hw1[:, 11:] == 200).all()


def test_zoom_is_between_its_limits():
    labels_HW = np.zeros((400, 400), dtype=np.uint8)
    labels_HW[:, 190:210] = 1  # a band 20 wide
    augment = Augment(size=(400, 400), zoom=(0.5, 2.0), **STILL)

    widths = []
    for seed in range(60):
        _, labels_hw = augment(labels_HW[:, :, None], labels_HW, drawing(seed))
        widths.append((labels_hw == 1).sum(1).max())

    assert 9 <= min(widths) < 13
    assert 32 < max(widths) <= 41
    assert 0.3 < np.mean(np.array(widths) < 20) < 0.7  # as often smaller as larger


@pytest.mark.parametrize(
    ("flip", "mirrored"), [(0.0, {False}), (0.5, {False, True}), (1.0, {True})]
)
def test_pictures_are_mirrored_as_often_as_asked(flip, mirrored):
    pixels_HWC, labels_HW = noise(10, 12), blocks(10, 12)
    augment = replace(unchanged((10, 12)), flip=flip)
    found = set()

    for seed in range(20):
        pixels_hwC, labels_hw = augment(pixels_HWC, labels_HW, drawing(seed))
        mirror = not np.array_equal(pixels_hwC, pixels_HWC)
        step = -1 if mirror else 1
        assert np.array_equal(pixels_hwC, pixels_HWC[:, ::step])
        assert np.array_equal(labels_hw, labels_HW[:, ::step])
        found.add(mirror)

    assert found == mirrored


def test_turns_go_all_four_ways():
    pixels_HWC, labels_HW = noise(12, 12), noise(12, 12, 1)[:, :, 0]
    augment = replace(unchanged((12, 12)), turns=True)
    ways = set()

    for seed in range(30):
        pixels_hwC, labels_hw = augment(pixels_HWC, labels_HW, drawing(seed))
        way = next(n for n in range(4) if np.array_equal(np.rot90(pixels_HWC, n), pixels_hwC))
        assert np.array_equal(np.rot90(labels_HW, way), labels_hw)
        ways.add(way)

    assert ways == {0, 1, 2, 3}


def test_a_rotation_leaves_no_empty_corner():
    augment = Augment(size=(20, 80), zoom=(1.0, 1.0), rotation=180.0, **STILL)

    for seed in range(20):
        pixels_hwC, labels_hw = augment(
            np.full((200, 200, 3), 99, np.uint8), np.ones((200, 200), np.uint8), drawing(seed)
        )
        assert (labels_hw == 1).all()
        assert (pixels_hwC == 99).all()


# colour


@pytest.mark.parametrize("channels", [1, 3])
def test_unchanged_is_unchanged(channels):
    pixels_HWC, labels_HW = noise(30, 20, channels), blocks(30, 20)

    pixels_hwC, labels_hw = unchanged((30, 20))(pixels_HWC, labels_HW, drawing(0))

    assert np.array_equal(pixels_hwC, pixels_HWC)
    assert np.array_equal(labels_hw, labels_HW)


def test_contrast_spreads_values_around_their_mean():
    pixels_HWC = np.clip(noise(40, 40), 100, 150)
    augment = replace(unchanged((40, 40)), contrast=(1.5, 1.5))

    pixels_hwC, _ = augment(pixels_HWC, blocks(40, 40), drawing(0))

    mean_C = pixels_HWC.mean((0, 1))
    assert np.abs(mean_C + 1.5 * (pixels_HWC - mean_C) - pixels_hwC).max() < 1


def test_gamma_bends_the_middle_and_leaves_the_ends():
    ramp_HWC = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    augment = replace(unchanged((16, 16)), gamma=(2.0, 2.0))

    pixels_hwC, _ = augment(ramp_HWC, blocks(16, 16), drawing(0))

    assert np.abs(255 * (ramp_HWC / 255) ** 2 - pixels_hwC).max() <= 0.51


def test_saturation_0_would_be_gray_and_gray_stays_as_it_is():
    pixels_HWC, gray_HW1 = noise(20, 20), noise(20, 20, 1)
    augment = replace(unchanged((20, 20)), saturation=(0.001, 0.001))

    pixels_hwC, _ = augment(pixels_HWC, blocks(20, 20), drawing(0))
    gray_hw1, _ = augment(gray_HW1, blocks(20, 20), drawing(0))

    assert np.ptp(pixels_hwC.astype(int), axis=2).max() <= 1
    assert np.array_equal(gray_hw1, gray_HW1)


def test_a_shift_differs_by_channel_and_stays_within_its_limit():
    pixels_HWC = np.full((8, 8, 3), 128, np.uint8)
    augment = replace(unchanged((8, 8)), shift=0.1)

    found_NC = np.array(
        [augment(pixels_HWC, blocks(8, 8), drawing(i))[0][0, 0] for i in range(50)], dtype=int
    )

    assert np.abs(found_NC - 128).max() <= 26
    assert np.abs(found_NC - 128).max() > 15
    assert (np.ptp(found_NC, axis=1) > 0).any()


# labels of other kinds


def test_labels_beyond_255_are_kept():
    labels_HW = np.array([[300, 5], [65535, 0]], dtype=np.uint16)

    _, labels_hw = unchanged((4, 4))(noise(2, 2), labels_HW, drawing(0), ignore_id=65535)

    assert labels_hw.dtype == np.uint16
    assert np.array_equal(labels_hw, labels_HW.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(
    ("pixels_HWC", "labels_HW", "ignore_id", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), 255, "float32.*8-bit"),
        (np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4), np.uint8), 255, "1 or 3 channels"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8), 255, r"\(4, 4\).*\(4, 5\)"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), 256, "uint8 cannot hold.*256"),
    ],
)
def test_what_cannot_be_read_is_refused(pixels_HWC, labels_HW, ignore_id, message):
    with pytest.raises(ValueError, match=message):
        Augment()(pixels_HWC, labels_HW, drawing(0), ignore_id)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"size": (0, 5)}, "augment.size must be at least 1 x 1"),
        ({"zoom": (2.0, 0.5)}, "augment.zoom must be two factors, the smaller first"),
        ({"gamma": (0.0, 1.0)}, "augment.gamma must be two factors"),
        ({"flip": 1.5}, "augment.flip must be 0 to 1"),
        ({"balanced": float("nan")}, "augment.balanced must be 0 to 1"),
        ({"rotation": 200.0}, "0 to 180 degrees"),
        ({"size": (4, 8), "turns": True}, r"needs a square.*try \(4, 4\)"),
        ({"whole": True}, r"set augment.zoom \(0.5, 2.0\) to \(1, 1\)"),
    ],
)
def test_knobs_that_cannot_be_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Augment(**knobs)
