"""The latent-attention document's demonstration: noise with random labels, then a picture.

`python -m models.training.synthetic [--out PICTURE.png]`

There is nothing to learn from it, and the loss says so: it stays at ln 2 = 0.6931. It is here
because its numbers are known to six digits (MODELS.md section 1.3), and so prove the loop.

Shapes: B batch, C channels, H W picture, h w native grid, K classes.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from torch import Tensor, nn

import models
from models.training.fit import Fit
from models.training.recipes import synthetic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from models.parts.segmenter import Segmenter
    from models.training.batches import Batch

log = logging.getLogger(__name__)

SIDE = 128
PANEL = 256
"""Side of a panel of the picture, in pixels."""
MARGIN = 20
"""Room for a title above it."""
COLORS_KC = np.array([(68, 1, 84), (253, 231, 37)], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Train on noise and paint the last picture of it."""

    out: Path = Path("synthetic.png")
    """Input, ground truth and prediction, side by side."""


class Native(nn.Module):
    """The model as the document trains it: labels are as coarse as its own grid."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits_BKhw."""
        return self.model(x_BCHW, native=True)


def main() -> None:
    """Run as a program."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    asked = tyro.cli(Synthetic, description=__doc__)
    training = begun()
    for moment in training.steps(noise(synthetic().batch)):
        if (moment.step - 1) % 10 == 0:
            log.info("iteration %d loss %.6f", moment.step - 1, moment.loss)
    model = training.settle()
    x_1CHW, labels_1hw = next(noise(1))
    with torch.inference_mode():
        answer_hw = model(x_1CHW)[0].argmax(0)
    painted(x_1CHW[0], labels_1hw[0], answer_hw).save(asked.out)
    log.info("wrote %s", asked.out)


def begun() -> Fit:
    """The training before its first step, the default generator where the document has it."""
    recipe = synthetic()
    torch.manual_seed(recipe.seed)
    tried = models.build("latent_attention")  # the document builds one to look at its answer,
    shape = tuple(tried(torch.randn(2, 3, SIDE, SIDE), native=True).shape)
    log.info("output shape %s", shape)
    return Fit(Native(models.build("latent_attention")), recipe)  # and another to train


def noise(batch: int) -> Iterator[Batch]:
    """Endless pictures and labels that have nothing to do with them."""
    while True:
        x_BCHW = torch.randn(batch, 3, SIDE, SIDE)
        yield x_BCHW, torch.randint(0, 2, (batch, SIDE // 4, SIDE // 4))


def painted(x_CHW: Tensor, labels_hw: Tensor, answer_hw: Tensor) -> Image.Image:
    """Input, ground truth and prediction, side by side."""
    spread_HWC = ((x_CHW - x_CHW.min()) / (x_CHW.max() - x_CHW.min())).permute(1, 2, 0).numpy()
    panels: dict[str, NDArray[np.uint8]] = {
        "input": (255 * spread_HWC).astype(np.uint8),
        "ground truth": COLORS_KC[labels_hw.numpy()],
        "prediction": COLORS_KC[answer_hw.numpy()],
    }
    sheet = Image.new("RGB", (PANEL * len(panels), PANEL + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, pixels_HWC) in enumerate(panels.items()):
        panel = Image.fromarray(pixels_HWC).resize((PANEL, PANEL), Image.Resampling.NEAREST)
        sheet.paste(panel, (i * PANEL, MARGIN))
        draw.text((i * PANEL + PANEL // 2, MARGIN // 2), title, fill="black", anchor="mm")
    return sheet


if __name__ == "__main__":
    main()
