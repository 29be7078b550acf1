"""Small archives, runs over them, and what two runs must have in common."""

import shutil
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.archive import Outcome, segment_archive
from pipeline.config import from_mapping
from pipeline.ledger import Ledger
from pipeline.place import Place
from pipeline.storage import open_store
from pipeline.verify import verify
from tests.bundles import ONE_WORKER, InProcess
from tests.pictures import blobs, encoded, parquet_of, tar_of, with_orientation


def jpeg(height: int, width: int, seed: int) -> bytes:
    return encoded(blobs(height, width, seed), "JPEG", quality=92)


def png(height: int, width: int, seed: int) -> bytes:
    return encoded(blobs(height, width, seed), "PNG")


def filled(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def unpacked(archive: Path | str, folder: Path) -> Path:
    """Write what a tar holds into a folder."""
    with tarfile.open(archive) as tar:
        # not as an argument: Debian's Python 3.11.2 does not know it
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)
    return folder


def mixed(folder: Path) -> Path:
    """Loose files, a tar shard, a table and sidecars: 13 images, one of them broken."""
    transparent = np.dstack([blobs(40, 60, 5), np.full((40, 60), 255, np.uint8)])
    transparent[:10, :, 3] = 0
    deep = (blobs(36, 44, 6)[..., 0].astype(np.uint16) << 8) + 3
    return filled(
        folder,
        {
            "README.md": b"about these pictures",
            "labels.json": b"{}",
            "loose/a.jpg": jpeg(64, 80, 1),
            "loose/b.png": png(33, 47, 2),
            "loose/broken.jpg": jpeg(64, 80, 3)[:400],
            "loose/deep.png": encoded(deep, "PNG"),
            "loose/gray.png": encoded(blobs(50, 30, 4)[..., :1], "PNG"),
            "loose/held.jpg": with_orientation(blobs(48, 72, 8), 6),
            "loose/one.png": png(1, 1, 9),
            "loose/see-through.png": encoded(transparent, "PNG"),
            "shard-000.tar": tar_of(
                {"x/1.jpg": jpeg(40, 52, 11), "x/1.json": b"{}", "x/2.png": png(40, 52, 12)}
            ),
            "table.parquet": parquet_of([jpeg(64, 80, 21), png(30, 30, 22), png(64, 80, 23)]),
        },
    )


def uniform(folder: Path, count: int, height: int = 40, width: int = 48) -> Path:
    return filled(folder, {f"{i:03}.png": png(height, width, i) for i in range(count)})


def segment(
    source: Path | str,
    out: Path | str,
    model: Path,
    place: Place | None = None,
    stop: threading.Event | None = None,
    **knobs: Any,
) -> Outcome:
    """`maskfleet segment` without the command line, four images a fragment unless told."""
    compute = {**ONE_WORKER.model_dump(), **knobs.pop("compute", {})}
    values = {"source": str(source), "out": str(out), "model": str(model), "log": "text"}
    config = from_mapping(
        {**values, "fragment": {"images": 4}, "compute": compute, "interval_s": 600.0, **knobs}
    )
    place = place or InProcess(compute=config.compute)
    return segment_archive(config, place, stop or threading.Event())


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def problems(out: Path | str) -> list[str]:
    found = verify(Ledger.open(open_store(str(out))))
    return found.problems + ([f"{found.pending} pending"] if found.pending else [])


def copied(run: Path, to: Path) -> Path:
    """A run folder of one's own, to damage."""
    shutil.copytree(run, to)
    return to
