"""A whole archive: refuse or plan, run what is missing, make it final.

This is what `maskfleet segment` calls. A call first finishes what is planned, then lists the source
and plans one more round if it has changed. Where the fragments run is somebody else's business
(`Place`): this process, or a cluster.
"""

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from models import Bundle
from pipeline.config import Compute, SegmentConfig
from pipeline.errors import (
    EXIT_DONE,
    EXIT_REJECTIONS,
    RunRefused,
    RunUnfinished,
    StorageError,
    StorageMissing,
)
from pipeline.finalize import Counts, finalize
from pipeline.headers import probe
from pipeline.layout import N_SLOTS, Layout
from pipeline.ledger import RUN, Ledger, frozen, now
from pipeline.line import Line
from pipeline.listing import Listing, head
from pipeline.overview import overview
from pipeline.plan import Known, Round, Start, plan_round, to_parquet
from pipeline.progress import Tally, facts, say, watched
from pipeline.reader import Run
from pipeline.records import PlannedImage, Receipt, Task
from pipeline.run import run_here
from pipeline.storage import PREFLIGHT, Store, check_create_only, open_store
from pipeline.tables import read_table
from pipeline.tile import Grid

DEMO = Path(__file__).parent.parent / "models" / "demo"
PROBED = 256  # images whose headers decide the slot size (STORE §5)
HEAD = 65_536  # bytes of an image that usually hold its size
SLOT_LEAST, SLOT_MOST = 2**16, 2**22
TILE, OVERLAP = 1024, 128  # where neither config nor bundle says


@dataclass(frozen=True, slots=True)
class Found:
    """What a place says of itself when a run is created."""

    budget: int
    """Padded pixels of a batch."""
    device: str
    stride: int
    min_side: int
    receptive_field: int | None


class Place(Protocol):
    """Where fragments are run."""

    def found(self, bundle: tuple[bytes, bytes], images: int) -> Found:
        """Load the model there, once, and find the pixel budget for a run of so many images."""
        ...

    def run(self, tasks: Iterable[Task], run_uri: str, stop: threading.Event) -> Iterator[Receipt]:
        """Receipts of fragments as they are committed."""
        ...

    def close(self) -> None:
        """Give back what was started."""
        ...


class Here:
    """This process: as many fragments at a time as there are cores, or a few for a GPU."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._segmenter: Any = None

    def found(self, bundle: tuple[bytes, bytes], images: int) -> Found:  # noqa: ARG002 - the contract
        """See `Place.found`."""
        from pipeline.infer import Segmenter  # torch: not needed to plan, refuse or show help

        self._segmenter = Segmenter(*bundle, self._compute.device)
        made = self._segmenter
        return Found(
            made.probe(), made.device.type, made.stride, made.min_side, made.receptive_field
        )

    def run(self, tasks: Iterable[Task], run_uri: str, stop: threading.Event) -> Iterator[Receipt]:
        """See `Place.run`."""
        line = Line.open(run_uri, self._compute)
        segmenter = self._segmenter or line.segmenter()
        cores = len(os.sched_getaffinity(0))
        workers = self._compute.workers or (
            cores if segmenter.device.type == "cpu" else min(4, cores)
        )
        yield from run_here(tasks, line, segmenter, workers, stop)

    def close(self) -> None:
        """Nothing was started."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended."""

    exit_code: int
    counts: Counts | None
    receipt: dict[str, Any]


# ----------------------------------------------------------------------------------------- a call


def segment_archive(config: SegmentConfig, place: Place, stop: threading.Event) -> Outcome:
    """Segment every image below the source; resume, extend or do nothing, as the run folder says.

    Raises:
        RunRefused: before anything is spent.
        RunUnfinished: when stopped; the same call goes on.
    """
    source, out = open_store(config.source), open_store(config.out)
    _refuse_nesting(source, out)
    bundle = read_bundle(config.model)
    card = _card(config, bundle)
    ledger, listing = Ledger.find(out), Listing()
    if config.dry_run:
        return _dry(config, source, out, ledger, card, listing)
    fresh = ledger is None
    if ledger is None:
        ledger = _create(config, source, out, bundle, card, place, listing)
    ledger.refuse_other(config, card.sha256)
    ledger.ensure_bundle(bundle)
    if ledger.rounds():
        ledger.ensure_array()
    else:  # its driver was killed between claim and plan
        cap = ledger.layout.slots if ledger.layout.kind == "stacked" else None
        ledger.add_round(0, _as_object(_first_round(config, source, listing, cap), listing))
    tally = Tally(0)
    counts = _finish_rounds(ledger, config, place, stop, tally)
    if not fresh and _extend(ledger, config, source, listing):
        counts = _finish_rounds(ledger, config, place, stop, tally)
    receipt = _receipt(ledger, counts, tally, listing)
    ledger.store.replace("receipt.json", json.dumps(receipt, indent=1).encode() + b"\n")
    if tally.answered and (sheet := overview(Run(ledger))) is not None:
        ledger.store.replace("overview.png", sheet)
    return Outcome(EXIT_REJECTIONS if counts.n_rejected else EXIT_DONE, counts, receipt)


def _refuse_nesting(source: Store, out: Store) -> None:
    a, b = f"{source.uri}/", f"{out.uri}/"
    if a.startswith(b) or b.startswith(a):
        raise RunRefused(
            f"--out {out.uri} and the source {source.uri} lie inside each other; "
            "choose a folder beside it"
        )


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


def _card(config: SegmentConfig, bundle: tuple[bytes, bytes]) -> Bundle:
    try:
        return Bundle.from_json(bundle[0])
    except ValueError as error:
        raise RunRefused(f"--model {config.model}: {error}") from error


def _dry(
    config: SegmentConfig,
    source: Store,
    out: Store,
    ledger: Ledger | None,
    card: Bundle,
    listing: Listing,
) -> Outcome:
    """Plan and check, write nothing."""
    known: dict[str, Known] = {}
    if ledger is None:
        _refuse_strangers(out)
    else:
        ledger.refuse_other(config, card.sha256)
        known = _known(ledger) if ledger.manifests() else {}
    plan = plan_round(source, config, listing, known, Start())
    rows = plan.table
    receipt = {
        "dry_run": True,
        "images": plan.images,
        "encoded_bytes": sum(rows["nbytes"].to_pylist()),
        "formats": _tallied(rows["format"]),
        "changes": _tallied(rows["change"]),
        "skipped": dict(listing.skipped),
        "left_out": listing.left_out,
    }
    return Outcome(EXIT_DONE, None, receipt)


def _tallied(column: pa.ChunkedArray) -> dict[str, int]:
    return {
        row["values"]: row["counts"] for row in column.value_counts().to_pylist() if row["values"]
    }


def _refuse_strangers(out: Store) -> None:
    try:
        stranger = next((f for f in out.list() if not f.path.startswith(PREFLIGHT)), None)
    except StorageMissing as error:
        if "bucket" in str(error):
            raise RunRefused(f"--out: {error}") from error
        return
    if stranger is not None and out.stat(RUN) is None:  # a driver may be a moment ahead of us
        raise RunRefused(
            f"--out {out.uri} is not empty and holds no {RUN} (it has {stranger.path}); "
            "choose an empty folder"
        )


def _create(
    config: SegmentConfig,
    source: Store,
    out: Store,
    bundle: tuple[bytes, bytes],
    card: Bundle,
    place: Place,
    listing: Listing,
) -> Ledger:
    """A new run: look at everything, then claim the folder and write round 0."""
    _refuse_strangers(out)
    plan = _first_round(config, source, listing)
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
    ledger.add_round(0, _as_object(plan, listing))
    return ledger


def _first_round(
    config: SegmentConfig, source: Store, listing: Listing, cap: int | None = None
) -> Round:
    plan = plan_round(source, config, listing, {}, Start(cap=cap))
    if not plan.images:
        skipped = f"; skipped {dict(listing.skipped)}" if listing.skipped else ""
        raise RunRefused(
            f"there are no images below {source.uri}{skipped}; "
            "check the path, --include and --exclude"
        )
    return plan


def _as_object(plan: Round, listing: Listing) -> bytes:
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
    slot = 2 ** int(np.ceil(np.log2(max(1, np.quantile(areas, 0.9)))))
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
    from concurrent.futures import ThreadPoolExecutor

    step = max(1, table.num_rows // PROBED)
    names = list(PlannedImage.__dataclass_fields__)
    chosen = table.take(list(range(0, table.num_rows, step))).select(names).to_pylist()
    with ThreadPoolExecutor(16) as pool:
        heads = pool.map(lambda row: head(source, PlannedImage(**row), HEAD), chosen)
        return [size for size in (probe(start) for start in heads) if size]


# ----------------------------------------------------------------------------------------- rounds


def _tasks(ledger: Ledger) -> tuple[list[Task], int]:
    """Planned fragments that are not committed, and how many images they hold."""
    commits = ledger.commits()
    tasks, images = [], 0
    for number in ledger.rounds():
        for row in ledger.fragments(number).to_pylist():
            if row["fragment"] not in commits:
                tasks.append(Task(row["fragment"], number, row["row_group"], row["images"]))
                images += row["images"]
    return tasks, images


def _finish_rounds(
    ledger: Ledger, config: SegmentConfig, place: Place, stop: threading.Event, tally: Tally
) -> Counts:
    """Run what is missing of all planned rounds, then make them final."""
    tasks, images = _tasks(ledger)
    if tasks:
        tally.total += images
        say(
            config.log,
            "start",
            text=f"{images} images in {len(tasks)} fragments to do",
            images=images,
            fragments=len(tasks),
        )
        receipts = place.run(tasks, ledger.store.uri, stop)
        try:
            for _ in watched(receipts, tally, config.log, config.interval_s):
                pass
        except StorageError as error:  # access lost or a store down, in mid-run: nothing is lost
            raise RunUnfinished(
                f"{error}; when that is mended, run the same command again"
            ) from error
        say(config.log, "progress", **facts(tally))
    if stop.is_set():
        raise RunUnfinished("stopped; what is committed stays, run the same command again to go on")
    rounds, manifests = ledger.rounds(), ledger.manifests()
    if manifests and rounds[-1] == manifests[-1] and not tasks:
        said = ledger.manifest(manifests[-1])["counts"]
        return Counts(
            said["planned"],
            said["done"],
            said["rejected_by_reason"],
            said["fragments"],
            said["pixels"],
        )
    return finalize(ledger)


def _known(ledger: Ledger) -> dict[str, Known]:
    """The live images of the finished rounds, by key."""
    columns = ["key", "image_id", "etag", "input_bytes", "sha256", "reason"]
    with ledger.plan_file("final/images.parquet") as file:
        table = read_table(file, columns)
    known = {}
    for batch in table.to_batches(8192):
        for key, image_id, etag, nbytes, digest, reason in zip(
            *(c.to_pylist() for c in batch.columns), strict=True
        ):
            known[key] = Known(image_id, etag, nbytes or 0, None, digest, reason)
    return known


def _extend(ledger: Ledger, config: SegmentConfig, source: Store, listing: Listing) -> bool:
    """Plan one more round if the source has changed or images are tried again."""
    numbers = ledger.rounds()
    start = time.monotonic()
    ids = [ledger.plan(n, ["image_id"])["image_id"] for n in numbers]
    first = Start(
        round=numbers[-1] + 1,
        image_id=1 + max((max(c.to_pylist(), default=-1) for c in ids), default=-1),
        fragment=1
        + max(
            (max(ledger.fragments(n)["fragment"].to_pylist(), default=-1) for n in numbers),
            default=-1,
        ),
        cap=ledger.layout.slots if ledger.layout.kind == "stacked" else None,
    )
    plan = plan_round(source, config, listing, _known(ledger), first)
    if not plan.table.num_rows:
        return False
    changes = _tallied(plan.table["change"])
    say(
        config.log,
        "round",
        text=f"the archive has changed: {changes} (listed in {time.monotonic() - start:.1f} s)",
        **changes,
    )
    ledger.add_round(first.round, _as_object(plan, listing))
    return True


def _receipt(ledger: Ledger, counts: Counts, tally: Tally, listing: Listing) -> dict[str, Any]:
    """What was promised and what was done, for people and for programs."""
    whole = time.monotonic() - tally.started
    first, last = tally.first_landed, tally.last_landed
    steady = last - first if first and last and last > first else None
    return {
        "run_id": ledger.run["run_id"],
        "finished": now(),
        "model": ledger.model_version,
        "round": ledger.rounds()[-1],
        "counts": {**asdict(counts), "rejected_total": counts.n_rejected},
        "skipped": dict(sorted(listing.skipped.items())),
        "left_out": listing.left_out,
        "this_call": {
            "images": tally.answered,
            "done": tally.done,
            "rejected": tally.rejected,
            "fragments": tally.fragments,
            "adopted": tally.adopted,
            "megapixels": round(tally.pixels / 1e6, 3),
            "bytes_read": tally.bytes_in,
            "bytes_written": tally.bytes_out,
            "seconds": round(whole, 3),
            "seconds_first_to_last_fragment": None if steady is None else round(steady, 3),
            "images_per_second": round(tally.answered / whole, 3),
            "images_per_second_first_to_last_fragment": steady
            and round((tally.answered - tally.first_images) / steady, 3),
            "megapixels_per_second": round(tally.pixels / 1e6 / whole, 3),
            "seconds_per_leg": {leg: round(s, 3) for leg, s in sorted(tally.seconds.items())},
        },
    }
