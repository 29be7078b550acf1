"""What every model of the zoo promises: which pictures it takes, and the form that is fast.

A picture is padded at the bottom and on the right with zeros, the mean of normalised pixels, up to
`padded_size`: a rule of its own size alone, so that an answer cannot depend on what it was batched
with. That padded answer is the definition of the model (MODELS.md section 8.2).

Shapes: B batch, C input channels, H W padded input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from models.parts.padding import cleared

if TYPE_CHECKING:
    from collections.abc import Iterable

    from models.parts.configs import ModelConfig

Size = tuple[int, int]
"""Height and width."""


class Network(nn.Module):
    """A model that reads pictures."""

    config: ModelConfig
    task: Literal["segment", "classify"]
    classes: int
    channels: int
    min_side: int = 1
    """The shortest side it accepts."""
    max_side: int | None = None
    """The longest side it accepts; None: any."""
    multiple: int = 1
    """Sides are padded to a multiple of this many pixels."""
    stride: int
    """Input pixels per cell of the native grid."""
    compiles: bool = True
    """Whether torch.compile has something to work on."""
    replays: bool = False
    """Whether the operations of its work follow from the shape of its input alone (replay.py)."""
    captures: bool = False
    """Whether its work, on a GPU, never asks for a value: it can be captured as a CUDA graph."""
    receptive_field: int | None
    """Pixels one answer depends on; None: all of them."""

    def padded_size(self, height: int, width: int) -> Size:
        """The size at which a picture of this size is read."""
        return -(-height // self.multiple) * self.multiple, -(
            -width // self.multiple
        ) * self.multiple

    def folded(self) -> Network:
        """The same answers from fewer operations, for inference: made from the present weights.

        Differs by rounding only. Not to be trained, and later changes of the weights need not
        reach it. A model that has no such form is its own.
        """
        return self.eval()

    def checked(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> list[Size]:
        """The valid size of every item.

        Raises:
            ValueError: channels or sizes that this model cannot read.
        """
        batch, channels, height, width = x_BCHW.shape
        if channels != self.channels:
            raise ValueError(
                f"the model reads {self.channels} channels, the batch has {channels} "
                f"(shape {tuple(x_BCHW.shape)}); convert the pictures"
            )
        if sizes_B2 is None:
            sizes = [(height, width)] * batch
        elif sizes_B2.shape != (batch, 2):
            raise ValueError(f"sizes must be ({batch}, 2), they are {tuple(sizes_B2.shape)}")
        else:
            sizes = [(h, w) for h, w in sizes_B2.tolist()]
        for h, w in set(sizes):
            self.check_size(h, w)
            if h > height or w > width:
                raise ValueError(
                    f"a picture of {h} x {w} in a batch of {height} x {width}: sizes must fit into "
                    "the batch; pad the picture or leave it out"
                )
        return sizes

    def check_size(self, height: int, width: int) -> None:
        """Whether a picture of this size can be read.

        Raises:
            ValueError: it cannot.
        """
        if self.max_side is not None and max(height, width) > self.max_side:
            raise ValueError(
                f"a picture of {height} x {width}: this model reads sides of up to "
                f"{self.max_side}; cut the picture into tiles"
            )
        if min(height, width) < self.min_side:
            raise ValueError(
                f"a picture of {height} x {width}: sides must be at least {self.min_side}; "
                "pad the picture or leave it out"
            )

    def alone(self, x_BCHW: Tensor, sizes: list[Size]) -> list[Tensor]:
        """Each item for itself, x_1CHW at its padded size."""
        items = []
        for i, (h, w) in enumerate(sizes):
            # Strides, not is_contiguous: a single-channel picture counts as contiguous in either
            # format, and the strides it happens to have would choose the kernel.
            x_1CHW = x_BCHW[i : i + 1, :, :h, :w]
            x_1CHW = on_canvas([x_1CHW], self.padded_size(h, w))
            _, channels, height, width = x_1CHW.shape
            if x_1CHW.stride() != (height * width * channels, 1, width * channels, channels):
                x_1CHW = x_1CHW.clone(memory_format=torch.channels_last)
            items.append(x_1CHW)
        return items

    def together(self, x_BCHW: Tensor, sizes: list[Size]) -> tuple[Tensor, Tensor | None]:
        """All items on one canvas, zeros around each, and their padded sizes if they differ."""
        padded = [self.padded_size(h, w) for h, w in sizes]
        canvas = max(h for h, _ in padded), max(w for _, w in padded)
        x_BCHW = fitted(x_BCHW, sizes, canvas)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        same = set(padded) == {canvas}
        return x_BCHW, None if same else beside(x_BCHW, padded)


def fitted(x_BCHW: Tensor, sizes: list[Size], canvas: Size) -> Tensor:
    """Items of these sizes on a canvas, zeros below and to the right of each."""
    height, width = x_BCHW.shape[-2:]
    x_BCHW = x_BCHW[:, :, : canvas[0], : canvas[1]]
    if set(sizes) != {(height, width)} and set(sizes) != {canvas}:
        x_BCHW = cleared(x_BCHW, beside(x_BCHW, sizes))
    return on_canvas([x_BCHW], canvas)


def beside(x_BCHW: Tensor, sizes: list[Size]) -> Tensor:
    """sizes_B2 where the pictures are; a GPU fetches them without making the host wait."""
    sizes_B2 = torch.tensor(sizes)
    if x_BCHW.device.type == "cuda":
        sizes_B2 = sizes_B2.pin_memory()
    return sizes_B2.to(x_BCHW.device, non_blocking=True)


def on_canvas(items: Iterable[Tensor], size: Iterable[int]) -> Tensor:
    """Pictures or answers of different sizes as one batch, zeros below and to the right."""
    height, width = size
    padded = [
        a  # by no rows and columns torch would copy it, into a memory format of its own
        if a.shape[-2:] == (height, width)
        else nn.functional.pad(a, (0, width - a.shape[-1], 0, height - a.shape[-2]))
        for a in items
    ]
    return padded[0] if len(padded) == 1 else torch.cat(padded)
