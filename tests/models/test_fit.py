"""The training loop: alone and shared, interrupted and taken up again."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
from models.training import synthetic
from models.training.batches import batch_of
from models.training.fit import Diverged, Fit, fit
from models.training.gallery import SMALL
from models.training.rates import Rate
from models.training.recipes import Recipe
from models.training.states import from_files, to_files
from tests.models.two_workers import (
    EVERY_TERM,
    STEPS,
    VOID,
    batches,
    net,
    short,
    uneven,
    weights_of,
)

ROOT = Path(__file__).parents[2]

# steps


def test_training_lowers_the_loss():
    recipe = Recipe(length=200, rate=Rate(peak=0.02, warmup=10))

    history = fit(net(), batches(200), recipe)

    assert [moment.step for moment in history] == list(range(1, 201))
    assert history[-1].loss < 0.2 < history[0].loss


@pytest.mark.parametrize("name", models.names())
def test_every_architecture_trains_stops_and_goes_on(name):
    config = {**SMALL[name], "classes": 3}
    x_BCHW = torch.randn(2, 3, 64, 64)

    def made():
        torch.manual_seed(3)
        return models.build(name, **config)

    labels = torch.tensor([0, 2])
    if made().task == "segment":
        labels = torch.randint(3, (2, 64, 64)).to(torch.uint8)
    recipe = short(4)
    whole, begun, resumed = (Fit(made(), recipe) for _ in range(3))

    history = list(whole.steps(repeat((x_BCHW, labels))))
    list(begun.steps([(x_BCHW, labels)] * 2))
    resumed.restore(from_files(*to_files(begun.state())))
    list(resumed.steps(repeat((x_BCHW, labels))))

    assert len(history) == 4
    assert all(math.isfinite(moment.loss) for moment in history)
    assert not torch.equal(weights_of(whole.net), weights_of(made()))
    assert torch.equal(weights_of(resumed.net), weights_of(whole.net))
    assert torch.equal(weights_of(resumed.settle()), weights_of(whole.settle()))


@pytest.mark.parametrize("knobs", [{}, {"optimizer": "sgd"}, {"bf16": True}, {"accumulate": 2}])
def test_equal_inputs_give_equal_weights(knobs):
    one, two = net(dropout=0.5), net(dropout=0.5)
    for model in (one, two):
        fit(model, batches(20), short(10, **knobs))

    assert torch.equal(weights_of(one), weights_of(two))


def test_another_seed_and_another_worker_drop_out_other_values():
    def weights(seed, rank):
        training = Fit(net(dropout=0.5), short(5, seed=seed), rank=rank)
        list(training.steps(batches(5)))
        return weights_of(training.net)

    assert not torch.equal(weights(0, 0), weights(1, 0))
    assert not torch.equal(weights(0, 0), weights(0, 1))


def test_training_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    model, recipe = net(dropout=0.5), short(3)
    torch.manual_seed(0)

    fit(model, batches(3), recipe)

    assert torch.equal(torch.rand(3), expected)


def test_training_stops_after_the_recipes_steps_and_asks_for_no_batch_more():
    drawn = []

    def counted():
        for i, each in enumerate(batches(50)):
            drawn.append(i)
            yield each

    assert len(fit(net(), counted(), short(7, accumulate=2))) == 7
    assert len(drawn) == 14


def test_a_last_step_takes_the_parts_that_are_left():
    assert len(fit(net(), batches(5), short(7, accumulate=2))) == 3


def test_epochs_are_counted_in_pictures():
    recipe = Recipe(length=2, unit="epochs", batch=4, rate=Rate(warmup=0))

    training = Fit(net(), recipe, pictures=10)

    assert training.epoch == 3  # the last batch of an epoch is a short one
    assert len(list(training.steps(batches(50)))) == 6


@pytest.mark.parametrize(
    "recipe",
    [Recipe(unit="epochs"), Recipe(rate=Rate(course="step"))],
    ids=["length in epochs", "steps down by epochs"],
)
def test_a_recipe_of_epochs_must_know_how_long_one_is(recipe):
    with pytest.raises(ValueError, match="say how many pictures one has"):
        Fit(net(), recipe)
    with pytest.raises(ValueError, match="an epoch needs pictures"):
        Fit(net(), recipe, pictures=0)


def test_the_document_is_reproduced_to_six_digits():
    """MODELS.md section 1.3, the complete order of the tutorial."""
    training = synthetic.begun()

    history = list(islice(training.steps(synthetic.noise(4)), 31))

    found = [f"{moment.loss:.6f}" for moment in history[::10]]
    assert found == ["0.694273", "0.693263", "0.693256", "0.693433"]


def test_the_picture_of_the_document_has_three_panels():
    x_CHW = torch.zeros(3, 128, 128)
    x_CHW[:, :64] = 1.0
    labels_hw = torch.zeros(32, 32, dtype=torch.long)
    labels_hw[:, 16:] = 1

    sheet = np.array(synthetic.painted(x_CHW, labels_hw, 1 - labels_hw))

    side, top = synthetic.PANEL, synthetic.MARGIN
    noise_HWC, truth_HWC, answer_HWC = (sheet[top:, i * side : (i + 1) * side] for i in range(3))
    assert (noise_HWC[: side // 2] == 255).all()
    assert (noise_HWC[side // 2 :] == 0).all()
    assert (truth_HWC[:, : side // 2] == synthetic.COLORS_KC[0]).all()
    assert (truth_HWC[:, side // 2 :] == synthetic.COLORS_KC[1]).all()
    assert np.array_equal(answer_HWC, truth_HWC[:, ::-1])


# what the recipe asks for


def one_step(model, batch, **knobs):
    """Weights before and after."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    recipe = Recipe(length=1, average=0.0, **{"rate": Rate(peak=0.1, warmup=0), **knobs})
    fit(model, [batch], recipe)
    return before, dict(model.named_parameters())


@pytest.mark.parametrize(
    ("knobs", "optimizer"),
    [
        (
            {"optimizer": "sgd", "momentum": 0.8, "nesterov": True, "weight_decay": 0.0},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
        ),
        ({"optimizer": "adam", "weight_decay": 0.0}, lambda p: torch.optim.Adam(p, lr=0.1)),
        (
            {"optimizer": "adamw", "weight_decay": 0.0},
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
        ),
    ],
)
def test_a_step_is_that_of_torch(knobs, optimizer):
    model, mine = net(), net()
    stepper = optimizer(mine.parameters())
    data = list(batches(3))
    constant = Rate(peak=0.1, course="constant", warmup=0)

    fit(model, data, Recipe(length=3, average=0.0, clip_norm=0.0, rate=constant, **knobs))
    mine.train()
    for x_BCHW, labels_BHW in data:
        stepper.zero_grad()
        nn.functional.cross_entropy(mine(x_BCHW), labels_BHW, ignore_index=VOID).backward()
        stepper.step()

    torch.testing.assert_close(weights_of(model), weights_of(mine))


def test_a_gradient_is_cut_to_its_longest():
    def longest(clip_norm):
        before, after = one_step(
            net(), next(batches(1)), optimizer="sgd", weight_decay=0.0, clip_norm=clip_norm
        )
        steps = [(after[name] - value).flatten() for name, value in before.items()]
        return (torch.cat(steps).norm() / 0.1).item()

    assert longest(0.0) > 0.2
    assert longest(0.01) == pytest.approx(0.01, rel=1e-3)


def test_only_weights_of_layers_decay():
    class Latent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.latents = net(), nn.Parameter(torch.ones(4, 8))

        def forward(self, x_BCHW):
            return self.body(x_BCHW) + 0 * self.latents.sum()

    x_BCHW, labels_BHW = next(batches(1))
    nothing_to_learn = x_BCHW, torch.full_like(labels_BHW, VOID)

    before, after = one_step(Latent(), nothing_to_learn, weight_decay=0.5)

    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"body.0.weight", "body.4.weight"}


def test_the_head_learns_faster_if_asked_to():
    def step(**knobs):
        before, after = one_step(
            net(), next(batches(1)), optimizer="sgd", weight_decay=0.0, clip_norm=0.0, **knobs
        )
        return {name: after[name] - value for name, value in before.items()}

    plain, fast = step(), step(head_factor=10.0, heads=("4",))

    for name, change in plain.items():
        factor = 10.0 if name.startswith("4.") else 1.0
        torch.testing.assert_close(fast[name], factor * change, rtol=1e-4, atol=1e-7)


def test_a_head_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"none of the heads top; its parts are 0, 1, 2, 3, 4"):
        Fit(net(), Recipe(head_factor=10.0, heads=("top",)))


def test_frozen_statistics_stay_and_others_do_not():
    def statistics(**knobs):
        model = net()
        fit(model, batches(3), short(3, average=0.0, **knobs))
        return model[1].running_mean

    assert not statistics(frozen_statistics=True).any()
    assert statistics().all()


def test_what_takes_no_gradient_stays():
    model = net()
    model[0].requires_grad_(requires_grad=False)
    before = model[0].weight.clone()

    fit(model, batches(3), short(3, weight_decay=0.5))

    assert torch.equal(model[0].weight, before)


def test_bfloat16_learns_about_the_same():
    recipe = Recipe(length=60, rate=Rate(peak=0.02, warmup=5))

    plain, rounded = (
        [moment.loss for moment in fit(net(), batches(60), replace(recipe, bf16=bf16))]
        for bf16 in (False, True)
    )

    assert rounded != plain
    assert rounded[-1] == pytest.approx(plain[-1], abs=0.02)
    assert next(net().parameters()).dtype == torch.float32


class _Unsteady(torch.autograd.Function):
    """Hands on what it gets; gradients of such types are lost on the way back."""

    @staticmethod
    def forward(ctx, x, *lost):
        ctx.lost = lost
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ill = gradient.dtype in ctx.lost
        return torch.full_like(gradient, torch.nan) if ill else gradient, *(None for _ in ctx.lost)


def unsteady(*lost):
    """A net with dropout, so that a step that is taken again must draw again what it drew."""

    class Layer(nn.Module):
        def forward(self, x):
            return _Unsteady.apply(x, *lost)

    layers = net(dropout=0.5)
    return nn.Sequential(*layers[:4], Layer(), layers[4])


def test_steps_whose_gradients_are_no_numbers_in_bfloat16_are_taken_in_float32():
    recipe = short(6, bf16=True, frozen_statistics=True)
    ill, plain = unsteady(torch.bfloat16), unsteady()

    losses, expected = (
        [moment.loss for moment in fit(model, batches(6), each)]
        for model, each in ((ill, recipe), (plain, replace(recipe, bf16=False)))
    )

    assert losses == expected
    assert torch.equal(weights_of(ill), weights_of(plain))


def test_gradients_that_are_no_numbers_in_float32_either_end_a_training():
    training = Fit(unsteady(torch.bfloat16, torch.float32), short(6, bf16=True))

    with pytest.raises(Diverged, match="gradient norm nan"):
        list(training.steps(batches(6)))


# parts of a step


def test_parts_of_a_step_do_what_the_whole_does():
    def curve(accumulate):
        data = [
            (x_BCHW[part], labels_BHW[part])
            for x_BCHW, labels_BHW in uneven(12)
            for part in torch.arange(8).chunk(accumulate)
        ]
        model = net()
        recipe = short(12, batch=8, accumulate=accumulate, loss=EVERY_TERM, frozen_statistics=True)
        losses = [moment.loss for moment in fit(model, data, recipe)]
        return torch.tensor(losses), weights_of(model)

    for parts in (2, 4):
        torch.testing.assert_close(curve(parts), curve(1), rtol=2e-5, atol=2e-6)


# two workers


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-workers")
    command = [sys.executable, "-W", "error", "-m", "tests.models.two_workers", folder]
    workers = [subprocess.Popen([*command, str(rank)], cwd=ROOT) for rank in range(2)]
    try:
        assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_workers_do_what_one_does_with_twice_the_batch(two_workers):
    alone = net()
    recipe = short(STEPS, batch=8, loss=EVERY_TERM, frozen_statistics=True)
    losses = [moment.loss for moment in fit(alone, uneven(STEPS), recipe)]

    for each in two_workers:
        assert each["losses"] == pytest.approx(losses, rel=2e-5)
        assert each["weights"] == pytest.approx(weights_of(alone).tolist(), rel=1e-4, abs=1e-5)
    assert two_workers[0]["weights"] == two_workers[1]["weights"]


def test_all_workers_stop_when_one_has_no_more_batches(two_workers):
    # one has a single part left for the third step, the other two parts
    assert [each["early"] for each in two_workers] == [3, 3]


def test_all_workers_stop_when_the_loss_of_one_is_no_number(two_workers):
    assert [each["back"] for each in two_workers] == [
        2,
        2,
    ]  # the weights before the last step that gave a number
    assert all("step 4: loss nan" in each["said"] for each in two_workers)


# taken up again


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"optimizer": "adam", "average": 0.0},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"accumulate": 2, "bf16": True, "head_factor": 3.0, "heads": ("4",)},
    ],
)
def test_a_training_taken_up_again_ends_where_the_other_did(knobs):
    recipe = short(20, **knobs)
    whole, begun, resumed = (Fit(net(dropout=0.3), recipe) for _ in range(3))
    data = list(batches(20 * recipe.accumulate))
    list(whole.steps(data))
    list(begun.steps(data[: 8 * recipe.accumulate]))

    resumed.restore(from_files(*to_files(begun.state())))
    history = list(resumed.steps(data[8 * recipe.accumulate :]))

    assert history[0].step == 9
    assert torch.equal(weights_of(resumed.net), weights_of(whole.net))
    assert torch.equal(weights_of(resumed.settle()), weights_of(whole.settle()))


def test_a_state_is_a_copy_on_both_ways():
    training = Fit(net(), short(20))
    list(training.steps(batches(3)))
    state = training.state()
    before = to_files(state)

    list(training.steps(batches(3)))
    assert to_files(state) == before

    training.restore(state)
    list(training.steps(batches(3)))
    assert to_files(state) == before


def test_equal_states_are_equal_bytes():
    def files():
        training = Fit(net(), short(20))
        list(training.steps(batches(3)))
        return to_files(training.state())

    assert files() == files()


@cache
def some_files():
    training = Fit(net(), short(20, patience=2))
    list(training.steps(batches(3)))
    training.scored(0.5)
    return to_files(training.state())


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([0, 1]), st.floats(0, 1, exclude_max=True), st.integers(-1, 7))
def test_a_state_that_was_cut_short_or_altered_is_refused(which, where, bit):
    files = [bytearray(each) for each in some_files()]
    place = int(where * len(files[which]))
    if bit < 0:
        del files[which][place:]
    else:
        files[which][place] ^= 1 << bit

    with pytest.raises(ValueError, match=r"damaged|version"):
        from_files(*(bytes(each) for each in files))


def test_tensors_of_another_state_are_refused():
    weights, _ = to_files(Fit(net(), short(20)).state())

    with pytest.raises(ValueError, match="damaged or another's; take an earlier one"):
        from_files(weights, some_files()[1])


def test_a_state_of_a_later_format_is_refused():
    weights, facts = some_files()
    later = {**json.loads(facts), "format_version": 2}
    del later["sha256"]
    text = json.dumps(later, sort_keys=True, separators=(",", ":"))
    later["sha256"] = hashlib.sha256(text.encode()).hexdigest()

    with pytest.raises(ValueError, match="format version 2, this program reads 1"):
        from_files(weights, json.dumps(later).encode())


def test_a_state_of_another_recipe_is_refused_and_changes_nothing():
    begun = Fit(net(), short(20))
    list(begun.steps(batches(3)))
    other = Fit(net(), short(20, rate=Rate(peak=0.5, warmup=2)))
    before = weights_of(other.net)

    with pytest.raises(ValueError, match=r"made with rate\.peak 0\.001, the recipe says 0\.5"):
        other.restore(begun.state())

    assert torch.equal(weights_of(other.net), before)


def test_a_state_of_more_pictures_is_refused():
    recipe = Recipe(length=3, unit="epochs", batch=4, rate=Rate(warmup=0))
    begun = Fit(net(), recipe, pictures=10)

    with pytest.raises(ValueError, match="epoch of the state has 3 steps, here it has 4"):
        Fit(net(), recipe, pictures=15).restore(begun.state())


def test_a_state_of_another_model_is_refused():
    begun = Fit(net(), short(20))

    with pytest.raises(ValueError, match=r"another model: it has no 1\.weight"):
        Fit(nn.Sequential(*net()[:1], nn.Linear(3, 3)), short(20)).restore(begun.state())


# no number


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(poison):
    def poisoned():
        yield from batches(5)
        yield torch.full((2, 1, 8, 8), poison), torch.zeros(2, 8, 8, dtype=torch.long)

    model = net()
    training = Fit(model, short(20, keep_every=2))

    with pytest.raises(Diverged, match=r"step 6: loss nan.*back at step 4.*lower learning rate"):
        list(training.steps(poisoned()))

    sane = Fit(net(), short(20))
    list(sane.steps(batches(4)))
    assert torch.equal(weights_of(model), weights_of(sane.net))


def test_a_restored_training_falls_back_no_further_than_it_was_restored():
    begun, resumed = Fit(net(), short(20)), Fit(net(), short(20))
    list(begun.steps(batches(7)))
    resumed.restore(begun.state())
    poison = torch.full((2, 1, 8, 8), torch.nan), torch.zeros(2, 8, 8, dtype=torch.long)

    with pytest.raises(Diverged, match="back at step 7"):
        list(resumed.steps([poison]))

    assert torch.equal(weights_of(resumed.net), weights_of(begun.net))


# the mean of the weights, and the best


def test_averaged_weights_are_lent_and_given_back():
    training = Fit(net(), short(10))
    list(training.steps(batches(10)))
    present = weights_of(training.model)

    with training.averaged():
        mean = weights_of(training.model)
        assert not training.model.training

    assert not torch.equal(mean, present)
    assert torch.equal(weights_of(training.model), present)
    assert torch.equal(weights_of(training.settle()), mean)


def test_the_mean_holds_the_statistics_of_norms_too():
    training = Fit(net(), short(10))
    list(training.steps(batches(10)))
    present = training.net[1].running_var.clone()

    training.settle()

    assert not torch.equal(training.net[1].running_var, present)
    assert training.net[1].num_batches_tracked == 10


def test_training_ends_when_patience_does_and_the_best_weights_are_kept():
    training = Fit(net(), short(100, patience=3))
    figures = iter([0.5, 0.7, 0.6, float("nan"), 0.7, 0.9])
    best = None
    for moment in training.steps(batches(100)):
        if moment.step % 5 == 0 and training.scored(next(figures)):
            with training.averaged():
                best = weights_of(training.net)

    assert training.done == 25  # two gains, then three reports without
    assert training.over
    assert training.best_figure == 0.7
    assert torch.equal(weights_of(training.settle()), best)


def test_patience_survives_a_restart():
    begun, resumed = (Fit(net(), short(100, patience=2)) for _ in range(2))
    list(begun.steps(batches(5)))
    begun.scored(0.5)
    with begun.averaged():
        best = weights_of(begun.net)
    list(begun.steps(batches(5)))
    begun.scored(0.4)

    resumed.restore(from_files(*to_files(begun.state())))
    assert not resumed.over
    resumed.scored(0.3)

    assert resumed.over
    assert list(resumed.steps(batches(5))) == []
    assert torch.equal(weights_of(resumed.settle()), best)


def test_without_patience_the_last_weights_are_kept():
    training = Fit(net(), short(10))
    for moment in training.steps(batches(10)):
        training.scored(-moment.step)
    with training.averaged():
        last = weights_of(training.net)

    assert training.done == 10
    assert training.best_figure == -1
    assert torch.equal(weights_of(training.settle()), last)


# batches


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), (3, (0.5,), (0.2,)), (1, (0.5,), (0.2,))],
)
def test_a_batch_is_what_inference_would_read(channels, mean, std):
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (2, 5, 7, channels), dtype=np.uint8)
    labels_BHW = np.ones((2, 5, 7), dtype=np.uint8)
    for each in (pixels_BHWC, labels_BHW):
        each.flags.writeable = False  # as Ray hands them over

    x_BCHW, labels = batch_of(pixels_BHWC, labels_BHW, Recipe(mean=mean, std=std))

    expected_BHWC = (pixels_BHWC / 255 - np.array(mean)) / np.array(std)
    expected_BCHW = torch.from_numpy(expected_BHWC).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(x_BCHW, expected_BCHW, rtol=1e-5, atol=1e-6)
    assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, torch.ones(2, 5, 7, dtype=torch.uint8))


# where there is a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_a_gpu_learns_what_the_cpu_does(bf16):
    recipe = short(10, bf16=bf16)
    cpu, gpu = Fit(net(), recipe), Fit(net().cuda(), recipe)

    curves = [[m.loss for m in each.steps(batches(10))] for each in (cpu, gpu)]

    assert curves[1] == pytest.approx(curves[0], rel=0.05 if bf16 else 1e-3)
    taken_over = Fit(net(), recipe)
    taken_over.restore(from_files(*to_files(gpu.state())))
    assert torch.equal(weights_of(taken_over.net), weights_of(gpu.net.cpu()))
