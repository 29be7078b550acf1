"""What nets made elsewhere share: the sizes they read are found by trying, and then kept to.

Unusual: nothing inside such a net can be told where a picture ends. Items of different sizes
therefore never pass together, each passes alone at its own padded size. And a net may read

* any size, with sides that are multiples of something: most do;
* squares only: heads that take the root of the number of tokens (DPT) would read an oblong picture
  as another one, without an error; pictures are padded to squares;
* one size only: its pictures are padded to that, and tiles are no larger.

Shapes: B batch, C input channels, H W padded input, K classes, h w native grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from models.parts.configs import ModelConfig
from models.parts.network import on_canvas
from models.parts.segmenter import Segmenter

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.parts.network import Size

OBLONG = ((1, 4), (4, 1), (2, 3))
"""Sizes to try, in multiples; 1 x 4 has as many tokens as a square."""
SQUARE = ((1, 1), (2, 2), (3, 3))
DOUBLED = (1, 2, 4)
"""What the multiple that is expected is tried times of."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of its training pictures, red, green, blue: what most nets were trained on."""
IMAGENET_GRAY = ((0.449,), (0.226,))
"""Their averages, as timm uses them for gray pictures."""


@dataclass(frozen=True, kw_only=True)
class GuestConfig(ModelConfig):
    """How pictures must be given to a net made elsewhere."""

    stride: int = 1
    """Input pixels per cell of its scores."""
    multiple: int = 1
    """Sides are padded to a multiple of this many pixels."""
    square: bool = False
    """Whether it reads squares only."""
    fixed: tuple[int, int] = (0, 0)
    """Height and width of the only size it reads; zeros: it is not bound to one."""

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(
                f"classes must be at least 2, it is {self.classes}; "
                "for one kind of object count the background as a class"
            )
        if min(self.stride, self.multiple) < 1 or self.multiple % self.stride:
            raise ValueError(
                f"multiple {self.multiple} must be a multiple of stride {self.stride}, 1 or more"
            )


class Guest(Segmenter):
    """A net made elsewhere; a subclass writes `logits`."""

    receptive_field = None  # nobody says

    def __init__(self, config: GuestConfig) -> None:
        super().__init__()
        self.config = config
        self.channels, self.classes = config.channels, config.classes
        self.stride, self.multiple = config.stride, config.multiple
        self.square, self.fixed = config.square, config.fixed
        self.max_side = min(config.fixed) or None

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Logits_BKhw of pictures that fill their canvas."""
        raise NotImplementedError

    def padded_size(self, height: int, width: int) -> Size:
        """See `Network.padded_size`."""
        if self.max_side is not None:
            return self.fixed
        size = super().padded_size(height, width)
        return (max(size), max(size)) if self.square else size

    def grid(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """Logits_BKhw; items of different sizes pass one by one."""
        if sizes_B2 is None:
            return self._scores(x_BCHW)
        height, width = x_BCHW.shape[-2:]
        cells = height // self.stride, width // self.stride
        items = (x_BCHW[i : i + 1, :, :h, :w] for i, (h, w) in enumerate(sizes_B2.tolist()))
        return on_canvas((self._scores(x_1CHW.contiguous()) for x_1CHW in items), cells)

    def folded(self) -> Guest:
        """Itself, in eval mode: what is inside is not ours to rearrange."""
        return self.eval()

    def _scores(self, x_BCHW: Tensor) -> Tensor:
        batch, _, height, width = x_BCHW.shape
        expected = (batch, self.classes, height // self.stride, width // self.stride)
        logits_BKhw = self.logits(x_BCHW)
        if logits_BKhw.shape != expected:
            raise ValueError(
                f"the net answers a picture of {height} x {width} with scores of shape "
                f"{tuple(logits_BKhw.shape)} instead of {expected}; it is not the one that was "
                "tried when its bundle was made: make the bundle again"
            )
        return logits_BKhw


def sizes_read(
    cells: Callable[[int, int], Size], multiple: int, fixed: Size | None
) -> dict[str, object]:
    """Fields of `GuestConfig`: the sizes a net reads, found by trying.

    Args:
        cells: height and width of the scores of a picture of this height and width; may raise.
        multiple: where to begin.
        fixed: the size to try last, if the net speaks of one.

    Raises:
        ValueError: none of them.
    """
    why = ""

    def stride_at(height: int, width: int) -> int | None:
        nonlocal why
        try:
            h, w = cells(height, width)
        except Exception as error:  # noqa: BLE001 - code that is not ours raises what it likes
            said = str(error).strip() or type(error).__name__
            why = f"{height} x {width}: {said.splitlines()[0]}"
            return None
        stride = height // h if h else 0
        if stride and (h * stride, w * stride) == (height, width):
            return stride
        why = f"{height} x {width} came back as {h} x {w}"
        return None

    for square, tried in ((False, OBLONG), (True, SQUARE)):
        for step in (multiple * times for times in DOUBLED):
            strides = {stride_at(a * step, b * step) for a, b in tried}
            stride = strides.pop()
            if not strides and stride is not None:
                return {"stride": stride, "multiple": step, "square": square}
    if fixed is not None and (stride := stride_at(*fixed)) is not None:
        return {"stride": stride, "multiple": stride, "fixed": fixed}
    steps = ", ".join(str(multiple * times) for times in DOUBLED)
    raise ValueError(
        f"pictures whose sides are multiples of {steps} do not come back as scores of a fixed "
        f"fraction of their size ({why}); this net cannot be used on pictures of different sizes"
    )


def colour(number: int) -> tuple[int, int, int]:
    """Red, green, blue for a class without a colour: PASCAL VOC's rule, different for each.

    The bits of the number are dealt to the three, each from its highest bit down.
    """
    red, green, blue = (
        sum((number >> (3 * i + channel) & 1) << (7 - i) for i in range(8)) for channel in range(3)
    )
    return red, green, blue
