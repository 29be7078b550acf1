"""A new run: look at everything, refuse or find out what will hold for all its rounds, claim it."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from models import Bundle
from pipeline.config import SegmentConfig
from pipeline.errors import RunRefused, StorageMissing
from pipeline.headers import probe
from pipeline.layout import N_SLOTS, Layout
from pipeline.ledger import RUN, Ledger, frozen, now
from pipeline.listing import Listing, head
from pipeline.place import Found, Place
from pipeline.plan import Round, Start, plan_round, to_parquet
from pipeline.records import PlannedImage
from pipeline.storage import PREFLIGHT, Store, check_create_only, open_store
from pipeline.tile import Grid

DEMO = Path(__file__).parent.parent / "models" / "demo"
PROBED = 256  # images whose headers decide the slot size (STORE §5)
HEAD = 65_536  # bytes of an image that usually hold its size
SLOT_LEAST, SLOT_MOST = 2**16, 2**22
SLOT_STEP = 4096  # the next power of two would store up to as much filling as mask
TILE, OVERLAP = 1024, 128  # where neither config nor bundle says


def read_bundle(model: str) -> tuple[bytes, bytes]:
    """model.json and weights.safetensors of a bundle by path, URI, or ``demo``.

    Raises:
        RunRefused: if there is no bundle there.
    """
    store = open_store(str(DEMO) if model == "demo" else model)
    try:
        return store.read("model.json"), store.read("weights.safetensors")
    except StorageMissing as error:
        raise RunRefused(
            f"--model {model}: no bundle there ({error}); a bundle is a folder with model.json and "
            "weights.safetensors, or the word demo. Pickles, .pt2 and TorchScript are not loaded"
        ) from error


def read_card(config: SegmentConfig, bundle: tuple[bytes, bytes]) -> Bundle:
    """The bundle's card, checked.

    Raises:
        RunRefused: if it is not one.
    """
    try:
        return Bundle.from_json(bundle[0])
    except ValueError as error:
        raise RunRefused(f"--model {config.model}: {error}") from error


def refuse_strangers(out: Store) -> None:
    """Refuse a run folder that holds anything but a run.

    Raises:
        RunRefused: naming what is there.
    """
    try:
        stranger = next((f for f in out.list() if not f.path.startswith(PREFLIGHT)), None)
    except StorageMissing as error:
        if out.uri.startswith("s3://"):  # a prefix is never missing, only its bucket
            raise RunRefused(f"--out: {error}") from error
        return
    if stranger is not None and out.stat(RUN) is None:  # a driver may be a moment ahead of us
        raise RunRefused(
            f"--out {out.uri} is not empty and holds no {RUN} (it has {stranger.path}); "
            "choose an empty folder"
        )


def create_run(
    config: SegmentConfig,
    source: Store,
    out: Store,
    bundle: tuple[bytes, bytes],
    card: Bundle,
    place: Place,
    listing: Listing,
) -> Ledger:
    """A new run: look at everything, then claim the folder and write round 0."""
    refuse_strangers(out)
    plan = first_round(config, source, listing)
    check_create_only(out)
    found = place.found(bundle, plan.images)
    layout = _layout(config, source, plan, card)
    about = {
        "name": config.model,
        "sha256": card.sha256,
        "architecture": card.architecture,
        "classes": [asdict(entry) for entry in card.classes],
    }
    grid = _grid(config, card, found)
    budget = config.batch.pixels or found.budget
    ledger = Ledger.create(out, config, bundle, about, frozen(layout, grid, budget, found.device))
    ledger.refuse_other(config, card.sha256)  # another driver may have been first
    ledger.add_round(0, as_object(plan, listing))
    return ledger


def first_round(
    config: SegmentConfig, source: Store, listing: Listing, cap: int | None = None
) -> Round:
    """Round 0: the whole archive.

    Raises:
        RunRefused: if there is nothing in it.
    """
    plan = plan_round(source, config, listing, {}, Start(cap=cap))
    if not plan.images:
        skipped = f"; skipped {dict(listing.skipped)}" if listing.skipped else ""
        raise RunRefused(
            f"there are no images below {source.uri}{skipped}; "
            "check the path, --include and --exclude"
        )
    return plan


def as_object(plan: Round, listing: Listing) -> bytes:
    """A round's plan as the bytes that are put."""
    about = {
        "skipped": dict(sorted(listing.skipped.items())),
        "left_out": listing.left_out,
        "planned": now(),
    }
    return to_parquet(plan, os.urandom(16).hex(), about)


def _grid(config: SegmentConfig, card: Bundle, found: Found) -> Grid:
    size = config.tile.size or (card.tile.size if card.tile else TILE)
    overlap = config.tile.overlap
    if overlap is None:
        overlap = min(card.tile.overlap if card.tile else OVERLAP, size // 4)
    if size < 2 * max(found.stride, found.min_side):
        raise RunRefused(
            f"--tile.size {size} is below twice the model's stride {found.stride}; try {TILE}"
        )
    if overlap * 2 > size:
        raise RunRefused(
            f"--tile.overlap {overlap} must be at most half of the tile size {size}; "
            f"try {size // 8}"
        )
    return Grid(
        size, overlap, found.stride, config.tile.taper, found.receptive_field, found.min_side
    )


def _layout(config: SegmentConfig, source: Store, plan: Round, card: Bundle) -> Layout:
    """Slot size from the pictures themselves: what nine of ten probed masks fit into."""
    wide = max(entry.id for entry in card.classes) >= 255
    dtype, fill = ("uint16", 65535) if wide else ("uint8", 255)
    sizes = probed_sizes(source, plan.table)
    most = max((count for count in _images_per_fragment(plan.table)), default=1)
    if config.layout == "stacked":
        height, width = _one_size(config, sizes)
        return Layout("stacked", dtype, fill, max(most, 16), height * width, height, width)
    areas = [h * w for h, w in sizes] or [SLOT_LEAST]
    slot = -(-int(np.quantile(areas, 0.9)) // SLOT_STEP) * SLOT_STEP
    slot = config.slot_bytes or min(SLOT_MOST, max(SLOT_LEAST, slot))
    return Layout("flat", dtype, fill, N_SLOTS, slot, confidence=config.confidence)


def _images_per_fragment(table: pa.Table) -> list[int]:
    return [row["counts"] for row in table["fragment"].value_counts().to_pylist()]


def _one_size(config: SegmentConfig, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    if config.size:
        height, width = (int(part) for part in config.size.split("x"))
        if not (height and width):
            raise RunRefused(f"--size {config.size}: both sides must be at least 1")
        return height, width
    if len(set(sizes)) != 1:
        raise RunRefused(
            f"--layout stacked needs one size, the probed images have {len(set(sizes))}; "
            "give --size HxW (others go to large/) or use flat"
        )
    return sizes[0]


def probed_sizes(source: Store, table: pa.Table) -> list[tuple[int, int]]:
    """Height and width of up to 256 images spread over the plan, from their first bytes."""
    step = max(1, table.num_rows // PROBED)
    names = list(PlannedImage.__dataclass_fields__)
    chosen = table.take(list(range(0, table.num_rows, step))).select(names).to_pylist()
    with ThreadPoolExecutor(16) as pool:
        heads = pool.map(lambda row: head(source, PlannedImage(**row), HEAD), chosen)
        return [size for size in (probe(start) for start in heads) if size]
