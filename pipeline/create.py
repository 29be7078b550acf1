"""A new run: look at everything, refuse or find out what will hold for all its rounds, claim it."""

# pyarrow.compute makes its functions when it is imported; no type checker can see them.
# pyright: reportAttributeAccessIssue=false

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models import Bundle
from models.foreign import FILES, bundle_of
from models.foreign.named import check
from pipeline import registry
from pipeline.config import SegmentConfig
from pipeline.errors import RunRefused, StorageMissing
from pipeline.headers import probe
from pipeline.keys import printable
from pipeline.known import Known
from pipeline.layout import N_SLOTS, Layout
from pipeline.ledger import FORECAST, RUN, Ledger, frozen, now
from pipeline.listing import Listing, head
from pipeline.place import Found, Place
from pipeline.plan import Round, Start, plan_round, to_parquet
from pipeline.progress import say
from pipeline.records import PlannedImage
from pipeline.storage import PREFLIGHT, Store, absolute, check_create_only, open_store
from pipeline.tile import Grid
from pipeline.versions import parse

DEMO = Path(__file__).parent.parent / "models" / "demo"
PROBED = 256  # images whose headers decide the slot size (STORE §5)
LISTED = 1000  # names of a folder that is no model, to say what lies there instead
HEAD = 65_536  # bytes of an image that usually hold its size
UNCOMPILED = (
    "what we have in C is not compiled where this runs (was there no C compiler when it was "
    "installed?): on CPUs it takes up to twice as long; docs/speed.md"
)
SLOT_LEAST, SLOT_MOST = 2**16, 2**22
SLOT_STEP = 4096  # the next power of two would store up to as much filling as mask
TILE, OVERLAP = 1024, 128  # where neither config nor bundle says


def pinned(config: SegmentConfig, ledger: Ledger | None) -> SegmentConfig:
    """The config with an exact version where --model means one in a registry.

    An alias such as ``champion`` is looked up when a run is created. The run goes on with the
    version it began with, whatever the alias means by then.

    Raises:
        RunRefused: if it means nothing.
    """
    if parse(config.model) is None:
        return config
    began_with = None if ledger is None else ledger.run["bundle"]["sha256"]
    version, newer = registry.pinned(config.model, began_with)
    if newer is not None:
        text = (
            f"{config.model} means {newer.path} by now; this run began with {version.path} and "
            "goes on with it. A newer model means a new run: another --out"
        )
        say(config.log, "model", text=text, model=version.reference, newer=newer.reference)
    return config.model_copy(update={"model": version.reference})


def read_bundle(model: str) -> tuple[bytes, bytes]:
    """model.json and weights.safetensors of a model by path, URI, reference, or ``demo``.

    What is no bundle yet is made one (models/foreign): a checkpoint of transformers, an ONNX file.

    Raises:
        RunRefused: if there is no model there, or none that can be used.
    """
    place, only = str(DEMO) if model == "demo" else model, None
    if parse(model) is not None:
        place = registry.resolve(model).uri
    elif PurePath(place).suffix.lower() in FILES:
        place, _, only = absolute(place).rpartition("/")
    store = open_store(place)

    def read(name: str) -> bytes | None:
        try:
            return store.read(name) if only in (None, name) else None
        except StorageMissing:
            return None

    def names() -> list[str]:
        if only is not None:
            return [only]
        with contextlib.suppress(StorageMissing):
            found = (f.path for f in islice(store.list(), LISTED))
            return [path for path in found if "/" not in path]
        return []

    try:
        return bundle_of(read, names)
    except ValueError as error:
        raise RunRefused(f"--model {model}: {error}") from error


def read_card(config: SegmentConfig, bundle: tuple[bytes, bytes]) -> Bundle:
    """The bundle's card, checked.

    Raises:
        RunRefused: if it is not one.
    """
    try:
        card = Bundle.from_json(bundle[0])
        check(card.architecture, config.architecture)
    except ValueError as error:
        raise RunRefused(f"--model {config.model}: {error}") from error
    if card.task == "classify":
        _refuse_what_is_for_masks(config, card)
    return card


def _refuse_what_is_for_masks(config: SegmentConfig, card: Bundle) -> None:
    """Refuse the knobs that would change nothing where the model is a classifier."""
    fixed = card.input.resize is not None
    knobs = {
        "--layout stacked": (config.layout == "stacked", "makes no masks"),
        "--size": (config.size is not None, "makes no masks"),
        "--confidence": (config.confidence, "makes no masks; probabilities are always stored"),
        "--slot-bytes": (config.slot_bytes is not None, "makes no masks"),
        "--tile.size": (fixed and config.tile.size is not None, "has a size of its own"),
        "--tile.overlap": (config.tile.overlap is not None, "reads pictures in one piece"),
    }
    for knob, (given, why) in knobs.items():
        if given:
            raise RunRefused(f"{knob}: --model {config.model} is a classifier and {why}; drop it")


def refuse_strangers(out: Store) -> None:
    """Refuse a run folder that holds anything but a run.

    Raises:
        RunRefused: naming what is there.
    """
    try:
        ours = (PREFLIGHT, FORECAST)
        stranger = next((f for f in out.list() if not f.path.startswith(ours)), None)
    except StorageMissing as error:
        if out.uri.startswith("s3://"):  # a prefix is never missing, only its bucket
            raise RunRefused(f"--out: {error}") from error
        return
    if stranger is not None and out.stat(RUN) is None:  # a driver may be a moment ahead of us
        raise RunRefused(
            f"--out {out.uri} is not empty and holds no {RUN} (it has {printable(stranger.path)}); "
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
    layout = layout_for(config, source, plan, card)
    images, (data, fragments) = plan.images, as_object(plan, listing)
    del plan  # before a model takes its place in memory
    pa.default_memory_pool().release_unused()
    found = place.found(bundle, images, config)
    if found.device == "cpu" and not found.compiled:
        say(config.log, "uncompiled", text=UNCOMPILED)
    about = {
        "name": config.model,
        "sha256": card.sha256,
        "architecture": card.architecture,
        "classes": [asdict(entry) for entry in card.classes],
    }
    grid = grid_for(config, card, found)
    budget = config.batch.pixels or found.budget
    ledger = Ledger.create(out, config, bundle, about, frozen(layout, grid, budget, found.device))
    ledger.refuse_other(config, card.sha256)  # another driver may have been first
    ledger.add_round(0, data, fragments)
    return ledger


def first_round(
    config: SegmentConfig, source: Store, listing: Listing, cap: int | None = None
) -> Round:
    """Round 0: the whole archive.

    Raises:
        RunRefused: if there is nothing in it.
    """
    plan = plan_round(source, config, listing, Known(), Start(cap=cap))
    if not plan.images:
        skipped = f"; skipped {dict(listing.skipped)}" if listing.skipped else ""
        raise RunRefused(
            f"there are no images below {source.uri}{skipped}; "
            "check the path, --include and --exclude"
        )
    return plan


def as_object(plan: Round, listing: Listing) -> tuple[bytes, pa.Table]:
    """A round's plan as the bytes that are put, and the small table beside it."""
    about = {
        "skipped": dict(sorted(listing.skipped.items())),
        "left_out": listing.left_out,
        "planned": now(),
    }
    return to_parquet(plan, os.urandom(16).hex(), about), plan.fragments()


def grid_for(config: SegmentConfig, card: Bundle, found: Found) -> Grid:
    """How a run cuts its pictures: what the config says, else the bundle.

    Raises:
        RunRefused: if the model cannot read such tiles.
    """
    usual = card.tile.size if card.tile else min(TILE, found.max_side or TILE)
    size = config.tile.size or usual
    if card.task == "classify":
        return grid_of(found, size, 0)  # nothing is cut: the longer side of what is read at once
    overlap = config.tile.overlap
    if overlap is None:
        overlap = min(card.tile.overlap if card.tile else OVERLAP, size // 4)
    least = 2 * max(found.stride, found.multiple, found.min_side)
    if size < least:
        raise RunRefused(f"--tile.size {size} is below {least}, what the model needs; try {TILE}")
    if found.max_side is not None and size > found.max_side:
        raise RunRefused(
            f"--tile.size {size} is above {found.max_side}, the longest side the model reads; "
            "leave it out"
        )
    if overlap * 2 > size:
        raise RunRefused(
            f"--tile.overlap {overlap} must be at most half of the tile size {size}; "
            f"try {size // 8}"
        )
    return grid_of(found, size, overlap, config.tile.taper)


def grid_of(
    found: Found, size: int, overlap: int, taper: Literal["gaussian", "linear"] = "gaussian"
) -> Grid:
    """The rule for cutting pictures for this model; size and overlap in pixels."""
    return Grid(
        size,
        overlap,
        found.stride,
        taper,
        found.receptive_field,
        found.min_side,
        found.multiple,
        found.partial_cells,
    )


def layout_for(config: SegmentConfig, source: Store, plan: Round, card: Bundle) -> Layout:
    """Slot size from the pictures themselves: what nine of ten probed masks fit into."""
    if card.task == "classify":
        return Layout("labels", "uint16", 65535, slots=0, slot=0)
    wide = max(entry.id for entry in card.classes) >= 255
    dtype, fill = ("uint16", 65535) if wide else ("uint8", 255)
    sizes = probed_sizes(source, plan)
    most = pc.max(plan.fragments()["images"]).as_py() or 1
    if config.layout == "stacked":
        height, width = _one_size(config, sizes)
        return Layout("stacked", dtype, fill, max(most, 16), height * width, height, width)
    areas = [h * w for h, w in sizes] or [SLOT_LEAST]
    slot = -(-int(np.quantile(areas, 0.9)) // SLOT_STEP) * SLOT_STEP
    slot = config.slot_bytes or min(SLOT_MOST, max(SLOT_LEAST, slot))
    return Layout("flat", dtype, fill, N_SLOTS, slot, confidence=config.confidence)


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


def probed_sizes(source: Store, plan: Round) -> list[tuple[int, int]]:
    """Height and width of up to 256 images spread over the plan, from their first bytes."""
    return [size for size in probed(source, plan.spread(PROBED)) if size]


def probed(source: Store, images: list[PlannedImage]) -> list[tuple[int, int] | None]:
    """Height and width of each, as far as its first bytes say."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda image: probe(head(source, image, HEAD)), images))
