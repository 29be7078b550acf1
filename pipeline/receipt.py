"""What a call promised and what it did: counts, speed, what the speed was limited by.

The work-bound limit is what the cores could do if every one of them worked all the time:
cores / (seconds of a core per image, summed over the stages), from the seconds that this very call
has booked; on GPUs also what these could do, whichever is less. It counts the stages' own threads:
not Ray, not the driver, not waiting. Efficiency is the rate from first fragment to last over it.
"""

import time
from dataclasses import asdict
from typing import Any

from pipeline.clock import peak_memory_mb
from pipeline.finalize import Counts
from pipeline.forecast import truth
from pipeline.ledger import Ledger, now
from pipeline.listing import Listing
from pipeline.place import Capacity
from pipeline.progress import Tally

BUSY = (
    0.7  # of the cores (or GPUs): beyond it they are what limits, below it something is waited for
)
DEVICE = "device"
FEWEST = 8  # fragments; fewer are in flight together, and the time between two ends says nothing


def receipt_of(
    ledger: Ledger, counts: Counts, tally: Tally, listing: Listing, capacity: Capacity
) -> dict[str, Any]:
    """For people and for programs."""
    call = {**_done(tally), **_speed(tally, capacity), **_passed(tally, ledger)}
    return {
        "run_id": ledger.run["run_id"],
        "finished": now(),
        "model": ledger.model_version,
        "task": "segment" if ledger.layout.has_masks else "classify",
        "round": ledger.rounds()[-1],
        "counts": {**asdict(counts), "rejected_total": counts.n_rejected},
        "skipped": dict(sorted(listing.skipped.items())),
        "left_out": listing.left_out,
        "this_call": call,
        "forecast": truth(ledger.store, tally.answered, call["seconds"]),
    }


def _done(tally: Tally) -> dict[str, Any]:
    return {
        "images": tally.answered,
        "done": tally.done,
        "rejected": tally.rejected,
        "fragments": tally.fragments,
        "adopted": tally.adopted,
        "megapixels": round(tally.pixels / 1e6, 3),
        "bytes_read": tally.bytes_in,
        "bytes_written": tally.bytes_out,
    }


def _speed(tally: Tally, capacity: Capacity) -> dict[str, Any]:
    whole = time.monotonic() - tally.started
    steady = tally.steady_s if tally.fragments >= FEWEST else None
    images = tally.answered - tally.first_images if steady else tally.answered
    rate = images / (steady or whole)
    limits = limits_of(tally, capacity)
    limit = min(limits.values(), default=None)
    return {
        "seconds": round(whole, 3),
        "seconds_first_to_last_fragment": None if steady is None else round(steady, 3),
        "images_per_second": round(tally.answered / whole, 3),
        "images_per_second_first_to_last_fragment": steady and round(rate, 3),
        "megapixels_per_second": round(tally.pixels / 1e6 / whole, 3),
        "seconds_per_leg": _rounded(tally.seconds),
        "busy_seconds_per_stage": _rounded(tally.busy),
        "cores": capacity.cores,
        "gpus": capacity.gpus,
        "work_bound_limit_images_per_second": limit and round(limit, 3),
        "efficiency": limit and round(rate / limit, 3),
        "bottleneck": bottleneck(tally, {name: rate / most for name, most in limits.items()}),
        "peak_memory_mb": {"driver": round(peak_memory_mb()), "worker": round(tally.peak_mb)},
    }


def limits_of(tally: Tally, capacity: Capacity) -> dict[str, float]:
    """Images per second that cores and GPUs could do; empty where nothing was done."""
    worked = sum(seconds for stage, seconds in tally.busy.items() if stage != DEVICE)
    held, limits = tally.busy.get(DEVICE, 0.0), {}
    if worked and tally.answered:
        limits["cores"] = capacity.cores * tally.answered / worked
    if held and capacity.gpus and tally.answered:
        limits["gpus"] = capacity.gpus * tally.answered / held
    return limits


def bottleneck(tally: Tally, used: dict[str, float]) -> str | None:
    """What more of would have made it faster.

    Args:
        tally: what was done.
        used: the share of cores and GPUs that worked.
    """
    if not used:
        return None
    fullest = max(used, key=lambda name: used[name])
    if fullest == "gpus" and used[fullest] >= BUSY:
        return f"gpus ({used[fullest]:.0%} busy)"
    if fullest == "cores" and used[fullest] >= BUSY:
        stages = {stage: s for stage, s in tally.busy.items() if stage != DEVICE}
        first = max(stages, key=lambda stage: stages[stage])
        share = stages[first] / sum(stages.values())
        return f"cores ({used[fullest]:.0%} busy, {share:.0%} of it {first})"
    waited = {leg: s - tally.busy.get(leg, 0.0) for leg, s in tally.seconds.items()}
    longest = max(waited, key=lambda leg: waited[leg])
    return f"waiting ({fullest} {used[fullest]:.0%} busy; longest for {longest})"


def _passed(tally: Tally, ledger: Ledger) -> dict[str, Any]:
    """How tiles went through the model."""
    passed, passes = tally.passed, tally.passed.get("passes", 0)
    if not passes:
        return {"passes": 0, "tiles": 0, "batch_fill": None, "padding_waste": None}
    alone = passes == passed["tiles"]  # as on every CPU
    return {
        "passes": passes,
        "tiles": passed["tiles"],
        "batch_fill": None if alone else round(passed["padded"] / passes / ledger.budget, 3),
        "padding_waste": round(1 - passed["pixels"] / passed["padded"], 4),
    }


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in sorted(seconds.items())}
