"""The plain vision transformer as an encoder: a token for every patch (Dosovitskiy et al. 2021).

Shapes: B batch, C channels, H W input, T tokens of patches, N = extra tokens + T, D width;
cells_B2 sizes on the grid of patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from models.parts.patches import Interpolation, PositionTable, readable
from models.parts.transformer import (
    Block,
    Blocks,
    Mlp,
    SelfAttention,
    TransformerConfig,
    drawn_as_usual_for_vits,
)

EXPANSION = 4  # inside the small nets


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(TransformerConfig):
    """A plain ViT."""

    dropout: float = 0.0
    """Share dropped in training: of what attention answers, and after both layers of small nets."""
    drop_path: float = 0.1
    """How often training leaves out the last block; linearly less for those before, 0 at first."""
    distilled: bool = False
    """Whether a distillation token stands beside the class token, as in DeiT."""
    interpolation: Interpolation = "bilinear"
    """How positions are stretched to other grids: ``bilinear`` or ``bicubic``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_no_share("dropout", "drop_path")
        self.refuse_unknown("interpolation", get_args(Interpolation))


class Encoder(nn.Module):
    """A picture becomes tokens; the extra ones listen and talk, and are left out at the end."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        extra = 2 if config.distilled else 1
        self.embed = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        self.extra = nn.Parameter(torch.empty(extra, config.width))
        self.positions = PositionTable(
            config.cells, config.width, extra=extra, interpolation=config.interpolation
        )
        self.blocks = Blocks(_block(config, place) for place in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        drawn_as_usual_for_vits(self)
        nn.init.trunc_normal_(self.extra, std=0.02)
        nn.init.trunc_normal_(self.positions.table, std=0.02)

    def forward(self, x_BCHW: Tensor, cells_B2: Tensor | None) -> Tensor:
        """tokens_BTD, one per patch."""
        patches_BDhw = self.embed(x_BCHW)
        cells = patches_BDhw.shape[2], patches_BDhw.shape[3]
        extra_BND = self.extra.expand(len(x_BCHW), -1, -1)
        x_BND = torch.cat([extra_BND, patches_BDhw.flatten(2).mT], dim=1)
        x_BND = x_BND + self.positions(cells, cells_B2)
        readable_B11N = readable(cells, cells_B2, before=len(self.extra))
        x_BND = self.blocks(x_BND, readable_B11N)
        return self.norm(x_BND[:, len(self.extra) :])

    def fold(self) -> None:
        """Let the linear layers take over the weights of the norms before them, in place."""
        weight_DCPP = self.embed.weight.detach()
        self.embed.weight = nn.Parameter(weight_DCPP.contiguous(memory_format=torch.channels_last))
        self.blocks.fold()


def _block(config: EncoderConfig, place: int) -> Block:
    attention = SelfAttention(config.width, config.heads, drop_answer=config.dropout)
    mlp = Mlp(
        config.width,
        EXPANSION * config.width,
        drop_hidden=config.dropout,
        drop_answer=config.dropout,
    )
    return Block(attention, mlp, drop_path=config.drop_path * place / max(1, config.depth - 1))
