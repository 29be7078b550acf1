"""Small models as others bring them, made here: checkpoint folders, ONNX files, modules."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import models
from tests.pictures import blobs

NAMES = ("ground", "nucleus", "debris")
MEAN, STD = (0.2, 0.2, 0.2), (0.25, 0.25, 0.25)


# ---------------------------------------------------------------------------------- transformers


def about(family: str) -> Any:
    """The config of a tiny net of 3 classes."""
    import transformers as t

    vit: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 16, "image_size": 64, "patch_size": 16,
    }  # fmt: skip
    four = ["stage1", "stage2", "stage3", "stage4"]
    upernet: dict[str, Any] = {"hidden_size": 16, "pool_scales": [1, 2], "auxiliary_channels": 8}
    made = {
        "segformer": lambda: t.SegformerConfig(
            depths=[1] * 4, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2],
            decoder_hidden_size=16,
        ),
        "beit": lambda: t.BeitConfig(
            **vit, out_indices=[1, 2, 3, 4], pool_scales=[1, 2], use_relative_position_bias=True
        ),
        "data2vec": lambda: t.Data2VecVisionConfig(
            **vit, out_indices=[1, 2, 3, 4], pool_scales=[1, 2]
        ),
        "dpt": lambda: t.DPTConfig(
            **vit, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4,
            fusion_hidden_size=8,
        ),
        "mobilenet_v2": lambda: t.MobileNetV2Config(depth_multiplier=0.25, output_stride=8),
        "mobilevit": lambda: t.MobileViTConfig(
            hidden_sizes=[16] * 3, neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
            num_attention_heads=2, output_stride=16, aspp_out_channels=8, atrous_rates=[2, 3, 4],
        ),
        "mobilevitv2": lambda: t.MobileViTV2Config(
            width_multiplier=0.25, aspp_out_channels=8, output_stride=16
        ),
        "upernet-convnext": lambda: t.UperNetConfig(
            **upernet, auxiliary_in_channels=16, backbone_config=t.ConvNextConfig(
                hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=four
            ),
        ),
        "upernet-swin": lambda: t.UperNetConfig(
            **upernet, auxiliary_in_channels=32, backbone_config=t.SwinConfig(
                embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, image_size=64,
                out_features=four,
            ),
        ),
    }[family]()  # fmt: skip
    made.id2label = dict(enumerate(NAMES))
    made.label2id = {name: i for i, name in enumerate(NAMES)}
    return made


FAMILIES = (
    "segformer", "beit", "data2vec", "dpt", "mobilenet_v2", "mobilevit", "mobilevitv2",
    "upernet-convnext", "upernet-swin",
)  # fmt: skip


def net_of(family: str) -> Any:
    """A net with weights as after a training: nothing is at its neutral value."""
    import transformers

    config = about(family)
    net = transformers.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING[type(config)](config).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.normal_(0, 1.5 * fan_in**-0.5)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.add_(1)
    return net


def checkpoint(
    folder: Path, family: str = "segformer", processor: Mapping[str, Any] | None = None, **how: Any
) -> Path:
    """A folder as `save_pretrained` writes it, with a processor's JSON if one is given."""
    save(net_of(family), folder, **how)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save(net: Any, folder: Path, **how: Any) -> None:
    """`save_pretrained` without its progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    net.save_pretrained(folder, **how)


def balanced_checkpoint(folder: Path) -> Path:
    """A SegFormer that finds every class in a picture of blobs."""
    net = net_of("segformer")
    picture_HWC = blobs(96, 128, seed=7).astype(np.float32) / 255
    x_1CHW = (torch.from_numpy(picture_HWC).permute(2, 0, 1)[None] - 0.2) / 0.25
    with torch.no_grad():
        logits_KN = net(x_1CHW).logits[0].flatten(1)
        net.decode_head.classifier.bias -= logits_KN.median(dim=1).values
    save(net, folder)
    processor = {"image_mean": MEAN, "image_std": STD, "size": {"height": 160, "width": 160}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


# ------------------------------------------------------------------------------------------ ONNX


def graph(
    batch: int | str = "n",
    size: tuple[int | str, int | str] = ("h", "w"),
    channels: int = 3,
    reshaped: tuple[int, ...] | None = None,
    **metadata: Any,
) -> onnx.ModelProto:
    """A 5 x 5 convolution of stride 4, and what the file says of itself.

    Args:
        batch: fixed, or a name.
        size: the same of height and width.
        channels: what it reads.
        reshaped: a shape that its answers are forced into.
        **metadata: keys without their prefix, values before they become JSON.
    """
    kernel = np.random.default_rng(5).normal(size=(3, channels, 5, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "kernel", "bias"], ["y"], strides=[4, 4], pads=[2, 2, 1, 1])
    ]
    weights = [
        numpy_helper.from_array(kernel, "kernel"),
        numpy_helper.from_array(np.array([0.1, 0.0, -0.1], np.float32), "bias"),
    ]
    if reshaped is not None:
        weights.append(numpy_helper.from_array(np.array(reshaped, np.int64), "shape"))
        nodes.append(helper.make_node("Reshape", ["y", "shape"], ["z"]))
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, channels, *size])],
            [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, [None] * 4)],
            weights,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
        producer_name="a test",
    )
    values = {f"maskfleet.{name}": json.dumps(value) for name, value in metadata.items()}
    helper.set_model_props(made, values)
    return made


def onnx_file(path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(graph(**options).SerializeToString())
    return path


def by_hand(x_BCHW: torch.Tensor) -> torch.Tensor:
    """What `graph` computes, by torch."""
    kernel, bias = (
        numpy_helper.to_array(w) for w in graph(channels=x_BCHW.shape[1]).graph.initializer
    )
    padded_BCHW = nn.functional.pad(x_BCHW, (2, 1, 2, 1))
    return nn.functional.conv2d(
        padded_BCHW, torch.from_numpy(kernel.copy()), torch.from_numpy(bias.copy()), stride=4
    )


# --------------------------------------------------------------------------------------- modules

MODULE = """
from dataclasses import dataclass

from torch import nn

from models.parts.configs import ModelConfig
from models.parts.segmenter import Segmenter


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    width: int = 4


class Net(Segmenter):
    stride, multiple, receptive_field = 4, 4, 4

    def __init__(self, config):
        super().__init__()
        self.config, self.channels, self.classes = config, config.channels, config.classes
        self.body = nn.Conv2d(config.channels, config.width, 4, stride=4)
        self.head = nn.Conv2d(config.width, config.classes, 1)

    def grid(self, x_BCHW, sizes_B2):
        return self.head(self.body(x_BCHW).relu())


def build(config):
    return Net(config)
"""


def module(folder: Path, text: str = MODULE) -> str:
    """Write `acme.nets.unet` below the folder; its dotted name. An earlier one is forgotten."""
    for each in [each for each in sys.modules if each.split(".")[0] == "acme"]:
        del sys.modules[each]
    package = folder / "acme" / "nets"
    package.mkdir(parents=True)
    (folder / "acme" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "unet.py").write_text(text)
    return "acme.nets.unet"


def module_bundle(folder: Path, name: str) -> Path:
    """A bundle of that module's net, which finds every class; the module must be importable."""
    torch.manual_seed(11)
    model = models.build(name, classes=3).eval()
    picture_HWC = blobs(96, 128, seed=7).astype(np.float32) / 255
    x_1CHW = (torch.from_numpy(picture_HWC).permute(2, 0, 1)[None] - 0.2) / 0.25
    with torch.no_grad():
        logits_KN = model(x_1CHW, native=True)[0].flatten(1)
        model.head.bias -= logits_KN.median(dim=1).values
    card = models.Bundle(
        architecture=name,
        config=model.config.to_json(),
        classes=tuple(models.ClassInfo(i, each, (i, i, i)) for i, each in enumerate(NAMES)),
        input=models.InputInfo(3, MEAN, STD),
        stride=model.stride,
        receptive_field=model.receptive_field,
        tile=models.TileInfo(64, 16),
        provenance={},
        metrics={},
    )
    models.save_bundle(folder, model, card)
    return folder
