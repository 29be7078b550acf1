"""A vision transformer from scratch: patches, a class token, fixed waves for positions.

Source: S. Callis, Vision Transformers, Explained (LANL, BSD-3), whose attention is that of the
token transformer in T2T-ViT (Yuan et al. 2021); MODELS.md section 5.

Unusual: what attention answers is added to the token's own value, not only to the token (a value
skip). Queries, keys and values have no bias by default. There is no dropout. Positions are a table
of sines and cosines, made for the grid at hand: pictures of other sizes are just more or fewer
tokens.

The source ends in one number. Here a class is a score, two or more: a yes or no is two classes,
and the difference of their scores what a sigmoid over one output would have read.

Shapes: B batch, C input channels, H W input, h w grid of patches, T = h w tokens, N = 1 + T,
D width, K classes, A heads, d = D / A; cells_B2 sizes on the grid of patches.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn

from models.parts.about import About
from models.parts.classifier import Classifier
from models.parts.folding import as_linear, neutral, norm_then_linear
from models.parts.patches import as_convolution, cut, grid_of, readable
from models.parts.transformer import (
    Block,
    Blocks,
    Mlp,
    SelfAttention,
    TransformerConfig,
    drawn_as_usual_for_vits,
    in_heads,
    out_of_heads,
)

if TYPE_CHECKING:
    from models.parts.network import Size

Positions = Literal["line", "grid"]

ABOUT = About(
    paper="Callis, Vision Transformers, Explained; T2T-ViT, Yuan et al. 2021, arXiv 2101.11986",
    good_for="one class per picture, where there is enough to train on",
    licence="source BSD-3, T2T-ViT Clear-BSD; no weights elsewhere",
    variants={
        "upstream": {"channels": 1},
        "walk-through": {
            "channels": 1,
            "image": (60, 100),
            "patch": 20,
            "depth": 1,
            "heads": 4,
            "mlp_ratio": 1.5,
        },
        "imagenet": {
            "classes": 1000,
            "image": (224, 224),
            "patch": 16,
            "heads": 12,
            "qkv_bias": True,
        },
        "cifar": {"classes": 10, "image": (32, 32), "patch": 4, "width": 192, "heads": 3},
    },
)
LONGEST_WAVE = 10_000  # Vaswani et al. 2017


@dataclass(frozen=True, kw_only=True)
class Config(TransformerConfig):
    """A ViT classifier; the defaults are the source's, which reads gray and gives one number."""

    image: tuple[int, int] = (400, 100)
    """Height and width that the table of positions is kept for; others are made when needed."""
    patch: int = 50
    """Side of a patch, in pixels."""
    heads: int = 1
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width inside the small nets, in widths of a token."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    positions: Positions = "line"
    """``line``: patches are counted row by row; ``grid``: half of a token says the row, half the
    column (2-D waves), so that a place does not depend on how wide the picture is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unknown("positions", get_args(Positions))
        if self.width * self.mlp_ratio < 1:
            raise ValueError(
                f"mlp_ratio {self.mlp_ratio} of width {self.width} leaves nothing; try 4.0"
            )
        if self.positions == "grid" and self.width % 2:
            raise ValueError(
                f"positions 'grid' need an even width, it is {self.width}; try {self.width + 1}"
            )


def build(config: Config) -> Classifier:
    """The net of this config, freshly initialised from torch's default generator."""
    return ViTClassifier(config)


class ViTClassifier(Classifier):
    """Patches and a class token through blocks; the class token is what is classified."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.classes = config.channels, config.classes
        self.stride = self.multiple = config.patch
        self.embed = nn.Linear(config.channels * config.patch**2, config.width)
        self.class_token = nn.Parameter(torch.empty(1, config.width))
        self.positions = WAVES[config.positions](config.width, config.cells)
        self.blocks = Blocks(_block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        drawn_as_usual_for_vits(self)
        nn.init.trunc_normal_(self.class_token, std=0.02)

    def scores(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BK."""
        cells, cells_B2 = grid_of(x_BCHW, sizes_B2, self.multiple)
        patches_BTD = self.embed(cut(x_BCHW, self.multiple))
        class_B1D = self.class_token.expand(len(x_BCHW), 1, -1)
        x_BND = torch.cat([class_B1D, patches_BTD], dim=1) + self.positions(cells, cells_B2)
        x_BND = self.blocks(x_BND, readable(cells, cells_B2, before=1))
        return self.head(self.norm(x_BND[:, 0]))

    def folded(self) -> Classifier:
        """See `Network.folded`."""
        return FoldedViTClassifier(self)


def _block(config: Config) -> Block:
    return Block(
        ValueSkipAttention(config.width, config.heads, qkv_bias=config.qkv_bias),
        Mlp(config.width, int(config.width * config.mlp_ratio)),
    )


class ValueSkipAttention(SelfAttention):
    """Attention whose answer keeps what the token itself would have said."""

    def forward(self, x_BTD: Tensor, readable_B11T: Tensor | None) -> Tensor:
        """See `SelfAttention`."""
        query_BATd, key_BATd, value_BATd = in_heads(self.qkv(x_BTD), 3 * self.heads).chunk(3, dim=1)
        read_BTD = self.attend(query_BATd, key_BATd, value_BATd, readable_B11T)
        return self.proj(read_BTD) + out_of_heads(value_BATd)


# -------------------------------------------------------------------------------------- positions


class Line(nn.Module):
    """Waves along the row-major index of a patch in its own picture; the class token is place 0."""

    table_ND: Tensor

    def __init__(self, width: int, cells: Size) -> None:
        super().__init__()
        # Not persistent: it is no weight, and checkpoints fit whatever size it is kept for.
        self.register_buffer("table_ND", waves(1 + cells[0] * cells[1], width), persistent=False)

    def forward(self, cells: Size, cells_B2: Tensor | None = None) -> Tensor:
        """positions_BND, B being 1 if all items fill the grid."""
        height, width = cells
        table_ND = at_least(self.table_ND, 1 + height * width)
        if cells_B2 is None:
            return table_ND[None, : 1 + height * width]
        row_h1 = torch.arange(height, device=table_ND.device)[:, None]
        column_w = torch.arange(width, device=table_ND.device)
        place_BT = (row_h1 * cells_B2[:, 1, None, None] + column_w).flatten(1) + 1
        return table_ND[nn.functional.pad(place_BT, (1, 0))]


class Grid(nn.Module):
    """Waves along rows and along columns, side by side; the class token is at (0, 0)."""

    table_ND: Tensor

    def __init__(self, width: int, cells: Size) -> None:
        super().__init__()
        self.register_buffer("table_ND", waves(1 + max(cells), width // 2), persistent=False)

    def forward(self, cells: Size, cells_B2: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """positions_1ND: a place is the same in all pictures."""
        height, width = cells
        table_ND = at_least(self.table_ND, 1 + max(cells))
        rows_hwD = table_ND[1 : 1 + height, None].expand(-1, width, -1)
        columns_hwD = table_ND[None, 1 : 1 + width].expand(height, -1, -1)
        places_TD = torch.cat([rows_hwD, columns_hwD], dim=2).flatten(0, 1)
        return torch.cat([table_ND[:1].repeat(1, 2), places_TD])[None]


WAVES = {"line": Line, "grid": Grid}


def waves(count: int, width: int, device: torch.device | None = None) -> Tensor:
    """table_ND: sin and cos in turn, from one radian per place to slow ones; row 0 is 0, 1, 0, 1.

    Computed in float64, kept in float32.
    """
    place_N1 = torch.arange(count, dtype=torch.float64, device=device)[:, None]
    column_D = torch.arange(width, device=device)
    angle_ND = place_N1 / LONGEST_WAVE ** (2 * (column_D // 2).double() / width)
    return torch.where(column_D % 2 == 0, angle_ND.sin(), angle_ND.cos()).float()


def at_least(table_ND: Tensor, count: int) -> Tensor:
    """The table, or one that has more places."""
    if count <= len(table_ND):
        return table_ND
    return waves(count, table_ND.shape[1], table_ND.device).to(table_ND.dtype)


# ----------------------------------------------------------------------------------- for inference


class FoldedViTClassifier(Classifier):
    """The net for inference: the last block works for the class token alone."""

    captures = True

    @torch.no_grad()
    def __init__(self, plain: ViTClassifier) -> None:
        super().__init__()
        self.config, self.channels, self.classes = plain.config, plain.channels, plain.classes
        self.stride = self.multiple = plain.multiple
        plain = deepcopy(plain)  # what is frozen here stays free there
        self.embed = as_convolution(
            (plain.embed.weight, plain.embed.bias), plain.channels, plain.multiple
        )
        self.positions = plain.positions
        self.first_1D = nn.Parameter(plain.class_token + plain.positions((1, 1))[0, :1])
        self.blocks = plain.blocks
        self.blocks.fold()
        self.last = LastBlock(cast("Block", self.blocks.pop(-1)))
        self.norm = neutral(plain.norm)
        self.head = as_linear(norm_then_linear(plain.norm, plain.head.weight, plain.head.bias))
        self.eval().requires_grad_(requires_grad=False)

    def scores(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BK."""
        cells, cells_B2 = grid_of(x_BCHW, sizes_B2, self.multiple)
        places_BTD = self.positions(cells, cells_B2)[:, 1:]
        patches_BTD = self.embed(x_BCHW).flatten(2).mT + places_BTD
        x_BND = torch.cat([self.first_1D.expand(len(x_BCHW), 1, -1), patches_BTD], dim=1)
        readable_B11N = readable(cells, cells_B2, before=1)
        x_BND = self.blocks(x_BND, readable_B11N)
        return self.head(self.norm(self.last(x_BND, readable_B11N)))


class LastBlock(nn.Module):
    """A folded block of which only the first token is wanted: all are read, one asks and thinks."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.attention, self.mlp = block.attention, block.mlp
        self.norm1, self.norm2 = block.norm1, block.norm2
        query_weight_DD, *others = block.attention.qkv.weight.chunk(3)
        query_bias_D, *other_biases = block.attention.qkv.bias.chunk(3)
        self.query = as_linear((query_weight_DD, query_bias_D))
        self.key_value = as_linear((torch.cat(others), torch.cat(other_biases)))

    def forward(self, x_BND: Tensor, readable_B11N: Tensor | None) -> Tensor:
        """first_BD."""
        heads = self.attention.heads
        normed_BND = self.norm1(x_BND)
        query_BA1d = in_heads(self.query(normed_BND[:, :1]), heads)
        key_BANd, value_BANd = in_heads(self.key_value(normed_BND), 2 * heads).chunk(2, dim=1)
        read_B1D = self.attention.attend(query_BA1d, key_BANd, value_BANd, readable_B11N)
        own_B1D = out_of_heads(value_BANd[:, :, :1])
        first_B1D = x_BND[:, :1] + self.attention.proj(read_B1D) + own_B1D
        return (first_B1D + self.mlp(self.norm2(first_B1D)))[:, 0]
