"""Convolutions with half of the multiplications: the same answers, in strips or whole."""

import pytest
import torch
from torch import nn

from models.parts import winograd
from models.parts.winograd import ByRows, RowWinograd, faster


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 3, 4, 5), (2, 5, 17, 3), (1, 32, 90, 64), (1, 64, 181, 40)]
)
@pytest.mark.parametrize("strip", [1, 50_000, 2**30])
@torch.inference_mode()
def test_it_is_the_convolution_up_to_rounding(shape, bias, strip, monkeypatch):
    monkeypatch.setattr(winograd, "STRIP", strip)
    torch.manual_seed(0)
    conv = nn.Conv2d(shape[1], 24, 3, padding=1, bias=bias).requires_grad_(requires_grad=False)
    x_BCHW = torch.randn(shape)

    exact_BFHW = nn.functional.conv2d(
        x_BCHW.double(),
        conv.weight.double(),
        None if conv.bias is None else conv.bias.double(),
        padding=1,
    )

    found_BFHW = ByRows(conv, RowWinograd(conv))(x_BCHW)

    torch.testing.assert_close(found_BFHW.double(), exact_BFHW, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_many_channels_take_this_way_and_half_precision_does_not():
    torch.manual_seed(0)
    conv = nn.Conv2d(winograd.CHANNELS, 8, 3, padding=1)
    x_BCHW = torch.randn(2, winograd.CHANNELS, 23, 19)

    by_rows = faster(conv)

    assert isinstance(by_rows, ByRows)
    torch.testing.assert_close(by_rows(x_BCHW), conv(x_BCHW), rtol=0, atol=1e-4)
    assert not torch.equal(by_rows(x_BCHW), conv(x_BCHW))
    half_BCHW, half = x_BCHW.bfloat16(), by_rows.bfloat16()
    assert torch.equal(half(half_BCHW), conv.bfloat16()(half_BCHW))


def test_few_channels_and_other_shapes_stay_what_they_are():
    few, strided = nn.Conv2d(64, 8, 3, padding=1), nn.Conv2d(128, 8, 3, stride=2, padding=1)

    assert faster(few) is few
    assert faster(strided) is strided


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
        RowWinograd(nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **about}))
