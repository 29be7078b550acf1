"""Corpora of any length from a folder of real pictures: the same files under new keys, by links.

Or as members of tar shards.
"""

import os
import tarfile
from collections.abc import Callable, Iterator
from itertools import cycle, groupby, islice
from pathlib import Path
from random import Random

PICTURES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif"}


def pictures(folders: list[Path]) -> list[Path]:
    """Every picture below `images/` of the folders (or below the folder itself), sorted."""
    found = []
    for folder in folders:
        below = folder / "images" if (folder / "images").is_dir() else folder
        found += sorted(p for p in below.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    if not found:
        raise SystemExit(f"no pictures below {', '.join(map(str, folders))}")
    return found


def in_turn(
    folders: list[Path], images: int, wanted: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """So many pictures, each as often as the next, in an order that mixes sizes everywhere."""
    originals = [each for each in pictures(folders) if wanted is None or wanted(each)]
    Random(0).shuffle(originals)
    return islice(cycle(originals), images)


def repeated(
    folders: list[Path], images: int, out: Path, wanted: Callable[[Path], bool] | None = None
) -> Path:
    """A folder with so many pictures: copies are taken in turn, each under its own key."""
    for number, source in enumerate(in_turn(folders, images, wanted)):
        target = out / f"{number // 1000:04d}" / f"{number:08d}{source.suffix.lower()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system
            target.write_bytes(source.read_bytes())
    return out


def sharded(
    folders: list[Path],
    images: int,
    out: Path,
    each: int = 100,
    wanted: Callable[[Path], bool] | None = None,
) -> Path:
    """The same pictures as members of tar shards, so many in each."""
    out.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(in_turn(folders, images, wanted))
    for shard, group in groupby(numbered, key=lambda one: one[0] // each):
        with tarfile.open(out / f"{shard:04d}.tar", "w", dereference=True) as tar:
            for number, source in group:
                tar.add(source, f"{number:08d}{source.suffix.lower()}")
    return out
