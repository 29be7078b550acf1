"""What a run would cost: time, bytes and money (`maskfleet plan`).

From the headers of a few thousand of its pictures, which say how large they are, and a few that are
tried, which say what such a picture costs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import numpy as np
import tyro
from pydantic import Field

from pipeline.config import SegmentConfig
from pipeline.create import (
    first_round,
    layout_for,
    pinned,
    probed,
    read_bundle,
    read_card,
    refuse_strangers,
)
from pipeline.decode import DecodeLimits
from pipeline.errors import RunRefused, StorageMissing
from pipeline.estimate import Range, Sample, strata_of
from pipeline.layout import Layout
from pipeline.ledger import FORECAST, RUN
from pipeline.listing import Listing
from pipeline.place import Capacity, Found
from pipeline.plan import Round
from pipeline.records import PlannedImage
from pipeline.storage import Store, open_store

if TYPE_CHECKING:
    from pipeline.sampling import Sampled

STRATA = 8
LOOKED_AT, BY_BYTES = 4096, 32  # pictures whose headers are read, and their strata
# Of runs by their receipts, two cores (benchmarks/RESULTS.md: 0.95 to 0.98 on 2026-11-28, 0.89 to
# 0.94 on 2026-11-29): how much of the time workers are at work; the standard deviation around that
# and of a machine's own speed from minute to minute; and what passes before.
EFFICIENCY, SPREAD = 0.92, 0.08
START_S = {"process": 3.0, "ray": 12.0}

In = TypeVar("In")
Out = TypeVar("Out")


class PlanConfig(SegmentConfig):
    """Say what a run over SOURCE would cost; with --out also write it down for that run."""

    out: str = ""
    """The run folder that is going to be: its receipt then says how true the forecast was."""
    sample: int = Field(default=64, ge=1)
    """Pictures that are tried."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Of everything the run would use, in any currency."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Machine-readable, one object."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would cost."""

    images: int
    fragments: int
    skipped: int
    megapixels: Range
    seconds: Range
    """Of the work, from its first picture to its last commit."""
    start_s: float
    """Before that."""
    bytes_read: int
    bytes_written: Range
    """Of masks."""
    rejected: float
    """Pictures."""
    workers: int
    device: str
    sampled: int
    cost: Range | None
    """Of the whole, start included."""


class Workers(Protocol):
    """A place where pictures are tried."""

    @property
    def capacity(self) -> Capacity:
        """See `pipeline.place.Place.capacity`."""
        ...

    def found(self, bundle: tuple[bytes, bytes], images: int, config: SegmentConfig) -> Found:
        """See `pipeline.place.Place.found`."""
        ...

    def each(self, make: Callable[[], Callable[[In], Out]], items: Sequence[In]) -> Iterator[Out]:
        """What is made of each item, in any order, by workers that are made there."""
        ...


def forecast(config: PlanConfig, place: Workers) -> Forecast:
    """List the source, try a few pictures, say what all of them would cost.

    Raises:
        RunRefused: if there is nothing to plan, or a run already.
    """
    out = open_store(config.out) if config.out else None
    if out is not None:
        _refuse_begun(out)
    asked = pinned(config, None)
    source, listing = open_store(asked.source), Listing()
    bundle = read_bundle(asked.model)
    card = read_card(asked, bundle)
    plan = first_round(asked, source, listing)
    found = place.found(bundle, plan.images, asked)
    batch = asked.batch.model_copy(update={"pixels": asked.batch.pixels or found.budget})
    # Nothing is written there, but the line of a run has a place.
    asked = asked.model_copy(update={"batch": batch, "out": f"{source.uri}.never-written"})
    layout = layout_for(asked, source, plan, card)
    sample = _sample(plan, source, config)
    workers = config.compute.workers or place.capacity.gpus or place.capacity.cores
    tried = _tried(plan, sample, place, partial(_sampler, bundle, layout, asked), workers)
    made = _forecast(config, plan, sample, tried, workers, found, listing)
    if out is not None:
        out.replace(FORECAST, json.dumps(asdict(made), indent=1).encode() + b"\n")
    return made


def _refuse_begun(out: Store) -> None:
    refuse_strangers(out)
    if out.stat(RUN) is not None:
        raise RunRefused(
            f"--out {out.uri} holds a run already: `maskfleet status {out.uri}` says how far it is"
        )


def _sampler(
    bundle: tuple[bytes, bytes], layout: Layout, asked: SegmentConfig
) -> "Callable[[PlannedImage], Sampled]":
    from pipeline.sampling import sampler_of  # torch takes seconds: not for a refusal or --help

    return sampler_of(bundle, layout, asked)


def _pixels(size: tuple[int, int] | None, most: DecodeLimits) -> int:
    """Of a picture; 0 where nobody knows, or where it claims more than a run would read."""
    return size[0] * size[1] if size and most.admit(*size) else 0


def _sample(plan: Round, source: Store, config: PlanConfig) -> Sample:
    """Pictures to try, so that sizes in the headers of many others tell what they stand for."""
    looked_at = strata_of(plan.nbytes, BY_BYTES, LOOKED_AT)
    rows = np.concatenate([stratum.tried for stratum in looked_at])
    found = probed(source, plan.picked(rows))  # in the order of the plan
    most = DecodeLimits(max_pixels=config.decode.max_pixels)
    pixels = np.zeros(len(rows), int)
    pixels[np.argsort(rows)] = [_pixels(size, most) for size in found]
    if not pixels.any():  # as in a table, whose values have no place of their own
        pixels = plan.nbytes[rows]
    return Sample.of(looked_at, pixels, STRATA, config.sample)


def _tried(
    plan: Round,
    sample: Sample,
    place: Workers,
    make: "Callable[[], Callable[[PlannedImage], Sampled]]",
    workers: int,
) -> "list[list[Sampled]]":
    """What the chosen pictures of each stratum have cost; in turn, so that none is warmed alone."""
    rows = np.concatenate(sample.rows)
    by_place = {image.image_id: image for image in plan.picked(rows)}
    images = [by_place[row] for row in rows]
    mixed = sorted(range(len(images)), key=lambda i: (i * 7919) % len(images))
    wanted = [images[i] for i in mixed]
    # All of them once for nothing: what a first picture pays for, a long run pays only then. Then
    # twice, for what a moment costs; but never one twice in a row: what is made anew whenever sizes
    # change is made anew in a run, too.
    found: dict[int, list[Sampled]] = {image.image_id: [] for image in images}
    for one in place.each(make, [*wanted[:1] * workers, *wanted * 3]):
        found[one.image_id].append(one)
    least = {i: min(ones[-2:], key=lambda one: one.seconds) for i, ones in found.items()}
    ids = [image.image_id for image in images]
    ends = np.cumsum([len(rows) for rows in sample.rows])
    return [[least[i] for i in part] for part in np.split(np.array(ids), ends[:-1])]


def _forecast(
    config: PlanConfig,
    plan: Round,
    sample: Sample,
    tried: "list[list[Sampled]]",
    workers: int,
    found: Found,
    listing: Listing,
) -> Forecast:
    def over(name: str, *, by_size: bool = True, spread: float = 0.0) -> Range:
        costs = [np.array([getattr(one, name) for one in part], float) for part in tried]
        return sample.total(costs, by_size=by_size, spread=spread)

    fragments = plan.fragments().num_rows
    busy = min(workers, fragments)
    # At the end each worker waits for the last one, half a fragment on average.
    share = (1 / EFFICIENCY + 0.5 * (busy - 1) / fragments) / busy
    seconds = over("seconds", spread=SPREAD).times(share)
    start = START_S["process" if config.on in (None, "process") else "ray"]
    price = config.price_per_hour
    whole = Range(seconds.low + start, seconds.expected + start, seconds.high + start)
    return Forecast(
        images=plan.images,
        fragments=fragments,
        skipped=sum(listing.skipped.values()),
        megapixels=over("pixels").times(1e-6),
        seconds=seconds,
        start_s=start,
        bytes_read=int(plan.nbytes.sum()),
        bytes_written=over("stored"),
        rejected=over("rejected", by_size=False).expected,
        workers=workers,
        device=found.device,
        sampled=sum(len(part) for part in tried),
        cost=None if price is None else whole.times(price / 3600),
    )


def truth(store: Store, images: int, seconds: float) -> dict[str, Any] | None:
    """How true the forecast of a run was that has just done all its images in one call.

    Returns:
        None where nothing was forecast, or something else was done.
    """
    try:
        said = json.loads(store.read(FORECAST))
    except StorageMissing:
        return None
    if said["images"] != images:
        return None
    range_s = Range(**said["seconds"])
    return {
        "seconds": asdict(range_s),
        "actual_seconds": round(seconds, 3),
        "off": round(seconds / range_s.expected - 1, 4) if range_s.expected else None,
        "within": range_s.holds(seconds),
    }
