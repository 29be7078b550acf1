"""SegFormer: a pyramid of transformers that need no position code, and a head of linear layers.

Source: Xie et al., NeurIPS 2021 (MODELS.md section 4), B0 to B5; written from its description.

Unusual: patches overlap, for they are strided convolutions. Tokens know where they are from the
zeros around the picture: the patches meet them, and so does a depthwise convolution within every
block. All stages look up keys and values on a map at 1/32, so that attention costs tokens times
a few hundred keys instead of tokens squared, and the first stage already sees the whole picture.

The folded form does what the head does at 1/4 of the picture's side at the side of every stage:
its linear layers, its share of the fusing convolution and the batch norm are one matrix, and
stretching a map and multiplying its channels commute (section 4.6).

Shapes: B batch, C channels, H W input, h w grid of a stage (1/4, 1/8, 1/16 and 1/32), N heads,
d width of a head, T keys (cells at 1/32), E decoder width, K classes.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, scaled_dot_product_attention

from models.parts.about import About
from models.parts.configs import ModelConfig, did_you_mean
from models.parts.folding import (
    Affine,
    as_linear,
    conv_then_norm,
    linear_then_linear,
    neutral,
    norm_then_conv,
    norm_then_linear,
)
from models.parts.padding import cleared, inside
from models.parts.resize import edges_repeated, upsampled, upsampled_rows
from models.parts.segmenter import Segmenter

ABOUT = About(
    paper="SegFormer, Xie et al. 2021, arXiv 2105.15203",
    good_for="scenes and large objects, where there is enough to train on; b0 fast, b5 best",
    licence="published code and weights NVIDIA, non-commercial only; none of them is used here",
    variants={
        name: {"variant": name, "classes": 150} for name in ("b0", "b1", "b2", "b3", "b4", "b5")
    },
)
STRIDES = (4, 8, 16, 32)
REDUCTIONS = (8, 4, 2, 1)  # times the stride: 32, where all keys lie
MLP_RATIO = 4
STRIP = 16  # rows at 1/4 that the folded head answers at a time on a CPU: some MB, not hundreds


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a SegFormer is."""

    widths: tuple[int, ...]
    """Channels of the stages."""
    depths: tuple[int, ...]
    """Blocks of the stages."""
    decoder_width: int
    """Channels of the head."""


VARIANTS = {
    "b0": Shape((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "b1": Shape((64, 128, 320, 512), (2, 2, 2, 2), 256),
    "b2": Shape((64, 128, 320, 512), (3, 4, 6, 3), 768),
    "b3": Shape((64, 128, 320, 512), (3, 4, 18, 3), 768),
    "b4": Shape((64, 128, 320, 512), (3, 8, 27, 3), 768),
    "b5": Shape((64, 128, 320, 512), (3, 6, 40, 3), 768),
}


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """A SegFormer: a variant of the paper, or numbers of one's own."""

    variant: str = "b0"
    """``b0`` to ``b5``."""
    widths: tuple[int, ...] = (0, 0, 0, 0)
    """Channels of the four stages; 0 is the variant's number."""
    depths: tuple[int, ...] = (0, 0, 0, 0)
    """Blocks of the four stages; 0 is the variant's number."""
    heads: tuple[int, ...] = (1, 2, 5, 8)
    """Attention heads of the four stages; widths are multiples of them."""
    decoder_width: int = 0
    """Channels of the head; 0 is the variant's number."""
    dropout: float = 0.1
    """Share of the head's channels left out in training."""
    drop_path: float = 0.1
    """Share of items that the last block leaves out in training; earlier blocks leave out fewer."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(
                f"segformer has no variant {self.variant!r}{did_you_mean(self.variant, VARIANTS)}"
            )
        least = {"widths": 0, "depths": 0, "heads": 1, "decoder_width": 0, "channels": 1}
        for name, least_of_it in least.items():
            self._refuse_below(name, least_of_it)
        self._refuse_heads_that_cannot_share()
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, it is {getattr(self, name)}")
        if self.classes < 2:
            raise ValueError(
                f"classes must be at least 2, it is {self.classes}; "
                "for one kind of object count the background as a class"
            )

    def _refuse_below(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, tuple):
            if len(value) != len(STRIDES) or min(value) < least:
                raise ValueError(
                    f"{name} must be {len(STRIDES)} numbers of at least {least}, one for each "
                    f"stage; they are {value}"
                )
        elif value < least:
            raise ValueError(f"{name} must be at least {least}, it is {value}")

    def _refuse_heads_that_cannot_share(self) -> None:
        for stage, (width, heads) in enumerate(zip(self.shape.widths, self.heads, strict=True), 1):
            if width % heads:
                raise ValueError(
                    f"stage {stage} has a width of {width}, which {heads} heads cannot share; "
                    f"try {math.gcd(width, heads)} heads or a width of {-(-width // heads) * heads}"
                )

    @property
    def shape(self) -> Shape:
        """The variant's numbers, and in their place those given here."""
        preset = VARIANTS[self.variant]
        return Shape(
            tuple(own or theirs for own, theirs in zip(self.widths, preset.widths, strict=True)),
            tuple(own or theirs for own, theirs in zip(self.depths, preset.depths, strict=True)),
            self.decoder_width or preset.decoder_width,
        )


def build(config: Config) -> Segmenter:
    """The net of this config, freshly initialised from torch's default generator."""
    return SegFormer(config)


class SegFormer(Segmenter):
    """The net to train."""

    stride = STRIDES[0]
    multiple = STRIDES[-1]
    receptive_field = None  # keys come from everywhere

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.classes = config.channels, config.classes
        self.encoder = Encoder(config)
        self.head = Head(config)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw at stride 4."""
        return self.head(self.encoder(x_BCHW, sizes_B2), sizes_B2)

    def folded(self) -> Segmenter:
        """See `Network.folded`."""
        return FoldedSegFormer(self)


# ---------------------------------------------------------------------------------------- encoder


class Encoder(nn.Module):
    """MiT, the mix transformer: four stages, each on a coarser map than the one before."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape = config.shape
        before, last = (config.channels, *shape.widths), max(1, sum(shape.depths) - 1)
        self.stages = nn.ModuleList(
            Stage(
                before[i],
                shape.widths[i],
                heads=config.heads[i],
                reduction=REDUCTIONS[i],
                stride=STRIDES[i] // (1, *STRIDES)[i],
                drop_paths=[
                    config.drop_path * (sum(shape.depths[:i]) + block) / last
                    for block in range(shape.depths[i])
                ],
            )
            for i in range(len(STRIDES))
        )
        self.apply(_draw)

    def forward(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> list[Tensor]:
        """x_BChw of every stage."""
        seen_B11T = None
        if sizes_B2 is not None:
            height, width = (side // STRIDES[-1] for side in x_BCHW.shape[-2:])
            seen_B11T = inside(sizes_B2 // STRIDES[-1], height, width).flatten(1)[:, None, None]
        maps = []
        for stage, stride in zip(self.stages, STRIDES, strict=True):
            x_BCHW = stage(x_BCHW, cells(sizes_B2, stride), seen_B11T)
            maps.append(x_BCHW)
        return maps


class Stage(nn.Module):
    """Overlapping patches, and blocks on them."""

    def __init__(
        self,
        before: int,
        width: int,
        *,
        heads: int,
        reduction: int,
        stride: int,
        drop_paths: list[float],
    ) -> None:
        super().__init__()
        side = 2 * stride - 1
        self.merge = nn.Conv2d(before, width, side, stride, side // 2)
        self.merge_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, reduction, rate) for rate in drop_paths)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BCHW: Tensor, cells_B2: Tensor | None, seen_B11T: Tensor | None) -> Tensor:
        """x_BChw. Patches end where an item does, for its sides are multiples of the stride."""
        x_BhwC = self.merge_norm(channels_behind(self.merge(x_BCHW)))
        for block in self.blocks:
            x_BhwC = block(x_BhwC, cells_B2, seen_B11T)
        return channels_in_front(self.norm(x_BhwC))


class Block(nn.Module):
    """A transformer block: tokens look around, then each is worked on with its neighbours."""

    def __init__(self, width: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = ReducedAttention(width, heads, reduction)
        self.mix_norm = nn.LayerNorm(width, eps=1e-6)
        self.mix = MixFFN(width)
        self.path = DropPath(drop_path)

    def forward(self, x_BhwC: Tensor, cells_B2: Tensor | None, seen_B11T: Tensor | None) -> Tensor:
        """The same grid."""
        x_BhwC = x_BhwC + self.path(self.attention(self.attention_norm(x_BhwC), seen_B11T))
        return x_BhwC + self.path(self.mix(self.mix_norm(x_BhwC), cells_B2))


class ReducedAttention(nn.Module):
    """Every cell asks a coarser map of the same picture."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        coarser = reduction > 1
        self.reduce = nn.Conv2d(width, width, reduction, reduction) if coarser else nn.Identity()
        self.reduce_norm = nn.LayerNorm(width) if coarser else nn.Identity()
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BhwC: Tensor, seen_B11T: Tensor | None) -> Tensor:
        """What the cells found, x_BhwC; keys not marked as seen are not looked at."""
        coarse_BhwC = channels_behind(self.reduce(channels_in_front(x_BhwC)))
        key_value_BhwC = self.key_value(self.reduce_norm(coarse_BhwC))
        key_BNTd, value_BNTd = (self._heads(part) for part in key_value_BhwC.chunk(2, dim=-1))
        found_BNQd = scaled_dot_product_attention(
            self._heads(self.query(x_BhwC)), key_BNTd, value_BNTd, attn_mask=seen_B11T
        )
        return self.out(found_BNQd.transpose(1, 2).reshape(x_BhwC.shape))

    def _heads(self, x_BhwC: Tensor) -> Tensor:
        return x_BhwC.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)


class MixFFN(nn.Module):
    """Two linear layers, and between them a window on the neighbours, which feels the border."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = MLP_RATIO * width
        self.widen = nn.Linear(width, inner)
        self.window = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.narrow = nn.Linear(inner, width)

    def forward(self, x_BhwC: Tensor, cells_B2: Tensor | None) -> Tensor:
        """What is to be added, x_BhwC."""
        inner_BChw = cleared(channels_in_front(self.widen(x_BhwC)), cells_B2)
        return self.narrow(gelu(channels_behind(self.window(inner_BChw))))


class DropPath(nn.Module):
    """In training, leaves out what a block would add, for whole items (Huang et al. 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BhwC: Tensor) -> Tensor:
        """The same on average."""
        if not self.training or not self.rate:
            return x_BhwC
        kept_B111 = x_BhwC.new_empty(len(x_BhwC), 1, 1, 1).bernoulli_(1 - self.rate)
        return x_BhwC * kept_B111 / (1 - self.rate)


# ------------------------------------------------------------------------------------------- head


class Head(nn.Module):
    """All stages at 1/4, side by side, and one hidden layer per cell."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape = config.shape
        width = shape.decoder_width
        self.linears = nn.ModuleList(nn.Linear(each, width) for each in shape.widths)
        self.fuse = nn.Conv2d(len(shape.widths) * width, width, 1, bias=False)
        nn.init.kaiming_normal_(self.fuse.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classify = nn.Conv2d(width, config.classes, 1)

    def forward(self, maps: list[Tensor], sizes_B2: Tensor | None) -> Tensor:
        """logits_BKhw at the grid of the first map."""
        said = []
        for x_BChw, said_by, stride in zip(maps, self.linears, STRIDES, strict=True):
            said_BEhw = channels_in_front(said_by(channels_behind(x_BChw)))
            said.append(upsampled(said_BEhw, stride // STRIDES[0], cells(sizes_B2, stride)))
        x_BEhw = self.fuse(torch.cat(said[::-1], dim=1))  # the coarsest first, as published
        return self.classify(self.dropout(relu(self.norm(x_BEhw))))


# ------------------------------------------------------------------------------------- folded form


class FoldedSegFormer(Segmenter):
    """The net for inference: bare layer norms, and the head at every stage's own side."""

    stride, multiple, receptive_field = SegFormer.stride, SegFormer.multiple, None
    captures = True

    @torch.no_grad()
    def __init__(self, plain: SegFormer) -> None:
        super().__init__()
        plain = deepcopy(plain)  # what is changed and frozen here stays as it is there
        self.config, self.channels, self.classes = plain.config, plain.channels, plain.classes
        self.encoder = plain.encoder
        for module in self.encoder.modules():
            if isinstance(module, Block):
                _fold(module)
        self.head = FoldedHead(plain.head)
        self.eval().requires_grad_(requires_grad=False)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw at stride 4."""
        return self.head(self.encoder(x_BCHW, sizes_B2), sizes_B2)


class FoldedHead(nn.Module):
    """One matrix per stage, then a sum instead of a concatenation.

    On a CPU in strips of rows: the stretched maps of a whole picture are larger than all else.
    """

    def __init__(self, plain: Head) -> None:
        super().__init__()
        weight_EO11, bias_E = conv_then_norm(plain.fuse, plain.norm)
        shares = weight_EO11[:, :, 0, 0].chunk(len(plain.linears), dim=1)[::-1]
        folded = [
            linear_then_linear(affine(each), (share_EE, torch.zeros_like(bias_E)))
            for each, share_EE in zip(plain.linears, shares, strict=True)
        ]
        weight_EC, rest_E = folded[0]
        folded[0] = weight_EC, rest_E + bias_E  # once; stretching leaves constants as they are
        self.linears = nn.ModuleList(as_linear(each) for each in folded)
        weight_KE11, bias_K = affine(plain.classify)
        self.classify = as_linear((weight_KE11[:, :, 0, 0], bias_K))

    def forward(self, maps: list[Tensor], sizes_B2: Tensor | None) -> Tensor:
        """logits_BKhw at the grid of the first map."""
        fine_BhwC, *coarser = (channels_behind(x_BChw) for x_BChw in maps)
        said = []
        for x_BhwC, said_by, stride in zip(coarser, self.linears[1:], STRIDES[1:], strict=True):
            said_BEhw = channels_in_front(said_by(x_BhwC))
            if sizes_B2 is not None:
                said_BEhw = edges_repeated(said_BEhw, sizes_B2 // stride)
            said.append((said_BEhw, stride // STRIDES[0]))
        height = fine_BhwC.shape[1]
        strip = STRIP if fine_BhwC.device.type == "cpu" else height
        logits = []
        for top in range(0, height, strip):
            rows = range(top, min(top + strip, height))
            x_BhwE = self.linears[0](fine_BhwC[:, rows.start : rows.stop])
            for said_BEhw, factor in said:
                x_BhwE += channels_behind(upsampled_rows(said_BEhw, factor, rows))
            logits.append(channels_in_front(self.classify(relu(x_BhwE, inplace=True))))
        return torch.cat(logits, dim=2)


def _fold(block: Block) -> None:
    """Let the layers behind the layer norms take over their weights and biases."""
    attention, mix, norm = block.attention, block.mix, block.attention_norm
    attention.query = _behind(norm, attention.query)
    if isinstance(attention.reduce, nn.Conv2d):
        weight, bias = norm_then_conv(norm, attention.reduce)
        attention.reduce.weight, attention.reduce.bias = nn.Parameter(weight), nn.Parameter(bias)
        norm = cast("nn.LayerNorm", attention.reduce_norm)
        attention.reduce_norm = neutral(norm)
    attention.key_value = _behind(norm, attention.key_value)
    mix.widen = _behind(block.mix_norm, mix.widen)
    block.attention_norm, block.mix_norm = neutral(block.attention_norm), neutral(block.mix_norm)


def _behind(norm: nn.LayerNorm, layer: nn.Linear) -> nn.Linear:
    return as_linear(norm_then_linear(norm, *affine(layer)))


# ------------------------------------------------------------------------------------------ shared


def cells(sizes_B2: Tensor | None, stride: int) -> Tensor | None:
    """The sizes on a grid of this stride."""
    return None if sizes_B2 is None else sizes_B2 // stride


def channels_behind(x_BChw: Tensor) -> Tensor:
    """x_BhwC, as linear layers and layer norms take it; moves nothing."""
    return x_BChw.permute(0, 2, 3, 1)


def channels_in_front(x_BhwC: Tensor) -> Tensor:
    """x_BChw, as convolutions take it; moves nothing."""
    return x_BhwC.permute(0, 3, 1, 2)


def affine(layer: nn.Module) -> Affine:
    """Weight and bias of a layer that has both."""
    return cast("Tensor", layer.weight), cast("Tensor", layer.bias)


def _draw(module: nn.Module) -> None:
    """The starting weights of the paper's code."""
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
