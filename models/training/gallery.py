"""A picture per model: what a small one says of a picture that ships, after a short training.

`python -m models.training.gallery --data PATH/TO/nuclei --out docs/models`

Minutes, not hours: the pictures show that a model trains and what its answers look like (blocks,
soft edges, fine detail), not how good it can become.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw

import models
from models.training.demo import Demo, crops, labelled, normalised, recipe_of
from models.training.fit import fit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from models.training.batches import Batch

log = logging.getLogger(__name__)

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "loose" / "fluorescence-small.png"
CROP = 128
SMALL: dict[str, dict[str, models.Json]] = {
    "depict": {"width": 96, "depth": 4, "heads": 3, "image": [CROP, CROP], "patch": 8},
    "latent_attention": {"variant": "plus", "size": "s"},
    "segformer": {"variant": "b0"},
    "segnet": {"separable": True, "widths": [32, 64, 96, 128]},
    "vit_classifier": {"width": 96, "depth": 4, "heads": 3, "image": [CROP, CROP], "patch": 16},
    "vit_segmenter": {"width": 96, "depth": 4, "heads": 3, "image": [CROP, CROP], "patch": 8},
}
"""Configs that learn something in a few hundred steps on one core."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Train every model for a moment and paint its answer."""

    data: Path
    """The nuclei folder."""
    out: Path = Path("docs/models")
    """Where the pictures go."""
    names: tuple[str, ...] = ()
    """Which models; all by default."""
    steps: int = 150
    """Batches of 8 crops each."""


def main() -> None:
    """Run as a program."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    asked = tyro.cli(Gallery, description=__doc__)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.names or models.names():
        paint(name, asked)


def paint(name: str, asked: Gallery) -> None:
    """Train one model and save what it says."""
    torch.manual_seed(7)
    model = models.build(name, classes=2, **SMALL[name])
    recipe = recipe_of(Demo(asked.data, steps=asked.steps, learning_rate=1e-3), CROP)
    batches = crops(labelled(asked.data, "train"), recipe)
    began = time.perf_counter()
    classifying = model.task == "classify"
    history = fit(model, kinds(batches) if classifying else batches, recipe)
    with Image.open(PICTURE) as picture:
        pixels_HWC = np.array(picture.convert("RGB"))
    x_1CHW = normalised(torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None] / 255)
    with torch.inference_mode():
        answer = model(x_1CHW)[0]
    sheet = named(pixels_HWC, answer) if classifying else masked(pixels_HWC, answer)
    sheet.save(asked.out / f"{name}.png", optimize=True)
    seconds = time.perf_counter() - began
    count = sum(value.numel() for value in model.parameters())
    log.info("%s: %d parameters, loss %.3f, %.0f s", name, count, history[-1].loss, seconds)


def kinds(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Crops with one label each: whether more than a tenth of it is nuclei."""
    for x_BCHW, labels_BHW in batches:
        yield x_BCHW, ((labels_BHW == 1).float().mean((1, 2)) > 0.1).long()


def masked(pixels_HWC: np.ndarray, logits_KHW: Tensor) -> Image.Image:
    """Picture, how sure the model is of nuclei, and its mask, side by side."""
    share_HW = logits_KHW.softmax(0)[1].numpy()
    mask_HW = logits_KHW.argmax(0).numpy() == 1
    grays = [(255 * share_HW).astype(np.uint8), (255 * mask_HW).astype(np.uint8)]
    panels = [pixels_HWC, *(np.repeat(gray_HW[..., None], 3, 2) for gray_HW in grays)]
    return Image.fromarray(np.concatenate(panels, 1))


def named(pixels_HWC: np.ndarray, logits_K: Tensor) -> Image.Image:
    """The picture with its class written into it."""
    image = Image.fromarray(pixels_HWC)
    share_K = logits_K.softmax(0)
    best = int(share_K.argmax())
    word = ("few nuclei", "many nuclei")[best]
    ImageDraw.Draw(image).text((6, 6), f"{word} {100 * share_K[best]:.0f} %", fill=(255, 170, 0))
    return image


if __name__ == "__main__":
    main()
