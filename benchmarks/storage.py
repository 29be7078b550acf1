"""Storage ratios: our fragment writer against the codec alone, memcpy, zarr-python, PNG; reads.

    python -m benchmarks.storage MASKS... [--images 256] [--repeats 7]

MASKS are folders of class-index PNG. All writers store the same masks in one process, interleaved;
best of the repeats, per CPU second where a writer computes, per wall second with fsync.
"""

import argparse
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from PIL import Image

from benchmarks.corpora import pictures
from benchmarks.record import record
from pipeline.fragment import CLASS_STATS, IMAGES, assemble, compress, slots_of
from pipeline.layout import Layout
from pipeline.storage import LocalStore

SLOTS = 4096
SLOT = 45 * 4096  # as create.py would choose it for CamVid: the mask of 480 x 360, rounded up


def ours(masks: list[np.ndarray]) -> bytes:
    """One fragment object."""
    frames = [frame for mask in masks for frame in slots_of(mask, SLOT, 255)]
    return assemble(
        {"fragment": 0},
        IMAGES.empty_table(),
        CLASS_STATS.empty_table(),
        frames,
        range(len(frames)),
        SLOTS,
    )


def with_zarr(masks: list[np.ndarray], folder: Path) -> None:
    """The same shard by zarr-python, in one assignment."""
    layout = Layout("flat", "uint8", 255, SLOTS, SLOT)
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_bytes(layout.array_json(1, {}))
    flat = np.full(sum(-(-m.size // SLOT) for m in masks) * SLOT, 255, np.uint8)
    at = 0
    for mask in masks:
        flat[at : at + mask.size] = mask.ravel()
        at += -(-mask.size // SLOT) * SLOT
    zarr.open_array(folder, mode="r+")[: len(flat)] = flat


def png(mask: np.ndarray) -> bytes:
    """PNG at Pillow's level 6, what most tools store."""
    sink = io.BytesIO()
    Image.fromarray(mask).save(sink, "PNG", compress_level=6)
    return sink.getvalue()


@dataclass(frozen=True, slots=True)
class Measured:
    """What was written, and how fast: MB a second of each writer."""

    raw: int
    """Bytes of the masks."""
    stored: int
    """Bytes of the one object."""
    pngs: int
    """Bytes of the same masks as PNG."""
    by_cpu: dict[str, float]
    by_wall: dict[str, float]

    @property
    def codec(self) -> float:
        """W_codec: an object built, over its codec alone."""
        return self.by_cpu["fragment, built"] / self.by_cpu["zstd 1 alone"]


def measured(masks: list[np.ndarray], repeats: int) -> Measured:
    """Writers in turn, the best of each."""
    raw = sum(mask.size for mask in masks)
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), LocalStore(Path(name))
        target = np.empty(max(m.size for m in masks), np.uint8)
        for turn in range(repeats):
            work = {
                "memcpy": lambda: [np.copyto(target[: m.size], m.ravel()) for m in masks],
                "zstd 1 alone": lambda: [compress(m) for m in masks],
                "fragment, built": lambda: ours(masks),
                "fragment, committed with fsync": lambda t=turn: store.create(
                    f"ours/{t}", ours(masks)
                ),
                "zarr-python, sharded": lambda t=turn: with_zarr(masks, folder / f"zarr-{t}"),
                "PNG": lambda: [png(m) for m in masks[:32]],
            }
            for label, call in work.items():
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                spent = time.perf_counter() - wall, time.process_time() - cpu
                best[label] = tuple(map(min, zip(best.get(label, (1e9, 1e9)), spent, strict=True)))
    share = {"PNG": sum(m.size for m in masks[:32]) / raw}
    return Measured(
        raw,
        len(ours(masks)),
        sum(len(png(m)) for m in masks),
        {k: raw * share.get(k, 1) / 1e6 / cpu for k, (_, cpu) in best.items()},
        {k: raw * share.get(k, 1) / 1e6 / w for k, (w, _) in best.items()},
    )


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("masks", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    files = pictures(given.masks)
    masks = [np.asarray(Image.open(files[i % len(files)])) for i in range(given.images)]
    found = measured(masks, given.repeats)
    speed, wall = found.by_cpu, found.by_wall
    built = speed["fragment, built"]
    lines = [
        (
            f"{len(masks)} masks, {found.raw / 1e6:.0f} MB raw"
            f" ({', '.join(p.parent.name or p.name for p in given.masks)}); best of {given.repeats}"
        ),
        "",
        "| writer | MB a CPU second | MB a second |",
        "|---|---|---|",
        *(f"| {k} | {speed[k]:.0f} | {wall[k]:.0f} |" for k in speed),
        "",
        (
            f"W_codec {found.codec:.2f} (gate 0.80), "
            "with fsync, wall "
            f"{wall['fragment, committed with fsync'] / wall['zstd 1 alone']:.2f}; "
            f"W_mem {built / speed['memcpy']:.3f}; "
            f"W_lib over zarr-python {built / speed['zarr-python, sharded']:.1f} (gate 3); "
            f"S_png {found.stored / found.pngs:.2f} (gate 0.95); "
            f"one object for {len(masks)} masks of {found.stored / 1e6:.2f} MB"
        ),
    ]
    record("storage ratios", lines)


if __name__ == "__main__":
    main()
