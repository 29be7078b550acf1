"""The pre-norm transformer: every token reads the others, then thinks for itself.

Attention Is All You Need (Vaswani et al. 2017) with the norms first, as in the vision transformer
(Dosovitskiy et al. 2021).

Shapes: B batch, T tokens, Q tokens that ask, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from models.parts.configs import ModelConfig, did_you_mean
from models.parts.folding import as_linear, neutral, norm_then_linear


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """What all transformers over patches have in common."""

    image: tuple[int, int] = (128, 128)
    """Height and width that positions are made for; pictures of any other size can be read."""
    patch: int = 16
    """Side of a patch, in pixels."""
    width: int = 768
    """Numbers per token, a multiple of heads."""
    depth: int = 12
    """Blocks."""
    heads: int = 8
    """Attention heads."""

    def __post_init__(self) -> None:
        self.refuse_below(1, "channels", "patch", "width", "depth", "heads")
        if len(self.image) != 2 or any(side < 1 or side % self.patch for side in self.image):
            nearest = tuple(max(1, round(side / self.patch)) * self.patch for side in self.image)
            raise ValueError(
                f"image {self.image} must be a height and a width, both multiples of patch "
                f"{self.patch}; try {(nearest * 2)[:2]} (pictures may have any size)"
            )
        refuse_uneven(self.width, self.heads)
        if self.classes < 2:
            raise ValueError(
                f"classes must be at least 2, it is {self.classes}; "
                "for one kind of object count the background as a class"
            )

    @property
    def cells(self) -> tuple[int, int]:
        """The grid of patches of `image`."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    def refuse_below(self, least: int, *names: str) -> None:
        """Numbers that are too small for what they count."""
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, it is {getattr(self, name)}")

    def refuse_unknown(self, name: str, known: tuple[str, ...]) -> None:
        """A choice that is none."""
        if (value := getattr(self, name)) not in known:
            raise ValueError(f"there is no {name} {value!r}{did_you_mean(value, known)}")

    def refuse_no_share(self, *names: str) -> None:
        """Shares to drop that would leave nothing, or are none."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, it is {getattr(self, name)}; try 0.1"
                )


def refuse_uneven(width: int, heads: int) -> None:
    """Raises ValueError unless the heads can share the width."""
    if width % heads:
        raise ValueError(
            f"a width of {width} cannot be shared by {heads} heads; "
            f"try {math.gcd(width, heads)} heads or a width of {heads * -(-width // heads)}"
        )


class SelfAttention(nn.Module):
    """Every token reads all tokens; queries, keys and values come from one matrix.

    What is dropped in training: shares of attention, and channels of the answer.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        drop_shares: float = 0.0,
        drop_answer: float = 0.0,
    ) -> None:
        super().__init__()
        refuse_uneven(width, heads)
        self.heads, self.drop_shares = heads, drop_shares
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.drop_answer = nn.Dropout(drop_answer)

    def forward(self, x_BTD: Tensor, readable_B11T: Tensor | None) -> Tensor:
        """What the tokens read; those not marked readable are not looked at."""
        query_BHTd, key_BHTd, value_BHTd = in_heads(self.qkv(x_BTD), 3 * self.heads).chunk(3, dim=1)
        read_BTD = self.attend(query_BHTd, key_BHTd, value_BHTd, readable_B11T)
        return self.drop_answer(self.proj(read_BTD))

    def attend(
        self,
        query_BHQd: Tensor,
        key_BHTd: Tensor,
        value_BHTd: Tensor,
        readable_B11T: Tensor | None,
    ) -> Tensor:
        """read_BQD, the heads side by side."""
        drop = self.drop_shares if self.training else 0.0
        return out_of_heads(
            scaled_dot_product_attention(query_BHQd, key_BHTd, value_BHTd, readable_B11T, drop)
        )


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(
        self, width: int, hidden: int, *, drop_hidden: float = 0.0, drop_answer: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.drop_hidden = nn.Dropout(drop_hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop_answer = nn.Dropout(drop_answer)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each token by itself."""
        return self.drop_answer(self.fc2(self.drop_hidden(gelu(self.fc1(x_BTD)))))


class Block(nn.Module):
    """Attention and a small net per token, each added to what was there."""

    def __init__(self, attention: SelfAttention, mlp: Mlp, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(attention.proj.out_features)
        self.attention = attention
        self.norm2 = nn.LayerNorm(attention.proj.out_features)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BTD: Tensor, readable_B11T: Tensor | None) -> Tensor:
        """The same tokens, having read each other."""
        x_BTD = x_BTD + self.drop_path(self.attention(self.norm1(x_BTD), readable_B11T))
        return x_BTD + self.drop_path(self.mlp(self.norm2(x_BTD)))


class Blocks(nn.ModuleList):
    """One block after the other."""

    def forward(self, x_BTD: Tensor, readable_B11T: Tensor | None) -> Tensor:
        """The tokens after the last one."""
        for block in self:
            x_BTD = block(x_BTD, readable_B11T)
        return x_BTD

    def fold(self) -> None:
        """See `fold`."""
        for block in self:
            fold(cast("Block", block))


class DropPath(nn.Module):
    """Leaves a branch out for some items, in training (stochastic depth, Huang et al. 2016)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The branch, or zeros; the same in the mean."""
        if not self.training or self.share == 0:
            return x_BTD
        kept_B11 = x_BTD.new_empty(len(x_BTD), 1, 1).bernoulli_(1 - self.share)
        return x_BTD * kept_B11 / (1 - self.share)


def in_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """x_BHTd."""
    return x_BTD.unflatten(2, (heads, -1)).transpose(1, 2)


def out_of_heads(x_BHTd: Tensor) -> Tensor:
    """x_BTD."""
    return x_BHTd.transpose(1, 2).flatten(2)


@torch.no_grad()
def drawn_as_usual_for_vits(root: nn.Module) -> None:
    """Linear layers from N(0, 0.02), cut at -2 and 2, and biases zero, as timm has it."""
    for module in root.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ----------------------------------------------------------------------------------- for inference


@torch.no_grad()
def fold(block: Block) -> None:
    """Let the layers behind the norms take over their weights and biases, in place."""
    qkv, fc1 = block.attention.qkv, block.mlp.fc1
    block.attention.qkv = as_linear(norm_then_linear(block.norm1, qkv.weight, qkv.bias))
    block.mlp.fc1 = as_linear(norm_then_linear(block.norm2, fc1.weight, fc1.bias))
    block.norm1, block.norm2 = neutral(block.norm1), neutral(block.norm2)
