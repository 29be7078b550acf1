"""A whole archive: refuse or plan, run what is missing, make it final.

This is what `maskfleet segment` calls. A call first finishes what is planned, then lists the source
and plans one more round if it has changed. Where the fragments run is somebody else's business
(`Place`): this process, or a cluster.
"""

# pyarrow.compute makes its functions when it is imported; no type checker can see them.
# pyright: reportAttributeAccessIssue=false

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from models import Bundle
from pipeline.config import SegmentConfig
from pipeline.create import (
    as_object,
    create_run,
    first_round,
    pinned,
    read_bundle,
    read_card,
    refuse_strangers,
)
from pipeline.errors import (
    EXIT_DONE,
    EXIT_REJECTIONS,
    RunRefused,
    RunUnfinished,
    StorageError,
)
from pipeline.finalize import Counts, final_counts, finalize, round_of
from pipeline.known import Known
from pipeline.ledger import Ledger
from pipeline.listing import Listing
from pipeline.overview import overview
from pipeline.place import Place
from pipeline.plan import REMOVED, Start, plan_round
from pipeline.progress import Tally, facts, say, watched
from pipeline.reader import Run
from pipeline.receipt import receipt_of
from pipeline.records import Task
from pipeline.storage import Store, open_store
from pipeline.tables import open_table, read_batches

IMAGES = "final/images.parquet"
SHEET = "overview.png"
ABANDONED_S = 900.0  # what is being written for so long has lost its writer


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
    ledger, listing = Ledger.find(out), Listing()
    config = pinned(config, ledger)
    bundle = read_bundle(config.model)
    card = read_card(config, bundle)
    if config.dry_run:
        return _dry(config, source, out, ledger, card, listing)
    fresh = ledger is None
    if ledger is None:
        ledger = create_run(config, source, out, bundle, card, place, listing)
    ledger.refuse_other(config, card.sha256)
    with _resumable():
        ledger.ensure_bundle(bundle)
        return _run_to_end(ledger, config, source, place, stop, listing, fresh=fresh)


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Once there is a run, a store that fails (down, full, access lost) costs time only."""
    try:
        yield
    except StorageError as error:
        raise RunUnfinished(f"{error}; when that is mended, run the same command again") from error


def _run_to_end(
    ledger: Ledger,
    config: SegmentConfig,
    source: Store,
    place: Place,
    stop: threading.Event,
    listing: Listing,
    *,
    fresh: bool,
) -> Outcome:
    """All that an existing run still needs."""
    if ledger.rounds():
        ledger.ensure_derived()
    else:  # its driver was killed between claim and plan
        cap = ledger.layout.slots if ledger.layout.kind == "stacked" else None
        ledger.add_round(0, *as_object(first_round(config, source, listing, cap), listing))
    tally = Tally(0)
    counts = _finish_rounds(ledger, config, place, stop, tally)
    if not fresh and _extend(ledger, config, source, listing):
        counts = _finish_rounds(ledger, config, place, stop, tally)
    receipt = receipt_of(ledger, counts, tally, listing, place.capacity)
    ledger.store.replace("receipt.json", json.dumps(receipt, indent=1).encode() + b"\n")
    stale = tally.answered or ledger.store.stat(SHEET) is None  # or killed before it was drawn
    if stale and (sheet := overview(Run(ledger))) is not None:
        ledger.store.replace(SHEET, sheet)
    if tally.answered:  # a call with nothing to do need not look at every folder
        _sweep(ledger.store)
    return Outcome(EXIT_REJECTIONS if counts.n_rejected else EXIT_DONE, counts, receipt)


def _sweep(out: Store) -> None:
    """Remove what killed writers left half-written. Old by the store's own clock alone."""
    about = out.stat("receipt.json")
    for found in out.unfinished():
        if about is not None and found.mtime < about.mtime - ABANDONED_S:
            out.delete(found.path)


def _refuse_nesting(source: Store, out: Store) -> None:
    # Links are resolved, so that a run cannot come to lie in its own source through one.
    a, b = (
        f"{s.uri if s.uri.startswith('s3://') else os.path.realpath(s.uri)}/" for s in (source, out)
    )
    if a.startswith(b) or b.startswith(a):
        raise RunRefused(
            f"--out {out.uri} and the source {source.uri} lie inside each other; "
            "choose a folder beside it"
        )


def _dry(
    config: SegmentConfig,
    source: Store,
    out: Store,
    ledger: Ledger | None,
    card: Bundle,
    listing: Listing,
) -> Outcome:
    """Plan and check, write nothing."""
    known = Known()
    if ledger is None:
        refuse_strangers(out)
    else:
        ledger.refuse_other(config, card.sha256)
        known = _known(ledger, config) if ledger.manifests() else known
    plan = plan_round(source, config, listing, known, Start())
    receipt = {
        "dry_run": True,
        "images": plan.images,
        "encoded_bytes": pc.sum(plan.fragments()["nbytes"]).as_py() or 0,
        "formats": plan.tally("format"),
        "changes": plan.tally("change"),
        "skipped": dict(listing.skipped),
        "left_out": listing.left_out,
    }
    return Outcome(EXIT_DONE, None, receipt)


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
    """Run what is missing of all planned rounds, then make them final.

    Another driver may plan a further round while this one is at it: then that one too.
    """
    while True:
        tasks = _run_missing(ledger, config, place, stop, tally)
        counts = None if tasks else final_counts(ledger)
        if (counts := counts or finalize(ledger)) is not None:
            return counts


def _run_missing(
    ledger: Ledger, config: SegmentConfig, place: Place, stop: threading.Event, tally: Tally
) -> int:
    """Run the planned fragments that are not committed; how many they were."""
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
        for _ in watched(receipts, tally, config.log, config.interval_s):
            pass
        say(config.log, "progress", **facts(tally))
    if stop.is_set():
        raise RunUnfinished("stopped; what is committed stays, run the same command again to go on")
    return len(tasks)


def _known(ledger: Ledger, config: SegmentConfig) -> Known:
    """The live images of the finished rounds."""
    path, newest = IMAGES, ledger.manifests()[-1]

    def rows(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if round_of(ledger, path) != newest:
            raise RunUnfinished(
                f"{ledger.store.uri}/{path} is not that of round {newest}: another driver has "
                "written it meanwhile; run the same command again"
            )
        with ledger.plan_file(path) as file:
            yield from read_batches(file, columns)

    return Known(rows, config.retry)


def _extend(ledger: Ledger, config: SegmentConfig, source: Store, listing: Listing) -> bool:
    """Plan one more round if the source has changed or images are tried again."""
    numbers = ledger.rounds()
    start = time.monotonic()
    planned = pa.concat_tables(ledger.fragments(n) for n in numbers)
    ends = pc.add(planned["first_image_id"], planned["images"].cast(pa.int64()))
    first = Start(
        round=numbers[-1] + 1,
        image_id=pc.max(ends).as_py() or 0,
        fragment=1 + (-1 if not planned.num_rows else pc.max(planned["fragment"]).as_py()),
        cap=ledger.layout.slots if ledger.layout.kind == "stacked" else None,
    )
    plan = plan_round(source, config, listing, _known(ledger, config), first)
    if plan.empty:
        return False
    changes = plan.tally("change")
    _refuse_removals(ledger, config, source, changes.get(REMOVED, 0))
    say(
        config.log,
        "round",
        text=f"the archive has changed: {changes} (listed in {time.monotonic() - start:.1f} s)",
        **changes,
    )
    ledger.add_round(first.round, *as_object(plan, listing))
    return True


def _refuse_removals(ledger: Ledger, config: SegmentConfig, source: Store, removed: int) -> None:
    """Most of an archive is seldom deleted; a disk that is not mounted looks as if it were."""
    if not removed or config.allow_removals:
        return
    with ledger.plan_file(IMAGES) as file:
        live = open_table(file).metadata.num_rows
    if removed * 2 <= live:
        return
    raise RunRefused(
        f"{removed} of {live} images are no longer in {source.uri}, and their masks would be "
        "dropped; is it mounted, and is it all there? If it is so, say --allow-removals"
    )
