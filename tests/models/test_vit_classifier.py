"""The ViT classifier from scratch: the note's numbers, and what production asks on top."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.parts.patches import cut, pasted
from models.parts.transformer import Block, Mlp
from models.vit_classifier import Config, Grid, Line, ValueSkipAttention, waves
from tests.models.vit_checks import (
    check_compiled,
    check_folded,
    check_items_keep_apart,
    learnt_by_heart,
    lively,
    parameters,
)

SMALL = {"image": (16, 24), "patch": 4, "width": 24, "depth": 2, "heads": 3, "mlp_ratio": 1.5}
WALK = {"channels": 1, "image": (60, 100), "patch": 20, "depth": 1, "heads": 4, "mlp_ratio": 1.5}
IMAGENET = {"image": (224, 224), "patch": 16, "heads": 12, "classes": 1000, "qkv_bias": True}
CIFAR = {"image": (32, 32), "patch": 4, "width": 192, "heads": 3, "classes": 10}
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"positions": "grid", "classes": 5}, {"qkv_bias": True, "channels": 1}, {"depth": 1}],
    ids=["line", "grid", "bias", "one-block"],
)


def small(**options):
    return models.build("vit_classifier", **{**SMALL, **options})


# The note's numbers


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # The source has one output; a class more is 768 weights and a bias more.
        (WALK, 4_445_569 + 769),
        ({"channels": 1}, 86_950_657 + 769),
        (IMAGENET, 86_416_360),
        (CIFAR, 5_343_370),
    ],
    ids=["walk-through", "upstream", "imagenet", "cifar"],
)
def test_it_has_the_documented_number_of_parameters(config, count):
    with torch.device("meta"):
        model = models.build("vit_classifier", **config)

    assert parameters(model) == count


def test_the_walk_through_has_the_documented_parts():
    with torch.device("meta"):
        model = models.build("vit_classifier", **WALK)

    parts = [model.embed, model.blocks[0], model.norm]
    assert [parameters(part) for part in parts] == [307_968, 4_134_528, 1_536]
    assert parameters(model.head) == 2 * 769


def test_the_full_model_has_the_documented_table_and_cost():
    with torch.device("meta"):
        model = models.build("vit_classifier", channels=1).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, 400, 100))

    assert model.positions.table_ND.numel() == 13_056
    assert counter.get_total_flops() / 1e9 == pytest.approx(2.96, abs=0.005)


def test_the_walk_through_has_the_documented_dimensions():
    model = models.build("vit_classifier", **WALK).eval()
    seen = []
    model.embed.register_forward_hook(lambda _, x, y: seen.extend([x[0].shape, y.shape]))
    model.blocks[0].register_forward_hook(lambda _, x, y: seen.append(y.shape))

    answer_BK = model(torch.randn(1, 1, 60, 100))

    assert seen == [(1, 15, 400), (1, 15, 768), (1, 16, 768)]
    assert answer_BK.shape == (1, 2)
    assert model(torch.randn(2, 1, 60, 100)).shape == (2, 2)


def test_it_starts_as_documented():
    model = models.build("vit_classifier", **WALK)

    weights = [model.embed.weight, model.class_token, model.blocks[0].attention.qkv.weight]
    assert [value.std().item() for value in weights] == pytest.approx([0.02] * 3, rel=0.1)
    assert model.class_token.any()
    assert not model.embed.bias.any()
    assert model.blocks[0].attention.qkv.bias is None


# Positions


def test_the_waves_are_the_documented_ones():
    table_ND = waves(17, 768)

    assert table_ND.dtype == torch.float32
    assert table_ND[0].tolist() == [0.0, 1.0] * 384
    first = [0.841471, 0.540302, 0.828431, 0.560091]
    assert table_ND[1, :4].tolist() == pytest.approx(first, abs=1e-6)
    lengths = table_ND.double().norm(dim=1).tolist()
    assert lengths == pytest.approx([19.59592] * 17, abs=1e-5)


def test_waves_far_out_are_as_exact_as_near_ones():
    """In float32 the angle 100000 is off by thousandths of a radian."""
    far_D = waves(100_001, 6)[100_000]

    expected = [
        wave(100_000 / 10_000 ** (2 * pair / 6))
        for pair in range(3)
        for wave in (math.sin, math.cos)
    ]
    assert far_D.tolist() == pytest.approx(expected, abs=1e-7)


def test_patches_in_a_line_are_counted_row_by_row_in_their_own_picture():
    line = Line(8, (2, 2))
    table_ND = waves(1 + 3 * 5, 8)

    assert torch.equal(line((3, 5))[0], table_ND)
    found_BND = line((3, 5), torch.tensor([[3, 5], [2, 3]]))
    assert torch.equal(found_BND[0], table_ND)
    grid_hwD = found_BND[1, 1:].unflatten(0, (3, 5))
    assert torch.equal(found_BND[1, 0], table_ND[0])
    assert torch.equal(grid_hwD[:2, :3].flatten(0, 1), table_ND[1:7])


def test_patches_on_a_grid_know_their_row_and_their_column():
    grid = Grid(8, (2, 2))
    table_ND = waves(6, 4)

    found_ND = grid((3, 5))[0]

    assert torch.equal(found_ND[0], torch.cat([table_ND[0], table_ND[0]]))
    grid_hwD = found_ND[1:].unflatten(0, (3, 5))
    assert torch.equal(grid_hwD[2, 4], torch.cat([table_ND[3], table_ND[5]]))
    assert torch.equal(grid((2, 2))[0, -1], torch.cat([table_ND[2], table_ND[2]]))


@pytest.mark.parametrize("positions", ["line", "grid"])
def test_a_larger_picture_only_has_more_tokens(positions):
    """What is kept for one size and what is made for another are the same numbers."""
    kept, made = (small(image=image, positions=positions) for image in ((20, 36), (4, 4)))
    made.load_state_dict(kept.state_dict(), strict=True)
    x_BCHW = torch.randn(2, 3, 18, 33)

    assert torch.equal(made.eval()(x_BCHW), kept.eval()(x_BCHW))
    assert torch.equal(made.double()(x_BCHW.double()), kept.double()(x_BCHW.double()))


def test_only_positions_tell_the_order_of_patches():
    model = lively(small()).double()
    x_BCHW = torch.randn(2, 3, 16, 24).double()
    shuffled_BCHW = pasted(cut(x_BCHW, 4)[:, torch.randperm(24)], (4, 6), 4)

    assert (model(shuffled_BCHW) - model(x_BCHW)).abs().max() > 1e-3
    model.positions.table_ND.zero_()
    torch.testing.assert_close(model(shuffled_BCHW), model(x_BCHW), rtol=0, atol=1e-12)


# Attention


def test_a_block_whose_attention_says_nothing_still_adds_the_values():
    block = lively(Block(ValueSkipAttention(8, 2, qkv_bias=False), Mlp(8, 12))).double()
    with torch.no_grad():
        for layer in (block.attention.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    x_BTD = torch.randn(2, 5, 8).double()

    value_BTD = block.norm1(x_BTD) @ block.attention.qkv.weight[16:].mT

    torch.testing.assert_close(block(x_BTD, None), x_BTD + value_BTD, rtol=0, atol=1e-12)


def test_attention_is_the_documented_formula():
    attention = lively(ValueSkipAttention(8, 2, qkv_bias=False)).double()
    x_BTD = torch.randn(2, 5, 8).double()

    query, key, value = (x_BTD @ part.mT for part in attention.qkv.weight.chunk(3))
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        shares_BTT = (query[..., head] * 4**-0.5 @ key[..., head].mT).softmax(-1)
        heads.append(shares_BTT @ value[..., head])
    expected_BTD = attention.proj(torch.cat(heads, dim=-1)) + value

    torch.testing.assert_close(attention(x_BTD, None), expected_BTD, rtol=0, atol=1e-12)


# Forms


@OPTIONS
def test_items_of_a_batch_keep_apart(options):
    check_items_keep_apart(lively(small(**options)))


@OPTIONS
def test_the_folded_form_answers_the_same(options):
    check_folded(lively(small(**options)))


def test_the_folded_form_works_less_in_the_last_block():
    model = small(depth=3)
    costs = []
    for form in (model, model.folded()):
        form.requires_grad_(requires_grad=False)
        with FlopCounterMode(display=False) as counter:
            form.eval()(torch.randn(1, 3, 16, 24))
        costs.append(counter.get_total_flops())

    tokens, width, hidden = 25, 24, 36
    spared = 2 * (tokens - 1) * (2 * width * width + 2 * width * hidden)  # query, proj, small net
    assert costs[0] - costs[1] >= spared


@pytest.mark.parametrize("positions", ["line", "grid"])
def test_both_forms_can_be_traced(positions):
    check_compiled(lively(small(positions=positions)))


# Training


def test_it_learns_a_batch_by_heart():
    x_BCHW, labels_B = torch.randn(8, 3, 16, 24), torch.tensor([0, 1, 2, 0, 1, 2, 1, 0])

    assert learnt_by_heart(small(classes=3), x_BCHW, labels_B, steps=60) > 0.99


def test_the_class_token_learns():
    model = small().train()
    model(torch.randn(2, 3, 16, 24)).square().sum().backward()

    assert model.class_token.grad.abs().sum() > 0


# Config


def test_the_defaults_are_upstreams():
    config = Config()

    assert (config.image, config.patch, config.width, config.depth) == ((400, 100), 50, 768, 12)
    assert (config.heads, config.mlp_ratio, config.qkv_bias) == (1, 4.0, False)
    assert config.positions == "line"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 64, "heads": 5}, "64 cannot be shared by 5 heads"),
        ({"classes": 1}, "at least 2, it is 1"),
        ({"image": (60, 100)}, r"\(60, 100\).*multiples of patch 50; try \(50, 100\)"),
        ({"positions": "girder"}, "no positions 'girder'; did you mean 'grid'"),
        ({"positions": "grid", "width": 65}, "even width, it is 65; try 66"),
        ({"mlp_ratio": 0.0}, "leaves nothing"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_reason(config, message):
    with pytest.raises(ValueError, match=message):
        models.build("vit_classifier", **config)
