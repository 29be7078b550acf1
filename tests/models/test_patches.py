"""What the vision transformers share: patches, positions, and the transformer itself."""

import pytest
import torch
from torch import nn

from models.parts.patches import PositionTable, as_convolution, cut, pasted, readable
from models.parts.transformer import Block, DropPath, Mlp, SelfAttention, fold
from tests.models.vit_checks import lively

INTERPOLATIONS = pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])


# Patches


def test_the_vector_of_a_patch_is_channel_major():
    ramp_1CHW = torch.arange(32.0).view(1, 2, 4, 4)

    tokens_1TV = cut(ramp_1CHW, 2)

    assert tokens_1TV[0, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert tokens_1TV[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert tokens_1TV[0, 2].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]


def test_a_cut_picture_is_pasted_as_it_was():
    x_BCHW = torch.randn(2, 3, 12, 20)

    assert torch.equal(pasted(cut(x_BCHW, 4), (3, 5), 4), x_BCHW)


def test_cutting_and_a_linear_layer_are_one_convolution():
    layer = nn.Linear(3 * 4 * 4, 10)
    x_BCHW = torch.randn(2, 3, 12, 20)

    conv = as_convolution((layer.weight, layer.bias), channels=3, patch=4)

    assert torch.equal(conv.weight, layer.weight.view(10, 3, 4, 4))
    torch.testing.assert_close(conv(x_BCHW).flatten(2).mT, layer(cut(x_BCHW, 4)), rtol=0, atol=2e-6)


def test_a_linear_layer_and_pasting_are_one_transposed_convolution():
    layer = nn.Linear(10, 3 * 4 * 4).double()
    tokens_BTD = torch.randn(2, 15, 10).double()

    found_BKHW = pasted(layer(tokens_BTD), (3, 5), 4)

    weight_DKPP = layer.weight.mT.view(10, 3, 4, 4)
    bias_KHW = layer.bias.view(3, 4, 4).repeat(1, 3, 5)
    map_BDhw = tokens_BTD.mT.unflatten(2, (3, 5))
    expected_BKHW = nn.functional.conv_transpose2d(map_BDhw, weight_DKPP, stride=4) + bias_KHW
    torch.testing.assert_close(found_BKHW, expected_BKHW, rtol=0, atol=1e-14)


def test_tokens_outside_of_an_item_may_not_be_read_and_those_that_are_no_patches_may():
    mask_B11N = readable((2, 3), torch.tensor([[2, 3], [1, 2]]), before=1, after=2)

    assert readable((2, 3), None, before=1) is None
    assert mask_B11N.shape == (2, 1, 1, 9)
    assert mask_B11N[0].all()
    assert mask_B11N[1].flatten().tolist() == [True, True, True, *[False] * 4, True, True]


# Positions


@INTERPOLATIONS
def test_positions_on_their_own_grid_are_the_table(interpolation):
    positions = PositionTable((3, 5), 4, extra=2, interpolation=interpolation)

    assert torch.equal(positions((3, 5))[0], positions.table)
    sized_BND = positions((3, 5), torch.tensor([[3, 5], [3, 5]]))
    assert torch.equal(sized_BND, positions.table.expand(2, -1, -1))


@INTERPOLATIONS
@pytest.mark.parametrize("cells", [(1, 1), (5, 3), (2, 40), (9, 9)])
def test_a_constant_table_stays_constant(interpolation, cells):
    positions = PositionTable((3, 5), 4, interpolation=interpolation)
    nn.init.constant_(positions.table, 0.7)

    found_1TD = positions(cells)

    assert found_1TD.shape == (1, cells[0] * cells[1], 4)
    torch.testing.assert_close(found_1TD, torch.full_like(found_1TD, 0.7), rtol=0, atol=1e-6)


@INTERPOLATIONS
@pytest.mark.parametrize("cells", [(4, 16), (16, 4), (3, 7)])
def test_rows_stay_rows_when_the_aspect_changes(interpolation, cells):
    """Also where the new grid has as many cells as the old one."""
    positions = PositionTable((8, 8), 2, interpolation=interpolation)
    with torch.no_grad():  # one channel knows the row, one the column
        grid_hw2 = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 2, indexing="ij"), -1)
        positions.table.copy_(grid_hw2.flatten(0, 1))

    rows_hw, columns_hw = positions(cells)[0].mT.unflatten(1, cells)

    torch.testing.assert_close(rows_hw, rows_hw[:, :1].expand(cells), rtol=0, atol=1e-5)
    torch.testing.assert_close(columns_hw, columns_hw[:1].expand(cells), rtol=0, atol=1e-5)
    assert (rows_hw.diff(dim=0) > 0).all()
    assert (columns_hw.diff(dim=1) > 0).all()


@INTERPOLATIONS
@pytest.mark.parametrize("cells", [(1, 1), (5, 3), (2, 40), (9, 9)])
def test_positions_are_stretched_as_torch_stretches_pictures(interpolation, cells):
    positions = PositionTable((3, 5), 4, extra=2, interpolation=interpolation).double()

    found_1ND = positions(cells)

    places_1Dhw = positions.table[2:].mT.unflatten(1, (3, 5))[None]
    expected_1Dhw = nn.functional.interpolate(places_1Dhw, cells, mode=interpolation)
    torch.testing.assert_close(
        found_1ND[:, 2:].mT.unflatten(2, cells), expected_1Dhw, rtol=0, atol=1e-13
    )
    assert torch.equal(found_1ND[0, :2], positions.table[:2])


@INTERPOLATIONS
def test_each_item_gets_the_positions_of_its_own_grid(interpolation):
    positions = PositionTable((3, 5), 4, extra=1, interpolation=interpolation).double()
    sizes = [(4, 6), (1, 1), (2, 6), (3, 5)]

    found_BND = positions((4, 6), torch.tensor(sizes))

    for found_ND, (h, w) in zip(found_BND, sizes, strict=True):
        own_TD = found_ND[1:].unflatten(0, (4, 6))[:h, :w].flatten(0, 1)
        assert torch.equal(found_ND[0], positions.table[0])
        torch.testing.assert_close(own_TD, positions((h, w))[0, 1:], rtol=0, atol=1e-14)


# The transformer


def test_attention_is_torchs_attention():
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    ours = SelfAttention(24, 3).double()
    ours.qkv.weight, ours.qkv.bias = theirs.in_proj_weight, theirs.in_proj_bias
    ours.proj.weight, ours.proj.bias = theirs.out_proj.weight, theirs.out_proj.bias
    x_BTD = torch.randn(2, 7, 24).double()
    outside_BT = torch.arange(7) >= torch.tensor([[7], [4]])

    expected_BTD, _ = theirs(x_BTD, x_BTD, x_BTD, key_padding_mask=outside_BT)

    torch.testing.assert_close(ours(x_BTD, ~outside_BT[:, None, None]), expected_BTD)


def test_a_block_is_torchs_block():
    theirs = nn.TransformerEncoderLayer(
        24, 3, 96, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    ours = Block(SelfAttention(24, 3), Mlp(24, 96))
    names = {
        "attention.qkv.": "self_attn.in_proj_",
        "attention.proj.": "self_attn.out_proj.",
        "mlp.fc1.": "linear1.",
        "mlp.fc2.": "linear2.",
    }
    lively(theirs)
    state = theirs.state_dict()
    for name in ours.state_dict():
        part = next((start for start in names if name.startswith(start)), None)
        if part is not None:
            state[name] = state.pop(names[part] + name.removeprefix(part))
    ours.load_state_dict(state, strict=True)
    x_BTD = torch.randn(2, 7, 24).double()

    torch.testing.assert_close(ours.double()(x_BTD, None), theirs.double()(x_BTD))


def test_a_folded_block_answers_as_before():
    block = lively(Block(SelfAttention(24, 3, qkv_bias=False), Mlp(24, 40))).double()
    x_BTD = torch.randn(2, 7, 24).double()
    before_BTD = block(x_BTD, None)

    fold(block)

    for norm in (block.norm1, block.norm2):
        assert torch.equal(norm.weight, torch.ones(24))
        assert not norm.bias.any()
    torch.testing.assert_close(block(x_BTD, None), before_BTD, rtol=1e-12, atol=1e-12)


def test_heads_that_cannot_share_the_width_are_refused():
    with pytest.raises(ValueError, match=r"64 cannot be shared by 5 heads.*width of 65"):
        SelfAttention(64, 5)


def test_a_dropped_path_is_left_out_for_whole_items_and_right_in_the_mean():
    x_BTD = torch.ones(4000, 2, 3)

    dropped_BTD = DropPath(0.25).train()(x_BTD)

    assert dropped_BTD.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(dropped_BTD, dropped_BTD[:, :1, :1].expand_as(dropped_BTD))
    assert dropped_BTD.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(DropPath(0.25).eval()(x_BTD), x_BTD)
