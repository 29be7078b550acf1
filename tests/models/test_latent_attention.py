"""The latent-expert segmenter: the tutorial's numbers, and what production asks on top."""

import itertools
import json

import pytest
import torch
from torch import nn

import models
from models.latent_attention import Config

RESIDUAL = {"variant": "residual", "stem_depth": 3, "features": 48, "dilations": [1, 2, 4]}
VARIANTS = pytest.mark.parametrize("config", [{}, RESIDUAL], ids=["seed", "residual"])


def lively(config):
    """A net whose scores differ from pixel to pixel; as initialised, the seed's do not."""
    model = models.build("latent_attention", **config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.9 if model.config.variant == "seed" else 1.3)
        mean_K = model(torch.randn(1, model.channels, 64, 64), native=True).mean((0, 2, 3))
        model.expert_seg.segmentation_head.bias -= mean_K  # or one class wins everywhere
    return model


def tutorial_losses(steps):
    model = models.build("latent_attention")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        x_BCHW = torch.randn(4, 3, 128, 128)
        labels_Bhw = torch.randint(0, 2, (4, 32, 32))
        loss = nn.functional.cross_entropy(model(x_BCHW, native=True), labels_Bhw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


# The tutorial's numbers


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 70_466),
        ({"classes": 3}, 70_531),
        ({"classes": 11}, 71_051),
        ({"classes": 19}, 71_571),
        ({"features": 48}, 62_770),
    ],
)
def test_the_seed_has_the_documented_number_of_parameters(config, count):
    model = models.build("latent_attention", **config)

    assert sum(value.numel() for value in model.parameters()) == count


def test_the_seed_starts_from_the_documented_weights():
    state = models.build("latent_attention").state_dict()
    values = [value.double() for value in state.values()]

    assert sum(v.sum() for v in values).item() == pytest.approx(103.319289, abs=1e-6)
    assert sum(v.abs().sum() for v in values).item() == pytest.approx(4911.460425, abs=1e-6)
    starts = {
        "encoder.conv1.weight": (0.14713551, 0.15973510, -0.04508576),
        "latent_attn.latents": (0.34209287, 1.51559484, 0.87581760),
        "latent_attn.attention.in_proj_weight": (0.11109606, -0.09493914, -0.10321193),
        "expert_seg.segmentation_head.weight": (0.08984111, -0.10010193, 0.07248786),
    }
    for key, start in starts.items():
        assert state[key].flatten()[:3].tolist() == pytest.approx(start, abs=1e-7)


def test_the_seed_answers_the_documented_scores():
    model = models.build("latent_attention")
    x_BCHW = torch.randn(2, 3, 128, 128)
    logits_BKhw = model(x_BCHW, native=True)

    assert x_BCHW.flatten()[:3].tolist() == pytest.approx((-0.5682392, 0.2999683, -0.6917352))
    assert logits_BKhw.shape == (2, 2, 32, 32)
    found = [f(logits_BKhw).item() for f in (torch.mean, torch.std, torch.min, torch.max)]
    assert found == pytest.approx([-0.0486939, 0.0200856, -0.0688341, -0.0285920], abs=1e-6)
    assert logits_BKhw[0, :, 0, 0].tolist() == pytest.approx([-0.0687200, -0.0285920], abs=1e-6)


def test_a_fresh_run_gives_the_documented_losses():
    losses = list(tutorial_losses(11))

    expected = {0: 0.6934152842, 1: 0.697339, 2: 0.693454, 10: 0.693217}
    assert {i: losses[i] for i in expected} == pytest.approx(expected, abs=2e-5)


def test_the_whole_tutorial_gives_the_documented_losses():
    models.build("latent_attention")(torch.randn(2, 3, 128, 128))
    losses = list(tutorial_losses(100))

    tens = [0.6942734718, 0.693263, 0.693256, 0.693433, 0.693025]
    tens += [0.693155, 0.693109, 0.693133, 0.693197, 0.693328]
    assert losses[::10] == pytest.approx(tens, abs=2e-5)
    assert losses[99] == pytest.approx(0.693251, abs=2e-5)
    assert losses[20:] == pytest.approx([0.693147] * 80, abs=5e-3)


def test_the_state_dict_has_the_tutorials_keys():
    convs = [f"encoder.conv{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
    linears = ["latent_attn.key_proj", "latent_attn.value_proj", "latent_attn.query_proj"]
    linears += ["expert_seg.pixel_proj", "expert_seg.segmentation_head"]
    linears += ["latent_attn.attention.out_proj", "expert_seg.attention.out_proj"]
    packed = [f"{side}.attention.in_proj" for side in ("latent_attn", "expert_seg")]
    expected = {*convs, "latent_attn.latents"}
    expected |= {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    expected |= {f"{name}_{part}" for name in packed for part in ("weight", "bias")}

    state = models.build("latent_attention").state_dict()

    assert set(state) == expected
    assert state["expert_seg.attention.in_proj_weight"].shape == (192, 64)


def test_attention_is_torchs_attention():
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    ours = models.build("latent_attention", latent_dim=24, heads=3).expert_seg.attention.double()
    ours.load_state_dict(theirs.state_dict())
    query_BQD = torch.randn(2, 5, 24).double()
    key_BTD, value_BTD = torch.randn(2, 2, 7, 24).double()
    outside_BT = torch.arange(7) >= torch.tensor([[7], [4]])

    expected_BQD, weights_BHQT = theirs(
        query_BQD,
        key_BTD,
        value_BTD,
        key_padding_mask=outside_BT,
        average_attn_weights=False,
    )

    torch.testing.assert_close(ours(query_BQD, key_BTD, value_BTD, outside_BT), expected_BQD)
    torch.testing.assert_close(ours.weights(query_BQD, key_BTD, outside_BT), weights_BHQT)


# Sizes


@VARIANTS
@pytest.mark.parametrize(
    ("size", "cells"),
    [
        ((4, 4), (1, 1)),
        ((5, 7), (1, 1)),
        ((4, 33), (1, 8)),
        ((127, 130), (31, 32)),
        ((360, 480), (90, 120)),
    ],
)
def test_every_size_from_four_pixels_on_is_answered(config, size, cells):
    model = models.build("latent_attention", **config).eval()
    x_BCHW = torch.randn(1, 3, *size)

    assert model.native_size(*size) == cells
    assert model(x_BCHW, native=True).shape == (1, 2, *cells)
    assert model(x_BCHW).shape == (1, 2, *size)
    assert model(x_BCHW).isfinite().all()


def test_scores_at_full_size_are_the_native_ones_stretched():
    model = lively(RESIDUAL)
    x_BCHW = torch.randn(2, 3, 41, 64)

    expected_BKHW = nn.functional.interpolate(
        model(x_BCHW, native=True), size=(41, 64), mode="bilinear", align_corners=False
    )

    assert torch.equal(model(x_BCHW), expected_BKHW)


def test_a_picture_of_three_pixels_is_refused():
    with pytest.raises(ValueError, match=r"3 x 9 in a batch of 3 x 9.*at least 4"):
        models.build("latent_attention")(torch.zeros(1, 3, 3, 9))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([[3, 8]], "at least 4"), ([[8, 9]], "fit into the batch"), ([[8, 8]] * 2, r"\(1, 2\)")],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        models.build("latent_attention")(torch.zeros(1, 3, 8, 8), torch.tensor(sizes))


def test_gray_pictures_are_refused_by_a_model_for_colour():
    with pytest.raises(ValueError, match="reads 3 channels, the batch has 1"):
        models.build("latent_attention")(torch.zeros(1, 1, 8, 8))


def test_gray_models_read_gray_pictures():
    model = models.build("latent_attention", channels=1).eval()

    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 2, 16, 16)


# Padding and batch mates


SIZES = [(64, 64), (33, 61), (4, 64), (64, 5), (17, 18), (8, 8)]


def padded(fill):
    """Six pictures in one batch, what lies outside of them being `fill`."""
    x_BCHW = torch.full((len(SIZES), 3, 64, 64), fill)
    for x_CHW, (height, width) in zip(x_BCHW, SIZES, strict=True):
        x_CHW[:, :height, :width] = torch.randn(3, height, width)
    return x_BCHW, torch.tensor(SIZES)


@VARIANTS
@pytest.mark.parametrize("fill", [0.0, 1e30, float("nan")])
def test_padding_changes_no_bit_of_the_answer(config, fill):
    model = lively(config)
    x_BCHW, sizes_B2 = padded(fill)

    native_BKhw, full_BKHW = model(x_BCHW, sizes_B2, native=True), model(x_BCHW, sizes_B2)

    for i, (height, width) in enumerate(SIZES):
        alone_1CHW = x_BCHW[i : i + 1, :, :height, :width].contiguous()
        rows, columns = model.native_size(height, width)
        assert torch.equal(native_BKhw[i, :, :rows, :columns], model(alone_1CHW, native=True)[0])
        assert torch.equal(full_BKHW[i, :, :height, :width], model(alone_1CHW)[0])
        assert not native_BKhw[i, :, rows:].any()
        assert not full_BKHW[i, :, :, width:].any()


@VARIANTS
@pytest.mark.parametrize("fill", [0.0, 1e30, float("nan")])
def test_items_masked_in_one_pass_answer_as_they_do_alone(config, fill):
    """The way of the GPU, walked on the CPU."""
    model = lively(config)
    x_BCHW, sizes_B2 = padded(fill)

    together_BKhw = model.grid(x_BCHW, sizes_B2)
    alone_BKhw = model(x_BCHW, sizes_B2, native=True)

    for i, size in enumerate(SIZES):
        rows, columns = model.native_size(*size)
        together_Khw = together_BKhw[i, :, :rows, :columns]
        alone_Khw = alone_BKhw[i, :, :rows, :columns]
        torch.testing.assert_close(together_Khw, alone_Khw, rtol=0, atol=1e-5)
        assert torch.equal(together_Khw.argmax(0), alone_Khw.argmax(0))


@VARIANTS
@pytest.mark.parametrize("native", [True, False])
def test_elsewhere_than_on_the_cpu_a_batch_passes_in_one_go(config, native):
    """Shapes only: the meta device stands for a GPU."""
    model = models.build("latent_attention", **config).to("meta")
    x_BCHW = torch.zeros(2, 3, 30, 41, device="meta")
    size = (7, 10) if native else (30, 41)

    assert model(x_BCHW, native=native).shape == (2, 2, *size)
    found_BKHW = model(x_BCHW, torch.tensor([[30, 20], [9, 41]]), native=native)
    assert found_BKHW.shape == (2, 2, *size)


@VARIANTS
@pytest.mark.parametrize("size", [(4, 4), (30, 50), (64, 64), (96, 97)])
def test_an_answer_does_not_depend_on_batch_mates_by_a_single_bit(config, size):
    model = lively(config)
    x_BCHW = torch.randn(9, 3, *size)
    height, width = size
    sizes_B2 = torch.tensor([[max(4, height - i), max(4, width - 3 * i)] for i in range(9)])

    with torch.inference_mode():
        alone_BKhw = torch.cat([model(x_CHW[None], native=True) for x_CHW in x_BCHW])
        sized_BKhw = torch.cat(
            [model(x_BCHW[i : i + 1], sizes_B2[i : i + 1], native=True) for i in range(9)]
        )
        for start in range(9):
            assert torch.equal(model(x_BCHW[start:], native=True), alone_BKhw[start:])
            found_BKhw = model(x_BCHW[start:], sizes_B2[start:], native=True)
            assert torch.equal(found_BKhw, sized_BKhw[start:])


@VARIANTS
@pytest.mark.parametrize("size", [(30, 50), (96, 97)])
def test_nor_does_it_with_two_threads(config, size):
    """Few pictures: two threads wait for each other wherever others work."""
    model = lively(config)
    x_BCHW = torch.randn(3, 3, *size)
    torch.set_num_threads(2)

    with torch.inference_mode():
        alone_BKhw = torch.cat([model(x_CHW[None], native=True) for x_CHW in x_BCHW])
        assert torch.equal(model(x_BCHW, native=True), alone_BKhw)


@VARIANTS
def test_the_memory_layout_of_a_batch_does_not_matter(config):
    model = lively({**config, "channels": 1})
    x_BCHW = torch.randn(3, 1, 40, 24)

    expected_BKHW = model(x_BCHW)

    assert torch.equal(model(x_BCHW.to(memory_format=torch.channels_last)), expected_BKHW)
    assert torch.equal(model(x_BCHW.mT.contiguous().mT), expected_BKHW)


@VARIANTS
def test_one_and_two_threads_agree(config):
    model = lively(config)
    x_BCHW = torch.randn(2, 3, 96, 80)

    one_BKHW = model(x_BCHW)
    torch.set_num_threads(2)

    torch.testing.assert_close(model(x_BCHW), one_BKHW, rtol=1e-6, atol=1e-6)


@VARIANTS
def test_gradient_mode_changes_nothing(config):
    model = lively(config)
    x_BCHW = torch.randn(2, 3, 32, 32)

    with torch.inference_mode():
        inferred_BKHW = model(x_BCHW)

    assert torch.equal(model(x_BCHW), inferred_BKHW)


@VARIANTS
@pytest.mark.parametrize("value", [0.0, -1.0, 100.0])
def test_a_constant_picture_gives_numbers(config, value):
    model = lively(config)

    assert model(torch.full((1, 3, 32, 48), value)).isfinite().all()


def test_the_interior_of_a_constant_picture_is_one_score():
    model = lively({})
    logits_KhwInside = model(torch.full((1, 3, 96, 96), 0.7), native=True)[0, :, 4:-4, 4:-4]

    assert torch.equal(logits_KhwInside, logits_KhwInside[:, :1, :1].expand_as(logits_KhwInside))


# Experts and tokens


@VARIANTS
def test_the_order_of_the_experts_does_not_matter(config):
    model = lively(config)
    x_BCHW = torch.randn(1, 3, 48, 48)
    before_BKHW = model(x_BCHW)

    with torch.no_grad():
        model.latent_attn.latents.copy_(model.latent_attn.latents[torch.randperm(16)])

    torch.testing.assert_close(model(x_BCHW), before_BKHW, rtol=0, atol=1e-5)


@VARIANTS
def test_the_order_of_the_tokens_matters_to_no_expert_and_follows_through_the_pixels(config):
    model = lively(config)
    x_BTF = torch.randn(2, 60, model.config.features)
    order_T = torch.randperm(60)

    experts_BMD = model.latent_attn(x_BTF, None)
    logits_BTK = model.expert_seg(x_BTF, experts_BMD)

    shuffled_BMD = model.latent_attn(x_BTF[:, order_T], None)
    torch.testing.assert_close(shuffled_BMD, experts_BMD, rtol=0, atol=2e-5)
    shuffled_BTK = model.expert_seg(x_BTF[:, order_T], experts_BMD)
    torch.testing.assert_close(shuffled_BTK, logits_BTK[:, order_T], rtol=0, atol=2e-5)


@VARIANTS
def test_seeing_everything_twice_tells_the_experts_nothing(config):
    model = lively(config)
    x_BTF = torch.randn(2, 60, model.config.features)

    twice_BMD = model.latent_attn(x_BTF.repeat(1, 2, 1), None)

    torch.testing.assert_close(twice_BMD, model.latent_attn(x_BTF, None), rtol=0, atol=2e-5)


@VARIANTS
def test_attention_maps_are_shares_and_skip_the_padding(config):
    model = lively(config)
    maps = model.attention_maps(torch.randn(2, 3, 32, 40), torch.tensor([[32, 40], [16, 20]]))

    assert maps.experts_BEMhw.shape == maps.pixels_BEMhw.shape == (2, 4, 16, 8, 10)
    torch.testing.assert_close(maps.experts_BEMhw.sum((3, 4)), torch.ones(2, 4, 16))
    torch.testing.assert_close(maps.pixels_BEMhw.sum(2), torch.ones(2, 4, 8, 10))
    assert not maps.experts_BEMhw[1, :, :, 4:].any()
    assert not maps.experts_BEMhw[1, :, :, :, 5:].any()


def test_the_experts_of_the_residual_net_begin_apart():
    spreads = {}
    for name, config in (("seed", {}), ("residual", {"variant": "residual"})):
        model = models.build("latent_attention", **config)
        x_BTF, _ = model.tokens(torch.randn(1, 3, 128, 128), None)
        spreads[name] = model.latent_attn(x_BTF, None).std(dim=1).mean().item()

    assert spreads["seed"] < 1e-3  # what keeps it from learning
    assert spreads["residual"] > 30 * spreads["seed"]


# Learning


def blobs(count, side):
    """Bright discs on a dark noisy ground, and where they are."""
    rows_HW, columns_HW = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    labels_BHW = torch.zeros(count, side, side, dtype=torch.long)
    for labels_HW, _ in itertools.product(labels_BHW, range(4)):
        row, column, radius = [*torch.randint(8, side - 8, (2,)).tolist(), 6]
        labels_HW[(rows_HW - row) ** 2 + (columns_HW - column) ** 2 < radius**2] = 1
    x_B1HW = labels_BHW[:, None] * 1.0 + torch.randn(count, 1, side, side) * 0.3
    return x_B1HW.expand(-1, 3, -1, -1), labels_BHW


def test_the_residual_net_learns_one_batch_by_heart():
    x_BCHW, labels_BHW = blobs(2, 64)
    model = models.build("latent_attention", **RESIDUAL)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    for _ in range(150):
        loss = nn.functional.cross_entropy(model(x_BCHW), labels_BHW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    hits_BHW = model.eval()(x_BCHW).argmax(1) == labels_BHW
    assert hits_BHW.float().mean() > 0.99


@VARIANTS
def test_every_parameter_gets_a_gradient(config):
    model = lively(config)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()

    # The biases of keys add the same to all scores of a query: the softmax does not feel them.
    unfelt = {"latent_attn.key_proj.bias"}
    felt = {name: value for name, value in model.named_parameters() if name not in unfelt}
    assert [name for name, value in felt.items() if not value.grad.abs().sum() > 1e-6] == []


# Config


@VARIANTS
def test_a_config_survives_json(config):
    model = models.build("latent_attention", **config)

    again = models.build("latent_attention", **json.loads(json.dumps(model.config.to_json())))

    assert again.config == model.config
    again.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latent_dim": 64, "heads": 5}, "latent_dim 64 .* heads 5"),
        ({"classes": 1}, "at least 2, it is 1"),
        ({"variant": "residul"}, "did you mean 'residual'"),
        ({"stem_depth": 2}, "needs variant='residual'"),
        ({"variant": "residual", "stem_depth": 1, "dilations": [0]}, "dilations"),
        ({"features": 0}, "features must be at least 1"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"heads": "4"}, "heads must be int as in 4, it is '4'"),
        ({"dilations": ["a"]}, r"dilations must be tuple as in \(1, 2, 4\), it is \['a'\]"),
        ({"head": 4}, "no option 'head'; did you mean 'heads'.*latents"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_reason(config, message):
    with pytest.raises(ValueError, match=message):
        models.build("latent_attention", **config)


def test_an_unknown_architecture_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="'latent_atention'; did you mean 'latent_attention'"):
        models.build("latent_atention")


def test_the_folder_is_the_list_of_architectures():
    assert "latent_attention" in models.names()
    assert not {"parts", "training", "bundle"} & set(models.names())
    assert models.build("latent_attention").config == Config()
