"""One picture seen many ways: another size, place, orientation, colour.

Pixels stay 8-bit until the end and Pillow does the work, so that neither torch nor a GPU is needed
where pictures are prepared. A window is cut first and stretched then: nothing outside is touched.

Shapes: H W picture, h w what comes out, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from models.training.reading import STRICT, refuse_no_share

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

SMOOTH, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
LUMA = (0.299, 0.587, 0.114)
"""How bright red, green and blue look (ITU-R 601-2)."""
TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """How far a picture may stray; all draws come from the generator handed in."""

    __pydantic_config__ = STRICT

    size: tuple[int, int] = (256, 256)
    """Height and width of what comes out, in pixels."""
    whole: bool = False
    """Squeeze whole pictures into that size, whatever their shape, instead of cutting windows."""
    zoom: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest magnification of a window."""
    balanced: float = 0.0
    """Share of windows around a pixel of a class drawn from those in the picture, rare or not."""
    flip: float = 0.5
    """Share of pictures mirrored left to right."""
    turns: bool = False
    """Turn by quarters too: for pictures that have no above."""
    rotation: float = 0.0
    """Largest rotation to either side, in degrees; it costs a second pass over the pixels."""
    contrast: tuple[float, float] = (0.8, 1.25)
    """Smallest and largest contrast."""
    gamma: tuple[float, float] = (0.8, 1.25)
    """Smallest and largest bend of the brightness curve."""
    saturation: tuple[float, float] = (0.8, 1.25)
    """Smallest and largest colourfulness; gray pictures have none."""
    shift: float = 0.03
    """Largest change of each channel, white being 1."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"augment.size must be at least 1 x 1, it is {self.size}")
        for name in ("zoom", "contrast", "gamma", "saturation"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(
                    f"augment.{name} must be two factors, the smaller first, it is {(low, high)}; "
                    "(1, 1) changes nothing"
                )
        refuse_no_share(self, "balanced", "flip", "shift", of="augment.")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"augment.rotation must be 0 to 180 degrees, it is {self.rotation}")
        if self.turns and self.size[0] != self.size[1]:
            raise ValueError(
                f"augment.turns needs a square, augment.size is {self.size}; "
                f"try {(min(self.size),) * 2}"
            )
        if self.whole and (self.balanced or self.zoom != (1, 1)):
            raise ValueError(
                "augment.whole leaves no window to choose: "
                f"set augment.zoom {self.zoom} to (1, 1) and augment.balanced {self.balanced} to 0"
            )

    def __call__(
        self,
        pixels_HWC: NDArray[np.uint8],
        labels_HW: NDArray[np.integer],
        draws: Generator,
        ignore_id: int = 255,
    ) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """The picture and its labels, both h x w, of the types they came in.

        Args:
            pixels_HWC: 8-bit, gray or RGB.
            labels_HW: class indexes.
            draws: the only source of chance.
            ignore_id: what labels say outside of the picture.
        """
        angle = draws.uniform(-self.rotation, self.rotation) if self.rotation else 0.0
        canvas = self._canvas(angle)
        window = self._window(labels_HW, canvas, draws, ignore_id)
        picture, labels = _images(pixels_HWC, labels_HW, ignore_id)
        picture = _seen(picture, window, canvas, SMOOTH, fill=None)
        labels = _seen(labels, window, canvas, NEAREST, fill=ignore_id)
        if angle:
            picture = self._middle(picture.rotate(angle, SMOOTH, fillcolor=_mean_color(picture)))
            labels = self._middle(labels.rotate(angle, NEAREST, fillcolor=ignore_id))
        for move in self._moves(draws):
            picture, labels = picture.transpose(move), labels.transpose(move)
        picture = self._recoloured(picture, draws)
        answer_hwC = np.array(picture).reshape(*self.size, pixels_HWC.shape[2])
        return answer_hwC, np.array(labels).astype(labels_HW.dtype)

    def _canvas(self, angle: float) -> tuple[int, int]:
        """What must be seen before a rotation, so that nothing is missing after it."""
        if not angle:
            return self.size
        (height, width), turn = self.size, math.radians(angle)
        cos, sin = abs(math.cos(turn)), abs(math.sin(turn))
        turned = math.ceil(height * cos + width * sin), math.ceil(width * cos + height * sin)
        return max(height, turned[0]), max(width, turned[1])

    def _middle(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def _window(
        self, labels_HW: NDArray[np.integer], canvas: tuple[int, int], draws: Generator, void: int
    ) -> Window:
        if self.whole:
            return Window(0, 0, *labels_HW.shape)
        zoom = _between(self.zoom, draws)
        sides = [side / zoom for side in canvas]
        target = None
        if self.balanced and draws.random() < self.balanced:
            target = _somewhere(labels_HW, draws, void)
        corner = []
        for axis, (length, side) in enumerate(zip(labels_HW.shape, sides, strict=True)):
            slack = int(length - side)  # below 0 the picture lies somewhere in the window
            low, high = min(0, slack), max(0, slack)
            if target is not None:
                low = min(max(low, math.ceil(target[axis] + 1 - side)), high)
                high = max(min(high, target[axis]), low)
            corner.append(int(draws.integers(low, high + 1)))
        return Window(*corner, *sides)

    def _moves(self, draws: Generator) -> list[Image.Transpose]:
        turn = TURNS[draws.integers(4)] if self.turns else None
        mirror = MIRROR if draws.random() < self.flip else None
        return [move for move in (turn, mirror) if move is not None]

    def _recoloured(self, picture: Image.Image, draws: Generator) -> Image.Image:
        """Saturation, then one table of 256 values for each channel."""
        factor = _between(self.saturation, draws)
        if factor != 1 and picture.mode == "RGB":
            picture = picture.convert("RGB", _saturating(factor))
        contrast, gamma = _between(self.contrast, draws), _between(self.gamma, draws)
        middle_C1 = _mean_of(picture)[:, None] / 255
        shift_C1 = draws.uniform(-self.shift, self.shift, middle_C1.shape)
        bent_256 = np.linspace(0, 1, 256) ** gamma
        table_C256 = middle_C1 + (bent_256 - middle_C1) * contrast + shift_C1
        return picture.point((255 * table_C256).round().clip(0, 255).astype(int).ravel().tolist())


def unchanged(size: tuple[int, int]) -> Augment:
    """Whole pictures at this size, as they are."""
    same = (1.0, 1.0)
    return Augment(
        size=size,
        whole=True,
        zoom=same,
        flip=0.0,
        contrast=same,
        gamma=same,
        saturation=same,
        shift=0.0,
    )


class Window(NamedTuple):
    """A part of the picture's plane, in its pixels; it may reach beyond the picture."""

    top: int
    left: int
    height: float
    width: float


def drawing(*numbers: int) -> Generator:
    """Draws that follow from these numbers alone (a seed, an epoch, a picture's place in it).

    A training that is taken up again then needs no state of its augmentation.
    """
    # With its length in front: numpy takes (1,) and (1, 0) for the same seed.
    return np.random.default_rng((len(numbers), *numbers))


def _images(
    pixels_HWC: NDArray[np.uint8], labels_HW: NDArray[np.integer], ignore_id: int
) -> tuple[Image.Image, Image.Image]:
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.shape[2] not in (1, 3):
        raise ValueError(
            f"a picture of {pixels_HWC.dtype} {pixels_HWC.shape}: "
            "augmentation reads 8-bit pixels of 1 or 3 channels; convert the pictures"
        )
    if pixels_HWC.shape[:2] != labels_HW.shape:
        raise ValueError(f"a picture of {pixels_HWC.shape[:2]} with labels of {labels_HW.shape}")
    if ignore_id > np.iinfo(labels_HW.dtype).max:
        raise ValueError(f"labels of {labels_HW.dtype} cannot hold ignore_id {ignore_id}")
    if labels_HW.dtype != np.uint8:
        labels_HW = labels_HW.astype(np.int32)  # Pillow knows no other large integers
    flat = pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC
    return Image.fromarray(flat), Image.fromarray(labels_HW)


def _seen(
    image: Image.Image,
    window: Window,
    canvas: tuple[int, int],
    how: Image.Resampling,
    fill: int | None,
) -> Image.Image:
    """What the window shows, stretched to the canvas; the outside is filled, None: mean colour."""
    rows = _covered(window.top, window.height, image.height, canvas[0])
    columns = _covered(window.left, window.width, image.width, canvas[1])
    size = (columns.length, rows.length)
    seen = image.resize(size, how, (columns.low, rows.low, columns.high, rows.high))
    if size == size_of(canvas):
        return seen
    whole = Image.new(image.mode, size_of(canvas), _mean_color(seen) if fill is None else fill)
    whole.paste(seen, (columns.start, rows.start))
    return whole


def size_of(shape: tuple[int, int]) -> tuple[int, int]:
    """Width and height, as Pillow counts."""
    height, width = shape
    return width, height


class Covered(NamedTuple):
    """Along one axis: pixels of the canvas that show the picture, and the part they show."""

    start: int
    length: int
    low: float
    high: float


def _covered(corner: int, side: float, length: int, pixels: int) -> Covered:
    scale = pixels / side
    first, last = max(0, corner), min(length, corner + side)
    start = math.ceil((first - corner) * scale - 1e-6)
    stop = math.floor((last - corner) * scale + 1e-6)
    if stop <= start:  # less than a pixel of it is seen: it fills one
        start = math.floor((first - corner) * scale)
        stop = start + 1
    low, high = (min(max(0.0, corner + end / scale), length) for end in (start, stop))
    return Covered(start, stop - start, low, high)


def _mean_color(image: Image.Image) -> tuple[int, ...] | int:
    mean = [round(value) for value in _mean_of(image).tolist()]
    return tuple(mean) if len(mean) > 1 else mean[0]


def _mean_of(image: Image.Image) -> NDArray[np.float64]:
    """Of each channel; a fifth of the time that numpy takes over three interleaved ones."""
    counts_C256 = np.array(image.histogram()).reshape(-1, 256)
    return counts_C256 @ np.arange(256) / counts_C256[0].sum()


def _saturating(factor: float) -> tuple[float, ...]:
    """Away from gray, or towards it, as three rows of weights for red, green, blue and 1."""
    matrix_34 = np.zeros((3, 4))
    matrix_34[:, :3] = factor * np.eye(3) + (1 - factor) * np.array(LUMA)
    return tuple(matrix_34.ravel().tolist())


def _somewhere(
    labels_HW: NDArray[np.integer], draws: Generator, void: int
) -> tuple[int, int] | None:
    """Row and column of a pixel whose class was drawn first; None if no pixel has one."""
    present = np.flatnonzero(np.bincount(labels_HW.ravel()))
    present = present[present != void]
    if not present.size:
        return None
    places = np.flatnonzero(labels_HW == draws.choice(present))
    row, column = divmod(int(draws.choice(places)), labels_HW.shape[1])
    return row, column


def _between(limits: tuple[float, float], draws: Generator) -> float:
    """A factor between the two, as often below 1 as its inverse is above."""
    low, high = (math.log(limit) for limit in limits)
    return math.exp(low + (high - low) * draws.random())
