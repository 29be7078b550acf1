"""The plain ViT that paints patches: the article's numbers, and what production asks on top."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.parts.patches import cut, pasted
from models.vit_segmenter import Config
from tests.models.vit_checks import (
    check_compiled,
    check_folded,
    check_items_keep_apart,
    discs,
    learnt_by_heart,
    lively,
    parameters,
)

SMALL = {"image": (16, 24), "patch": 4, "width": 24, "depth": 2, "heads": 3}
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"interpolation": "bicubic", "classes": 5}, {"refine": 6, "channels": 1}],
    ids=["article", "bicubic", "refined"],
)


def small(**options):
    return models.build("vit_segmenter", **{**SMALL, **options})


def passing_pixels_through(**options):
    """A net of identities: if all pixels keep their places, the scores are the picture."""
    model = small(width=48, classes=3, **options).eval()
    with torch.no_grad():
        for layer in (model.embed, model.head):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in model.blocks:
            nn.init.zeros_(block.attention.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)
            nn.init.zeros_(block.mlp.fc2.bias)
        nn.init.zeros_(model.positions.table)
    model.norm.eps = 0
    return model


# The article's numbers


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"classes": 3}, 86_284_806),
        ({"classes": 2}, 86_087_942),
        ({"classes": 10}, 87_662_854),
        ({"classes": 11}, 87_859_718),
        ({"classes": 10, "width": 512}, 39_568_390),
    ],
)
def test_it_has_the_documented_number_of_parameters(config, count):
    with torch.device("meta"):
        model = models.build("vit_segmenter", **config)

    assert parameters(model) == count


def test_it_has_the_documented_parts_and_cost():
    with torch.device("meta"):
        model = models.build("vit_segmenter", classes=3).eval()
        model.requires_grad_(requires_grad=False)
        with FlopCounterMode(display=False) as counter:
            logits_BKHW = model(torch.zeros(2, 3, 128, 128))

    assert logits_BKHW.shape == (2, 3, 128, 128)
    assert counter.get_total_flops() / 2e9 == pytest.approx(11.17, abs=0.005)
    parts = [model.norm, model.embed, model.positions, model.blocks[0], model.head]
    assert [parameters(part) for part in parts] == [6, 590_592, 49_152, 7_087_872, 590_592]
    assert len(model.blocks) == 12


def test_it_starts_as_the_article_does():
    model = models.build("vit_segmenter", depth=1)
    attention = model.blocks[0].attention

    assert model.positions.table.std().item() == pytest.approx(1, abs=0.02)
    bound = (6 / (768 + 3 * 768)) ** 0.5  # Xavier on the packed matrix
    assert attention.qkv.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert not attention.qkv.bias.any()
    assert not attention.proj.bias.any()


def test_only_attention_and_the_small_nets_answers_are_dropped():
    block = small().blocks[0]

    dropped = {name: m.p for name, m in block.named_modules() if isinstance(m, nn.Dropout)}
    assert {name for name, share in dropped.items() if share} == {"mlp.drop_answer"}
    assert dropped["mlp.drop_answer"] == block.attention.drop_shares == 0.2


# Places


@pytest.mark.parametrize("size", [(64, 256), (256, 64), (16, 24), (12, 16), (13, 18), (1, 7)])
def test_every_pixel_keeps_its_place(size):
    """Also on grids with as many cells as the table, and on sides that are no whole patches."""
    model = passing_pixels_through(image=(32, 32))
    x_BCHW = torch.randn(2, 3, *size)

    torch.testing.assert_close(model(x_BCHW), x_BCHW, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 256), (256, 64)])
def test_a_marker_is_answered_where_it_is(size):
    """The seed's net shows a marker at cell (0, 8) of 4 x 16 at (1, 0) of 8 x 8."""
    model = lively(small(image=(128, 128), patch=16))
    with torch.no_grad():
        for block in model.blocks:  # without reading each other, only the marked patch can know
            block.attention.proj.weight.zero_()
    x_1CHW = torch.zeros(1, 3, *size)
    marked_1CHW = x_1CHW.clone()
    row, column = (0, 8) if size == (64, 256) else (8, 0)
    here = slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16)
    marked_1CHW[:, :, here[0], here[1]] = 1

    moved_HW = (model(marked_1CHW) - model(x_1CHW)).abs().amax((0, 1))

    assert (moved_HW[here] > 1e-3).all()
    moved_HW[here] = 0
    assert not moved_HW.any()


@pytest.mark.parametrize("size", [(256, 256), (120, 128), (360, 480), (130, 130)])
def test_sizes_that_broke_the_articles_net_are_answered_at_their_own(size):
    model = small(image=(128, 128), patch=16)

    assert model.eval()(torch.randn(1, 3, *size)).shape == (1, 2, *size)


def test_shuffled_patches_with_shuffled_positions_are_answered_shuffled():
    model = lively(small()).double()
    x_BCHW = torch.randn(2, 3, 16, 24).double()
    order_T = torch.randperm(24)
    before_BTV = cut(model(x_BCHW), 4)

    with torch.no_grad():
        model.positions.table.copy_(model.positions.table[order_T])
    shuffled_BCHW = pasted(cut(x_BCHW, 4)[:, order_T], (4, 6), 4)

    found_BTV = cut(model(shuffled_BCHW), 4)
    torch.testing.assert_close(found_BTV, before_BTV[:, order_T], rtol=0, atol=1e-10)
    assert (found_BTV - before_BTV).abs().max() > 1e-2


# Forms


@OPTIONS
def test_items_of_a_batch_keep_apart(options):
    check_items_keep_apart(lively(small(**options)))


@OPTIONS
def test_the_folded_form_answers_the_same(options):
    check_folded(lively(small(**options)))


def test_both_forms_can_be_traced():
    check_compiled(lively(small()))


# Training


def test_the_batch_norm_learns_unless_its_statistics_are_frozen():
    x_BCHW = torch.rand(2, 3, 16, 24)

    for frozen in (False, True):
        model = small(frozen_statistics=frozen, dropout=0.0).train()
        before_BKHW = model(x_BCHW)
        assert model.norm.running_mean.any() != frozen
        assert torch.allclose(model.eval()(x_BCHW), before_BKHW, atol=1e-5) == frozen


def test_training_drops_at_random_and_prediction_does_not():
    model = small()
    x_BCHW = torch.rand(2, 3, 16, 24)

    assert not torch.equal(model.train()(x_BCHW), model(x_BCHW))
    assert torch.equal(model.eval()(x_BCHW), model(x_BCHW))


def test_a_refined_net_begins_as_the_plain_one_and_then_looks_over_the_edges_of_patches():
    plain, refined = small(), small(refine=6)
    missing = refined.load_state_dict(plain.state_dict(), strict=False).missing_keys
    x_BCHW = torch.rand(1, 3, 16, 24)
    assert {key.split(".")[0] for key in missing} == {"refine"}
    assert torch.equal(refined.eval()(x_BCHW), plain.eval()(x_BCHW))

    lively(refined)
    logits_BKHW = torch.randn(1, 2, 16, 24)
    moved_BKHW = logits_BKHW.clone()
    moved_BKHW[..., 3] += 1  # the last column of the first patches

    change_BKHW = refined.refine(moved_BKHW, None) - refined.refine(logits_BKHW, None)

    assert change_BKHW[..., 4].any()
    assert not change_BKHW[..., 6:].any()  # two convolutions of 3 x 3 reach two pixels


def test_it_learns_a_batch_by_heart():
    x_BCHW, labels_BHW = discs(2, 32)

    model = models.build(
        "vit_segmenter", image=(32, 32), patch=4, width=64, depth=2, heads=2, dropout=0.0
    )

    assert learnt_by_heart(model, x_BCHW, labels_BHW, steps=80) > 0.99


# Config


def test_the_defaults_are_the_articles():
    config = Config()

    assert (config.image, config.patch, config.width) == ((128, 128), 16, 768)
    assert (config.depth, config.heads, config.dropout) == (12, 8, 0.2)
    assert (config.interpolation, config.frozen_statistics, config.refine) == ("bilinear", False, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 64, "heads": 5}, "64 cannot be shared by 5 heads"),
        ({"classes": 1}, "at least 2, it is 1"),
        ({"image": (120, 128)}, r"\(120, 128\).*multiples of patch 16; try \(128, 128\)"),
        ({"image": (128,)}, r"a height and a width"),
        ({"patch": 0}, "patch must be at least 1, it is 0"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"refine": -1}, "refine must be at least 0"),
        ({"dropout": 1.0}, "dropout must be .* below 1, it is 1.0"),
        ({"interpolation": "cubic"}, "no interpolation 'cubic'; did you mean 'bicubic'"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_reason(config, message):
    with pytest.raises(ValueError, match=message):
        models.build("vit_segmenter", **config)
