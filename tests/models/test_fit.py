"""The training loop, its scores and its crops."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from models.training.augment import Augment
from models.training.fit import Diverged, Fit, FitConfig, PixelCrossEntropy, fit
from models.training.scores import Confusion


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))


def batches(count, seed=0):
    """Bright pixels are class 1."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x_BCHW = torch.randn(2, 1, 8, 8, generator=generator)
        yield x_BCHW, (x_BCHW[:, 0] > 0.3).long()


def weights_of(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


# fit


def test_training_lowers_the_loss():
    history = fit(net(), batches(200), FitConfig(steps=200, learning_rate=0.02, warmup=10))

    assert [moment.step for moment in history] == list(range(1, 201))
    assert history[-1].loss < 0.2 < history[0].loss


def test_equal_inputs_give_equal_weights():
    one, two = net(), net()
    for model in (one, two):
        fit(model, batches(20), FitConfig(steps=20, warmup=2, average=0.9))

    assert torch.equal(weights_of(one), weights_of(two))


def test_a_training_taken_up_again_ends_where_the_other_did():
    config = FitConfig(steps=20, warmup=2, average=0.9)
    whole, begun, resumed = Fit(net(), config), Fit(net(), config), Fit(net(), config)
    data = list(batches(20))
    list(whole.steps(data))
    list(begun.steps(data[:8]))

    resumed.restore(begun.state())
    history = list(resumed.steps(data[8:]))

    assert history[0].step == 9
    assert torch.equal(weights_of(resumed.settle()), weights_of(whole.settle()))


def test_training_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    model, config = net(), FitConfig(steps=3, warmup=0)
    torch.manual_seed(0)

    fit(model, batches(3), config)

    assert torch.equal(torch.rand(3), expected)


def test_training_stops_after_the_configured_steps():
    assert len(fit(net(), batches(50), FitConfig(steps=7, warmup=0))) == 7


def test_the_rate_climbs_then_falls_to_its_last_share():
    config = FitConfig(steps=110, warmup=10, learning_rate=1.0, final_share=0.1)
    rates = [config.rate(step) for step in range(111)]

    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(poison):
    def poisoned():
        yield from batches(5)
        yield torch.full((2, 1, 8, 8), poison), torch.zeros(2, 8, 8, dtype=torch.long)

    model = net()
    training = Fit(model, FitConfig(steps=20, warmup=2, keep_every=2))

    with pytest.raises(Diverged, match=r"step 6: loss nan.*back at step 4.*lower learning rate"):
        list(training.steps(poisoned()))

    sane = Fit(net(), FitConfig(steps=20, warmup=2))
    list(sane.steps(batches(4)))
    assert torch.equal(weights_of(model), weights_of(sane.model))


def test_a_batch_that_is_all_ignored_teaches_nothing():
    logits_BKHW = torch.randn(1, 2, 4, 4, requires_grad=True)

    loss = PixelCrossEntropy(255)(logits_BKHW, torch.full((1, 4, 4), 255))
    loss.backward()

    assert loss.item() == 0
    assert not logits_BKHW.grad.any()


def test_ignored_pixels_do_not_count():
    logits_BKHW = torch.randn(1, 2, 1, 2)

    loss = PixelCrossEntropy(255)(logits_BKHW, torch.tensor([[[1, 255]]]))

    expected = nn.functional.cross_entropy(logits_BKHW[..., :1], torch.tensor([[[1]]]))
    torch.testing.assert_close(loss, expected)


def test_averaged_weights_are_lent_and_given_back():
    training = Fit(net(), FitConfig(steps=10, warmup=0, average=0.9))
    list(training.steps(batches(10)))
    present = weights_of(training.model)

    with training.averaged():
        mean = weights_of(training.model)

    assert not torch.equal(mean, present)
    assert torch.equal(weights_of(training.model), present)
    assert torch.equal(weights_of(training.settle()), mean)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 10, "warmup": 11}, "warmup 11"),
        ({"average": 1.0}, "try 0.99"),
        ({"learning_rate": -1.0}, "above 0"),
    ],
)
def test_knobs_that_cannot_be_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**knobs)


# scores


def test_scores_follow_from_the_counts():
    found = Confusion(3)
    found.add(np.array([0, 0, 0, 1, 1, 255]), np.array([0, 0, 1, 1, 0, 2]))

    assert found.counts_KK.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert found.iou_K() == pytest.approx([2 / 4, 1 / 3, math.nan], nan_ok=True)
    assert found.mean_iou() == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert found.accuracy() == pytest.approx(3 / 5)


def test_scores_do_not_depend_on_how_the_pictures_were_cut():
    labels_HW, answers_HW = np.random.default_rng(0).integers(0, 4, (2, 30, 20), dtype=np.uint8)
    whole, pieces = Confusion(4), Confusion(4)

    whole.add(labels_HW, answers_HW)
    for row in range(0, 30, 7):
        pieces.add(labels_HW[row : row + 7], answers_HW[row : row + 7])

    assert (whole.counts_KK == pieces.counts_KK).all()


def test_nothing_counted_has_no_score():
    found = Confusion(2)
    found.add(np.full(4, 255), np.zeros(4, dtype=int))

    assert math.isnan(found.mean_iou())
    assert math.isnan(found.accuracy())


def test_labels_that_are_no_class_are_refused():
    with pytest.raises(ValueError, match="labels run from 0 to 2; 2 classes are 0 to 1"):
        Confusion(2).add(np.array([0, 2]), np.array([0, 0]))
    with pytest.raises(ValueError, match=r"labels are \(2,\), answers are \(3,\)"):
        Confusion(2).add(np.zeros(2, dtype=int), np.zeros(3, dtype=int))


# crops


STILL = {"gain": (1.0, 1.0), "gamma": (1.0, 1.0), "shift": 0.0}


def test_picture_and_labels_move_together():
    labels_HW = (torch.rand(70, 90, generator=torch.Generator().manual_seed(0)) > 0.5).byte()
    x_CHW = labels_HW.float()[None]
    augment = Augment(crop=32, zoom=(1.0, 1.0), **STILL)
    generator = torch.Generator().manual_seed(5)

    for _ in range(20):
        x_CSS, labels_SS = augment(x_CHW, labels_HW, generator)
        torch.testing.assert_close(x_CSS[0], labels_SS.float())


@pytest.mark.parametrize("size", [(8, 8), (200, 20), (64, 64)])
def test_every_crop_has_its_size_and_the_outside_is_ignored(size):
    augment, generator = Augment(crop=64), torch.Generator().manual_seed(0)

    for _ in range(10):
        x_CSS, labels_SS = augment(
            torch.rand(3, *size), torch.ones(size, dtype=torch.uint8), generator
        )
        assert x_CSS.shape == (3, 64, 64)
        assert labels_SS.shape == (64, 64)
        assert 0 <= x_CSS.min() <= x_CSS.max() <= 1
        assert set(labels_SS.unique().tolist()) <= {1, 255}


def test_equal_generators_give_equal_crops():
    x_CHW, labels_HW = torch.rand(3, 80, 80), torch.ones(80, 80, dtype=torch.uint8)

    one, two = (
        Augment(crop=32)(x_CHW, labels_HW, torch.Generator().manual_seed(9)) for _ in range(2)
    )

    assert torch.equal(one[0], two[0])
