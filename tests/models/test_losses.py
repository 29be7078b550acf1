"""The terms of the loss against formulas written out by hand, and the weights of classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models.training.balance import ClassCounts
from models.training.losses import Loss
from models.training.recipes import Recipe, Terms

VOID = 255
ALONE = {
    "cross_entropy": Terms(),
    "smoothed": Terms(label_smoothing=0.1),
    "weighted": Terms(class_weights=(0.5, 1.0, 4.0, 2.0)),
    "focal": Terms(cross_entropy=0.0, focal=1.0),
    "focal, weighted": Terms(cross_entropy=0.0, focal=1.0, class_weights=(0.5, 1.0, 4.0, 2.0)),
    "focal, gamma 0.5": Terms(cross_entropy=0.0, focal=1.0, focal_gamma=0.5),
    "dice": Terms(cross_entropy=0.0, dice=1.0),
    "lovasz": Terms(cross_entropy=0.0, lovasz=1.0),
    "all": Terms(focal=0.5, dice=0.25, lovasz=2.0),
}
each_term = pytest.mark.parametrize("terms", ALONE.values(), ids=ALONE.keys())


def batch(pictures=3, height=5, width=7, classes=4, seed=0):
    """Scores, and labels of which one in five is void and one class never occurs."""
    generator = torch.Generator().manual_seed(seed)
    logits_BKHW = 3 * torch.randn(pictures, classes, height, width, generator=generator).double()
    labels_BHW = torch.randint(classes - 1, (pictures, height, width), generator=generator)
    void_BHW = torch.rand(labels_BHW.shape, generator=generator) < 0.2
    return logits_BKHW, labels_BHW.masked_fill(void_BHW, VOID)


def valid_pixels(logits_BKHW, labels_BHW):
    """Picture by picture: shares_PK and labels_P of the pixels that count."""
    for logits_KHW, labels_HW in zip(logits_BKHW.numpy(), labels_BHW.numpy(), strict=True):
        logits_PK = logits_KHW.reshape(len(logits_KHW), -1).T[labels_HW.ravel() != VOID]
        powers_PK = np.exp(logits_PK - logits_PK.max(1, keepdims=True))
        yield powers_PK / powers_PK.sum(1, keepdims=True), labels_HW[labels_HW != VOID]


# against formulas


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_is_its_formula(gamma):
    logits_BKHW, labels_BHW = batch()
    weights = (0.5, 1.0, 4.0, 2.0)

    found = []
    for shares_PK, labels_P in valid_pixels(logits_BKHW, labels_BHW):
        for share_K, label in zip(shares_PK, labels_P, strict=True):
            p = share_K[label]
            found.append(-weights[label] * (1 - p) ** gamma * np.log(p))

    terms = Terms(cross_entropy=0.0, focal=1.0, focal_gamma=gamma, class_weights=weights)
    assert Loss(terms)(logits_BKHW, labels_BHW).item() == pytest.approx(np.mean(found), rel=1e-7)


def test_dice_is_its_formula():
    logits_BKHW, labels_BHW = batch()

    pictures = []
    for shares_PK, labels_P in valid_pixels(logits_BKHW, labels_BHW):
        lost = []
        for label in set(labels_P.tolist()):
            both = sum(share_K[label] for share_K in shares_PK[labels_P == label])
            lost.append(1 - 2 * both / (shares_PK[:, label].sum() + (labels_P == label).sum()))
        pictures.append(np.mean(lost))

    loss = Loss(Terms(cross_entropy=0.0, dice=1.0))(logits_BKHW, labels_BHW)
    assert loss.item() == pytest.approx(np.mean(pictures), rel=1e-12)


def test_lovasz_is_its_formula():
    """Algorithm 1 of the paper: pixels by falling error, each weighed by what it costs in IoU."""
    logits_BKHW, labels_BHW = batch()

    pictures = []
    for shares_PK, labels_P in valid_pixels(logits_BKHW, labels_BHW):
        lost = []
        for label in set(labels_P.tolist()):
            truth_P = labels_P == label
            error_P = np.where(truth_P, 1 - shares_PK[:, label], shares_PK[:, label])
            before = total = 0.0
            missed, called = 0, 0
            for place in np.argsort(-error_P):
                missed, called = missed + truth_P[place], called + (not truth_P[place])
                jaccard = 1 - (truth_P.sum() - missed) / (truth_P.sum() + called)
                total += error_P[place] * (jaccard - before)
                before = jaccard
            lost.append(total)
        pictures.append(np.mean(lost))

    loss = Loss(Terms(cross_entropy=0.0, lovasz=1.0))(logits_BKHW, labels_BHW)
    assert loss.item() == pytest.approx(np.mean(pictures), rel=1e-12)


def test_lovasz_of_hard_answers_is_the_iou_that_was_lost():
    labels_BHW = torch.tensor([[[0, 0, 0, 1, 1, 1]]])
    answers_BHW = torch.tensor([[[0, 0, 1, 1, 1, 0]]])
    logits_BKHW = 1e4 * nn.functional.one_hot(answers_BHW, 2).permute(0, 3, 1, 2).double()

    loss = Loss(Terms(cross_entropy=0.0, lovasz=1.0))(logits_BKHW, labels_BHW)

    assert loss.item() == pytest.approx(1 - 2 / 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_that_of_torch(smoothing):
    logits_BKHW, labels_BHW = batch()

    loss = Loss(Terms(label_smoothing=smoothing))(logits_BKHW, labels_BHW)

    expected = nn.functional.cross_entropy(
        logits_BKHW, labels_BHW, ignore_index=VOID, label_smoothing=smoothing
    )
    torch.testing.assert_close(loss, expected)


def test_a_weight_multiplies_the_pixels_of_its_class():
    logits_BKHW, labels_BHW = batch()
    weights = (0.5, 1.0, 4.0, 2.0)

    loss = Loss(Terms(class_weights=weights))(logits_BKHW, labels_BHW)

    surprise_BHW = nn.functional.cross_entropy(
        logits_BKHW, labels_BHW, ignore_index=VOID, reduction="none"
    )
    heavy_BHW = torch.tensor([*weights, 0.0]).double()[labels_BHW.where(labels_BHW != VOID, 4)]
    expected = (surprise_BHW * heavy_BHW).sum() / (labels_BHW != VOID).sum()
    torch.testing.assert_close(loss, expected)


def test_terms_add_up_by_their_shares():
    logits_BKHW, labels_BHW = batch()

    def alone(**terms):
        return Loss(Terms(**{"cross_entropy": 0.0, **terms}))(logits_BKHW, labels_BHW)

    parts = [
        0.5 * alone(cross_entropy=1.0),
        2.0 * alone(focal=1.0),
        0.25 * alone(dice=1.0),
        3.0 * alone(lovasz=1.0),
    ]
    whole = alone(cross_entropy=0.5, focal=2.0, dice=0.25, lovasz=3.0)
    torch.testing.assert_close(whole, torch.stack(parts).sum())


# gradients


@each_term
def test_slopes_are_those_of_the_loss(terms):
    logits_BKHW, labels_BHW = batch(pictures=2, height=3, width=3)
    loss = Loss(terms)

    assert torch.autograd.gradcheck(
        lambda logits: loss(logits, labels_BHW), logits_BKHW.requires_grad_()
    )


@each_term
def test_a_small_step_down_the_slope_lowers_it(terms):
    logits_BKHW, labels_BHW = batch()
    loss = Loss(terms)
    before = loss(logits_BKHW.requires_grad_(), labels_BHW)
    before.backward()

    after = loss(logits_BKHW.detach() - 0.1 * logits_BKHW.grad, labels_BHW)

    assert after < before


@each_term
def test_ignored_pixels_give_neither_loss_nor_gradient(terms):
    logits_BKHW, labels_BHW = batch()
    other_BKHW = torch.where((labels_BHW == VOID)[:, None], -logits_BKHW, logits_BKHW)
    logits_BKHW.requires_grad_()

    loss = Loss(terms)(logits_BKHW, labels_BHW)
    loss.backward()

    torch.testing.assert_close(loss.detach(), Loss(terms)(other_BKHW, labels_BHW))
    void_BKHW = (labels_BHW == VOID)[:, None].expand_as(logits_BKHW)
    assert not logits_BKHW.grad[void_BKHW].any()
    assert logits_BKHW.grad[~void_BKHW].any()


@each_term
def test_an_ignored_label_may_be_a_class_index(terms):
    logits_BKHW, labels_BHW = batch()
    shifted_BHW = labels_BHW.where(labels_BHW != 2, VOID)

    loss = Loss(terms, ignore_id=2)(logits_BKHW, shifted_BHW.where(shifted_BHW != VOID, 2))

    torch.testing.assert_close(loss, Loss(terms)(logits_BKHW, shifted_BHW))


@each_term
def test_a_batch_that_is_all_ignored_teaches_nothing(terms):
    logits_BKHW, labels_BHW = batch()
    logits_BKHW.requires_grad_()

    loss = Loss(terms)(logits_BKHW, torch.full_like(labels_BHW, VOID))
    loss.backward()

    assert loss.item() == 0
    assert not logits_BKHW.grad.any()


@each_term
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e30])
def test_extreme_scores_give_numbers(terms, scale):
    logits_BKHW, labels_BHW = batch()
    logits_BKHW = (scale * logits_BKHW.sign()).float().requires_grad_()

    loss = Loss(terms)(logits_BKHW, labels_BHW)
    loss.backward()

    assert loss.isfinite()
    assert logits_BKHW.grad.isfinite().all()


# parts of a step


@each_term
def test_parts_of_a_step_add_up_to_the_whole(terms):
    logits_BKHW, labels_BHW = batch(pictures=5)
    labels_BHW[0] = VOID  # it must not count as a picture
    labels_BHW[1, 1:] = VOID
    loss = Loss(terms)
    counts_2 = loss.counts(labels_BHW)

    shares = [
        loss(logits_BKHW[part], labels_BHW[part], counts_2) for part in (slice(0, 2), slice(2, 5))
    ]

    assert counts_2.tolist() == [(labels_BHW != VOID).sum(), 4]
    torch.testing.assert_close(torch.stack(shares).sum(), loss(logits_BKHW, labels_BHW))


# classifiers


@pytest.mark.parametrize("name", ["cross_entropy", "smoothed", "weighted", "focal, weighted"])
def test_the_picture_of_a_classifier_is_one_pixel(name):
    logits_BK = torch.randn(6, 4).double()
    labels_B = torch.tensor([0, 3, VOID, 1, 2, 2])
    loss = Loss(ALONE[name])

    found = loss(logits_BK, labels_B)

    torch.testing.assert_close(found, loss(logits_BK[:, :, None, None], labels_B[:, None, None]))
    assert loss.counts(labels_B).tolist() == [5, 5]


@pytest.mark.parametrize("name", ["dice", "lovasz"])
def test_overlaps_of_a_classifier_are_refused(name):
    with pytest.raises(ValueError, match="need masks"):
        Loss(ALONE[name])(torch.randn(2, 3), torch.tensor([0, 1]))


def test_class_weights_of_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match="are 3 numbers, the model has 4 classes"):
        Loss(Terms(class_weights=(1.0, 2.0, 3.0)))(*batch())


# balance


def test_median_frequencies_of_camvid_are_those_of_the_specification():
    """Counts of the 367 training masks; weights of MODELS.md section 7.1."""
    counts = ClassCounts(11, ignore_id=11)
    counts.pixels_K[:] = (
        *(10_682_767, 14_750_079, 623_349, 20_076_880, 2_845_085, 6_166_762),
        *(743_859, 714_595, 3_719_877, 405_385, 184_967),
    )
    pictures_K = np.array([366, 365, 366, 367, 349, 319, 351, 173, 360, 317, 201])
    counts.around_K[:] = 360 * 480 * pictures_K

    expected = [0.2793, 0.2017, 4.7865, 0.1490, 1.0, 0.4217, 3.8467, 1.9736, 0.7889, 6.3747, 8.8587]
    assert counts.median_frequency() == pytest.approx(expected, abs=5e-5)
    assert max(counts.median_frequency(heaviest=5.0)) == 5.0


def test_classes_are_counted_in_the_pictures_that_show_them():
    counts = ClassCounts(3)

    counts.add(np.array([[0, 0], [0, 1]]))
    counts.add(np.array([[0, 255], [0, 0]], dtype=np.uint8))

    assert counts.pixels_K.tolist() == [6, 1, 0]
    assert counts.around_K.tolist() == [8, 4, 0]
    # 6/8 and 1/4 have the median 1/2; class 2 never occurs
    assert counts.median_frequency() == pytest.approx((0.5 / 0.75, 0.5 / 0.25, 1.0))


def test_counts_of_two_workers_add_up():
    labels_NHW = np.random.default_rng(0).integers(0, 4, (6, 5, 5), dtype=np.uint8)
    one, two, whole = ClassCounts(4), ClassCounts(4), ClassCounts(4)
    for i, labels_HW in enumerate(labels_NHW):
        whole.add(labels_HW)
        (one if i % 2 else two).add(labels_HW)

    one.merge(two)

    assert one.median_frequency() == whole.median_frequency()


def test_labels_that_are_no_class_are_refused():
    with pytest.raises(ValueError, match="labels run from 0 to 7; 3 classes are 0 to 2"):
        ClassCounts(3).add(np.array([0, 7, 255]))


def test_labels_without_any_class_cannot_be_balanced():
    counts = ClassCounts(3)
    counts.add(np.full((2, 2), 255))

    with pytest.raises(ValueError, match="nothing to balance"):
        counts.median_frequency()


def test_a_balanced_recipe_holds_the_numbers():
    counts = ClassCounts(2)
    counts.add(np.array([0, 0, 0, 1]))
    recipe = Recipe(loss=Terms(class_weights="median_frequency", heaviest=1.5))

    balanced = recipe.balanced(counts)

    assert balanced.loss.class_weights == pytest.approx((0.5 / 0.75, 1.5))
    assert replace(balanced, loss=recipe.loss) == recipe
    assert Recipe().balanced(counts) == Recipe()


def test_weights_that_were_not_counted_are_refused():
    with pytest.raises(ValueError, match=r"call recipe\.balanced"):
        Loss(Terms(class_weights="median_frequency"))
