"""Latent experts: a few learned vectors read the whole picture, every pixel asks them.

Source: the latent-expert tutorial of MarkTechPost (MODELS.md section 1); the bottleneck is that of
Perceiver (Jaegle et al. 2021) and of the induced set attention block (Lee et al. 2019).

Unusual: attention costs pixels times experts instead of pixels squared, and there is no position
code; position enters only where the convolutions meet the border.

Two variants:

* ``seed`` is the tutorial's net, number for number. Its experts begin as copies of each other, so
  that all pixels get the same answer, and it hardly learns from real pictures.
* ``plus`` learns, and is what Maskfleet ships: the experts read a strided, deeper map (1/16), begin
  apart, and keep what they were; every pixel keeps its own features (1/4 and what the coarser maps
  say there) beside what the experts tell it; tokens are normalised. It comes in sizes.

Both have a folded form for inference: what depends on weights alone is multiplied out once
(models/parts/folded_experts.py), and batch norms vanish into their convolutions.

Shapes: B batch, C input channels, H W input, h w native grid (stride 4), T = h w tokens,
F features, D latent width, M experts, K classes, E heads of attention.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, pad, relu

from models.parts.about import About
from models.parts.attention import Attention
from models.parts.configs import ModelConfig, did_you_mean
from models.parts.conv3x3 import HalvedTwice, compiled
from models.parts.folded_experts import FoldedAsking, FoldedReading
from models.parts.folding import (
    as_linear,
    fused_conv,
    linear_then_linear,
    neutral,
    norm_then_linear,
)
from models.parts.kernels import operations
from models.parts.padding import cleared, inside
from models.parts.resize import edges_repeated, upsampled, upsampled_rows
from models.parts.segmenter import Segmenter
from models.parts.strips import pays, spans

ABOUT = About(
    paper="MarkTechPost latent-expert tutorial; Perceiver, Jaegle et al. 2021, arXiv 2103.03206",
    good_for="the default: archives of any size on CPUs and GPUs; seed only to compare with",
    licence="idea free, tutorial text not copied; no weights elsewhere",
    variants={
        "seed": {},
        "plus xs": {"variant": "plus", "size": "xs"},
        "plus s": {"variant": "plus", "size": "s"},
        "plus m": {"variant": "plus", "size": "m"},
        "plus l": {"variant": "plus", "size": "l"},
    },
)
COUNTS = ("channels", "stem_width", "features", "latent_dim", "latents", "heads")


@dataclass(frozen=True, slots=True)
class PlusSize:
    """How large a ``plus`` net is."""

    stem: int
    """Channels at 1/2 of the picture's side."""
    widths: tuple[int, int, int]
    """Channels at 1/4, 1/8 and 1/16."""
    depths: tuple[int, int, int]
    """Blocks at 1/4, 1/8 and 1/16."""
    latent_dim: int
    """Width of experts and of pixels that ask them."""
    latents: int
    """Experts."""
    heads: int
    """Attention heads."""


SIZES = {
    "xs": PlusSize(8, (16, 32, 48), (1, 1, 2), 32, 8, 2),
    "s": PlusSize(16, (32, 64, 96), (1, 2, 4), 64, 16, 4),
    "m": PlusSize(24, (48, 96, 144), (1, 3, 5), 96, 24, 4),
    "l": PlusSize(32, (64, 160, 320), (2, 4, 9), 160, 32, 8),
}
EXPANSION = 2  # inside a block: four, as in ConvNeXt, costs twice as much for little on small maps
STRIP = (
    16  # rows at 1/4: some MB at 1024 pixels, what a core's cache holds (measured: 8 to 32 equal)
)
STEM_STRIP = 2 * 1024**2  # bytes of a strip's convolution, or twice that (measured: 2 to 8 equal)
SPREADS = (
    1,
    2,
    4,
)  # dilations of the blocks at 1/16, in turn: a view of some 400 pixels each round


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """A latent-expert segmenter; the defaults are the tutorial's."""

    variant: str = "seed"
    """``seed`` or ``plus``."""
    size: str = "s"
    """``xs``, ``s``, ``m`` or ``l``; plus only."""
    stem_width: int = 32
    """Channels at full resolution, where most of the time goes; seed only."""
    features: int = 64
    """Channels of the native grid; seed only."""
    latent_dim: int = 64
    """Width of the experts, a multiple of heads; seed only."""
    latents: int = 16
    """How many experts; seed only."""
    heads: int = 4
    """Attention heads; seed only."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(
                f"latent_attention has no variant {self.variant!r}"
                f"{did_you_mean(self.variant, VARIANTS)}"
            )
        if self.size not in SIZES:
            raise ValueError(f"plus has no size {self.size!r}{did_you_mean(self.size, SIZES)}")
        shared = {"variant", "channels", "classes"}
        foreign = {"size"} if self.variant == "seed" else set(COUNTS) - shared
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in foreign and value != field.default:
                raise ValueError(
                    f"{field.name} {value!r} does not belong to variant {self.variant!r}; "
                    "seed has numbers of its own, plus comes in sizes"
                )
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if self.latent_dim % self.heads:
            raise ValueError(
                f"latent_dim {self.latent_dim} must be a multiple of heads {self.heads}"
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


def build(config: Config) -> Segmenter:
    """The net of this config, freshly initialised from torch's default generator."""
    return VARIANTS[config.variant](config)


# ------------------------------------------------------------------------------------------- seed


class SeedSegmenter(Segmenter):
    """The tutorial's net."""

    stride = 4
    min_side = 4
    partial_cells = False  # the pooling drops them
    receptive_field = None  # the experts see everything

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.classes = config.channels, config.classes
        self.encoder = Stem(config)
        self.latent_attn = Experts(config.features, config.latent_dim, config.latents, config.heads)
        self.expert_seg = AskExperts(config)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw at stride 4."""
        x_BFhw = self.encoder(x_BCHW, sizes_B2)
        x_BTF = x_BFhw.flatten(2).mT
        experts_BMD = self.latent_attn(x_BTF, outside(x_BFhw, sizes_B2, self.stride))
        logits_BTK = self.expert_seg(x_BTF, experts_BMD)
        return logits_BTK.mT.unflatten(2, x_BFhw.shape[-2:])

    def attention_maps(self, x_BCHW: Tensor, sizes_B2: Tensor | None = None) -> AttentionMaps:
        """What `forward` would look at; for people, it costs a second pass."""
        x_BFhw = self.encoder(x_BCHW, sizes_B2)
        cells, x_BTF = x_BFhw.shape[-2:], x_BFhw.flatten(2).mT
        outside_BT = outside(x_BFhw, sizes_B2, self.stride)
        experts_BEMT = self.latent_attn.weights(x_BTF, outside_BT)
        pixels_BETM = self.expert_seg.weights(x_BTF, self.latent_attn(x_BTF, outside_BT))
        return AttentionMaps(experts_BEMT.unflatten(3, cells), pixels_BETM.mT.unflatten(3, cells))

    def folded(self) -> Segmenter:
        """See `Network.folded`."""
        return FoldedSeed(self)


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
            x_BCHW = relu(max_pool2d(conv(x_BCHW), 2))
            x_BCHW = cleared(x_BCHW, None if sizes_B2 is None else sizes_B2 // 2**level)
        return x_BCHW


class Experts(nn.Module):
    """Learned vectors read all tokens once."""

    def __init__(self, features: int, width: int, latents: int, heads: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.key_proj = nn.Linear(features, width)
        self.value_proj = nn.Linear(features, width)
        self.query_proj = nn.Linear(width, width)
        self.attention = Attention(width, heads)

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


class FoldedSeed(Segmenter):
    """The tutorial's net, multiplied out (MODELS.md section 1.6)."""

    stride, min_side, partial_cells, receptive_field = 4, 4, False, None
    replays = captures = True

    @torch.no_grad()
    def __init__(self, plain: SeedSegmenter) -> None:
        super().__init__()
        plain = deepcopy(plain)  # what is frozen here stays free there
        self.config, self.channels, self.classes = plain.config, plain.channels, plain.classes
        self.encoder = FoldedStem(plain.encoder)
        reading, asking = plain.latent_attn, plain.expert_seg
        query_MD = reading.query_proj(reading.latents)
        self.read = FoldedReading(
            query_MD, _affine(reading.key_proj), _affine(reading.value_proj), reading.attention
        )
        self.ask = FoldedAsking(
            _affine(asking.pixel_proj), asking.attention, _affine(asking.segmentation_head)
        )
        self.eval().requires_grad_(requires_grad=False)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw at stride 4."""
        x_BFhw = self.encoder(x_BCHW, sizes_B2)
        x_BTF = x_BFhw.flatten(2).mT
        experts_BMD = self.read(x_BTF, outside(x_BFhw, sizes_B2, self.stride))
        logits_BKT = self.ask.by_output(x_BTF, *self.ask.prepared(experts_BMD))
        return logits_BKT.unflatten(2, x_BFhw.shape[-2:])


class FoldedStem(Stem):
    """`Stem`, on a CPU in strips of rows; in C where that is compiled (models/parts/conv3x3.py).

    What a convolution writes is four times as large as the maximum that follows: in strips it is
    still in the cache when the maximum reads it, and what the first one leaves when the second
    reads it; no picture needs the memory for the whole (370 MB at 1600 x 1200). By torch alone the
    maximum is two of its elementwise ones, twice as fast as its pooling, which notes places too.
    """

    def __init__(self, plain: Stem) -> None:
        nn.Module.__init__(self)  # not Stem's: its convolutions are those of the plain one
        self.conv1, self.conv2 = plain.conv1, plain.conv2
        both = compiled(plain.conv1) and compiled(plain.conv2)
        self.both = HalvedTwice(plain.conv1, plain.conv2) if both else None

    def forward(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """See `Stem.forward`."""
        if not pays(x_BCHW) or sizes_B2 is not None or not len(x_BCHW):
            return super().forward(x_BCHW, sizes_B2)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        if self.both is not None and operations.serves(x_BCHW):
            return self.both(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for conv in (self.conv1, self.conv2):
            batch, _, height, width = x_BCHW.shape
            out_BhwF = x_BCHW.new_empty(batch, height // 2, width // 2, conv.out_channels)
            x_BCHW = _halved(conv, x_BCHW, out_BhwF).permute(0, 3, 1, 2)
        return x_BCHW


def _halved(conv: nn.Conv2d, x_BCHW: Tensor, out_BhwF: Tensor) -> Tensor:
    """A 3 x 3 convolution, the 2 x 2 maximum of it, and ReLU, into what is given."""
    batch, _, height, width = x_BCHW.shape
    h, features = out_BhwF.shape[1], out_BhwF.shape[3]
    row = batch * width * features * x_BCHW.element_size()
    for start, stop in spans(h, STEM_STRIP // row // 2):
        first, last = 2 * start - 1, 2 * stop + 1
        rows = x_BCHW[:, :, max(first, 0) : last]
        if first < 0 or last > height:
            rows = pad(rows, (0, 0, int(first < 0), max(0, last - height)))
        wide_BHWF = conv2d(rows, conv.weight, conv.bias, padding=(0, 1)).permute(0, 2, 3, 1)
        pairs_BhyWF = wide_BHWF.unflatten(1, (stop - start, 2))
        wide_BhWF = torch.maximum(pairs_BhyWF[:, :, 0], pairs_BhyWF[:, :, 1])
        _columns_halved(wide_BhWF, out_BhwF[:, start:stop]).relu_()
    return out_BhwF


def _columns_halved(x_BhWF: Tensor, out_BhwF: Tensor) -> Tensor:
    """The greater one of every two columns, into what is given; an odd one is left out."""
    w = out_BhwF.shape[2]
    pairs_BhwxF = x_BhWF[:, :, : 2 * w].unflatten(2, (w, 2))
    return torch.maximum(pairs_BhwxF[..., 0, :], pairs_BhwxF[..., 1, :], out=out_BhwF)


# ------------------------------------------------------------------------------------------- plus


class PlusSegmenter(Segmenter):
    """The net to train."""

    stride = 4
    multiple = 16
    receptive_field = None  # the experts see everything

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.classes = config.channels, config.classes
        size = SIZES[config.size]
        self.encoder = Pyramid(config.channels, size)
        self.coarse_norm = nn.LayerNorm(size.widths[-1])
        self.latent_attn = Experts(size.widths[-1], size.latent_dim, size.latents, size.heads)
        self.latent_attn.spread_out()
        self.expert_norm = nn.LayerNorm(size.latent_dim)
        self.expert_mlp = Mlp(size.latent_dim)
        self.laterals = nn.ModuleList(nn.Conv2d(w, size.latent_dim, 1) for w in size.widths)
        self.expert_seg = AskExpertsBeside(size, config.classes)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw at stride 4."""
        fine_BFhw, _, coarse_BFhw = maps = self.encoder(x_BCHW, sizes_B2)
        tokens_BTF = self.coarse_norm(coarse_BFhw.flatten(2).mT)
        experts_BMD = self.experts(tokens_BTF, outside(coarse_BFhw, sizes_B2, 16))
        pixels_BDhw = gathered(self.laterals, maps, sizes_B2)
        logits_BTK = self.expert_seg(pixels_BDhw.flatten(2).mT, experts_BMD)
        return logits_BTK.mT.unflatten(2, fine_BFhw.shape[-2:])

    def experts(self, tokens_BTF: Tensor, outside_BT: Tensor | None) -> Tensor:
        """experts_BMD: what they were, what they read, and what they make of it; normalised."""
        experts_BMD = self.latent_attn.latents + self.latent_attn(tokens_BTF, outside_BT)
        return self.expert_norm(experts_BMD + self.expert_mlp(experts_BMD))

    def attention_maps(self, x_BCHW: Tensor, sizes_B2: Tensor | None = None) -> AttentionMaps:
        """What `forward` would look at, experts at 1/16 and pixels at 1/4; for people."""
        maps = self.encoder(x_BCHW, sizes_B2)
        tokens_BTF = self.coarse_norm(maps[-1].flatten(2).mT)
        outside_BT = outside(maps[-1], sizes_B2, 16)
        experts_BEMT = self.latent_attn.weights(tokens_BTF, outside_BT)
        pixels_BTD = gathered(self.laterals, maps, sizes_B2).flatten(2).mT
        pixels_BETM = self.expert_seg.weights(pixels_BTD, self.experts(tokens_BTF, outside_BT))
        return AttentionMaps(
            experts_BEMT.unflatten(3, maps[-1].shape[-2:]),
            pixels_BETM.mT.unflatten(3, maps[0].shape[-2:]),
        )

    def folded(self) -> Segmenter:
        """See `Network.folded`."""
        return FoldedPlus(self)


def gathered(laterals: nn.ModuleList, maps: tuple[Tensor, ...], sizes_B2: Tensor | None) -> Tensor:
    """pixels_BDhw at 1/4: the sum of what all maps say there (as in FPN, Lin et al. 2017)."""
    pixels_BDhw = laterals[0](maps[0])
    for level in (1, 2):
        cells_B2 = None if sizes_B2 is None else sizes_B2 // 2 ** (2 + level)
        said_BDhw = laterals[level](maps[level])
        pixels_BDhw = pixels_BDhw + upsampled(said_BDhw, 2**level, cells_B2)
    return pixels_BDhw


class Pyramid(nn.Module):
    """Strided convolutions and depthwise blocks: maps at 1/4, 1/8 and 1/16."""

    def __init__(self, channels: int, size: PlusSize) -> None:
        super().__init__()
        self.stem = ConvNorm(channels, size.stem, 3, stride=2)
        before = (size.stem, *size.widths[:-1])
        self.downs = nn.ModuleList(
            ConvNorm(a, b, 3, stride=2) for a, b in zip(before, size.widths, strict=True)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(width, _spread(level, i)) for i in range(depth))
            for level, (width, depth) in enumerate(zip(size.widths, size.depths, strict=True))
        )

    def forward(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> tuple[Tensor, ...]:
        """x_BFhw at 1/4, 1/8 and 1/16; zero outside of the items."""
        cells_B2 = halved(sizes_B2)
        x_BFhw = cleared(relu(self.stem(x_BCHW), inplace=True), cells_B2)
        maps = []
        for down, blocks in zip(self.downs, self.stages, strict=True):
            cells_B2 = halved(cells_B2)
            x_BFhw = cleared(relu(down(x_BFhw), inplace=True), cells_B2)
            for block in blocks.children():
                x_BFhw = cleared(block(x_BFhw), cells_B2)
            maps.append(x_BFhw)
        return tuple(maps)


class ConvNorm(nn.Module):
    """A convolution and a batch norm."""

    def __init__(
        self, before: int, after: int, side: int, stride: int = 1, spread: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        padding = side // 2 * spread
        self.conv = nn.Conv2d(before, after, side, stride, padding, spread, groups, bias=False)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x_BFhw: Tensor) -> Tensor:
        """One after the other."""
        return self.norm(self.conv(x_BFhw))

    def fused(self) -> nn.Conv2d:
        """The convolution that does both."""
        return fused_conv(self.conv, self.norm)


class Block(nn.Module):
    """A depthwise window and a small net per cell, added to what was there (as in ConvNeXt)."""

    def __init__(self, width: int, spread: int) -> None:
        super().__init__()
        self.window = ConvNorm(width, width, 3, spread=spread, groups=width)
        self.widen = ConvNorm(width, EXPANSION * width, 1)
        self.narrow = ConvNorm(EXPANSION * width, width, 1)

    def forward(self, x_BFhw: Tensor) -> Tensor:
        """The same grid, every cell having seen its neighbours."""
        return x_BFhw + self.narrow(relu(self.widen(self.window(x_BFhw)), inplace=True))


class Mlp(nn.Module):
    """Two linear layers over a normalised vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, EXPANSION * width)
        self.narrow = nn.Linear(EXPANSION * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """What is to be added."""
        return self.narrow(relu(self.widen(self.norm(x_BTD))))


class AskExpertsBeside(nn.Module):
    """Every pixel asks the experts, and also keeps what it knew itself."""

    def __init__(self, size: PlusSize, classes: int) -> None:
        super().__init__()
        self.pixel_norm = nn.LayerNorm(size.latent_dim)
        self.attention = Attention(size.latent_dim, size.heads)
        self.mlp = Mlp(size.latent_dim)
        self.segmentation_head = nn.Linear(size.latent_dim, classes)

    def forward(self, pixels_BTD: Tensor, experts_BMD: Tensor) -> Tensor:
        """logits_BTK."""
        asked_BTD = self.pixel_norm(pixels_BTD)
        known_BTD = pixels_BTD + self.attention(asked_BTD, experts_BMD, experts_BMD)
        return self.segmentation_head(known_BTD + self.mlp(known_BTD))

    def weights(self, pixels_BTD: Tensor, experts_BMD: Tensor) -> Tensor:
        """How much each pixel takes from each expert: weights_BETM."""
        return self.attention.weights(self.pixel_norm(pixels_BTD), experts_BMD)


class FoldedPlus(Segmenter):
    """The net for inference: no batch norms, constant queries, keys and values multiplied out.

    Everything at 1/4 that happens cell by cell is done in C on a CPU, or else in strips, so that
    what one step writes is still in the cache when the next one reads it.
    """

    stride, multiple, receptive_field = 4, 16, None
    replays = captures = True
    head_KD: Tensor
    narrow_KX: Tensor
    bias_K1: Tensor
    lateral_CP: Tensor
    lateral_P: Tensor

    @torch.no_grad()
    def __init__(self, plain: PlusSegmenter) -> None:
        super().__init__()
        plain = deepcopy(plain)  # what is frozen here stays free there
        self.config, self.channels, self.classes = plain.config, plain.channels, plain.classes
        self.encoder = _without_norms(plain.encoder)
        self.laterals = nn.ModuleList(
            CellwiseLinear(cast("nn.Conv2d", each)) for each in plain.laterals
        )
        reading, asking = plain.latent_attn, plain.expert_seg
        self.latents = reading.latents
        self.read = FoldedReading(
            reading.query_proj(reading.latents),
            norm_then_linear(plain.coarse_norm, *_affine(reading.key_proj)),
            norm_then_linear(plain.coarse_norm, *_affine(reading.value_proj)),
            reading.attention,
        )
        self.expert_norm, self.expert_mlp = plain.expert_norm, plain.expert_mlp
        self.coarse_norm, self.pixel_norm = neutral(plain.coarse_norm), neutral(asking.pixel_norm)
        identity_DD = torch.eye(len(asking.pixel_norm.weight)).to(asking.pixel_norm.weight)
        self.ask = FoldedAsking(
            norm_then_linear(asking.pixel_norm, identity_DD, None), asking.attention, None
        )
        self.widen = as_linear(norm_then_linear(asking.mlp.norm, *_affine(asking.mlp.widen)))
        head = _affine(asking.segmentation_head)
        narrow_KX, bias_K = linear_then_linear(_affine(asking.mlp.narrow), head)
        parts = {"head_KD": head[0], "narrow_KX": narrow_KX, "bias_K1": bias_K[:, None]}
        fine = cast("CellwiseLinear", self.laterals[0]).linear
        parts["lateral_CP"], parts["lateral_P"] = operations.wide(fine.weight, fine.bias)
        for name, part in parts.items():
            self.register_buffer(name, part.clone(), persistent=False)
        self.eval().requires_grad_(requires_grad=False)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw at stride 4."""
        fine_BFhw, middle_BFhw, coarse_BFhw = self.encoder(x_BCHW, sizes_B2)
        tokens_BTF = self.coarse_norm(coarse_BFhw.flatten(2).mT)
        read_BMD = self.read(tokens_BTF, outside(coarse_BFhw, sizes_B2, 16))
        experts_BMD = self.latents + read_BMD
        experts_BMD = self.expert_norm(experts_BMD + self.expert_mlp(experts_BMD))
        experts = self.ask.prepared(experts_BMD)
        said = [
            (each(x_BFhw), 2**level)
            for level, (each, x_BFhw) in enumerate(
                zip(self.laterals[1:], (middle_BFhw, coarse_BFhw), strict=True), start=1
            )
        ]
        if sizes_B2 is not None:
            said = [(edges_repeated(x, sizes_B2 // (4 * f)), f) for x, f in said]
        if operations.serves(fine_BFhw):
            return self._compiled(fine_BFhw, said[0][0], said[1][0], experts)
        height, width = fine_BFhw.shape[-2:]
        strip = STRIP if x_BCHW.device.type == "cpu" else height
        logits = []
        for top in range(0, height, strip):
            rows = range(top, min(top + strip, height))
            pixels_BDhw = self.laterals[0](fine_BFhw[:, :, rows.start : rows.stop])
            for coarser_BDhw, factor in said:
                pixels_BDhw += upsampled_rows(coarser_BDhw, factor, rows)
            logits_BKT = self._classified(pixels_BDhw.flatten(2).mT, experts)
            logits.append(logits_BKT.unflatten(2, (len(rows), width)))
        return torch.cat(logits, dim=2)

    def _compiled(
        self, fine_BFhw: Tensor, half: Tensor, quarter: Tensor, experts: tuple[Tensor, ...]
    ) -> Tensor:
        fine, *coarser = (x.permute(0, 2, 3, 1).contiguous() for x in (fine_BFhw, half, quarter))
        cells = fine, self.lateral_CP, self.lateral_P, *coarser
        asking = *experts, self.ask.bias_O, self.ask.heads
        thinking = self.widen.weight, self.widen.bias, self.head_KD, self.narrow_KX, self.bias_K1
        return operations.classify(*cells, *asking, *thinking, self.pixel_norm.eps)

    def _classified(self, pixels_BTD: Tensor, experts: tuple[Tensor, ...]) -> Tensor:
        known_BTD = pixels_BTD + self.ask(self.pixel_norm(pixels_BTD), *experts)
        thought_BTD = relu(self.widen(self.pixel_norm(known_BTD)), inplace=True)
        # Classes first, as in `FoldedAsking.by_output`.
        batch = len(pixels_BTD)
        logits_BKT = torch.baddbmm(self.bias_K1, self.head_KD.expand(batch, -1, -1), known_BTD.mT)
        return logits_BKT.baddbmm_(self.narrow_KX.expand(batch, -1, -1), thought_BTD.mT)


class CellwiseLinear(nn.Module):
    """A 1 x 1 convolution as the matrix product it is.

    With one thread and one picture torch 2.13 leaves oneDNN for a slow path of its own there.
    """

    @torch.no_grad()
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.linear = as_linear((conv.weight[:, :, 0, 0], cast("Tensor", conv.bias)))

    def forward(self, x_BFhw: Tensor) -> Tensor:
        """The same map, other channels."""
        return self.linear(x_BFhw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FoldedBlock(nn.Module):
    """A block without its norms."""

    _FOR_C = ("window_9F", "window_F", "widen_FX", "widen_X", "narrow_XF", "narrow_F")

    def __init__(self, plain: Block) -> None:
        super().__init__()
        self.window = plain.window.fused()
        self.widen = CellwiseLinear(plain.widen.fused())
        self.narrow = CellwiseLinear(plain.narrow.fused())
        parts = (
            self.window.weight[:, 0].permute(1, 2, 0).flatten(0, 1).contiguous(),
            cast("Tensor", self.window.bias),
            *operations.wide(self.widen.linear.weight, self.widen.linear.bias),
            *operations.wide(self.narrow.linear.weight, self.narrow.linear.bias),
        )
        for name, part in zip(self._FOR_C, parts, strict=True):
            self.register_buffer(name, part.detach(), persistent=False)

    def forward(self, x_BFhw: Tensor) -> Tensor:
        """See `Block`."""
        if operations.serves(x_BFhw):
            x_BhwF = x_BFhw.permute(0, 2, 3, 1).contiguous()
            parts = (getattr(self, name) for name in self._FOR_C)
            return operations.block(x_BhwF, self.window.dilation[0], *parts).permute(0, 3, 1, 2)
        change_BFhw = self.narrow(relu(self.widen(self.window(x_BFhw)), inplace=True))
        return change_BFhw.add_(x_BFhw)


VARIANTS = {"seed": SeedSegmenter, "plus": PlusSegmenter}


def outside(x_BFhw: Tensor, sizes_B2: Tensor | None, stride: int) -> Tensor | None:
    """outside_BT, True for the tokens of a map that are padding; None where none is."""
    if sizes_B2 is None:
        return None
    return ~inside(sizes_B2 // stride, *x_BFhw.shape[-2:]).flatten(1)


def halved(sizes_B2: Tensor | None) -> Tensor | None:
    """The sizes on the next coarser map."""
    return None if sizes_B2 is None else sizes_B2 // 2


def _spread(level: int, place: int) -> int:
    return SPREADS[place % len(SPREADS)] if level == 2 else 1


def _affine(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def _without_norms(encoder: Pyramid) -> Pyramid:
    """A copy whose convolutions do the work of the batch norms behind them."""
    encoder = deepcopy(encoder)
    for name, layer in list(encoder.named_children()):
        setattr(encoder, name, _without_norm(layer))
    return encoder


def _without_norm(layer: nn.Module) -> nn.Module:
    if isinstance(layer, ConvNorm):
        return layer.fused()
    if isinstance(layer, Block):
        return FoldedBlock(layer)
    return nn.ModuleList(_without_norm(each) for each in layer.children())
