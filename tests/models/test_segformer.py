"""SegFormer: the numbers of MODELS.md section 4, and that items and forms agree."""

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.segformer import Config

TINY = {
    "widths": (8, 16, 24, 32),
    "depths": (1, 1, 1, 1),
    "heads": (1, 2, 3, 4),
    "decoder_width": 16,
}


def lively(**config):
    """A tiny net as after a training: nothing at its neutral value, scores that vary."""
    model = models.build("segformer", **{**TINY, **config}).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.2)
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
                module.bias.normal_(0, 0.2)
    return model


def on_meta(**config):
    with torch.device("meta"):
        return models.build("segformer", **config)


def count(*modules):
    return sum(value.numel() for module in modules for value in module.parameters())


# Counts (section 4.2 and the master table)


@pytest.mark.parametrize(
    ("variant", "counts"),
    [
        ("b0", (3_752_694, 3_719_027, 3_716_971)),
        ("b1", (13_715_798, 13_682_131, 13_680_075)),
        ("b2", (27_461_974, 27_361_235, 27_355_083)),
        ("b3", (47_337_814, 47_237_075, 47_230_923)),
        ("b4", (64_108_374, 64_007_635, 64_001_483)),
        ("b5", (84_708_694, 84_607_955, 84_601_803)),
    ],
)
def test_a_variant_has_the_documented_number_of_parameters(variant, counts):
    found = tuple(count(on_meta(variant=variant, classes=classes)) for classes in (150, 19, 11))

    assert found == counts


@pytest.mark.parametrize(
    ("variant", "encoder", "head"),
    [
        ("b0", 3_319_392, 433_302),
        ("b1", 13_151_424, 564_374),
        ("b2", 24_196_288, 3_265_686),
        ("b3", 44_072_128, 3_265_686),
        ("b4", 60_842_688, 3_265_686),
        ("b5", 81_443_008, 3_265_686),
    ],
)
def test_encoder_and_head_share_them_as_documented(variant, encoder, head):
    model = on_meta(variant=variant, classes=150)

    assert (count(model.encoder), count(model.head)) == (encoder, head)


def test_the_stages_of_b0_share_them_as_documented():
    stages = on_meta().encoder.stages

    assert [count(stage) for stage in stages] == [164_096, 255_296, 930_080, 1_969_920]


def test_the_layer_norms_have_the_documented_epsilons():
    norms = {
        name.split(".")[-1]: module.eps
        for name, module in on_meta().encoder.named_modules()
        if isinstance(module, nn.LayerNorm)
    }

    assert norms == {
        "merge_norm": 1e-5,
        "reduce_norm": 1e-5,
        "attention_norm": 1e-6,
        "mix_norm": 1e-6,
        "norm": 1e-6,
    }


def test_the_encoder_starts_as_documented():
    stage = models.build("segformer").encoder.stages[2]
    block = stage.blocks[0]

    assert block.mix.widen.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mix.window.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert stage.merge.weight.std().item() == pytest.approx((2 / (9 * 160)) ** 0.5, rel=0.02)
    assert not block.mix.widen.bias.any()
    assert not stage.merge.bias.any()


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("b0", 16.78), ("b1", 31.76), ("b2", 124.7), ("b3", 157.9), ("b4", 191.1), ("b5", 223.0)],
)
def test_a_variant_takes_the_documented_operations(variant, expected):
    model = on_meta(variant=variant, classes=150).eval()

    with FlopCounterMode(display=False) as operations:
        model.grid(torch.zeros(1, 3, 512, 512, device="meta"), None)

    assert operations.get_total_flops() / 1e9 == pytest.approx(expected, rel=5e-4)


# Sizes (section 4.4)


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        ((512, 512), [(128, 128), (64, 64), (32, 32), (16, 16)]),
        ((360, 480), [(90, 120), (45, 60), (23, 30), (12, 15)]),
        ((100, 157), [(25, 40), (13, 20), (7, 10), (4, 5)]),
    ],
)
def test_the_encoder_has_the_documented_grids(size, grids):
    maps = on_meta().encoder(torch.zeros(1, 3, *size, device="meta"), None)

    assert [tuple(x_BChw.shape[-2:]) for x_BChw in maps] == grids


def test_the_encoder_alone_cannot_read_28_pixels():
    encoder = on_meta().encoder

    assert encoder(torch.zeros(1, 3, 29, 29, device="meta"), None)[3].shape[-2:] == (1, 1)
    with pytest.raises(RuntimeError, match="Kernel size"):
        encoder(torch.zeros(1, 3, 28, 28, device="meta"), None)


@pytest.mark.parametrize(
    ("size", "padded", "cells"),
    [
        ((512, 512), (512, 512), (128, 128)),
        ((360, 480), (384, 480), (90, 120)),
        ((100, 157), (128, 160), (25, 40)),
        ((28, 3), (32, 32), (7, 1)),
        ((1, 1), (32, 32), (1, 1)),
    ],
)
def test_pictures_are_padded_to_multiples_of_32_and_answers_cut(size, padded, cells):
    model = lively()
    x_BCHW = torch.randn(1, 3, *size)
    by_hand_BCHW = nn.functional.pad(x_BCHW, (0, padded[1] - size[1], 0, padded[0] - size[0]))

    native_BKhw = model(x_BCHW, native=True)

    assert model.padded_size(*size) == padded
    assert native_BKhw.shape == (1, 2, *cells)
    assert model(x_BCHW).shape == (1, 2, *size)
    by_hand_BKhw = model.grid(by_hand_BCHW, None)[:, :, : cells[0], : cells[1]]
    torch.testing.assert_close(native_BKhw, by_hand_BKhw, rtol=0, atol=1e-5)


# What it computes


def test_a_far_corner_is_seen_everywhere_from_the_first_stage_on():
    model = lively(decoder_width=64).double()  # 16 channels are all below zero here and there
    x_BCHW = torch.randn(1, 3, 256, 256, dtype=torch.float64)
    other_BCHW = x_BCHW.clone()
    other_BCHW[..., -1, -1] += 1000

    first_BChw, other_BChw = model.encoder(x_BCHW, None)[0], model.encoder(other_BCHW, None)[0]

    assert (first_BChw != other_BChw).any(dim=1).all()
    assert (model.grid(x_BCHW, None) != model.grid(other_BCHW, None)).any(dim=1).all()


@pytest.mark.parametrize(
    "change", [lambda x: x.flip(-1), lambda x: x.roll(32, -1)], ids=["flip", "move"]
)
def test_answers_do_not_just_flip_or_move_with_the_picture(change):
    """Strided convolutions and borders tell left from right, and where a thing is."""
    model = lively()
    x_BCHW = torch.randn(1, 3, 96, 96)
    whole_BKHW = model(x_BCHW)

    assert (model(change(x_BCHW)) - change(whole_BKHW)).abs().max() > 0.01 * whole_BKHW.std()


def test_attention_is_the_textbooks():
    attention = lively().encoder.stages[1].blocks[0].attention.double()
    x_BhwC = torch.randn(2, 8, 12, 16, dtype=torch.float64)
    seen_B11T = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    seen_B11T[1, ..., 4:] = False

    coarse_BTC = attention.reduce(x_BhwC.permute(0, 3, 1, 2)).flatten(2).mT
    key_BTC, value_BTC = attention.key_value(attention.reduce_norm(coarse_BTC)).chunk(2, dim=2)
    query_BQC = attention.query(x_BhwC).flatten(1, 2)
    found = []
    for head in (slice(0, 8), slice(8, 16)):
        scores_BQT = query_BQC[..., head] @ key_BTC[..., head].mT / 8**0.5
        scores_BQT = scores_BQT.masked_fill(~seen_B11T[:, 0], -torch.inf)
        found.append(scores_BQT.softmax(dim=-1) @ value_BTC[..., head])
    expected_BhwC = attention.out(torch.cat(found, dim=2)).view(2, 8, 12, 16)

    torch.testing.assert_close(attention(x_BhwC, seen_B11T), expected_BhwC, rtol=0, atol=1e-12)


def test_the_head_reads_the_coarsest_map_first():
    head = lively().head
    with torch.no_grad():
        head.fuse.weight[:, 16:] = 0  # all but the first map of the concatenation
    maps = [torch.randn(1, c, 32 // 2**i, 32 // 2**i) for i, c in enumerate((8, 16, 24, 32))]
    logits_BKhw = head(maps, None)

    for i in range(3):
        other = [x + 1 if i == j else x for j, x in enumerate(maps)]
        assert torch.equal(head(other, None), logits_BKhw)
    assert not torch.equal(head([*maps[:3], maps[3] + 1], None), logits_BKhw)


# Batch mates and padding


SIZES = [(96, 128), (32, 32), (64, 128), (96, 32), (32, 96)]


def padded_batch(dtype=torch.float64):
    """Pictures at their padded sizes in one batch, zeros outside of each."""
    x_BCHW = torch.zeros(len(SIZES), 3, 96, 128, dtype=dtype)
    for x_CHW, (height, width) in zip(x_BCHW, SIZES, strict=True):
        x_CHW[:, :height, :width] = torch.randn(3, height, width, dtype=dtype)
    return x_BCHW, torch.tensor(SIZES)


@pytest.mark.parametrize("form", ["plain", "folded"])
def test_items_masked_in_one_pass_answer_as_they_do_alone(form):
    model = lively().double()
    model = model.folded() if form == "folded" else model
    x_BCHW, sizes_B2 = padded_batch()

    together_BKhw = model.grid(x_BCHW, sizes_B2)

    for i, (height, width) in enumerate(SIZES):
        alone_1Khw = model.grid(x_BCHW[i : i + 1, :, :height, :width], None)
        found_1Khw = together_BKhw[i : i + 1, :, : height // 4, : width // 4]
        torch.testing.assert_close(found_1Khw, alone_1Khw, rtol=0, atol=1e-9)


def test_without_the_sizes_they_would_not():
    model = lively().double()
    x_BCHW, _ = padded_batch()

    together_BKhw = model.grid(x_BCHW, None)
    alone_1Khw = model.grid(x_BCHW[1:2, :, :32, :32], None)

    assert (together_BKhw[1:2, :, :8, :8] - alone_1Khw).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["plain", "folded"])
def test_an_answer_does_not_depend_on_batch_mates_by_a_single_bit(form):
    model = lively().folded() if form == "folded" else lively()
    x_BCHW, sizes_B2 = (
        torch.randn(4, 3, 61, 70),
        torch.tensor([[61, 70], [9, 70], [40, 1], [33, 50]]),
    )

    together_BKHW = model(x_BCHW, sizes_B2)

    for i, (height, width) in enumerate(sizes_B2.tolist()):
        alone_1KHW = model(x_BCHW[i : i + 1, :, :height, :width])
        assert torch.equal(together_BKHW[i : i + 1, :, :height, :width], alone_1KHW)


# Training


def test_pictures_of_different_sizes_train_together():
    model = lively().train()
    logits_BKHW = model(torch.randn(3, 3, 61, 70), torch.tensor([[61, 70], [9, 70], [33, 50]]))
    (logits_BKHW * torch.randn_like(logits_BKHW)).sum().backward()

    assert [name for name, value in model.named_parameters() if not value.grad.any()] == []
    assert not logits_BKHW[1, :, 9:].any()


def test_later_blocks_leave_out_more_and_only_in_training():
    model = models.build("segformer", **{**TINY, "depths": (1, 2, 1, 1)})
    rates = [block.path.rate for stage in model.encoder.stages for block in stage.blocks]
    path = model.encoder.stages[3].blocks[0].path
    x_BhwC = torch.ones(4000, 1, 2, 3)

    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    kept_B = path(x_BhwC)[:, 0, 0, 0]
    assert torch.equal(path(x_BhwC)[0].unique(), path(x_BhwC)[0, 0, 0, :1])  # whole items
    assert (kept_B == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert kept_B.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(path.eval()(x_BhwC), x_BhwC)


def test_the_head_drops_whole_channels_and_only_in_training():
    model = lively(dropout=0.5)
    x_BCHW = torch.randn(1, 3, 32, 32)

    assert model.head.dropout.p == 0.5
    assert models.build("segformer", **TINY).head.dropout.p == 0.1
    assert torch.equal(model(x_BCHW), model(x_BCHW))
    dropped_BChw = model.head.dropout.train()(torch.ones(1, 64, 4, 4))
    assert dropped_BChw.flatten(2).std(dim=2).max() == 0
    assert (dropped_BChw == 0).any()


def test_it_learns_one_batch_by_heart():
    side = torch.arange(64)
    disc_HW = (side[:, None] - 30) ** 2 + (side - 24) ** 2 < 15**2
    labels_BHW = torch.stack([disc_HW, disc_HW.flip(1)]).long()
    x_BCHW = labels_BHW[:, None] + 0.3 * torch.randn(2, 3, 64, 64)
    model = models.build("segformer", **TINY)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    for _ in range(150):
        loss = nn.functional.cross_entropy(model(x_BCHW), labels_BHW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    hits_BHW = model.eval()(x_BCHW).argmax(1) == labels_BHW
    assert hits_BHW.float().mean() > 0.99


# The folded form (section 4.6)


@pytest.mark.parametrize(("kind", "most"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [(64, 96), (61, 90), (160, 33)])
def test_the_folded_form_answers_the_same(size, kind, most):
    model = lively(classes=5).to(kind)
    x_BCHW = torch.randn(2, 3, *size, dtype=kind)

    plain_BKHW, found_BKHW = model(x_BCHW), model.folded()(x_BCHW)

    assert (plain_BKHW.std(dim=(0, 2, 3)) > 0.05).all()  # else equality would prove nothing
    assert (found_BKHW - plain_BKHW).abs().max() <= most * plain_BKHW.abs().max()
    assert torch.equal(found_BKHW.argmax(1), plain_BKHW.argmax(1))


def test_the_folded_head_answers_at_the_side_of_every_stage():
    folded = lively(classes=5).folded()

    assert count(folded.head) == (8 + 16 + 24 + 32) * 16 + 4 * 16 + 16 * 5 + 5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    norms = [m for m in folded.encoder.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 19
    kept = [norm for norm in norms if (norm.weight != 1).any()]
    assert len(kept) == 8  # patches and ends of stages


def test_the_folded_b0_takes_half_the_operations():
    model = models.build("segformer", classes=150).folded().to("meta")

    with FlopCounterMode(display=False) as operations:
        model.grid(torch.zeros(1, 3, 512, 512, device="meta"), None)

    assert operations.get_total_flops() / 1e9 == pytest.approx(8.2, abs=0.05)


def test_folding_leaves_the_plain_form_as_it_was():
    model = lively()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    folded = model.folded()

    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value.requires_grad for value in model.parameters())
    assert not any(value.requires_grad for value in folded.parameters())
    shared = {value.data_ptr() for value in model.parameters()}
    assert not shared & {value.data_ptr() for value in folded.parameters()}


# Config


@pytest.mark.parametrize("config", [{"variant": "b2"}, TINY, {"widths": (0, 64, 0, 128)}])
def test_a_config_survives_json(config):
    model = on_meta(**config)

    again = on_meta(**json.loads(json.dumps(model.config.to_json())))

    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())


def test_numbers_of_ones_own_replace_those_of_the_variant():
    shape = Config(variant="b1", widths=(0, 0, 40, 0), depths=(1, 0, 0, 0), decoder_width=8).shape

    assert shape.widths == (64, 128, 40, 512)
    assert shape.depths == (1, 2, 2, 2)
    assert shape.decoder_width == 8
    assert Config(variant="b5").shape.depths == (3, 6, 40, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variant": "b6"}, "no variant 'b6'; known: b0, b1"),
        ({"widths": (8, 16, 24, 32)}, "stage 3 has a width of 24, which 5 heads .* try 1 heads or"),
        ({"heads": (1, 2, 5, 0)}, "heads must be 4 numbers of at least 1"),
        ({"depths": (1, 1, 1)}, "depths must be 4 numbers"),
        ({"widths": (-8, 0, 0, 0)}, "widths must be 4 numbers of at least 0"),
        ({"decoder_width": -1}, "decoder_width must be at least 0, it is -1"),
        ({"channels": 0}, "channels must be at least 1, it is 0"),
        ({"drop_path": 1.0}, "drop_path must be from 0 to below 1, it is 1.0"),
        ({"dropout": -0.1}, "dropout must be from 0"),
        ({"classes": 1}, "at least 2, it is 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_reason(config, message):
    with pytest.raises(ValueError, match=message):
        on_meta(**config)
