"""Every listed model keeps the contract."""

import models
from tests.models.contract import ClassifierContract, NetworkContract, SegmenterContract

SMALL_VIT = {"image": [16, 24], "patch": 4, "width": 24, "depth": 2, "heads": 3}


class TestSeed(SegmenterContract):
    name = "latent_attention"
    variant = "seed"
    scale = 1.5
    unfelt = ("key_proj.bias",)
    steps, rate = 1000, 1e-3  # its experts begin as copies of each other (MODELS.md section 1.4)


class TestPlus(SegmenterContract):
    name = "latent_attention"
    variant = "plus"
    config = {"variant": "plus", "size": "xs"}  # noqa: RUF012
    unfelt = ("key_proj.bias",)


class TestDepictSa(SegmenterContract):
    positions_by_item = True
    name = "depict"
    variant = "sa"
    config = {**SMALL_VIT, "dim_head_sa": 8}  # noqa: RUF012


class TestDepictCa(SegmenterContract):
    positions_by_item = True
    name = "depict"
    variant = "ca"
    config = {**SMALL_VIT, "mode": "ca", "dim_head_sa": 8, "dim_head_ca": 8}  # noqa: RUF012


class TestSegFormer(SegmenterContract):
    name = "segformer"
    config = {  # noqa: RUF012
        "widths": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "heads": [1, 2, 3, 4],
        "decoder_width": 16,
    }
    steps = 400  # dropout and dropped blocks slow it down


class TestSegNet(SegmenterContract):
    name = "segnet"
    config = {"widths": [8, 16], "depths": [2, 1]}  # noqa: RUF012


class TestSegNetSeparable(SegmenterContract):
    name = "segnet"
    variant = "separable"
    config = {"widths": [8, 16], "depths": [2, 1], "separable": True}  # noqa: RUF012


class TestViTClassifier(ClassifierContract):
    scale = 2.0
    positions_by_item = True
    name = "vit_classifier"
    config = {**SMALL_VIT, "mlp_ratio": 1.5}  # noqa: RUF012


class TestViTSegmenter(SegmenterContract):
    positions_by_item = True
    name = "vit_segmenter"
    config = SMALL_VIT


def test_every_listed_model_has_a_contract():
    kinds = [*SegmenterContract.__subclasses__(), *ClassifierContract.__subclasses__()]

    assert {kind.name for kind in kinds} == set(models.names())
    assert all(issubclass(kind, NetworkContract) for kind in kinds)
