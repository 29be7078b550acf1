"""Latent experts: a few learned vectors read the whole picture, every pixel asks them.

Source: the latent-expert tutorial of MarkTechPost (MODELS.md section 1); the bottleneck is that of
Perceiver (Jaegle et al. 2021) and of the induced set attention block (Lee et al. 2019).

Unusual: attention costs pixels times experts instead of pixels squared, and there is no position
code; position enters only where the convolutions meet the border.

Two variants:

* ``seed`` is the tutorial's net, number for number. Its experts begin as copies of each other, so
  that all pixels get the same answer, and it hardly learns from real pictures.
* ``residual`` learns: the pixel keeps its own features beside what the experts say, tokens are
  normalised, experts begin apart, and depthwise blocks widen the view before they are asked.

Shapes: B batch, C input channels, H W input, h w native grid (stride 4), T = h w tokens,
F features, D latent width, M experts, K classes, E heads of attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.parts.attention import Attention
from models.parts.configs import ModelConfig, did_you_mean
from models.parts.padding import cleared, inside
from models.parts.segmenter import Segmenter

COUNTS = ("channels", "stem_width", "features", "latent_dim", "latents", "heads", "expansion")


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """A latent-expert segmenter; the defaults are the tutorial's."""

    variant: str = "seed"
    """``seed`` or ``residual``."""
    stem_width: int = 32
    """Channels at full resolution, where most of the time goes."""
    features: int = 64
    """Channels of the native grid."""
    latent_dim: int = 64
    """Width of the experts; a multiple of heads."""
    latents: int = 16
    """How many experts."""
    heads: int = 4
    """Attention heads."""
    stem_depth: int = 0
    """Depthwise blocks on the native grid; residual only."""
    dilations: tuple[int, ...] = (1, 2, 4)
    """Spread of their 3 x 3 windows, in turn; residual only."""
    expansion: int = 2
    """How much wider the inside of a block is; residual only."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(
                f"latent_attention has no variant {self.variant!r}"
                f"{did_you_mean(self.variant, VARIANTS)}"
            )
        if self.variant == "seed" and self.stem_depth:
            raise ValueError(
                f"stem_depth {self.stem_depth} needs variant='residual'; the seed has no blocks"
            )
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if self.latent_dim % self.heads:
            raise ValueError(
                f"latent_dim {self.latent_dim} must be a multiple of heads {self.heads}"
            )
        if self.stem_depth < 0 or not self.dilations or min(self.dilations) < 1:
            raise ValueError(
                f"stem_depth {self.stem_depth} must not be negative, and dilations "
                f"{self.dilations} must all be 1 or more"
            )
        if self.classes < 2:
            raise ValueError(
                f"classes must be at least 2, it is {self.classes}; "
                "for one kind of object count the background as a class"
            )


@dataclass(frozen=True, slots=True)
class AttentionMaps:
    """Who looked where."""

    experts_BEMhw: Tensor
    """How much each expert read of each cell; sums to 1 over the valid cells."""
    pixels_BEMhw: Tensor
    """How much each cell took from each expert; sums to 1 over the experts."""


def build(config: Config) -> LatentSegmenter:
    """The net of this config, freshly initialised from torch's default generator."""
    return VARIANTS[config.variant](config)


class LatentSegmenter(Segmenter):
    """The tutorial's net."""

    stride = 4
    min_side = 4
    receptive_field = None  # the experts see everything

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.classes = config.classes
        self.encoder = Stem(config)
        self.latent_attn = Experts(config)
        self.expert_seg = AskExperts(config)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw at stride 4."""
        x_BTF, outside_BT = self.tokens(x_BCHW, sizes_B2)
        experts_BMD = self.latent_attn(x_BTF, outside_BT)
        logits_BTK = self.expert_seg(x_BTF, experts_BMD)
        return logits_BTK.mT.unflatten(2, self.native_size(*x_BCHW.shape[-2:]))

    def features(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """x_BhwF, what a cell knows before the experts are asked."""
        return self.encoder(x_BCHW, sizes_B2).permute(0, 2, 3, 1)

    def tokens(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x_BTF row by row, and outside_BT where there is padding."""
        x_BhwF = self.features(x_BCHW, sizes_B2)
        if sizes_B2 is None:
            return x_BhwF.flatten(1, 2), None
        outside_Bhw = ~inside(sizes_B2 // self.stride, *x_BhwF.shape[1:3])
        return x_BhwF.flatten(1, 2), outside_Bhw.flatten(1)

    def attention_maps(self, x_BCHW: Tensor, sizes_B2: Tensor | None = None) -> AttentionMaps:
        """What `forward` would look at; for people, it costs a second pass."""
        cells = self.native_size(*x_BCHW.shape[-2:])
        x_BTF, outside_BT = self.tokens(x_BCHW, sizes_B2)
        experts_BEMT = self.latent_attn.weights(x_BTF, outside_BT)
        pixels_BETM = self.expert_seg.weights(x_BTF, self.latent_attn(x_BTF, outside_BT))
        return AttentionMaps(experts_BEMT.unflatten(3, cells), pixels_BETM.mT.unflatten(3, cells))


class ResidualLatentSegmenter(LatentSegmenter):
    """The net to train: blocks in the stem, normalised tokens, a pixel path of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        spreads = [config.dilations[i % len(config.dilations)] for i in range(config.stem_depth)]
        self.blocks = nn.ModuleList(Block(config, spread) for spread in spreads)
        self.token_norm = nn.LayerNorm(config.features)
        self.expert_seg = AskExpertsBeside(config)
        self.latent_attn.spread_out()

    def features(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """x_BhwF of the deeper stem, normalised cell by cell."""
        cells_B2 = None if sizes_B2 is None else sizes_B2 // self.stride
        x_BFhw = self.encoder(x_BCHW, sizes_B2)
        for block in self.blocks:
            x_BFhw = block(x_BFhw, cells_B2)
        return self.token_norm(x_BFhw.permute(0, 2, 3, 1))


VARIANTS = {"seed": LatentSegmenter, "residual": ResidualLatentSegmenter}


class Stem(nn.Module):
    """Two convolutions, each followed by a 2 x 2 maximum: stride 4, a view of 10 pixels."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.channels, config.stem_width, 3, padding=1)
        self.conv2 = nn.Conv2d(config.stem_width, config.features, 3, padding=1)

    def forward(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """x_BFhw; zero outside of the items, as the convolutions need it."""
        x_BCHW = cleared(x_BCHW.contiguous(memory_format=torch.channels_last), sizes_B2)
        for level, conv in enumerate((self.conv1, self.conv2), start=1):
            # The maximum first: it commutes with ReLU and leaves it a quarter of the work.
            x_BCHW = nn.functional.relu(nn.functional.max_pool2d(conv(x_BCHW), 2))
            x_BCHW = cleared(x_BCHW, None if sizes_B2 is None else sizes_B2 // 2**level)
        return x_BCHW


class Block(nn.Module):
    """A depthwise window and a small net per cell, added to what was there (as in ConvNeXt)."""

    def __init__(self, config: Config, spread: int) -> None:
        super().__init__()
        width = config.features
        self.window = nn.Conv2d(width, width, 3, padding=spread, dilation=spread, groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, config.expansion * width)
        self.narrow = nn.Linear(config.expansion * width, width)

    def forward(self, x_BFhw: Tensor, cells_B2: Tensor | None) -> Tensor:
        """The same grid, every cell having seen its neighbours."""
        seen_BhwF = self.norm(self.window(x_BFhw).permute(0, 2, 3, 1))
        change_BhwF = self.narrow(nn.functional.gelu(self.widen(seen_BhwF)))
        return cleared(x_BFhw + change_BhwF.permute(0, 3, 1, 2), cells_B2)


class Experts(nn.Module):
    """Learned vectors read all tokens once."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.latent_dim
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.key_proj = nn.Linear(config.features, width)
        self.value_proj = nn.Linear(config.features, width)
        self.query_proj = nn.Linear(width, width)
        self.attention = Attention(width, config.heads)

    def forward(self, x_BTF: Tensor, outside_BT: Tensor | None) -> Tensor:
        """experts_BMD."""
        return self.attention(
            self._queries(len(x_BTF)), self.key_proj(x_BTF), self.value_proj(x_BTF), outside_BT
        )

    def weights(self, x_BTF: Tensor, outside_BT: Tensor | None) -> Tensor:
        """How much each expert reads of each token: weights_BEMT."""
        return self.attention.weights(self._queries(len(x_BTF)), self.key_proj(x_BTF), outside_BT)

    @torch.no_grad()
    def spread_out(self) -> None:
        """Begin with experts at right angles whose scores on normalised tokens have deviation 1.

        Drawn from N(0, 1) they score 0.2 on average: a softmax over a thousand tokens is then flat,
        and all experts read the mean of the picture.
        """
        nn.init.orthogonal_(self.latents)
        width = self.latents.shape[1]
        key_DF = self.attention.in_proj_weight[width : 2 * width] @ self.key_proj.weight
        key_EdF = key_DF.unflatten(0, (self.attention.heads, -1))
        query_DD = self.attention.in_proj_weight[:width] @ self.query_proj.weight
        query_EMd = (self.latents @ query_DD.mT).unflatten(1, (self.attention.heads, -1))
        query_EMd = query_EMd.transpose(0, 1) * query_EMd.shape[-1] ** -0.5
        deviation_EM = (query_EMd @ key_EdF).norm(dim=-1)
        self.latents /= deviation_EM.square().mean().sqrt()

    def _queries(self, batch: int) -> Tensor:
        return self.query_proj(self.latents).expand(batch, -1, -1)


class AskExperts(nn.Module):
    """Every pixel asks the experts, and the mix of their answers is classified."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.pixel_proj = nn.Linear(config.features, config.latent_dim)
        self.attention = Attention(config.latent_dim, config.heads)
        self.segmentation_head = nn.Linear(config.latent_dim, config.classes)

    def forward(self, x_BTF: Tensor, experts_BMD: Tensor) -> Tensor:
        """logits_BTK."""
        told_BTD = self.attention(self.pixel_proj(x_BTF), experts_BMD, experts_BMD)
        return self.segmentation_head(told_BTD)

    def weights(self, x_BTF: Tensor, experts_BMD: Tensor) -> Tensor:
        """How much each pixel takes from each expert: weights_BETM."""
        return self.attention.weights(self.pixel_proj(x_BTF), experts_BMD)


class AskExpertsBeside(AskExperts):
    """Every pixel asks the experts, and also keeps what it knew itself."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.expert_norm = nn.LayerNorm(config.latent_dim)
        self.norm = nn.LayerNorm(config.latent_dim)
        self.widen = nn.Linear(config.latent_dim, config.expansion * config.latent_dim)
        self.narrow = nn.Linear(config.expansion * config.latent_dim, config.latent_dim)

    def forward(self, x_BTF: Tensor, experts_BMD: Tensor) -> Tensor:
        """logits_BTK."""
        experts_BMD = self.expert_norm(experts_BMD)
        pixel_BTD = self.pixel_proj(x_BTF)
        known_BTD = pixel_BTD + self.attention(pixel_BTD, experts_BMD, experts_BMD)
        known_BTD = known_BTD + self.narrow(nn.functional.gelu(self.widen(self.norm(known_BTD))))
        return self.segmentation_head(known_BTD)

    def weights(self, x_BTF: Tensor, experts_BMD: Tensor) -> Tensor:
        """How much each pixel takes from each expert: weights_BETM."""
        return super().weights(x_BTF, self.expert_norm(experts_BMD))
