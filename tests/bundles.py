"""Small models: bundles with answers that are not trivial, stand-ins whose rule one can check."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import models
from models.parts.classifier import Classifier
from models.parts.segmenter import Segmenter as Network
from pipeline.config import Compute, SegmentConfig
from pipeline.here import Here
from pipeline.infer import Segmenter
from pipeline.place import Found
from tests.pictures import blobs

TINY = {"variant": "plus", "size": "xs"}
MEAN, STD = (0.2, 0.2, 0.2), (0.25, 0.25, 0.25)
COLOURS = ((0, 0, 0), (255, 170, 0), (0, 90, 255), (120, 120, 120))
NAMES = ("background", "nucleus", "debris", "edge")
ONE_WORKER = Compute(workers=1, fetch_threads=2)
BUDGET = 4 * 160 * 160  # small, so that a fragment makes several batches


def tiny_bundle(
    folder: Path,
    ids: Sequence[int] = (0, 1),
    channels: int = 3,
    seed: int = 42,
    limits: tuple[float, float] | None = None,
) -> Path:
    """Write an untrained latent-attention bundle that finds every class in a picture of blobs."""
    torch.manual_seed(seed)
    model = models.build("latent_attention", **TINY, classes=len(ids), channels=channels).eval()
    _balance(model)
    bundle = models.Bundle(
        architecture="latent_attention",
        config=model.config.to_json(),
        classes=tuple(
            models.ClassInfo(i, name, colour)
            for i, name, colour in zip(ids, NAMES, COLOURS, strict=False)
        ),
        input=models.InputInfo(channels, MEAN[:channels], STD[:channels], limits),
        stride=model.stride,
        receptive_field=model.receptive_field,
        tile=models.TileInfo(160, 32),
        provenance={"script": "tests/bundles.py", "seed": seed},
        metrics={},
    )
    folder.mkdir(parents=True, exist_ok=True)
    models.save_bundle(folder, model, bundle)
    return folder


KINDS = ((3, "dim"), (0, "middling"), (200, "bright"))
"""Ids and names of the classifier: ids are not places among the scores."""
TINY_VIT = {"image": (64, 64), "patch": 8, "width": 16, "depth": 2, "heads": 2}


def tiny_classifier(
    folder: Path,
    resize: tuple[int, int] | None = None,
    tile: int = 160,
    seed: int = 49,  # untrained, so a matter of luck: with this one every kind occurs
    channels: int = 3,
) -> Path:
    """Write an untrained bundle that finds every kind among pictures of blobs."""
    torch.manual_seed(seed)
    model = models.build("vit_classifier", **TINY_VIT, classes=3, channels=channels).eval()
    _even_out(model)
    bundle = models.Bundle(
        architecture="vit_classifier",
        task="classify",
        config=model.config.to_json(),
        classes=tuple(
            models.ClassInfo(i, name, colour)
            for (i, name), colour in zip(KINDS, COLOURS, strict=False)
        ),
        input=models.InputInfo(channels, MEAN[:channels], STD[:channels], resize=resize),
        stride=model.stride,
        receptive_field=model.receptive_field,
        tile=models.TileInfo(tile, 0),
        provenance={"script": "tests/bundles.py", "seed": seed},
        metrics={},
    )
    models.save_bundle(folder, model, bundle)
    return folder


@torch.no_grad()
def _even_out(model: Classifier) -> None:
    """Stretch and shift the last layer until pictures of blobs are of different kinds."""
    pictures = [blobs(32 + 8 * n, 96 - 8 * n, seed=n).astype(np.float32) / 255 for n in range(8)]
    logits = [
        model((torch.from_numpy(p).permute(2, 0, 1)[None, : model.channels] - 0.2) / 0.25)
        for p in pictures
    ]
    logits_NK = torch.cat(logits)
    spread_K = logits_NK.std(0)
    model.head.weight /= spread_K[:, None]
    model.head.bias.copy_((model.head.bias - logits_NK.mean(0)) / spread_K)


def files_of(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "model.json").read_bytes(), (folder / "weights.safetensors").read_bytes()


@torch.no_grad()
def _balance(model: nn.Module) -> None:
    """Move the bias until no class wins everywhere: an untrained head prefers one by chance."""
    picture_HWC = blobs(96, 128, seed=7).astype(np.float32) / 255
    x_BCHW = (torch.from_numpy(picture_HWC).permute(2, 0, 1)[None] - 0.2) / 0.25
    logits_KN = model(x_BCHW[:, : model.channels], native=True)[0].flatten(1)
    model.expert_seg.segmentation_head.bias -= logits_KN.median(dim=1).values


# --------------------------------------------------------------- a stand-in with a finite window


class Window(Network):
    """Two 3 x 3 means on cells of 4 pixels, scored by brightness: the answer of a cell depends on
    the 5 x 5 cells around it and on nothing else."""

    stride, min_side, channels, classes = 4, 4, 3, 2
    receptive_field, partial_cells = 20, False

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        gray_B1hw = nn.functional.avg_pool2d(x_BCHW.mean(1, keepdim=True), 4)
        for _ in range(2):
            gray_B1hw = nn.functional.avg_pool2d(gray_B1hw, 3, stride=1, padding=1)
        return torch.cat([-gray_B1hw, gray_B1hw], dim=1)


class Brightness(Classifier):
    """A picture is as probable of a kind as its mean value is near to the kind's: 0.2, 0.5, 0.8."""

    stride, min_side, channels, classes = 1, 1, 3, 3
    means_K = torch.tensor([0.2, 0.5, 0.8])

    def scores(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        mean_B = (x_BCHW * STD[0] + MEAN[0]).mean((1, 2, 3))
        return -100 * (mean_B[:, None] - self.means_K).square()


def brightness_segmenter(bundle: tuple[bytes, bytes]) -> Segmenter:
    """A classifier's bundle with the stand-in instead of its network."""
    segmenter = Segmenter(*bundle, "cpu")
    segmenter.model = Brightness().eval()
    return segmenter


def window_segmenter(bundle: tuple[bytes, bytes]) -> Segmenter:
    """The bundle's classes and normalisation with the stand-in instead of its network."""
    segmenter = Segmenter(*bundle, "cpu")
    segmenter.model = Window().eval()
    return segmenter


class InProcess(Here):
    """This process without the probe: the same budget in every test."""

    def __init__(self, segmenter: Segmenter | None = None, compute: Compute = ONE_WORKER) -> None:
        super().__init__(compute)
        self._segmenter = segmenter

    def found(self, bundle: tuple[bytes, bytes], images: int, config: SegmentConfig) -> Found:
        made = self._segmenter = self._segmenter or Segmenter.of(bundle, config)
        return made.found(BUDGET)


class NoProbe(InProcess):
    """Loads each model once for all runs of this process: only where many small runs follow."""

    _loaded: ClassVar[dict[bytes, Segmenter | None]] = {}

    def found(self, bundle: tuple[bytes, bytes], images: int, config: SegmentConfig) -> Found:
        self._segmenter = self._loaded.get(bundle[0])
        answer = super().found(bundle, images, config)
        self._loaded[bundle[0]] = self._segmenter
        return answer
