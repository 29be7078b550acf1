"""Convolutions in C: the same answers as torch's, by every set of instructions known here."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, max_pool2d

from models.parts import kernels
from models.parts.conv3x3 import CHANNELS, ByTiles, HalvedTwice, Winograd, faster

SHAPES = [(1, 2, 2, 1), (3, 4, 5, 24), (5, 17, 3, 7), (13, 30, 66, 64), (32, 90, 64, 40)]


def convolution(channels, features, bias=True):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, features, 3, padding=1, bias=bias)
    return conv.requires_grad_(requires_grad=False)


def exact(conv, x_HWC):
    bias = None if conv.bias is None else conv.bias.double()
    return conv2d(x_HWC.double().permute(2, 0, 1)[None], conv.weight.double(), bias, padding=1)


def halved(y_1FHW):
    return max_pool2d(y_1FHW.relu(), 2)


def rows_of(y_1FHW):
    return y_1FHW[0].permute(1, 2, 0).float()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("channels", "height", "width", "features"), SHAPES)
def test_winograds_way_is_the_convolution_up_to_rounding(channels, height, width, features, bias):
    conv = convolution(channels, features, bias)
    x_HWC = torch.randn(height, width, channels)

    found_1HWF = Winograd(conv)(x_HWC[None])

    torch.testing.assert_close(found_1HWF[0], rows_of(exact(conv, x_HWC)), rtol=0, atol=5e-6)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("between", [1, 32, 40])
@pytest.mark.parametrize(
    ("channels", "height", "width", "features"),
    [(1, 4, 4, 1), (3, 5, 31, 16), (4, 6, 20, 7), (3, 7, 12, 40), (3, 75, 266, 64)],
)
def test_two_convolutions_are_each_halved_and_cut_off_at_zero(
    channels, height, width, features, between
):
    first, second = convolution(channels, between), convolution(between, features)
    x_BHWC = torch.randn(2, height, width, channels)

    found_BhwF = HalvedTwice(first, second)(x_BHWC)

    for x_HWC, found_hwF in zip(x_BHWC, found_BhwF, strict=True):
        between_HWF = rows_of(halved(exact(first, x_HWC)))
        expected_hwF = rows_of(halved(exact(second, between_HWF)))
        torch.testing.assert_close(found_hwF, expected_hwF, rtol=0, atol=5e-6)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("none", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("height", "width"), [(13, 7), (24, 8), (22, 21)])
def test_what_is_no_number_is_hidden_nowhere(height, width, none):
    first, second = convolution(4, 8), convolution(8, 19)
    twice, once = HalvedTwice(first, second), Winograd(second)
    for place in range(0, height * width, 3):
        x_HWC, wide_HWC = torch.randn(height, width, 4), torch.randn(height, width, 8)
        for each_HWC in (x_HWC, wide_HWC):
            each_HWC.view(-1, each_HWC.shape[2])[place, place % 4] = none

        found_hwF, found_HWF = twice(x_HWC[None])[0], once(wide_HWC[None])[0]

        between_HWF = rows_of(halved(exact(first, x_HWC)))
        expected_hwF = rows_of(halved(exact(second, between_HWF)))
        assert not found_hwF[~expected_hwF.isfinite()].isfinite().any()
        assert not found_HWF[~rows_of(exact(second, wide_HWC)).isfinite()].isfinite().any()
        assert found_HWF.isfinite().any()


@pytest.mark.usefixtures("instructions")
@torch.inference_mode()
def test_many_channels_take_this_way_and_half_precision_does_not():
    conv = convolution(CHANNELS, 8)
    x_BCHW = torch.randn(2, CHANNELS, 23, 19)

    by_tiles = faster(conv)

    assert isinstance(by_tiles, ByTiles)
    torch.testing.assert_close(by_tiles(x_BCHW), conv(x_BCHW), rtol=0, atol=1e-5)
    assert not torch.equal(by_tiles(x_BCHW), conv(x_BCHW))
    half_BCHW, half = x_BCHW.bfloat16(), by_tiles.bfloat16()
    assert torch.equal(half(half_BCHW), conv.bfloat16()(half_BCHW))


def test_few_channels_and_other_shapes_stay_what_they_are(monkeypatch):
    few, strided = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(128, 8, 3, stride=2, padding=1)
    many = nn.Conv2d(128, 8, 3, padding=1)

    assert faster(few) is few
    assert faster(strided) is strided
    monkeypatch.setattr(kernels, "LIBRARY", None)
    assert faster(many) is many


@pytest.mark.parametrize(
    "about",
    [
        {"kernel_size": 5},
        {"stride": 2},
        {"dilation": 2},
        {"padding": 0},
        {"groups": 4},
        {"padding_mode": "reflect"},
    ],
)
def test_other_convolutions_are_refused(about):
    with pytest.raises(ValueError, match="only 3 x 3, stride 1, padding 1, without groups"):
        Winograd(nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **about}))
