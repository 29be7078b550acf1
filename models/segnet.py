"""SegNet: convolutions and maxima down, and up again to the very pixels where the maxima lay.

Source: the CNN baseline of the ViT segmenter's article series (MODELS.md section 6), after
Badrinarayanan et al. 2017. `separable` is its twin with a ninth of the multiplications.

Unusual: nothing is stretched. Every maximum remembers its pixel, and the way up puts values back
there, zeros elsewhere: scores are at full resolution, for any size from 16 pixels on. Where a side
is odd its last row is in no maximum; on the way up it begins as zeros. The pixels themselves are
normalised by a batch norm. As published, a ReLU ended the net, so that no score could be negative;
`final_activation` brings it back.

Two things follow from the maxima. Where the two greatest values of a cell differ by rounding only,
another form or another machine may choose the other pixel, and answers change there. And an answer
depends on where the cells begin: it sees 99 pixels to every side (by default), but a part of a
picture answers like the whole only if it begins at multiples of 16.

Shapes: B batch, C channels, K classes, H W grid of a level (1, 1/2, 1/4 and 1/8), h w half of it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, max_unpool2d, relu

from models.parts.about import About
from models.parts.configs import ModelConfig
from models.parts.conv3x3 import faster
from models.parts.folding import fused_conv, norm_as_scale
from models.parts.padding import cleared
from models.parts.segmenter import Segmenter

ABOUT = About(
    paper="SegNet, Badrinarayanan et al. 2017, arXiv 1511.00561",
    good_for="a plain baseline with exact edges, at full resolution and at its price",
    licence="idea free; no code or weights of others",
    variants={
        "full": {"classes": 3},
        "separable": {"classes": 3, "separable": True},
        "as published": {"classes": 3, "final_activation": True},
    },
)


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """The baseline; the defaults are the article's."""

    separable: bool = False
    """Depthwise and pointwise convolutions instead of full ones."""
    final_activation: bool = False
    """End with a ReLU as the article's net does: no score below zero."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of the levels, full resolution first."""
    depths: tuple[int, ...] = (2, 2, 3, 3)
    """Convolutions of the levels, as many down as up."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be numbers of at least 1, they are {values}")
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"widths {self.widths} are {len(self.widths)} levels, depths {self.depths} are "
                f"{len(self.depths)}; give one number of each for every level"
            )
        if self.channels < 1:
            raise ValueError(f"channels must be at least 1, it is {self.channels}")
        if self.classes < 2:
            raise ValueError(
                f"classes must be at least 2, it is {self.classes}; "
                "for one kind of object count the background as a class"
            )


def build(config: Config) -> Segmenter:
    """The net of this config, freshly initialised from torch's default generator."""
    return SegNet(config)


class SegNet(Segmenter):
    """The net to train."""

    stride = 1
    # Finite in truth, but tiles begin at any multiple of stride and multiple, and only those that
    # begin where the cells of the whole picture do can be relied on to answer like it.
    receptive_field = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.classes = config.channels, config.classes
        self.min_side = 2 ** len(config.widths)
        self.norm = nn.BatchNorm2d(config.channels)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKHW."""
        x_BCHW = cleared(self.norm(x_BCHW), sizes_B2)
        return self.decoder(*self.encoder(x_BCHW, sizes_B2))

    def folded(self) -> Segmenter:
        """See `Network.folded`."""
        return FoldedSegNet(self)


class Maxima(NamedTuple):
    """Where the maxima of a level lay."""

    place_BChw: Tensor
    """Which pixel, row by row."""
    side: torch.Size
    """Height and width of the level."""
    sizes_B2: Tensor | None
    """Those of every item on it."""


class Encoder(nn.Module):
    """Down: convolutions, then the greatest of 2 x 2."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        before = (config.channels, *config.widths)
        self.levels = nn.ModuleList(
            Level([before[i], *[before[i + 1]] * depth], separable=config.separable)
            for i, depth in enumerate(config.depths)
        )

    def forward(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> tuple[Tensor, list[Maxima]]:
        """The coarsest map, and how to come back from it."""
        maxima = []
        for level in self.levels:
            x_BCHW = level(x_BCHW, sizes_B2)
            x_BChw, place_BChw = max_pool2d(x_BCHW, 2, return_indices=True)
            maxima.append(Maxima(place_BChw, x_BCHW.shape[-2:], sizes_B2))
            sizes_B2 = None if sizes_B2 is None else sizes_B2 // 2
            x_BCHW = cleared(x_BChw, sizes_B2)
        return x_BCHW, maxima


class Decoder(nn.Module):
    """Up: values back to where the maxima lay, then convolutions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        first, depth = config.widths[0], config.depths[0]
        levels = [
            Level([*[wide] * more, narrow], separable=config.separable)
            for (narrow, wide), more in zip(pairwise(config.widths), config.depths[1:], strict=True)
        ]
        top = Level([first] * depth, separable=config.separable)
        self.levels = nn.ModuleList([*levels[::-1], top])
        self.head = convolution(first, config.classes, separable=config.separable)
        self.final_activation = config.final_activation

    def forward(self, x_BChw: Tensor, maxima: list[Maxima]) -> Tensor:
        """logits_BKHW."""
        for level, (place_BChw, side, sizes_B2) in zip(self.levels, maxima[::-1], strict=True):
            x_BCHW = max_unpool2d(x_BChw, place_BChw, (2, 2), output_size=side)
            x_BChw = level(x_BCHW, sizes_B2)
        logits_BKHW = self.head(x_BChw)
        return relu(logits_BKHW) if self.final_activation else logits_BKHW


class Level(nn.ModuleList):
    """Convolutions on one grid, each with a batch norm and a ReLU."""

    def __init__(self, widths: list[int], *, separable: bool) -> None:
        super().__init__(convolution(a, b, separable=separable) for a, b in pairwise(widths))

    def forward(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """The same grid; zero outside of the items if what came in was."""
        for layer in self:
            x_BCHW = cleared(relu(layer(x_BCHW), inplace=True), sizes_B2)
        return x_BCHW


def convolution(before: int, after: int, *, separable: bool) -> nn.Sequential:
    """A 3 x 3 convolution, in one or in two steps, and a batch norm."""
    window = nn.Conv2d(
        before,
        before if separable else after,
        kernel_size=3,
        padding=1,
        groups=before if separable else 1,
        bias=False,
    )
    point = [nn.Conv2d(before, after, 1, bias=False)] if separable else []
    return nn.Sequential(window, *point, nn.BatchNorm2d(after))


# ------------------------------------------------------------------------------------- folded form


class FoldedSegNet(Segmenter):
    """The net for inference: convolutions do the work of the batch norms behind them.

    On a CPU those of many channels take a quarter of the multiplications (models/parts/conv3x3.py).
    The first norm stays, as a product and a sum per pixel. Within the first convolution it would
    ask for a border in the mean colour, and writing that border costs as much.
    """

    stride, receptive_field = SegNet.stride, SegNet.receptive_field
    captures = True
    scale_C11: Tensor
    shift_C11: Tensor

    @torch.no_grad()
    def __init__(self, plain: SegNet) -> None:
        super().__init__()
        plain = deepcopy(plain)  # what is changed and frozen here stays as it is there
        self.config, self.channels, self.classes = plain.config, plain.channels, plain.classes
        self.min_side = plain.min_side
        scale_C, shift_C = norm_as_scale(plain.norm)
        self.register_buffer("scale_C11", scale_C[:, None, None].clone(), persistent=False)
        self.register_buffer("shift_C11", shift_C[:, None, None].clone(), persistent=False)
        self.encoder, self.decoder = plain.encoder, plain.decoder
        for level in (*self.encoder.levels, *self.decoder.levels):
            for i, layer in enumerate(cast("Level", level)):
                cast("Level", level)[i] = _without_norm(layer)
        self.decoder.head = _without_norm(self.decoder.head)
        self.eval().requires_grad_(requires_grad=False)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKHW."""
        x_BCHW = cleared(torch.addcmul(self.shift_C11, x_BCHW, self.scale_C11), sizes_B2)
        return self.decoder(*self.encoder(x_BCHW, sizes_B2))


def _without_norm(layer: nn.Module) -> nn.Sequential:
    *window, conv, norm = cast("nn.Sequential", layer)
    fused = fused_conv(cast("nn.Conv2d", conv), cast("nn.BatchNorm2d", norm))
    return nn.Sequential(*window, faster(fused))
