"""Corpora of any length from a folder of real pictures: the same files under new keys, by links."""

import os
from itertools import count
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


def repeated(folders: list[Path], images: int, out: Path) -> Path:
    """A folder with so many pictures: copies are taken in turn, each under its own key.

    Shuffled once, so that every part of the run sees the same mix of sizes.
    """
    originals = pictures(folders)
    Random(0).shuffle(originals)
    for number in count():
        if number >= images:
            return out
        source = originals[number % len(originals)]
        target = out / f"{number // 1000:04d}" / f"{number:08d}{source.suffix.lower()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system
            target.write_bytes(source.read_bytes())
    raise AssertionError
