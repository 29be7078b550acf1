"""Say what a run would cost, in time, bytes and money, from a few of its pictures."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict

import tyro

from jobs import ended
from pipeline.errors import EXIT_DONE
from pipeline.estimate import Range
from pipeline.forecast import Forecast, PlanConfig, forecast
from pipeline.progress import duration
from pipeline.storage import absolute


def main(arguments: list[str] | None = None) -> int:
    """Parse, try some pictures, say.

    Args:
        arguments: the command line without the program's name; default: this process's.

    Returns:
        0 done, 2 refused.
    """
    return ended(lambda: _run(parsed(arguments)))


def parsed(arguments: list[str] | None) -> PlanConfig:
    """The config that the command line says."""
    config = tyro.cli(PlanConfig, prog="maskfleet plan", args=arguments)
    out = absolute(config.out) if config.out else ""
    inside = "auto" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else None
    return config.model_copy(
        update={"source": absolute(config.source), "out": out, "on": config.on or inside}
    )


def _run(config: PlanConfig) -> int:
    if config.on in (None, "process"):
        from pipeline.here import Here  # torch takes seconds: not for a refusal or --help

        found = forecast(config, Here(config.compute))
    else:
        from pipeline.cluster import OnRay  # Ray takes a second to import

        place = OnRay(config.on, config.compute)
        try:
            found = forecast(config, place)
        finally:
            place.close()
    text = json.dumps(asdict(found)) if config.as_json else "\n".join(_text(config, found))
    sys.stdout.write(f"{text}\n")
    return EXIT_DONE


def _text(config: PlanConfig, found: Forecast) -> Iterator[str]:
    yield (
        f"{found.images:,} images, {_mega(found.megapixels)} megapixels, in {found.fragments:,} "
        f"fragments ({found.skipped:,} other objects skipped)"
    )
    start = duration(found.start_s)
    low, expected, high = (duration(s) for s in asdict(found.seconds).values())
    yield (
        f"time: {expected} ({low} to {high}) with {found.workers} workers on {found.device}, "
        f"after {start} to start"
    )
    read, written = found.bytes_read / 1e6, found.bytes_written.times(1e-6)
    yield f"reads {read:,.1f} MB, writes masks of {_mega(written, 1)} MB"
    if found.rejected:
        yield f"rejects {found.rejected:,.0f} images or so"
    if found.cost is not None:
        cost = found.cost
        yield f"costs {cost.expected:,.2f} ({cost.low:,.2f} to {cost.high:,.2f})"
    yield f"in brackets: 80 % intervals, from {found.sampled} pictures that were tried"
    if config.out:
        yield f"written down for the run in {config.out}"


def _mega(value: Range, digits: int = 0) -> str:
    form = f",.{digits}f"
    return f"{value.expected:{form}} ({value.low:{form}} to {value.high:{form}})"


if __name__ == "__main__":
    sys.exit(main())
