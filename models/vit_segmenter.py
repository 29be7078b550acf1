"""A plain vision transformer that paints: every token becomes the scores of its patch of pixels.

Source: D. Matani and N. Singh, part 4 of their series on segmentation (2023) with its notebook in
dhruvbird/ml-notebooks (MODELS.md section 2); the transformer is that of Dosovitskiy et al. (2021)
without class token and without a norm at the end.

Unusual: a batch norm on raw pixels is the only normalisation of the input, so a bundle of this
model says mean 0 and std 1. The zeros that pad a picture to whole patches are then black pixels,
not mean ones; as for all models, the answer with that padding is the definition. Positions start
from N(0, 1), not 0.02. Attention drops shares, the small nets drop only their answers. One linear
layer paints a whole patch, so early in training the edges of patches show; `refine` is our own
remedy, off by default.

As trained by its authors: 128 x 128, batch 64, 50 epochs of Adam at 4e-4, times 0.8 every 12
epochs, flips and contrast jitter only (their text says colour jitter). The batch norm learns its
statistics from whole batches; to fine-tune with one picture at a time set `frozen_statistics`.

Shapes: B batch, C input channels, H W input, h w grid of patches, T = h w tokens, D width,
K classes, P side of a patch, V values of a patch; cells_B2 sizes on the grid of patches.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from models.parts.about import About
from models.parts.folding import norm_as_scale
from models.parts.padding import cleared
from models.parts.patches import (
    Interpolation,
    PositionTable,
    as_convolution,
    cut,
    grid_of,
    pasted,
    readable,
)
from models.parts.segmenter import Segmenter
from models.parts.transformer import Block, Blocks, Mlp, SelfAttention, TransformerConfig

if TYPE_CHECKING:
    from models.parts.folding import Affine

ABOUT = About(
    paper="Matani and Singh 2023, part 4 of 4; ViT, Dosovitskiy et al. 2021, arXiv 2010.11929",
    good_for="comparing with a published 0.859 pixel accuracy on Oxford-IIIT Pet; wants a GPU",
    licence="notebook MIT; no weights elsewhere",
    variants={"article": {"classes": 3}, "shape walk": {"classes": 10, "width": 512}},
)
EXPANSION = 4  # inside the small nets


@dataclass(frozen=True, kw_only=True)
class Config(TransformerConfig):
    """A ViT segmenter; the defaults are the article's, which has 3 classes."""

    dropout: float = 0.2
    """Share of attention, and of the small nets' answers, dropped in training."""
    interpolation: Interpolation = "bilinear"
    """How positions are stretched to other grids: ``bilinear`` or ``bicubic``."""
    frozen_statistics: bool = False
    """Leave the means and variances of the batch norm as they are in training."""
    refine: int = 0
    """Channels of two convolutions that smooth the edges of patches; 0: none, as in the article."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_no_share("dropout")
        self.refuse_unknown("interpolation", get_args(Interpolation))
        self.refuse_below(0, "refine")


def build(config: Config) -> Segmenter:
    """The net of this config, freshly initialised from torch's default generator."""
    return ViTSegmenter(config)


class ViTSegmenter(Segmenter):
    """Pixels to tokens, blocks, tokens to pixels."""

    stride = 1
    receptive_field = None  # attention sees everything

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.classes, self.multiple = config.channels, config.classes, config.patch
        self.frozen_statistics = config.frozen_statistics
        pixels = config.patch**2
        self.norm = nn.BatchNorm2d(config.channels)
        self.embed = nn.Linear(config.channels * pixels, config.width)
        self.positions = PositionTable(
            config.cells, config.width, interpolation=config.interpolation
        )
        self.blocks = Blocks(_block(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, pixels * config.classes)
        self.refine = Refinement(config.classes, config.refine) if config.refine else None

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKHW; the native grid is that of the pixels."""
        patch = self.multiple
        cells, cells_B2 = grid_of(x_BCHW, sizes_B2, patch)
        tokens_BTD = self.embed(cut(self.norm(x_BCHW), patch)) + self.positions(cells, cells_B2)
        tokens_BTD = self.blocks(tokens_BTD, readable(cells, cells_B2))
        logits_BKHW = pasted(self.head(tokens_BTD), cells, patch)
        return logits_BKHW if self.refine is None else self.refine(logits_BKHW, sizes_B2)

    def train(self, mode: bool = True) -> Self:
        """As in torch, except that frozen statistics stay frozen."""
        super().train(mode)
        self.norm.train(mode and not self.frozen_statistics)
        return self

    def folded(self) -> Segmenter:
        """See `Network.folded`."""
        return FoldedViTSegmenter(self)


def _block(config: Config) -> Block:
    attention = SelfAttention(config.width, config.heads, drop_shares=config.dropout)
    nn.init.xavier_uniform_(attention.qkv.weight)  # as torch's MultiheadAttention, which they use
    nn.init.zeros_(attention.qkv.bias)
    nn.init.zeros_(attention.proj.bias)
    mlp = Mlp(config.width, EXPANSION * config.width, drop_answer=config.dropout)
    return Block(attention, mlp)


class Refinement(nn.Module):
    """Two convolutions over the scores, added to them: cells of different patches meet at last."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(classes, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, classes, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)  # begin as the article's net

    def forward(self, logits_BKHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Smoother logits_BKHW."""
        hidden_BFHW = relu(self.conv1(cleared(logits_BKHW, sizes_B2)))
        return logits_BKHW + self.conv2(cleared(hidden_BFHW, sizes_B2))


class FoldedViTSegmenter(Segmenter):
    """The net for inference: no batch norm, patches cut and embedded by one convolution."""

    stride, receptive_field = 1, None
    captures = True

    @torch.no_grad()
    def __init__(self, plain: ViTSegmenter) -> None:
        super().__init__()
        self.config = plain.config
        self.channels, self.classes, self.multiple = plain.channels, plain.classes, plain.multiple
        self.embed = as_convolution(
            _norm_then_embed(plain.norm, plain.embed), plain.channels, plain.multiple
        )
        self.positions = deepcopy(plain.positions)  # what is frozen here stays free there
        self.blocks = deepcopy(plain.blocks)
        self.blocks.fold()
        self.head = deepcopy(plain.head)
        self.refine = deepcopy(plain.refine)
        self.eval().requires_grad_(requires_grad=False)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKHW; the native grid is that of the pixels."""
        cells, cells_B2 = grid_of(x_BCHW, sizes_B2, self.multiple)
        tokens_BTD = self.embed(x_BCHW).flatten(2).mT + self.positions(cells, cells_B2)
        tokens_BTD = self.blocks(tokens_BTD, readable(cells, cells_B2))
        logits_BKHW = pasted(self.head(tokens_BTD), cells, self.multiple)
        return logits_BKHW if self.refine is None else self.refine(logits_BKHW, sizes_B2)


def _norm_then_embed(norm: nn.BatchNorm2d, embed: nn.Linear) -> Affine:
    """Exact at the borders too: patches do not overlap and see no padding of their own."""
    scale_C, shift_C = norm_as_scale(norm)
    pixels = embed.in_features // len(scale_C)
    scale_V, shift_V = scale_C.repeat_interleave(pixels), shift_C.repeat_interleave(pixels)
    return embed.weight * scale_V, embed.bias + embed.weight @ shift_V
