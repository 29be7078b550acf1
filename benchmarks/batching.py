"""How full batches are, what they are padded with, how many passes: without a model.

    python -m benchmarks.batching PICTURES... [--budget 2097152] [--fragment 64] [--steps 4 8 16]

PICTURES are folders whose pictures' sizes are read from their headers; each is a distribution of
its own, beside one like the web's (log-normal sides about 640 x 480). Pictures go by in the order
of their names, in fragments, and are cut as with a model of stride 4 that pads to 16.

Compared: our buckets (`pipeline/batch.py`: padded shape by a fixed grid, filled to a pixel budget)
with grids of more and fewer steps an octave; the same with fragments sharing batches (`batch.mix`);
count-batching per exact shape, as people write it (a batch is full at so many pictures); and all
pictures of a fragment padded to its largest. `age`: tiles that come by while one waits.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.corpora import pictures
from benchmarks.record import record
from pipeline import batch
from pipeline.batch import pack
from pipeline.headers import probe
from pipeline.records import Array, Pixels, PlannedImage
from pipeline.tile import Grid, Picture, Tile, cut

Size = tuple[int, int]
GRID = Grid(1024, 128, 4, "gaussian", None, 4, 16, partial_cells=True)
WINDOW = 512 * 1024**2
HEAD = 65_536
COUNT = 16  # pictures of a batch where they are counted


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a model that is not there."""

    tiles: int
    pixels: int
    padded: int
    ages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """What became of all tiles."""

    passes: int
    tiles: int
    waste: float
    """Share of the pixels that are padding."""
    fill: float
    """Padded pixels over the budget, of all passes."""
    age: float
    """Tiles that came by while one waited, on average."""


def sizes_of(folder: Path) -> list[Size]:
    """Heights and widths, from headers."""
    found = []
    for path in pictures([folder]):
        with path.open("rb") as file:
            found.append(probe(file.read(HEAD)))
    return [size for size in found if size]


def web(count: int = 2000) -> list[Size]:
    """Sides as on the web: log-normal, two shapes of three lying, one standing."""
    draws = np.random.default_rng(0)
    long = np.clip(draws.lognormal(np.log(640), 0.5, count), 64, 4000)
    short = long * draws.choice([2 / 3, 3 / 4, 9 / 16, 1.0], count, p=[0.4, 0.4, 0.1, 0.1])
    lying = draws.random(count) < 2 / 3
    return [
        (int(s), int(g)) if flat else (int(g), int(s))
        for g, s, flat in zip(long, short, lying, strict=True)
    ]


def tiles_of(sizes: list[Size]) -> Iterator[Tile]:
    """Tiles of pictures that hold nothing: their pixels are one value, seen everywhere."""
    for number, (height, width) in enumerate(sizes):
        values: Array = np.broadcast_to(np.zeros(1, np.uint8), (height, width, 3))
        plan = PlannedImage(number, "", "", None, None, 0, "", "", 0)
        rows, columns = GRID.offsets(height), GRID.offsets(width)
        picture = Picture(plan, Pixels(values, None), 0, "", False, rows, columns)  # noqa: FBT003
        yield from cut([picture], GRID)


def ours(sizes: list[Size], budget: int) -> Iterator[Pass]:
    """Buckets by padded shape."""
    arrived: dict[int, int] = {}

    def counted(tiles: Iterable[Tile]) -> Iterator[Tile]:
        for tile in tiles:
            arrived[id(tile)] = len(arrived)
            yield tile

    for one in pack(counted(list(tiles_of(sizes))), budget, WINDOW, GRID.align):
        ages = tuple(len(arrived) - 1 - arrived[id(tile)] for tile in one.tiles)
        pixels = sum(tile.height * tile.width for tile in one.tiles)
        yield Pass(len(one.tiles), pixels, one.pixels, ages)


def by_count(sizes: list[Size]) -> Iterator[Pass]:
    """Equal shapes, so many at a time; what is left at the end of a fragment goes as it is."""
    waiting: dict[Size, list[int]] = {}
    for number, tile in enumerate(tiles_of(sizes)):
        shape = tile.height, tile.width
        group = waiting.setdefault(shape, [])
        group.append(number)
        if len(group) == COUNT:
            yield _exact(shape, waiting.pop(shape), number)
    for shape, group in waiting.items():
        yield _exact(shape, group, number)


def _exact(shape: Size, group: list[int], now: int) -> Pass:
    area = len(group) * shape[0] * shape[1]
    return Pass(len(group), area, area, tuple(now - number for number in group))


def to_the_largest(sizes: list[Size]) -> Iterator[Pass]:
    """All tiles of a fragment padded to its largest side, so many at a time."""
    tiles = list(tiles_of(sizes))
    height, width = max(t.height for t in tiles), max(t.width for t in tiles)
    for first in range(0, len(tiles), COUNT):
        part = tiles[first : first + COUNT]
        pixels = sum(tile.height * tile.width for tile in part)
        yield Pass(len(part), pixels, len(part) * height * width, tuple(range(len(part))))


def packed(passes: Iterable[Pass], budget: int) -> Packed:
    """All of them in one line."""
    every = list(passes)
    padded = sum(one.padded for one in every)
    ages = [age for one in every for age in one.ages]
    return Packed(
        len(every),
        len(ages),
        1 - sum(one.pixels for one in every) / padded,
        padded / len(every) / budget,
        float(np.mean(ages)),
    )


def in_fragments(sizes: list[Size], images: int) -> Iterator[list[Size]]:
    """So many pictures at a time."""
    for first in range(0, len(sizes), images):
        yield sizes[first : first + images]


def compared(sizes: list[Size], budget: int, images: int, steps: list[int]) -> dict[str, Packed]:
    """Every way, over the same pictures."""
    parts = list(in_fragments(sizes, images))
    found = {}
    usual = batch.STEPS
    for count in steps:
        batch.STEPS = count  # the grid is a constant of the module; here it is what is measured
        name = f"buckets, {count} steps an octave" + (" (ours)" if count == usual else "")
        found[name] = packed((p for part in parts for p in ours(part, budget)), budget)
        if count == usual:
            shared = in_fragments(sizes, 4 * images)
            name = "the same, four fragments sharing"
            found[name] = packed((p for part in shared for p in ours(part, budget)), budget)
    batch.STEPS = usual
    found[f"{COUNT} of one exact shape"] = packed(
        (p for part in parts for p in by_count(part)), budget
    )
    found["padded to a fragment's largest"] = packed(
        (p for part in parts for p in to_the_largest(part)), budget
    )
    return found


def main() -> None:
    """Pack and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="*", type=Path)
    parser.add_argument("--budget", type=int, default=2**21, help="pixels; as a GPU wants them")
    parser.add_argument("--fragment", type=int, default=64, help="pictures")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, batch.STEPS, 16])
    given = parser.parse_args()
    corpora = {folder.name: sizes_of(folder) for folder in given.pictures} | {"web": web()}
    lines = [
        f"budget {given.budget} px, fragments of {given.fragment} pictures",
        "",
        "| pictures | way | passes | tiles a pass | padding | fill | age, tiles |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sizes in corpora.items():
        about = f"{name}: {len(sizes)} of {len(set(sizes))} sizes"
        for way, it in compared(sizes, given.budget, given.fragment, given.steps).items():
            lines.append(
                f"| {about} | {way} | {it.passes} | {it.tiles / it.passes:.1f} | {it.waste:.1%}"
                f" | {it.fill:.0%} | {it.age:.1f} |"
            )
    record("batches without a model", lines)


if __name__ == "__main__":
    main()
