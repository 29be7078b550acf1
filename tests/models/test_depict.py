"""DEPICT: the documented numbers, the symmetries of its layers, and what production asks on top."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.depict import DECODERS, ENCODERS, Config, CrossLayer, SelfLayer
from tests.models.vit_checks import (
    check_compiled,
    check_folded,
    check_items_keep_apart,
    discs,
    learnt_by_heart,
    lively,
    parameters,
)

MODES = pytest.mark.parametrize("mode", ["sa", "ca"])
SMALL = {"image": (16, 24), "patch": 4, "width": 24, "depth": 2, "heads": 3}
SUBSPACES = {"decoder_heads": 2, "dim_head_sa": 10, "dim_head_ca": 5}
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {"mode": "sa", "classes": 8},
        {"mode": "ca", "classes": 8},
        {"mode": "ca", "classes": 2, "distilled": True, "interpolation": "bicubic"},
        {"mode": "sa", "classes": 3, "scores": "temperature", "decoder_layers": 1},
        {"mode": "ca", "classes": 8, "depth_ca": 1, "channels": 1},
    ],
    ids=["sa", "ca", "ca-deit-bicubic", "sa-temperature", "ca-shallow"],
)


def small(**options):
    return models.build("depict", **{**SMALL, **SUBSPACES, **options})


def decoder(mode, **options):
    return DECODERS[mode](Config(mode=mode, **{"heads": 1, **SUBSPACES, **options})).eval()


def apart(model):
    """A model whose classes differ; it is lively, too.

    As initialised, and when long steps pull all classes the same way, they have nearly the same
    cosines: the norm over classes then blows up what float32 rounds off, in whatever form.
    """
    lively(model)
    with torch.no_grad():
        nn.init.normal_(model.decoder.classes)
        for name, value in model.decoder.named_parameters():
            if name.endswith("step"):
                value.mul_(0.3)
    return model


NOTE = {"classes": 10, "width": 128, "decoder_layers": 4, "decoder_heads": 8}
NOTE |= {"dim_head_sa": 100, "dim_head_ca": 50, "decoder_dropout": 0.1}


# Documented numbers


@pytest.mark.parametrize(("mode", "count"), [("sa", 412_184), ("ca", 566_811)])
def test_the_notes_decoder_has_the_documented_number_of_parameters(mode, count):
    model = decoder(mode, **NOTE)

    assert parameters(model) == count
    assert [parameters(layer) for layer in model.layers] == [102_657] * 4
    if mode == "ca":
        assert [parameters(layer) for layer in model.cross_layers] == [51_457] * 3


@pytest.mark.parametrize(
    ("encoder", "classes", "sa", "ca"),
    [
        ("tiny", 150, 203_439, 291_378),
        ("small", 150, 406_575, 582_450),
        ("base", 150, 812_847, 1_164_594),
        ("large", 150, 1_083_695, 1_552_690),
        ("tiny", 11, 176_473, 264_412),
        ("small", 11, 352_921, 528_796),
        ("tiny", 19, 178_025, 265_964),
        ("small", 19, 356_009, 531_884),
    ],
)
def test_the_repositorys_decoders_have_the_documented_number_of_parameters(
    encoder, classes, sa, ca
):
    with torch.device("meta"):
        configs = [Config(classes=classes, mode=mode, **ENCODERS[encoder]) for mode in DECODERS]
        found = [parameters(DECODERS[config.mode](config)) for config in configs]

    assert found == [sa, ca]


def test_twice_the_layers_are_the_papers_large_decoder():
    with torch.device("meta"):
        config = Config(classes=150, decoder_layers=6, **ENCODERS["large"])

        assert parameters(DECODERS["sa"](config)) == 2_011_442


@pytest.mark.parametrize(
    ("encoder", "alone", "whole"),
    [
        ("tiny", 5_683_392, 5_886_831),
        ("small", 21_983_616, 22_390_191),
        ("base", 86_434_560, 87_247_407),
        ("large", 304_739_328, 305_823_023),
    ],
)
def test_encoders_and_whole_models_have_the_documented_number_of_parameters(encoder, alone, whole):
    with torch.device("meta"):
        model = models.build("depict", classes=150, **ENCODERS[encoder])

    assert parameters(model.encoder) == alone
    assert parameters(model) == whole


def test_a_distilled_encoder_has_one_more_token_and_position():
    with torch.device("meta"):
        model = models.build("depict", classes=150, distilled=True, **ENCODERS["tiny"])

    assert parameters(model.encoder) == 5_683_392 + 2 * 192


@pytest.mark.parametrize(
    ("encoder", "layers", "sa", "ca"),
    [
        ("tiny", 3, 5.83, 5.05),
        ("small", 3, 6.70, 6.04),
        ("base", 3, 8.44, 8.03),
        ("large", 3, 17.97, 17.79),
        ("large", 6, 35.44, None),
    ],
)
def test_the_decoders_cost_what_is_documented(encoder, layers, sa, ca):
    side = ENCODERS[encoder]["image"][0] // 16
    found = []
    for mode in DECODERS if ca else ["sa"]:
        with torch.device("meta"):
            config = Config(classes=150, mode=mode, decoder_layers=layers, **ENCODERS[encoder])
            model = DECODERS[mode](config).requires_grad_(requires_grad=False)
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, side * side, config.width), (side, side))
        found.append(counter.get_total_flops() / 1e9)

    assert found == pytest.approx([sa, ca] if ca else [sa], abs=0.006)


@MODES
@pytest.mark.parametrize("cells", [(8, 8), (4, 6)])
def test_the_notes_decoder_has_the_documented_shapes(mode, cells):
    model = decoder(mode, **NOTE).double()

    logits_BKhw = model(torch.randn(2, cells[0] * cells[1], 128).double(), cells)

    assert logits_BKhw.shape == (2, 10, *cells)
    assert logits_BKhw.mean(1).abs().max() < 1e-12  # the norm centres the classes, as initialised


def test_the_whole_model_stretches_its_cells_to_the_picture():
    model = small().eval()
    x_BCHW = torch.randn(2, 3, 18, 23)

    logits_BKhw = model(x_BCHW, native=True)

    assert logits_BKhw.shape == (2, 2, 5, 6)
    whole_BKHW = nn.functional.interpolate(
        logits_BKhw, size=(20, 24), mode="bilinear", align_corners=False
    )
    assert torch.equal(model(x_BCHW), whole_BKHW[:, :, :18, :23])


def test_it_starts_as_documented():
    torch.manual_seed(0)
    model = models.build("depict", classes=150)
    layers = model.decoder.layers

    assert model.decoder.classes.std().item() == pytest.approx(0.02, rel=0.05)
    assert layers[0].basis.std().item() == pytest.approx(192**-0.5, rel=0.02)
    steps = torch.cat([SelfLayer(4, 1, 2, 0.0).step for _ in range(400)])
    assert steps.std().item() == pytest.approx(1, abs=0.1)
    assert 0.4 < (steps < 0).float().mean() < 0.6
    encoder = model.encoder
    weights = [encoder.extra, encoder.positions.table, encoder.blocks[0].attention.qkv.weight]
    assert [value.std().item() for value in weights] == pytest.approx([0.02] * 3, rel=0.15)
    shares = [block.drop_path.share for block in encoder.blocks]
    assert shares == pytest.approx([0.1 * i / 11 for i in range(12)])


# Layers


def test_a_layer_without_norm_on_two_axes_has_the_closed_form():
    layer = SelfLayer(2, 1, 2, 0.0).eval()
    with torch.no_grad():
        layer.basis.copy_(torch.eye(2))
        layer.step.fill_(1)
    tokens_1HTd = layer.seen(torch.eye(2)[None])

    found_1TD = layer.moved(tokens_1HTd, tokens_1HTd, None)

    expected_TD = torch.tensor([[0.669762, 0.330238], [0.330238, 0.669762]])
    torch.testing.assert_close(found_1TD[0], expected_TD, rtol=0, atol=1e-6)


def shares_of(query_BHQd, tokens_BHTd):
    return (query_BHQd @ tokens_BHTd.mT * tokens_BHTd.shape[-1] ** -0.5).softmax(-1)


def test_layers_are_the_documented_formulas():
    self_layer, cross_layer = (
        lively(kind(6, 3, 4, 0.0)).double() for kind in (SelfLayer, CrossLayer)
    )
    x_BTD, classes_BKD = torch.randn(2, 5, 6).double(), torch.randn(2, 3, 6).double()

    def seen(layer, y_BTD):
        return (y_BTD @ layer.basis.mT).view(2, -1, 3, 4).transpose(1, 2)

    def expected(layer, asking_BQD, query_BQD):
        tokens_BHTd = seen(layer, layer.norm(x_BTD))
        read_BHQd = shares_of(seen(layer, query_BQD), tokens_BHTd) @ tokens_BHTd
        step_BQD = layer.step * (read_BHQd.transpose(1, 2).reshape(2, -1, 12) @ layer.basis)
        return asking_BQD + step_BQD

    torch.testing.assert_close(
        self_layer(x_BTD, None), expected(self_layer, x_BTD, self_layer.norm(x_BTD))
    )
    torch.testing.assert_close(  # classes ask as they are
        cross_layer(classes_BKD, x_BTD, None), expected(cross_layer, classes_BKD, classes_BKD)
    )


def test_a_step_of_zero_moves_nothing():
    layer = SelfLayer(6, 3, 4, 0.0)
    nn.init.zeros_(layer.step)
    x_BTD = torch.randn(2, 5, 6)

    assert torch.equal(layer(x_BTD, None), x_BTD)


@pytest.mark.parametrize("turn", ["rotation", "sign"])
def test_the_axes_of_a_subspace_do_not_matter(turn):
    layer = lively(SelfLayer(6, 3, 4, 0.0)).double()
    x_BTD = torch.randn(2, 5, 6).double()
    before_BTD = layer(x_BTD, None)

    with torch.no_grad():
        if turn == "rotation":
            turned_Hdd = torch.linalg.qr(torch.randn(3, 4, 4).double()).Q
            turned_HdD = turned_Hdd @ layer.basis.unflatten(0, (3, 4))
            layer.basis.copy_(turned_HdD.flatten(0, 1))
        else:
            layer.basis.neg_()

    torch.testing.assert_close(layer(x_BTD, None), before_BTD, rtol=0, atol=1e-12)


def test_shares_are_dropped_in_training_only():
    layer = SelfLayer(6, 3, 4, 0.5)
    x_BTD = torch.randn(2, 5, 6)

    assert not torch.equal(layer.train()(x_BTD, None), layer(x_BTD, None))
    assert torch.equal(layer.eval()(x_BTD, None), layer(x_BTD, None))


# Decoder


@MODES
def test_shuffled_patches_are_answered_shuffled(mode):
    model = lively(decoder(mode, classes=5, width=24)).double()
    x_BTD = torch.randn(2, 12, 24).double()
    order_T = torch.randperm(12)

    found_BKT = model(x_BTD[:, order_T], (3, 4)).flatten(2)

    expected_BKT = model(x_BTD, (3, 4)).flatten(2)[:, :, order_T]
    torch.testing.assert_close(found_BKT, expected_BKT, rtol=0, atol=1e-10)


@MODES
def test_shuffled_classes_are_answered_shuffled(mode):
    model = lively(decoder(mode, classes=5, width=24)).double()
    x_BTD = torch.randn(2, 12, 24).double()
    order_K = torch.randperm(5)
    before_BKhw = model(x_BTD, (3, 4))

    with torch.no_grad():
        for value in (model.classes, model.scores.weight, model.scores.bias):
            value.copy_(value[order_K])

    found_BKhw = model(x_BTD, (3, 4))
    torch.testing.assert_close(found_BKhw, before_BKhw[:, order_K], rtol=0, atol=1e-10)


@MODES
def test_tokens_that_do_not_fill_the_grid_are_refused(mode):
    """The seed reshapes 30 tokens of a picture 90 pixels high to 5 x 6 without a word."""
    with pytest.raises(
        ValueError, match=r"30 tokens do not fill a grid of 5 x 5.*rows and columns"
    ):
        decoder(mode, width=24)(torch.randn(1, 30, 24), (5, 5))


@MODES
def test_vectors_of_zero_give_numbers(mode):
    model = decoder(mode, classes=5, width=24)
    with torch.no_grad():
        for value in (model.classes, *model.norm.parameters()):
            value.zero_()  # the last norm now gives patches of length zero
        if mode == "ca":
            for value in model.class_norm.parameters():
                value.zero_()
    x_BTD = torch.zeros(1, 12, 24, requires_grad=True)

    logits_BKhw = model(x_BTD, (3, 4))
    logits_BKhw.sum().backward()

    assert logits_BKhw.isfinite().all()
    assert x_BTD.grad.isfinite().all()


@MODES
def test_layers_where_classes_read_patches_are_counted_on_their_own(mode):
    counts = {
        layers: len(getattr(decoder(mode, width=24, decoder_layers=layers), "cross_layers", []))
        for layers in (1, 5)
    }

    assert counts == dict.fromkeys((1, 5), 3 if mode == "ca" else 0)


def test_in_ca_no_patch_hears_of_the_classes_and_in_sa_all_do():
    x_BTD = torch.randn(1, 12, 24)
    for mode, hears in (("ca", False), ("sa", True)):
        model = lively(decoder(mode, classes=5, width=24))
        before_BTD, _ = model.met(x_BTD, (3, 4), None)
        with torch.no_grad():
            model.classes.add_(torch.randn_like(model.classes))
        after_BTD, _ = model.met(x_BTD, (3, 4), None)
        assert torch.equal(after_BTD, before_BTD) != hears


@pytest.mark.parametrize("classes", [3, 11])
def test_the_norm_over_classes_bounds_the_scores(classes):
    model = decoder("sa", classes=classes, width=24)
    cosines_BTK = nn.functional.one_hot(torch.arange(classes)).float()[None]

    highest = model.scores(cosines_BTK).max().item()

    assert highest == pytest.approx((classes - 1) ** 0.5, rel=1e-3)


def test_two_classes_get_a_temperature_because_the_norm_would_teach_nothing():
    x_BTD, labels_Bhw = torch.randn(1, 12, 24), torch.zeros(1, 3, 4, dtype=torch.long)
    felt = {}
    for scores in ("norm", "auto"):
        torch.manual_seed(1)
        model = decoder("sa", classes=2, width=24, scores=scores)
        with torch.no_grad():
            nn.init.normal_(model.classes)
        loss = nn.functional.cross_entropy(model(x_BTD, (3, 4)), labels_Bhw)
        loss.backward()
        felt[scores] = model.classes.grad.norm().item()

    assert felt["auto"] > 100 * felt["norm"]
    assert isinstance(decoder("sa", classes=3, width=24).scores, nn.LayerNorm)
    free = decoder("sa", classes=3, width=24, scores="temperature").scores
    assert free(torch.tensor([[[1.0, -0.5, 0]]])).tolist()[0][0] == pytest.approx(
        [1 / 0.07, -0.5 / 0.07, 0]
    )


# Encoder


def test_grids_with_as_many_cells_as_the_table_are_resized_all_the_same():
    encoder = lively(small(image=(32, 32))).encoder
    x_1CHW = torch.zeros(1, 3, 16, 64)  # 4 x 16 patches, the table has 8 x 8

    grid_hwD = encoder.positions((4, 16))[0, 1:].unflatten(0, (4, 16))

    expected_1Dhw = nn.functional.interpolate(
        encoder.positions.table[1:].mT.unflatten(1, (8, 8))[None], (4, 16), mode="bilinear"
    )
    torch.testing.assert_close(grid_hwD.permute(2, 0, 1), expected_1Dhw[0], rtol=0, atol=1e-5)
    assert encoder(x_1CHW, None).shape == (1, 64, 24)


def test_extra_tokens_talk_to_patches_but_are_not_handed_on():
    encoder = lively(small(distilled=True)).encoder
    x_BCHW = torch.randn(2, 3, 16, 24)
    before_BTD = encoder(x_BCHW, None)

    with torch.no_grad():
        encoder.extra[1].add_(torch.randn(24))

    assert before_BTD.shape == (2, 24, 24)
    assert not torch.allclose(encoder(x_BCHW, None), before_BTD)


def test_dropout_stands_behind_both_layers_of_small_nets_and_behind_attention():
    block = small(dropout=0.1).encoder.blocks[0]

    dropped = {name: m.p for name, m in block.named_modules() if isinstance(m, nn.Dropout)}
    assert dropped == dict.fromkeys(
        ("attention.drop_answer", "mlp.drop_hidden", "mlp.drop_answer"), 0.1
    )
    assert block.attention.drop_shares == 0


# Forms


@OPTIONS
def test_items_of_a_batch_keep_apart(options):
    check_items_keep_apart(apart(small(**options)))


@OPTIONS
def test_the_folded_form_answers_the_same(options):
    check_folded(apart(small(**options)))


@MODES
def test_both_forms_can_be_traced(mode):
    check_compiled(apart(small(mode=mode)))


# Training


@MODES
@pytest.mark.parametrize("classes", [2, 3])
def test_it_learns_a_batch_by_heart(mode, classes):
    x_BCHW, labels_BHW = discs(2, 16)

    model = models.build(
        "depict",
        mode=mode,
        classes=classes,
        image=(16, 16),
        patch=1,
        width=32,
        depth=1,
        heads=2,
        decoder_layers=1,
        depth_ca=1,
        **SUBSPACES,
    )

    assert learnt_by_heart(model, x_BCHW, labels_BHW, steps=120) > 0.99


# Config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 64, "heads": 5}, "64 cannot be shared by 5 heads"),
        ({"classes": 1}, "at least 2, it is 1"),
        ({"mode": "as"}, "no mode 'as'"),
        ({"scores": "norms"}, "no scores 'norms'; did you mean 'norm'"),
        ({"depth_ca": 0}, "depth_ca must be at least 1"),
        ({"drop_path": 1.0}, "drop_path must be .* below 1"),
        ({"decoder_dropout": -0.1}, "decoder_dropout must be at least 0"),
        ({"interpolation": "cubic"}, "did you mean 'bicubic'"),
        ({"image": (500, 512)}, r"multiples of patch 16; try \(496, 512\)"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_reason(config, message):
    with pytest.raises(ValueError, match=message):
        models.build("depict", **config)


def test_the_width_of_subspaces_need_not_divide_anything():
    assert (
        small(width=24, decoder_heads=5, dim_head_sa=7)
        .eval()(torch.zeros(1, 3, 8, 8))
        .isfinite()
        .all()
    )
