"""SegNet: the numbers of MODELS.md section 6, and that items, parts and forms agree."""

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.parts.conv3x3 import ByTiles

TINY = {"widths": (8, 16), "depths": (2, 1)}
TWINS = pytest.mark.parametrize("separable", [False, True], ids=["full", "separable"])
FORMS = pytest.mark.parametrize("form", ["plain", "folded"])


def lively(**config):
    """A tiny net as after a training: nothing at its neutral value, scores that vary."""
    model = models.build("segnet", **{**TINY, **config}).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.2)
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return model


def in_form(model, form):
    return model.folded() if form == "folded" else model


def on_meta(**config):
    with torch.device("meta"):
        return models.build("segnet", **config)


def count(*modules):
    return sum(value.numel() for module in modules for value in module.parameters())


# Counts (section 6)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ({"classes": 3}, 15_274_892),
        ({"classes": 11}, 15_279_516),
        ({"classes": 3, "separable": True}, 1_749_671),
        ({"classes": 11, "separable": True}, 1_750_199),
        ({"classes": 3, "final_activation": True}, 15_274_892),
    ],
)
def test_it_has_the_documented_number_of_parameters(config, total):
    assert count(on_meta(**config)) == total


def test_the_levels_share_them_as_documented():
    model = on_meta(classes=3)
    down, up = model.encoder.levels, model.decoder.levels

    assert [count(level) for level in down] == [38_848, 221_696, 1_476_096, 5_901_312]
    assert [count(level) for level in up[:3]] == [5_900_800, 1_475_840, 221_568]
    assert count(up[3], model.decoder.head) == 38_726
    assert count(model.norm) == 6


@TWINS
def test_as_many_convolutions_lead_up_as_down(separable):
    model = on_meta(separable=separable)

    assert [len(level) for level in model.encoder.levels] == [2, 2, 3, 3]
    assert [len(level) for level in model.decoder.levels] == [3, 3, 2, 1]  # and the head
    window = model.encoder.levels[1][0][0]
    assert window.kernel_size == (3, 3)
    assert window.groups == (64 if separable else 1)
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(("separable", "expected"), [(False, 18.23), (True, 2.16)])
def test_it_takes_the_documented_operations(separable, expected):
    model = on_meta(classes=3, separable=separable).eval()

    with FlopCounterMode(display=False) as operations:
        model.grid(torch.zeros(1, 3, 128, 128, device="meta"), None)

    assert operations.get_total_flops() / 1e9 == pytest.approx(expected, abs=0.005)


# Sizes


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (130, 131), (90, 120), (16, 257)])
def test_every_size_from_16_pixels_on_is_answered_at_full_resolution(size):
    model = models.build("segnet", widths=(4, 4, 4, 4), depths=(1, 1, 1, 1)).eval()
    x_BCHW = torch.randn(1, 3, *size)

    assert model.padded_size(*size) == model.native_size(*size) == size
    assert model(x_BCHW, native=True).shape == (1, 2, *size)
    assert torch.equal(model(x_BCHW), model(x_BCHW, native=True))


def test_a_picture_of_15_pixels_is_refused():
    model = on_meta()

    assert model.min_side == 16
    with pytest.raises(ValueError, match=r"15 x 40: sides must be at least 16"):
        model(torch.zeros(1, 3, 15, 40))


# What it computes


@TWINS
@FORMS
def test_scores_below_zero_come_unless_the_article_is_followed(separable, form):
    x_BCHW = torch.randn(1, 3, 40, 40)
    model = lively(separable=separable)
    faithful = lively(separable=separable, final_activation=True)
    faithful.load_state_dict(model.state_dict())

    logits_BKHW = in_form(model, form)(x_BCHW)

    assert logits_BKHW.min() < 0
    assert logits_BKHW.max() > 0
    assert torch.equal(in_form(faithful, form)(x_BCHW), logits_BKHW.clamp_min(0))


def test_values_return_to_where_the_maxima_lay_and_odd_rows_begin_as_zeros():
    model = lively()
    seen = {}
    for i, level in enumerate(model.encoder.levels):
        level.register_forward_hook(lambda _, inputs, out, i=i: seen.update({("down", i): out}))
    for i, level in enumerate(model.decoder.levels[::-1]):
        level.register_forward_pre_hook(lambda _, inputs, i=i: seen.update({("up", i): inputs[0]}))
    model.grid(torch.randn(1, 3, 27, 38), None)

    for i, (rows, columns) in enumerate([(26, 38), (12, 18)]):
        down_BCHW, up_BCHW = seen["down", i], seen["up", i]
        assert up_BCHW.shape == down_BCHW.shape
        assert up_BCHW[:, :, :rows].any()
        assert not up_BCHW[:, :, rows:].any()
        assert not up_BCHW[..., columns:].any()
        cells = (
            nn.functional.max_pool2d(down_BCHW, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        )
        at_maximum = down_BCHW[:, :, :rows, :columns] == cells
        assert not (up_BCHW[:, :, :rows, :columns] != 0)[~at_maximum].any()


def test_pixels_are_normalised_by_what_the_training_saw():
    model = lively().double()
    with torch.no_grad():
        model.norm.weight.fill_(1)
        model.norm.bias.zero_()
        model.norm.running_mean.copy_(torch.tensor([0.4, 0.5, 0.6]))
        model.norm.running_var.copy_(torch.tensor([0.04, 0.09, 0.16]))
    x_BCHW = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    mean_C11, deviation_C11 = (
        model.norm.running_mean.view(3, 1, 1),
        model.norm.running_var.view(3, 1, 1),
    )
    by_hand_BCHW = (x_BCHW - mean_C11) / (deviation_C11 + 1e-5).sqrt()

    expected_BKHW = model.decoder(*model.encoder(by_hand_BCHW, None))

    torch.testing.assert_close(model(x_BCHW), expected_BKHW, rtol=0, atol=1e-12)


def reach(depths):
    """How many pixels an answer sees up or left of its own, and down or right, wherever it lies.

    From an answer down the levels and up again to the pixels: a convolution adds a pixel of its
    level on both sides, a maximum is the cell that pixels lie in, and a cell is both its pixels.
    """
    before, after = [], []
    for y in range(2 ** len(depths)):
        first = last = y
        for depth in depths:
            first, last = (first - depth) // 2, (last + depth) // 2
        for depth in reversed(depths):
            first, last = 2 * first - depth, 2 * last + 1 + depth
        before.append(y - first)
        after.append(last - y)
    return before, after


def test_by_default_an_answer_sees_99_pixels_to_every_side():
    before, after = reach((2, 2, 3, 3))

    assert max(before) == max(after) == 99


@FORMS
@pytest.mark.parametrize("depths", [(1,), (2,), (1, 1)])
def test_an_answer_depends_on_the_pixels_within_its_reach_and_on_no_other(depths, form):
    """Measured: columns are changed one at a time, in several pictures and nets."""
    before, after = reach(depths)
    cell = 2 ** len(depths)
    start = 32
    felt = torch.zeros(cell, 72, dtype=torch.bool)
    for _ in range(6):
        model = lively(widths=(8,) * len(depths), depths=depths).double()
        model = in_form(model, form)
        x_1CHW = torch.randn(1, 3, cell, 72, dtype=torch.float64)
        x_WCHW = x_1CHW.repeat(72, 1, 1, 1)
        x_WCHW.diagonal(dim1=0, dim2=3).add_(3 * torch.randn(3, cell, 72, dtype=torch.float64))
        changed_WKHW = model.grid(x_WCHW, None) != model.grid(x_1CHW, None)
        felt |= changed_WKHW[..., start : start + cell].any(dim=(1, 2)).T

    for y in range(cell):
        columns = felt[y].nonzero().flatten()
        assert columns.min() == start + y - before[y]
        assert columns.max() == start + y + after[y]


@pytest.mark.parametrize(("left", "same"), [(16, True), (20, True), (17, False), (18, False)])
def test_a_part_answers_like_the_whole_if_it_begins_where_a_cell_does(left, same):
    model = lively(depths=(1, 1)).double()
    margin = max(max(side) for side in reach((1, 1)))
    x_BCHW = torch.randn(1, 3, 48, 96, dtype=torch.float64)

    whole_BKHW = model(x_BCHW)[..., left + margin : 80 - margin]
    part_BKHW = model(x_BCHW[..., left:80])[..., margin:-margin]

    assert torch.allclose(part_BKHW, whole_BKHW, rtol=0, atol=1e-9) == same


# Batch mates and padding


SIZES = [(40, 50), (39, 49), (16, 16), (17, 50), (40, 19), (35, 22)]


def padded_batch():
    """Pictures in one batch, zeros outside of each."""
    x_BCHW = torch.zeros(len(SIZES), 3, 40, 50, dtype=torch.float64)
    for x_CHW, (height, width) in zip(x_BCHW, SIZES, strict=True):
        x_CHW[:, :height, :width] = torch.randn(3, height, width)
    return x_BCHW, torch.tensor(SIZES)


@TWINS
@FORMS
def test_items_masked_in_one_pass_answer_as_they_do_alone(separable, form):
    config = {"widths": (4, 6, 8, 10), "depths": (2, 1, 1, 1), "separable": separable}
    model = in_form(lively(**config).double(), form)
    x_BCHW, sizes_B2 = padded_batch()

    together_BKHW = model.grid(x_BCHW, sizes_B2)

    for i, (height, width) in enumerate(SIZES):
        alone_1KHW = model.grid(x_BCHW[i : i + 1, :, :height, :width], None)
        found_1KHW = together_BKHW[i : i + 1, :, :height, :width]
        torch.testing.assert_close(found_1KHW, alone_1KHW, rtol=0, atol=1e-9)


def test_on_the_way_up_items_begin_as_zeros_outside_of_their_cells():
    model = lively(widths=(4, 6, 8), depths=(1, 1, 1)).double()
    seen = []
    for level in model.decoder.levels[::-1]:
        level.register_forward_pre_hook(lambda _, inputs: seen.insert(0, inputs[0]))
    x_BCHW, sizes_B2 = padded_batch()
    model.grid(x_BCHW, sizes_B2)

    for level, up_BCHW in enumerate(seen):
        for item_CHW, (height, width) in zip(up_BCHW, SIZES, strict=True):
            rows, columns = (2 * (side // 2 ** (level + 1)) for side in (height, width))
            assert item_CHW[:, :rows, :columns].any()
            assert not item_CHW[:, rows:].any()
            assert not item_CHW[:, :, columns:].any()


def test_without_the_sizes_they_would_not():
    model = lively().double()
    x_BCHW, _ = padded_batch()

    together_BKHW = model.grid(x_BCHW, None)
    alone_1KHW = model.grid(x_BCHW[2:3, :, :16, :16], None)

    assert (together_BKHW[2:3, :, :16, :16] - alone_1KHW).abs().max() > 1e-3


@TWINS
@FORMS
def test_an_answer_does_not_depend_on_batch_mates_by_a_single_bit(separable, form):
    model = in_form(lively(separable=separable), form)
    x_BCHW = torch.randn(4, 3, 37, 42)
    sizes_B2 = torch.tensor([[37, 42], [16, 42], [37, 17], [22, 33]])

    together_BKHW = model(x_BCHW, sizes_B2)

    for i, (height, width) in enumerate(sizes_B2.tolist()):
        alone_1KHW = model(x_BCHW[i : i + 1, :, :height, :width])
        assert torch.equal(together_BKHW[i : i + 1, :, :height, :width], alone_1KHW)


# Training


@TWINS
def test_pictures_of_different_sizes_train_together(separable):
    model = lively(separable=separable).train()
    logits_BKHW = model(torch.randn(3, 3, 37, 42), torch.tensor([[37, 42], [16, 42], [22, 33]]))
    (logits_BKHW * torch.randn_like(logits_BKHW)).sum().backward()

    assert [name for name, value in model.named_parameters() if not value.grad.any()] == []


@TWINS
def test_it_learns_one_batch_by_heart(separable):
    side = torch.arange(32)
    disc_HW = (side[:, None] - 15) ** 2 + (side - 12) ** 2 < 8**2
    labels_BHW = torch.stack([disc_HW, disc_HW.flip(1)]).long()
    x_BCHW = labels_BHW[:, None] + 0.3 * torch.randn(2, 3, 32, 32)
    model = models.build("segnet", **TINY, separable=separable)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    for _ in range(100):
        loss = nn.functional.cross_entropy(model(x_BCHW), labels_BHW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    hits_BHW = model.eval()(x_BCHW).argmax(1) == labels_BHW
    assert hits_BHW.float().mean() > 0.99


# The folded form


@TWINS
@pytest.mark.parametrize(("kind", "most"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [(64, 96), (61, 90), (16, 33)])
def test_the_folded_form_answers_the_same(size, kind, most, separable):
    model = lively(classes=5, separable=separable).to(kind)
    x_BCHW = torch.randn(2, 3, *size, dtype=kind)

    plain_BKHW, found_BKHW = model(x_BCHW), model.folded()(x_BCHW)

    assert (plain_BKHW.std(dim=(0, 2, 3)) > 0.1).all()  # else equality would prove nothing
    assert (found_BKHW - plain_BKHW).abs().max() <= most * plain_BKHW.abs().max()
    assert torch.equal(found_BKHW.argmax(1), plain_BKHW.argmax(1))


@TWINS
def test_folding_leaves_the_plain_form_as_it_was(separable):
    model = lively(separable=separable)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    folded = model.folded()

    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value.requires_grad for value in model.parameters())
    shared = {value.data_ptr() for value in model.parameters()}
    assert not shared & {value.data_ptr() for value in folded.parameters()}


# Config


@TWINS
def test_a_config_survives_json(separable):
    model = models.build("segnet", **TINY, separable=separable, final_activation=True)

    again = models.build("segnet", **json.loads(json.dumps(model.config.to_json())))

    assert again.config == model.config
    again.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widths": (8, 16)}, r"widths \(8, 16\) are 2 levels, depths .* are 4"),
        ({"widths": (8, 0, 8, 8)}, "widths must be numbers of at least 1"),
        ({"depths": (1, 1, 1, 0)}, "depths must be numbers of at least 1"),
        ({"channels": 0}, "channels must be at least 1, it is 0"),
        ({"classes": 1}, "at least 2, it is 1"),
        ({"separable": 1}, "separable must be bool as in False, it is 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_reason(config, message):
    with pytest.raises(ValueError, match=message):
        on_meta(**config)


@pytest.mark.parametrize("size", [(32, 40), (37, 51), (4, 5)])
@torch.inference_mode()
def test_many_channels_are_folded_into_a_quarter_of_the_multiplications(size):
    model = lively(widths=(8, 128), depths=(1, 3))
    folded = model.folded()
    x_BCHW = torch.rand(2, 3, *size)

    plain_BKHW, found_BKHW = model(x_BCHW), folded(x_BCHW)

    assert sum(isinstance(module, ByTiles) for module in folded.modules()) == 5
    # A maximum that two pixels nearly share may move: few values, but then by more than rounding.
    assert ((plain_BKHW - found_BKHW).abs() < 1e-4).float().mean() > 0.99
    assert (plain_BKHW.argmax(1) == found_BKHW.argmax(1)).float().mean() > 0.99
