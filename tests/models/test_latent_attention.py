"""The latent-expert segmenter: the tutorial's numbers, and what production asks on top."""

import pytest
import torch
from torch import nn

import models
from models import latent_attention
from models.latent_attention import Config, FoldedStem
from models.parts import kernels

PLUS = {"variant": "plus", "size": "xs"}
VARIANTS = pytest.mark.parametrize("config", [{}, PLUS], ids=["seed", "plus"])


def lively(config):
    """A net whose scores differ from pixel to pixel; as initialised, the seed's do not."""
    model = models.build("latent_attention", **config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.9 if model.config.variant == "seed" else 1.3)
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
def test_the_seed_answers_every_size_from_four_pixels_on(size, cells):
    model = models.build("latent_attention").eval()

    assert model.native_size(*size) == cells
    assert model(torch.randn(1, 3, *size), native=True).shape == (1, 2, *cells)
    assert model(torch.randn(1, 3, *size)).shape == (1, 2, *size)


def test_the_seed_refuses_a_picture_of_three_pixels():
    with pytest.raises(ValueError, match=r"a picture of 3 x 9: sides must be at least 4"):
        models.build("latent_attention")(torch.zeros(1, 3, 3, 9))


def test_plus_answers_a_single_pixel():
    model = lively(PLUS)

    assert model.padded_size(1, 1) == (16, 16)
    assert model(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_the_interior_of_a_constant_picture_is_one_score():
    model = lively({})
    logits_KhwInside = model(torch.full((1, 3, 96, 96), 0.7), native=True)[0, :, 4:-4, 4:-4]

    assert torch.equal(logits_KhwInside, logits_KhwInside[:, :1, :1].expand_as(logits_KhwInside))


STRIPPED = [(4, 4), (5, 7), (64, 48), (133, 499), (376, 500), (701, 333), (130, 2050), (9, 40000)]


@pytest.mark.parametrize("size", STRIPPED)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_folded_stem_in_strips_is_the_plain_one_up_to_rounding(size, batch):
    stem = lively({}).encoder
    x_BCHW = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    exact_BFhw = stem.double()(x_BCHW.double(), None).detach().float()
    stem.float()
    with torch.inference_mode():
        folded_BFhw = FoldedStem(stem)(x_BCHW, None)
        torch.testing.assert_close(folded_BFhw, exact_BFhw, rtol=0, atol=1e-5)
        sizes_B2 = torch.tensor([size, (4, 4)])[:batch]
        assert torch.equal(FoldedStem(stem)(x_BCHW, sizes_B2), stem(x_BCHW, sizes_B2))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("compiled", [True, False])
@torch.inference_mode()
def test_the_folded_stem_joins_strips_of_a_few_rows(batch, compiled, monkeypatch):
    monkeypatch.setattr(latent_attention, "STEM_STRIP", 1)
    if not compiled:
        monkeypatch.setattr(kernels, "LIBRARY", None)
    stem = lively({}).encoder
    for height in range(4, 36):
        x_BCHW = torch.randn(batch, 3, height, 9)
        torch.testing.assert_close(
            FoldedStem(stem)(x_BCHW, None), stem(x_BCHW, None), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("size", STRIPPED[:4])  # a minute for larger ones where no core has bf16
def test_the_folded_stem_in_half_precision_is_the_plain_one_bit_for_bit(size):
    stem = lively({}).encoder.bfloat16()
    x_BCHW = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).bfloat16()
    sizes_B2 = torch.tensor([size, (4, 4)])
    with torch.inference_mode():
        for batch in (1, 2):
            for given in ((x_BCHW[:batch], None), (x_BCHW[:batch], sizes_B2[:batch])):
                assert torch.equal(FoldedStem(stem)(*given), stem(*given))


@pytest.mark.parametrize("size", ["xs", "s", "m", "l"])
def test_plus_grows_with_its_size(size):
    counts = {"xs": 71_171, "s": 370_683, "m": 948_323, "l": 5_400_843}

    with torch.device("meta"):
        model = models.build("latent_attention", variant="plus", size=size, classes=11)

    assert sum(value.numel() for value in model.parameters()) == counts[size]


# Experts and tokens


@VARIANTS
def test_the_order_of_the_experts_does_not_matter(config):
    model = lively(config)
    x_BCHW = torch.randn(1, 3, 48, 48)
    before_BKHW = model(x_BCHW)

    with torch.no_grad():
        latents_MD = model.latent_attn.latents
        latents_MD.copy_(latents_MD.flip(0))

    torch.testing.assert_close(model(x_BCHW), before_BKHW, rtol=0, atol=1e-5)


@VARIANTS
def test_the_order_of_the_tokens_matters_to_no_expert(config):
    model = lively(config)
    x_BTF = torch.randn(2, 60, model.latent_attn.key_proj.in_features)

    shuffled_BMD = model.latent_attn(x_BTF[:, torch.randperm(60)], None)

    torch.testing.assert_close(shuffled_BMD, model.latent_attn(x_BTF, None), rtol=0, atol=2e-5)


@VARIANTS
def test_pixels_ask_each_for_itself(config):
    model = lively(config)
    attention = model.expert_seg.attention
    width = attention.out_proj.in_features
    features = width if model.config.variant == "plus" else model.config.features
    x_BTF, experts_BMD = torch.randn(2, 60, features), torch.randn(2, 8, width)
    order_T = torch.randperm(60)

    logits_BTK = model.expert_seg(x_BTF, experts_BMD)

    shuffled_BTK = model.expert_seg(x_BTF[:, order_T], experts_BMD)
    torch.testing.assert_close(shuffled_BTK, logits_BTK[:, order_T], rtol=0, atol=2e-5)


@VARIANTS
def test_seeing_everything_twice_tells_the_experts_nothing(config):
    model = lively(config)
    x_BTF = torch.randn(2, 60, model.latent_attn.key_proj.in_features)

    twice_BMD = model.latent_attn(x_BTF.repeat(1, 2, 1), None)

    torch.testing.assert_close(twice_BMD, model.latent_attn(x_BTF, None), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("config", "read", "ask"),
    [({}, (4, 16, 8, 12), (4, 16, 8, 12)), (PLUS, (2, 8, 2, 3), (2, 8, 8, 12))],
)
def test_attention_maps_are_shares_and_skip_the_padding(config, read, ask):
    model = lively(config)
    maps = model.attention_maps(torch.randn(2, 3, 32, 48), torch.tensor([[32, 48], [16, 32]]))

    assert maps.experts_BEMhw.shape == (2, *read)
    assert maps.pixels_BEMhw.shape == (2, *ask)
    torch.testing.assert_close(maps.experts_BEMhw.sum((3, 4)), torch.ones(2, *read[:2]))
    torch.testing.assert_close(maps.pixels_BEMhw.sum(2), torch.ones(2, ask[0], *ask[2:]))
    assert not maps.experts_BEMhw[1, :, :, read[2] // 2 :].any()
    assert not maps.experts_BEMhw[1, :, :, :, read[3] * 2 // 3 :].any()


def test_the_experts_of_plus_begin_apart():
    x_BCHW = torch.randn(1, 3, 128, 128)
    seed, plus = (models.build("latent_attention", **config) for config in ({}, PLUS))

    collapsed = seed.latent_attn(seed.encoder(x_BCHW, None).flatten(2).mT, None)
    tokens_BTF = plus.coarse_norm(plus.encoder(x_BCHW, None)[-1].flatten(2).mT)
    apart = plus.latent_attn(tokens_BTF, None)

    assert collapsed.std(dim=1).mean() < 1e-3  # what keeps it from learning
    assert apart.std(dim=1).mean() > 30 * collapsed.std(dim=1).mean()


# Config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latent_dim": 64, "heads": 5}, "latent_dim 64 .* heads 5"),
        ({"classes": 1}, "at least 2, it is 1"),
        ({"variant": "plu"}, "did you mean 'plus'"),
        ({"variant": "plus", "size": "xl"}, "plus has no size 'xl'"),
        ({"variant": "plus", "features": 32}, "features 32 does not belong to variant 'plus'"),
        ({"size": "m"}, "size 'm' does not belong to variant 'seed'"),
        ({"features": 0}, "features must be at least 1"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"heads": "4"}, "heads must be int as in 4, it is '4'"),
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
