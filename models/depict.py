"""DEPICT: classes and patches attend to each other in few, shared subspaces; no small nets.

Source: Wen and Li, Rethinking Decoders for Transformer-based Semantic Segmentation (NeurIPS 2024,
arXiv 2411.03033) and QishuaiWen/DEPICT; MODELS.md section 3. The encoder is a plain ViT, as in
Segmenter (Strudel et al. 2021), whose mask decoder is 5 to 26 times larger.

Unusual: a layer of the decoder has one matrix, which is query, key, value and (transposed) output
at once, and one step size, which may be negative; the width of a head is free and need not divide
anything. Scores are cosines between patches and classes, then a layer norm over the classes.

Two modes: in ``sa`` classes are tokens like any other; in ``ca`` patches attend to each other
first, and the classes then read them.

The norm over classes bounds every score by sqrt(classes - 1). With two classes it says +1 and -1
whatever the cosines are, and teaches nothing: there, a learned temperature takes its place
(`scores`), as in CLIP (Radford et al. 2021).

Sizes of the encoder are in `ENCODERS`. Published: ADE20K, 150 classes, 512 x 512 (large 640), from
ImageNet-21k weights; SGD with momentum 0.9, 1e-3, no weight decay at all (class embeddings never).

Shapes: B batch, C input channels, H W input, h w grid of patches, T = h w tokens, K classes,
N = T + K, D width, H heads, d width of a head, S = H d, L layers; cells_B2 sizes on the grid.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, scaled_dot_product_attention

from models.parts.about import About
from models.parts.folding import as_linear, neutral, norm_then_linear
from models.parts.patches import grid_of, readable
from models.parts.segmenter import Segmenter
from models.parts.transformer import in_heads, out_of_heads
from models.parts.vit import Encoder, EncoderConfig

if TYPE_CHECKING:
    from models.parts.configs import Json
    from models.parts.network import Size

Mode = Literal["sa", "ca"]
Scores = Literal["auto", "norm", "temperature"]

ENCODERS: dict[str, dict[str, Json]] = {
    "tiny": {"image": (512, 512), "width": 192, "depth": 12, "heads": 3},
    "small": {"image": (512, 512), "width": 384, "depth": 12, "heads": 6},
    "base": {"image": (512, 512), "width": 768, "depth": 12, "heads": 12},
    "large": {"image": (640, 640), "width": 1024, "depth": 24, "heads": 16},
}
"""The published encoders, as fields of `Config`."""

ABOUT = About(
    paper="DEPICT, Wen and Li 2024, arXiv 2411.03033; ViT, Dosovitskiy et al. 2021",
    good_for="putting pretrained plain ViTs to work with a very small decoder; wants a GPU",
    licence="DEPICT MIT, Segmenter MIT; mind the licence of the encoder's weights",
    variants={
        f"{mode} {name}": {"mode": mode, **encoder}
        for mode in get_args(Mode)
        for name, encoder in ENCODERS.items()
    },
)


@dataclass(frozen=True, kw_only=True)
class Config(EncoderConfig):
    """DEPICT on a plain ViT; the defaults are the repository's with its smallest encoder."""

    image: tuple[int, int] = (512, 512)
    """Height and width that positions are made for; pictures of any other size can be read."""
    width: int = 192
    """Numbers per token, a multiple of heads; also of the decoder."""
    heads: int = 3
    """Attention heads of the encoder."""
    mode: Mode = "sa"
    """``sa`` or ``ca``, see above."""
    decoder_layers: int = 3
    """Layers in which tokens attend to each other; the paper's large model seems to have 6."""
    depth_ca: int = 3
    """Layers in which classes read patches; ca only."""
    decoder_heads: int = 3
    """Heads, that is subspaces, of every layer of the decoder."""
    dim_head_sa: int = 100
    """Dimensions of a subspace where tokens attend to each other."""
    dim_head_ca: int = 50
    """Dimensions of a subspace where classes read patches; ca only."""
    decoder_dropout: float = 0.0
    """Share of the decoder's attention dropped in training."""
    scores: Scores = "auto"
    """What follows the cosines: ``norm``, ``temperature``, or ``auto``: norm from 3 classes on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_below(
            1, "decoder_layers", "depth_ca", "decoder_heads", "dim_head_sa", "dim_head_ca"
        )
        self.refuse_no_share("decoder_dropout")
        self.refuse_unknown("mode", get_args(Mode))
        self.refuse_unknown("scores", get_args(Scores))


def build(config: Config) -> Segmenter:
    """The net of this config, freshly initialised from torch's default generator."""
    return DepictSegmenter(config)


class DepictSegmenter(Segmenter):
    """An encoder and DEPICT."""

    receptive_field = None  # attention sees everything
    captures = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.classes = config.channels, config.classes
        self.stride = self.multiple = config.patch
        self.encoder = Encoder(config)
        self.decoder = DECODERS[config.mode](config)

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw, a cell for each patch."""
        cells, cells_B2 = grid_of(x_BCHW, sizes_B2, self.stride)
        return self.decoder(self.encoder(x_BCHW, cells_B2), cells, cells_B2)

    def folded(self) -> Segmenter:
        """See `Network.folded`."""
        net = deepcopy(self)  # what is frozen there stays free here
        net.encoder.fold()
        net.decoder = net.decoder.folded()
        return net.eval().requires_grad_(requires_grad=False)


# ---------------------------------------------------------------------------------------- decoder


class SubspaceAttention(nn.Module):
    """What tokens have in common inside of a few subspaces, as a step of its own length."""

    def __init__(self, width: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(width)
        self.basis = nn.Parameter(torch.randn(heads * dim_head, width) * width**-0.5)
        self.step = nn.Parameter(torch.randn(1))

    def seen(self, x_BTD: Tensor) -> Tensor:
        """x_BHTd: the tokens as seen in the subspaces."""
        return in_heads(linear(x_BTD, self.basis), self.heads)

    def moved(
        self, query_BHQd: Tensor, tokens_BHTd: Tensor, readable_B11T: Tensor | None
    ) -> Tensor:
        """The step of those who ask, step_BQD."""
        drop = self.dropout if self.training else 0.0
        read_BHQd = scaled_dot_product_attention(
            query_BHQd, tokens_BHTd, tokens_BHTd, readable_B11T, drop
        )
        return self.step * (out_of_heads(read_BHQd) @ self.basis)


class SelfLayer(SubspaceAttention):
    """Tokens attend to each other (MSSA)."""

    def forward(self, x_BTD: Tensor, readable_B11T: Tensor | None) -> Tensor:
        """The tokens, moved."""
        tokens_BHTd = self.seen(self.norm(x_BTD))
        return x_BTD + self.moved(tokens_BHTd, tokens_BHTd, readable_B11T)


class CrossLayer(SubspaceAttention):
    """Classes read tokens (MSCA); they ask as they are, only the tokens are normalised."""

    def forward(self, classes_BKD: Tensor, x_BTD: Tensor, readable_B11T: Tensor | None) -> Tensor:
        """The classes, moved."""
        tokens_BHTd = self.seen(self.norm(x_BTD))
        return classes_BKD + self.moved(self.seen(classes_BKD), tokens_BHTd, readable_B11T)


class Temperature(nn.Module):
    """Scores are cosines times a learned number; it begins at 1 / 0.07 as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(0.07)))

    def forward(self, cosines_BTK: Tensor) -> Tensor:
        """scores_BTK."""
        return cosines_BTK * self.log_scale.exp()


class Decoder(nn.Module):
    """From the tokens of any plain ViT to class scores; usable without the encoder.

    A subclass says how patches and classes meet.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.empty(config.classes, config.width))
        nn.init.trunc_normal_(self.classes, std=0.02)
        norm = config.scores == "norm" or (config.scores == "auto" and config.classes > 2)
        self.scores = nn.LayerNorm(config.classes) if norm else Temperature()

    def forward(self, x_BTD: Tensor, cells: Size, cells_B2: Tensor | None = None) -> Tensor:
        """Logits_BKhw.

        Args:
            x_BTD: tokens of patches alone, row by row.
            cells: how many rows and columns they make.
            cells_B2: what of the grid belongs to each item; None: all.

        Raises:
            ValueError: another number of tokens than the grid has cells.
        """
        if x_BTD.shape[1] != cells[0] * cells[1]:
            raise ValueError(
                f"{x_BTD.shape[1]} tokens do not fill a grid of {cells[0]} x {cells[1]}; "
                "leave out class tokens, and count rows and columns of patches, not of pixels"
            )
        patches_BTD, classes_BKD = self.met(x_BTD, cells, cells_B2)
        cosines_BTK = unit(patches_BTD) @ unit(classes_BKD).mT
        return self.scores(cosines_BTK).mT.unflatten(2, cells)

    def met(self, x_BTD: Tensor, cells: Size, cells_B2: Tensor | None) -> tuple[Tensor, Tensor]:
        """patches_BTD and classes_BKD after all layers."""
        raise NotImplementedError

    def folded(self) -> Decoder:
        """The same for inference; it takes over parts of this one."""
        raise NotImplementedError


class SelfDecoder(Decoder):
    """Classes are appended to the patches (mode sa)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layers = _self_layers(config)
        self.norm = nn.LayerNorm(config.width)

    def met(self, x_BTD: Tensor, cells: Size, cells_B2: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Decoder`."""
        x_BND = torch.cat([x_BTD, self.classes.expand(len(x_BTD), -1, -1)], dim=1)
        readable_B11N = readable(cells, cells_B2, after=len(self.classes))
        for layer in self.layers:
            x_BND = layer(x_BND, readable_B11N)
        x_BND = self.norm(x_BND)
        return x_BND[:, : x_BTD.shape[1]], x_BND[:, x_BTD.shape[1] :]

    def folded(self) -> Decoder:
        """See `Decoder`."""
        self.layers = nn.ModuleList(
            FoldedSelfLayer(cast("SelfLayer", layer)) for layer in self.layers
        )
        return self


class CrossDecoder(Decoder):
    """Patches first, then classes read them (mode ca)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layers = _self_layers(config)
        self.norm = nn.LayerNorm(config.width)
        self.cross_layers = nn.ModuleList(
            CrossLayer(
                config.width, config.decoder_heads, config.dim_head_ca, config.decoder_dropout
            )
            for _ in range(config.depth_ca)
        )
        self.class_norm = nn.LayerNorm(config.width)

    def met(self, x_BTD: Tensor, cells: Size, cells_B2: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Decoder`."""
        readable_B11T = readable(cells, cells_B2)
        for layer in self.layers:
            x_BTD = layer(x_BTD, readable_B11T)
        patches_BTD = self.norm(x_BTD)
        classes_BKD = self.classes.expand(len(x_BTD), -1, -1)
        for layer in self.cross_layers:
            classes_BKD = layer(classes_BKD, patches_BTD, readable_B11T)
        return patches_BTD, self.class_norm(classes_BKD)

    def folded(self) -> Decoder:
        """See `Decoder`."""
        return FoldedCrossDecoder(self)


DECODERS = {"sa": SelfDecoder, "ca": CrossDecoder}


def unit(x_BTD: Tensor) -> Tensor:
    """The tokens at length 1; a token of zeros stays one instead of becoming NaN."""
    return normalize(x_BTD, dim=-1, eps=1e-12)


def _self_layers(config: Config) -> nn.ModuleList:
    return nn.ModuleList(
        SelfLayer(config.width, config.decoder_heads, config.dim_head_sa, config.decoder_dropout)
        for _ in range(config.decoder_layers)
    )


# ----------------------------------------------------------------------------------- for inference


class FoldedSelfLayer(nn.Module):
    """A self layer whose norm and step have become part of its matrices."""

    @torch.no_grad()
    def __init__(self, plain: SelfLayer) -> None:
        super().__init__()
        self.heads = plain.heads
        self.norm = neutral(plain.norm)
        self.see = as_linear(norm_then_linear(plain.norm, plain.basis, None))
        self.out_SD = nn.Parameter(plain.step * plain.basis)

    def forward(self, x_BTD: Tensor, readable_B11T: Tensor | None) -> Tensor:
        """See `SelfLayer`."""
        tokens_BHTd = in_heads(self.see(self.norm(x_BTD)), self.heads)
        read_BHTd = scaled_dot_product_attention(
            tokens_BHTd, tokens_BHTd, tokens_BHTd, readable_B11T
        )
        return x_BTD + out_of_heads(read_BHTd) @ self.out_SD


class FoldedCrossDecoder(Decoder):
    """All cross layers see the same tokens: in one product; and what they first ask is known."""

    @torch.no_grad()
    def __init__(self, plain: CrossDecoder) -> None:
        nn.Module.__init__(self)
        self.classes, self.scores = plain.classes, plain.scores
        self.layers = nn.ModuleList(
            FoldedSelfLayer(cast("SelfLayer", layer)) for layer in plain.layers
        )
        self.norm, self.class_norm = plain.norm, plain.class_norm
        cross = cast("list[CrossLayer]", list(plain.cross_layers))
        self.heads = cross[0].heads
        self.token_norm = neutral(cross[0].norm)
        seen = [norm_then_linear(layer.norm, layer.basis, None) for layer in cross]
        weights, biases = zip(*seen, strict=True)
        self.see = as_linear((torch.cat(weights), torch.cat(biases)))
        self.first_query_1HKd = nn.Parameter(cross[0].seen(plain.classes[None]))
        self.bases_LSD = nn.Parameter(torch.stack([layer.basis for layer in cross]))
        self.outs_LSD = nn.Parameter(torch.stack([layer.step * layer.basis for layer in cross]))

    def met(self, x_BTD: Tensor, cells: Size, cells_B2: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Decoder`."""
        readable_B11T = readable(cells, cells_B2)
        for layer in self.layers:
            x_BTD = layer(x_BTD, readable_B11T)
        patches_BTD = self.norm(x_BTD)
        seen_BTS = self.see(self.token_norm(patches_BTD)).chunk(len(self.bases_LSD), dim=2)
        classes_BKD = self.classes.expand(len(x_BTD), -1, -1)
        query_BHKd = self.first_query_1HKd.expand(len(x_BTD), -1, -1, -1)
        for place, tokens_BTS in enumerate(seen_BTS):
            if place:
                query_BHKd = in_heads(linear(classes_BKD, self.bases_LSD[place]), self.heads)
            tokens_BHTd = in_heads(tokens_BTS, self.heads)
            read_BHKd = scaled_dot_product_attention(
                query_BHKd, tokens_BHTd, tokens_BHTd, readable_B11T
            )
            classes_BKD = classes_BKD + out_of_heads(read_BHKd) @ self.outs_LSD[place]
        return patches_BTD, self.class_norm(classes_BKD)
