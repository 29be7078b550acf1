"""Tiles of many pictures into batches, by padded shape and pixel budget.

The padded shape of a tile is a function of its own size alone (a fixed grid, at most an eighth
above it), and batches are a function of the fragment alone: the same fragment is always batched
the same way, wherever and whenever it runs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.tile import Tile

STEPS = 8  # padded sizes per octave: at most 1/8 more per side; more steps would empty the batches
SMALLEST = 32  # below this padding costs nothing against a pass's overhead


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


def pack(tiles: Iterable[Tile], budget: int, window: int, align: int) -> Iterator[Batch]:
    """Batches of at most ``budget`` padded pixels (a larger tile goes alone).

    Args:
        tiles: in plan order; tiles of equal shape keep it.
        budget: padded pixels of a batch.
        window: decoded bytes that may wait for their batch to fill; when there are more, the
            largest group is flushed.
        align: pixels that padded sides are multiples of (`Grid.align`).
    """
    waiting: dict[tuple[int, int, str, int], list[Tile]] = {}
    held = 0
    for tile in tiles:
        values = tile.values_HWC
        shape = (padded(tile.height, align), padded(tile.width, align))
        group = waiting.setdefault((*shape, str(values.dtype), values.shape[2]), [])
        group.append(tile)
        held += values.nbytes
        if (len(group) + 1) * shape[0] * shape[1] > budget:
            held -= _nbytes(group)
            yield _flushed(waiting, (*shape, str(values.dtype), values.shape[2]))
        while held > window and waiting:
            largest = max(waiting, key=lambda key: _nbytes(waiting[key]))
            held -= _nbytes(waiting[largest])
            yield _flushed(waiting, largest)
    for key in list(waiting):
        yield _flushed(waiting, key)


def _flushed(
    waiting: dict[tuple[int, int, str, int], list[Tile]], key: tuple[int, int, str, int]
) -> Batch:
    return Batch(tuple(waiting.pop(key)), key[0], key[1])


def _nbytes(group: list[Tile]) -> int:
    return sum(tile.values_HWC.nbytes for tile in group)
