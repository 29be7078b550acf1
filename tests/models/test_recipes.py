"""Recipes: JSON both ways, strictly, the learning rate of every step, and those with a name."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.training.augment import Augment
from models.training.rates import Rate
from models.training.recipes import NAMED, Recipe, Terms, default, pets, street, synthetic

OTHER = Recipe(
    length=7,
    unit="epochs",
    batch=12,
    accumulate=3,
    optimizer="sgd",
    momentum=0.8,
    nesterov=True,
    weight_decay=1e-4,
    rate=Rate(peak=0.1, course="poly", warmup=9, power=1.0, final_share=0.0),
    head_factor=10.0,
    heads=("top",),
    clip_norm=0.0,
    loss=Terms(focal=0.5, lovasz=1.0, label_smoothing=0.1, class_weights=(1.0, 0.5)),
    average=0.0,
    frozen_statistics=True,
    bf16=True,
    patience=4,
    augment=Augment(size=(64, 64), turns=True, rotation=5.0, balanced=0.25),
    mean=(0.5,),
    std=(0.2,),
    ignore_id=11,
    keep_every=10,
    seed=99,
)


# JSON


@pytest.mark.parametrize("recipe", [*(make() for make in NAMED.values()), OTHER])
def test_a_recipe_comes_back_from_json(recipe):
    text = json.dumps(recipe.to_json(), allow_nan=False)

    assert Recipe.from_json(json.loads(text)) == recipe
    assert json.dumps(Recipe.from_json(json.loads(text)).to_json()) == text


def test_every_knob_of_the_other_recipe_differs_from_the_default():
    """Or the test above would prove less than it says."""
    before = Recipe().to_json()
    assert [key for key, value in OTHER.to_json().items() if value == before[key]] == []


def test_what_is_not_said_is_the_default():
    recipe = Recipe.from_json({"batch": 4, "rate": {"peak": 1}, "loss": {"dice": 0.5}})

    assert recipe == Recipe(batch=4, rate=Rate(peak=1.0), loss=Terms(dice=0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bach": 4}, "recipe: there is no option 'bach'; did you mean 'batch'"),
        ({"rate": {"peek": 1.0}}, "no option 'rate.peek'; did you mean 'peak'"),
        ({"augment": {"zooms": [1, 2]}}, "no option 'augment.zooms'; did you mean 'zoom'"),
        ({"batch": "8"}, "batch should be a valid integer"),
        ({"batch": 8.5}, "batch should be a valid integer"),
        ({"batch": True}, "batch should be a valid integer"),
        ({"nesterov": 1}, "nesterov should be a valid boolean, it is 1"),
        ({"rate": {"peak": "1e-3"}}, r"rate\.peak should be a valid number, it is '1e-3'"),
        ({"rate": {"peak": float("nan")}}, r"rate\.peak should be a finite number"),
        ({"rate": 0.1}, "rate should be an object, it is 0.1"),
        ({"augment": {"size": [1, 2, 3]}}, r"augment\.size"),
        ({"optimizer": "lamb"}, "optimizer should be 'adamw', .*it is 'lamb'"),
        ({"loss": {"class_weights": "median"}}, r"loss\.class_weights should be 'none' or"),
        ({"rate": {"peak": -1.0}}, r"rate\.peak must be above 0"),
        ({"batch": 0, "seed": "x"}, "seed should be"),
    ],
)
def test_json_that_says_something_else_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(values)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ValueError, match=r"peek.*bach"):
        Recipe.from_json({"bach": 4, "rate": {"peek": 1}})


def test_recipes_are_values():
    with pytest.raises(FrozenInstanceError):
        Recipe().batch = 2
    assert len({Recipe(), Recipe(), street()}) == 2


def test_recipes_are_read_without_torch():
    """A command line that only shows its help must not wait for it."""
    parts = "models.training.recipes, models.training.balance"
    code = f"import sys, {parts}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"length": 0}, "length must be at least 1, it is 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"average": 1.0}, "average must be at least 0 and below 1.*try 0.9"),
        ({"momentum": -0.1}, "momentum must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0, it is nan"),
        ({"unit": "epoch"}, "unit cannot be 'epoch'; did you mean 'epochs'"),
        ({"optimizer": "adamW"}, "optimizer cannot be 'adamW'.*known: adam, adamw, sgd"),
        ({"nesterov": True}, "nesterov needs optimizer sgd"),
        ({"optimizer": "sgd", "momentum": 0.0, "nesterov": True}, "momentum above 0"),
        ({"length": 10}, "rate.warmup 50 must not exceed the length of 10 steps"),
        ({"head_factor": 0.0}, "head_factor must be above 0"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "one of each per channel"),
        ({"std": (0.2, 0.2, 0.0)}, "one of each per channel"),
    ],
)
def test_knobs_that_cannot_be_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"peak": 0.0}, "peak must be above 0"),
        ({"peak": float("nan")}, "peak must be above 0, it is nan"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"final_share": 1.1}, "final_share must be 0 to 1"),
        ({"power": 0.0}, "power must be above 0"),
        ({"gamma": 1.5}, "gamma must be above 0 and at most 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"course": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_rates_that_cannot_be_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Rate(**knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"dice": -1.0}, "loss.dice must be at least 0"),
        ({"cross_entropy": 0.0}, "all terms of the loss are 0"),
        ({"focal_gamma": -1.0}, "focal_gamma must be at least 0"),
        ({"label_smoothing": 1.1}, "label_smoothing must be 0 to 1"),
        ({"class_weights": ()}, "one number of at least 0 for each class"),
        ({"class_weights": (1.0, -1.0)}, "one number of at least 0 for each class"),
        ({"class_weights": "median"}, "cannot be 'median'; known: median_frequency, none"),
        ({"heaviest": 0.5}, "heaviest must be at least 1"),
    ],
)
def test_terms_that_cannot_be_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Terms(**knobs)


# sharing


def test_a_batch_is_shared_evenly():
    recipe = Recipe(batch=24, accumulate=3)

    assert recipe.part() == 8
    assert recipe.part(workers=4) == 2
    with pytest.raises(ValueError, match=r"batch 24.*5 workers in 3 parts each; try batch 30"):
        recipe.part(workers=5)


# the learning rate


def rates(rate, steps, epoch=1):
    return [rate.at(step, steps, epoch) for step in range(steps + 1)]


@settings(max_examples=60)
@given(st.sampled_from(["cosine", "poly", "step", "constant"]), st.integers(0, 40))
def test_the_rate_climbs_to_its_peak_and_never_again(course, warmup):
    found = rates(Rate(peak=1.0, course=course, warmup=warmup, every=2), 100, epoch=15)

    assert found[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert 0 < max(found) <= 1


def test_half_a_cosine_falls_to_the_final_share():
    found = rates(Rate(peak=1.0, warmup=10, final_share=0.1), 110)

    assert found[10] == pytest.approx(1.0)
    assert found[60] == pytest.approx(0.55)
    assert found[110] == pytest.approx(0.1)


def test_poly_is_a_power_of_what_is_left():
    rate = Rate(peak=2.0, course="poly", warmup=0, power=0.9, final_share=0.0)

    assert rates(rate, 40) == pytest.approx([2 * (1 - step / 40) ** 0.9 for step in range(41)])


def test_a_constant_rate_is_one():
    assert set(rates(Rate(peak=0.5, course="constant", warmup=0), 30)) == {0.5}


def test_steps_down_are_those_of_the_pets_article():
    """Epochs 1, 13, 25, 37 and 49, of 58 steps each (MODELS.md section 2.5)."""
    found = [pets().rate.at(58 * (epoch - 1), 58 * 50, 58) for epoch in (1, 12, 13, 25, 37, 49, 50)]

    assert found == pytest.approx(
        [4e-4, 4e-4, 3.2e-4, 2.56e-4, 2.048e-4, 1.6384e-4, 1.6384e-4], rel=1e-4
    )


# those with a name


def test_the_named_recipes_say_what_their_documents_say():
    assert default() == Recipe()

    noise = synthetic()
    assert (noise.optimizer, noise.rate.peak, noise.length, noise.unit) == (
        "adam",
        1e-3,
        100,
        "steps",
    )
    assert (noise.batch, noise.weight_decay, noise.clip_norm) == (4, 0.0, 0.0)

    article = pets()
    assert (article.optimizer, article.weight_decay) == ("adam", 0.0)
    assert (article.batch, article.length, article.unit) == (64, 50, "epochs")
    assert article.rate == Rate(peak=4e-4, course="step", gamma=0.8, every=12, warmup=0)
    assert article.augment.size == (128, 128)
    assert article.augment.whole
    assert article.augment.flip == 0.5
    assert (article.mean, article.std) == ((0.0,), (1.0,))  # its first layer is a batch norm

    camvid = street()
    assert camvid.loss.class_weights == "median_frequency"
    assert camvid.rate == Rate(peak=1e-3, warmup=100, final_share=0.0)


def test_a_variant_is_a_recipe_with_two_lines_changed():
    longer = replace(street(), length=500, rate=replace(street().rate, peak=1e-3))

    assert longer.augment == street().augment
