"""Counts and figures of masks, against scikit-learn and against the naive way."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
    recall_score,
)

from models.training.scores import BINS, WIDTH, Boundary, Calibration, Confusion

CLASSES, IGNORED = 4, 255
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 8))
NAMES = list(range(CLASSES))


@st.composite
def pictures(draw):
    """Labels, some of them ignored, and answers of the same size."""
    size = draw(SIZES)
    labels = st.sampled_from([*NAMES, IGNORED])
    return (
        draw(arrays(np.uint8, size, elements=labels)),
        draw(arrays(np.uint8, size, elements=st.integers(0, CLASSES - 1))),
    )


def counted(*pairs):
    found = Confusion(CLASSES, IGNORED)
    for labels_HW, answers_HW in pairs:
        found.add(labels_HW, answers_HW)
    return found


def kept(labels_HW, answers_HW):
    return labels_HW[labels_HW != IGNORED], answers_HW[labels_HW != IGNORED]


# pixels


@given(pictures())
def test_the_confusion_matrix_is_that_of_scikit_learn(pair):
    true_N, said_N = kept(*pair)
    expected = np.zeros((CLASSES, CLASSES), int)
    if true_N.size:
        expected = confusion_matrix(true_N, said_N, labels=NAMES)

    assert (counted(pair).counts_KK == expected).all()


@given(pictures().filter(lambda pair: (pair[0] != IGNORED).any()))
def test_figures_are_those_of_scikit_learn(pair):
    true_N, said_N = kept(*pair)
    found = counted(pair)
    each = {"labels": NAMES, "average": None, "zero_division": np.nan}
    there = sorted(set(true_N.tolist()))

    assert found.iou_K() == pytest.approx(jaccard(true_N, said_N), nan_ok=True)
    assert found.dice_K() == pytest.approx(f1_score(true_N, said_N, **each), nan_ok=True)
    assert found.recall_K() == pytest.approx(recall_score(true_N, said_N, **each), nan_ok=True)
    assert found.accuracy() == pytest.approx(accuracy_score(true_N, said_N))
    assert found.mean_found(found.iou_K()) == pytest.approx(
        jaccard_score(true_N, said_N, labels=there, average="macro")
    )


def jaccard(true_N, said_N):
    """NaN where a class is neither there nor called: jaccard_score itself has only 0 or 1."""
    scores = jaccard_score(true_N, said_N, labels=NAMES, average=None, zero_division=0)
    return np.where(np.isin(NAMES, [*true_N, *said_N]), scores, np.nan)


def test_a_class_that_is_only_called_by_mistake_is_no_part_of_the_mean():
    found = counted((np.array([[0, 0, 1, 1]]), np.array([[0, 3, 1, 1]])))

    assert found.iou_K()[3] == 0
    assert found.mean_found(found.iou_K()) == pytest.approx((1 / 2 + 1) / 2)


def test_figures_of_nothing_are_not_numbers():
    found = counted((np.full((2, 2), IGNORED), np.zeros((2, 2), int)))

    assert math.isnan(found.mean_found(found.dice_K()))
    assert math.isnan(Calibration().error())
    assert math.isnan(Boundary(CLASSES).mean_f())


@given(st.lists(pictures(), min_size=1, max_size=4))
def test_counts_of_pictures_add_up(pairs):
    together = counted(*pairs)

    assert (together.counts_KK == sum(counted(pair).counts_KK for pair in pairs)).all()


# confidence


CONFIDENCES = st.tuples(st.integers(0, 255), st.booleans())


@given(st.lists(CONFIDENCES.filter(lambda pair: pair[0] % 17 or pair[0] in (0, 255)), min_size=1))
def test_calibration_is_that_of_scikit_learn(pairs):
    sure = np.array([level for level, _ in pairs], np.uint8)
    right = np.array([right for _, right in pairs])
    found = Calibration()
    found.add(sure, right)

    share_right, mean_sure = calibration_curve(right, sure / 255, n_bins=BINS)
    # scikit-learn leaves empty bins out and does not say how many are in the others
    count_L, sure_L, right_L = found.bins()
    count_l = count_L[count_L > 0]

    assert right_L[count_L > 0] / count_l == pytest.approx(share_right)
    assert sure_L[count_L > 0] / count_l == pytest.approx(mean_sure)
    weights = count_l / count_l.sum()
    assert found.error() == pytest.approx((weights * abs(share_right - mean_sure)).sum(), abs=1e-12)


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower_one():
    found = Calibration()
    found.add(np.arange(0, 256, 17, dtype=np.uint8), np.ones(16, bool))

    assert found.bins()[0].tolist() == [2] + [1] * 14


def test_answers_that_are_always_right_and_half_sure_are_off_by_half():
    found = Calibration()
    found.add(np.full((3, 3), 128, np.uint8), np.ones((3, 3), bool))

    assert found.error() == pytest.approx(1 - 128 / 255)


# borders


def naive(labels_HW, answers_HW, width):
    """Boundary counts by asking every pixel about every other one."""
    height, across = labels_HW.shape
    pixels = list(np.ndindex(height, across))
    ignored = {at for at in pixels if labels_HW[at] == IGNORED}

    def borders(values_HW):
        found = set()
        for y, x in pixels:
            for other in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= other[0] < height and 0 <= other[1] < across
                if inside and not {(y, x), other} & ignored and values_HW[y, x] != values_HW[other]:
                    found.add((y, x, int(values_HW[y, x])))
        return found

    def near(some, others):
        return {
            (y, x, k)
            for y, x, k in some
            if any(k == c and (y - b) ** 2 + (x - a) ** 2 <= width**2 for b, a, c in others)
        }

    def by_class(some):
        return np.bincount([k for _, _, k in some], minlength=CLASSES).tolist()

    true, said = borders(labels_HW), borders(answers_HW)
    return [by_class(part) for part in (true, near(true, said), said, near(said, true))]


@given(pictures(), st.integers(1, 6))
@settings(max_examples=60)
def test_borders_are_those_of_the_naive_way(pair, width):
    found = Boundary(CLASSES, width, IGNORED)
    found.add(*pair)

    mine = [found.labelled_K, found.found_K, found.answered_K, found.right_K]
    assert [part.tolist() for part in mine] == naive(*pair, width)


@given(pictures(), st.integers(1, 6))
def test_borders_of_labels_and_answers_are_the_same_thing_the_other_way_round(pair, width):
    labels_HW, answers_HW = pair
    answers_HW = np.where(labels_HW == IGNORED, IGNORED, answers_HW)
    one, other = Boundary(CLASSES, width, IGNORED), Boundary(CLASSES, width, IGNORED)
    one.add(labels_HW, answers_HW)
    other.add(answers_HW, labels_HW)

    assert one.labelled_K.tolist() == other.answered_K.tolist()
    assert one.found_K.tolist() == other.right_K.tolist()
    assert one.f_K() == pytest.approx(other.f_K(), nan_ok=True)


def disk(height, width, row, column, radius):
    rows, columns = np.mgrid[:height, :width]
    return (np.hypot(rows - row, columns - column) < radius).astype(np.uint8)


def test_an_object_that_is_off_by_no_more_than_the_width_is_found_whole():
    f = {}
    for off in (0, 3, 8):
        found = Boundary(2, 3)
        found.add(disk(80, 90, 40, 40, 20), disk(80, 90, 40, 40 + off, 20))
        f[off] = found.mean_f()

    assert f[0] == f[3] == 1
    assert 0.2 < f[8] < 0.8  # above and below the two borders still run side by side


def test_f_is_the_harmonic_mean_of_precision_and_recall():
    found = Boundary(2, 1)
    found.labelled_K, found.found_K = np.array([0, 40]), np.array([0, 30])
    found.answered_K, found.right_K = np.array([0, 60]), np.array([0, 20])

    precision, recall = 20 / 60, 30 / 40
    expected = 2 * precision * recall / (precision + recall)
    assert found.f_K() == pytest.approx([np.nan, expected], nan_ok=True)
    assert found.mean_f() == pytest.approx(expected)


def test_an_object_that_is_not_found_at_all_counts_as_0():
    found = Boundary(3, 2)
    found.add(disk(30, 30, 15, 15, 8) * 2, np.zeros((30, 30), np.uint8))

    assert found.f_K() == pytest.approx([0, np.nan, 0], nan_ok=True)


def test_a_width_below_1_is_a_share_of_the_diagonal():
    assert Boundary(2).width == WIDTH
    assert Boundary(2).pixels(360, 480) == math.ceil(0.0075 * 600)
    assert Boundary(2, 0.5).pixels(3, 4) == 3
    assert Boundary(2, 3).pixels(3000, 4000) == 3
    with pytest.raises(ValueError, match="above 0"):
        Boundary(2, 0)
