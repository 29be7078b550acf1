"""Cut pictures into tiles and stitch the scores together again: inverse to each other, in one file.

A picture that fits one tile is one tile. A larger one is cut into overlapping tiles whose offsets
are multiples of the model's stride, so that their native score grids coincide. Where tiles overlap
their scores are averaged with a taper (gaussian: sigma an eighth of the tile, as in nnU-Net,
Isensee et al. 2021; or linear). For a model with a finite receptive field, cells nearer to an inner
tile border than half of it count nothing, so the stitched scores equal those of the whole picture.

Stitching goes from top to bottom and hands out finished pixel rows as soon as no later tile can
change them: memory holds one row of tiles, never the scores of the whole picture.

Shapes: K classes; G, g rows and columns of the native grid (stride pixels a cell); H, W pixels.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.records import Array, Pixels, PlannedImage


@dataclass(frozen=True, slots=True)
class Grid:
    """The rule for cutting: sizes in pixels."""

    size: int
    overlap: int
    stride: int
    taper: Literal["gaussian", "linear"]
    receptive_field: int | None
    """Pixels; None = the whole picture."""
    min_side: int
    """The model's smallest input; smaller pictures are padded up to it."""
    multiple: int = 1
    """The model pads sides to a multiple of this many pixels: tiles had better be multiples."""
    partial_cells: bool = False
    """Whether cells that the picture fills only in part are in the native grid."""

    @property
    def align(self) -> int:
        """Pixels that offsets and sides of tiles are multiples of."""
        return math.lcm(self.stride, self.multiple)

    def cells(self, length: int) -> int:
        """Native cells along a picture's side."""
        if self.partial_cells:
            return -(-length // self.stride)
        return max(1, length // self.stride)

    def span(self, length: int) -> int:
        """The pixels over which these cells are stretched."""
        return self.cells(length) * self.stride if self.partial_cells else length

    def side(self, length: int) -> int:
        """The side of the tiles along a picture's side: all equal, as small as their number allows.

        Tiles of full size would overlap far more than asked for wherever the length is a little
        beyond a multiple: 1200 pixels in tiles of 1024 are two of 664, not two of 1024.
        """
        if length <= self.size:
            return length
        most, overlap = max(self.align, self.size // self.align * self.align), self._shared
        count = -(-(length - overlap) // max(self.align, most - overlap))
        even = -(-(length + (count - 1) * overlap) // count)
        return -(-even // self.align) * self.align

    @property
    def _shared(self) -> int:
        """The overlap in whole steps."""
        return -(-self.overlap // self.align) * self.align

    def offsets(self, length: int) -> tuple[int, ...]:
        """First pixels of the tiles along a side, multiples of `align`."""
        side = self.side(length)
        if side == length:
            return (0,)
        last = -(-(length - side) // self.align) * self.align
        return (*range(0, last, max(self.align, side - self._shared)), last)

    def extent(self, offset: int, length: int) -> int:
        """Pixels of the tile that starts there."""
        return min(self.side(length), length - offset)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded image on its way through the model."""

    plan: PlannedImage
    pixels: Pixels
    input_bytes: int
    sha256: str
    large: bool
    """It does not fit the slots its fragment has left: it gets an array of its own."""
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    """Offsets of its tiles."""
    upright: tuple[int, int] | None = None
    """Height and width before it was scaled for a classifier; None: its pixels are unscaled."""

    @property
    def tiled(self) -> bool:
        """Whether it takes more than one tile."""
        return len(self.rows) * len(self.columns) > 1


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """A window of a picture, and where it goes back."""

    picture: Picture
    y: int
    x: int
    height: int
    width: int

    @property
    def values_HWC(self) -> Array:  # noqa: N802 - a name that carries its shape
        """Its pixels (a view)."""
        return self.picture.pixels.values_HWC[
            self.y : self.y + self.height, self.x : self.x + self.width
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Finished pixel rows of a mask, and what was counted in them."""

    labels_HW: Array
    """uint8 or uint16; the fill value where there is no data."""
    confidence_HW: Array | None
    """uint8, 255 = certain, 0 where there is no data."""
    counts_K: Array
    """Data pixels per class, int64."""
    confidences_K: Array
    """Sum of the winning class's softmax per class, float64."""


@dataclass(frozen=True, slots=True, eq=False)
class TileAnswer:
    """What the model says of a tile: rows or probabilities of a whole picture, scores of a part."""

    tile: Tile
    rows: Rows | None = None
    scores_KGg: Array | None = None
    probabilities_K: Array | None = None
    """A classifier's, float32."""
    failure: str | None = None
    """Why there is none of these."""


@dataclass(frozen=True, slots=True, eq=False)
class Strip:
    """Finished rows of a picture, from top to bottom."""

    picture: Picture
    rows: Rows | None
    last: bool
    seam_score: float | None = None
    """With the last strip of a tiled picture: share of overlapping cells whose tiles disagreed."""
    failure: str | None = None
    """Why there are no rows; the picture has no mask then."""


Finish = Callable[[Picture, Array, int, tuple[int, int], int, int], Rows]
"""(picture, scores_KGg from grid row g0 on, g0, whole grid (G, g), y0, y1) -> rows y0 to y1."""


def cut(pictures: Iterable[Picture], grid: Grid) -> Iterator[Tile]:
    """Tiles of every picture, row by row."""
    for picture in pictures:
        for y in picture.rows:
            for x in picture.columns:
                height = grid.extent(y, picture.pixels.height)
                yield Tile(picture, y, x, height, grid.extent(x, picture.pixels.width))


def stitch(answers: Iterable[TileAnswer], grid: Grid, finish: Finish) -> Iterator[Strip]:
    """Strips of finished rows; each picture's come from top to bottom.

    The tiles of one picture must arrive in the order they were cut.
    """
    open_canvases: dict[int, _Canvas] = {}
    for answer in answers:
        picture = answer.tile.picture
        if answer.scores_KGg is None:
            yield Strip(picture, answer.rows, last=True, failure=answer.failure)
            continue
        if picture.plan.image_id not in open_canvases:
            open_canvases[picture.plan.image_id] = _Canvas.empty(picture, grid, answer.scores_KGg)
        canvas = open_canvases[picture.plan.image_id]
        canvas.add(answer.tile, answer.scores_KGg)
        yield from canvas.finished(answer.tile, finish)
        if canvas.complete(answer.tile):
            del open_canvases[picture.plan.image_id]


@dataclass(slots=True)
class _Canvas:
    """The scores of one tiled picture, as far down as they are needed."""

    picture: Picture
    grid: Grid
    cells: tuple[int, int]
    """Rows and columns of the whole grid."""
    scores_KGg: Array
    weights_Gg: Array
    top: int = 0
    """Grid row of the first kept row."""
    next_y: int = 0
    """First pixel row not handed out yet."""
    compared: int = 0
    disagreed: int = 0

    @classmethod
    def empty(cls, picture: Picture, grid: Grid, scores_KGg: Array) -> "_Canvas":
        """Nothing yet, of as many classes as the scores that are to come."""
        pixels = picture.pixels
        cells = (grid.cells(pixels.height), grid.cells(pixels.width))
        kept_KGg = np.zeros((scores_KGg.shape[0], 0, cells[1]), scores_KGg.dtype)
        return cls(picture, grid, cells, kept_KGg, np.zeros((0, cells[1]), scores_KGg.dtype))

    def add(self, tile: Tile, scores: Array) -> None:
        """Lay a tile's scores over what is there."""
        stride = self.grid.stride
        height, width = scores.shape[1:]
        self._make_room(tile.y // stride + height)
        weights = self._weights(tile, height, width)
        rows = slice(tile.y // stride - self.top, tile.y // stride - self.top + height)
        columns = slice(tile.x // stride, tile.x // stride + width)
        under, before = self.scores_KGg[:, rows, columns], self.weights_Gg[rows, columns]
        both = (before > 0) & (weights > 0)
        if both.any():
            # Dividing by the weight does not change which class is first.
            self.compared += int(both.sum())
            self.disagreed += int((under[:, both].argmax(0) != scores[:, both].argmax(0)).sum())
        under += scores * weights
        before += weights

    def _make_room(self, bottom: int) -> None:
        missing = bottom - self.top - self.scores_KGg.shape[1]
        if missing > 0:
            self.scores_KGg = np.pad(self.scores_KGg, ((0, 0), (0, missing), (0, 0)))
            self.weights_Gg = np.pad(self.weights_Gg, ((0, missing), (0, 0)))

    def _weights(self, tile: Tile, height: int, width: int) -> Array:
        pixels = self.picture.pixels
        down = taper(height, self.grid, tile.y > 0, tile.y + tile.height < pixels.height)
        across = taper(width, self.grid, tile.x > 0, tile.x + tile.width < pixels.width)
        return (down[:, None] * across[None, :]).astype(self.scores_KGg.dtype)

    def complete(self, tile: Tile) -> bool:
        """Whether that was the last tile."""
        return tile.y == self.picture.rows[-1] and tile.x == self.picture.columns[-1]

    def finished(self, tile: Tile, finish: Finish) -> Iterator[Strip]:
        """Pixel rows that no later tile can change, after a row of tiles is complete."""
        if tile.x != self.picture.columns[-1]:
            return
        last, height = self.complete(tile), self.picture.pixels.height
        span = self.grid.span(height)
        if last:
            until = height
        else:
            following = self.picture.rows[self.picture.rows.index(tile.y) + 1] // self.grid.stride
            # A pixel row reads the grid rows around it: stop where the lower one may still change.
            until = first_row_reading(following, self.cells[0], span)
        if until > self.next_y:
            # Not the rows below: where a halo counts nothing their weight may still be 0.
            kept = grid_row_above(until - 1, self.cells[0], span) + 2 - self.top
            blended = self.scores_KGg[:, :kept] / self.weights_Gg[:kept]
            rows = finish(self.picture, blended, self.top, self.cells, self.next_y, until)
            self.next_y = until
            self._forget(0 if last else grid_row_above(until, self.cells[0], span))
            seam = (
                self.disagreed / self.compared if last and self.compared else 0.0 if last else None
            )
            yield Strip(self.picture, rows, last, seam)

    def _forget(self, row: int) -> None:
        if row > self.top:
            self.scores_KGg = self.scores_KGg[:, row - self.top :].copy()
            self.weights_Gg = self.weights_Gg[row - self.top :].copy()
            self.top = row


def grid_row_above(y: int, cells: int, height: int) -> int:
    """The upper of the two grid rows that pixel row y is interpolated from (half-pixel centres)."""
    return max(0, math.floor((y + 0.5) * cells / height - 0.5))


def first_row_reading(row: int, cells: int, height: int) -> int:
    """The first pixel row whose lower grid row is ``row`` or below."""
    y = max(0, math.floor((row - 0.5) * height / cells - 0.5) - 2)
    while y < height and grid_row_above(y, cells, height) + 1 < row:
        y += 1
    return y


def taper(cells: int, grid: Grid, before: bool, after: bool) -> Array:
    """Weights along one side of a tile.

    Args:
        cells: native cells of the side.
        grid: the cutting rule.
        before: whether a neighbour overlaps the start (else it is the picture's border).
        after: the same for the end.
    """
    overlap = grid.overlap // grid.stride
    halo = 0 if grid.receptive_field is None else -(-grid.receptive_field // 2 // grid.stride) + 1
    halo = min(halo, max(0, (overlap - 1) // 2))
    position = np.arange(cells, dtype=np.float64)
    if grid.taper == "gaussian":
        centre, sigma = (cells - 1) / 2, max(1.0, cells / 8)
        weights = np.maximum(np.exp(-0.5 * ((position - centre) / sigma) ** 2), 1e-3)
    else:
        weights = np.minimum(position + 1, cells - position) / cells
    if before:
        weights[:halo] = 0
    if after:
        weights[cells - halo :] = 0
    return weights
