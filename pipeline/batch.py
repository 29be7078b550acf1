"""Tiles of many pictures into batches, by padded shape and pixel budget.

The padded shape of a tile is a function of its own size alone (a fixed grid, at most an eighth
above it), and batches are a function of the fragment alone: the same fragment is always batched
the same way, wherever and whenever it runs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.tile import Tile

STEPS = 8  # padded sizes per octave: at most 1/8 more per side; more steps would empty the batches
SMALLEST = 32  # below this padding costs nothing against a pass's overhead

Shape = tuple[int, int, np.dtype, int]
"""What tiles of a batch share: padded height and width, type and number of channels."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tiles that go through the model together."""

    tiles: tuple[Tile, ...]
    height: int
    width: int
    """The padded shape they share, in pixels."""

    @property
    def pixels(self) -> int:
        """Padded pixels of the whole batch."""
        return len(self.tiles) * self.height * self.width


def padded(length: int, align: int) -> int:
    """The padded length of a side: the next on a fixed grid of multiples of the alignment."""
    step = SMALLEST if length <= SMALLEST * STEPS else 2 ** ((length - 1).bit_length() - 1) // STEPS
    step = -(-step // align) * align
    return -(-length // step) * step


def shape_of(tile: Tile, align: int) -> Shape:
    """What a tile shares with those it may be in a batch with."""
    values = tile.values_HWC
    return padded(tile.height, align), padded(tile.width, align), values.dtype, values.shape[2]


def pack(tiles: Iterable[Tile], budget: int, window: int, align: int) -> Iterator[Batch]:
    """Batches of at most ``budget`` padded pixels (a larger tile goes alone).

    Args:
        tiles: in plan order; tiles of equal shape keep it.
        budget: padded pixels of a batch.
        window: decoded bytes that may wait for their batch to fill; when there are more, the
            largest group is flushed.
        align: pixels that padded sides are multiples of (`Grid.align`).
    """
    waiting: dict[Shape, list[Tile]] = {}
    held = 0
    for tile in tiles:
        shape = shape_of(tile, align)
        group = waiting.setdefault(shape, [])
        group.append(tile)
        held += tile.values_HWC.nbytes
        if (len(group) + 1) * shape[0] * shape[1] > budget:
            held -= _nbytes(group)
            yield _flushed(waiting, shape)
        while held > window and waiting:
            largest = max(waiting, key=lambda key: _nbytes(waiting[key]))
            held -= _nbytes(waiting[largest])
            yield _flushed(waiting, largest)
    for shape in list(waiting):
        yield _flushed(waiting, shape)


def _flushed(waiting: dict[Shape, list[Tile]], shape: Shape) -> Batch:
    return Batch(tuple(waiting.pop(shape)), *shape[:2])


def _nbytes(group: list[Tile]) -> int:
    return sum(tile.values_HWC.nbytes for tile in group)
