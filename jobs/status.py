"""Say how far a run is: done, rejected, pending, rate, ETA; needs the run folder only."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import tyro

from jobs import ended
from pipeline.errors import EXIT_DONE, EXIT_REJECTIONS, EXIT_UNFINISHED
from pipeline.ledger import Ledger
from pipeline.progress import duration
from pipeline.status import Status, status
from pipeline.storage import open_store


def show(
    run: Annotated[str, tyro.conf.Positional],
    json: bool = False,
) -> int:
    """Say how far a run is.

    Args:
        run: the run folder, a local path or s3://bucket/prefix.
        json: machine-readable, one object.

    Returns:
        0 done, 3 done with rejections, 4 something is pending.
    """
    now = status(Ledger.open(open_store(run)))
    sys.stdout.write(_as_json(now) if json else _as_text(now))
    if now.pending or not now.finished:
        return EXIT_UNFINISHED
    return EXIT_REJECTIONS if now.rejected else EXIT_DONE


def _as_json(now: Status) -> str:
    return json.dumps(asdict(now)) + "\n"


def _as_text(now: Status) -> str:
    rejected = ", ".join(f"{n} {reason}" for reason, n in now.rejected.items())
    lines = [
        (
            f"{now.done} done, {sum(now.rejected.values())} rejected, {now.pending} pending"
            f" of {now.planned} images"
        ),
        (
            f"{now.committed} of {now.fragments} fragments committed, {now.megapixels} MP,"
            f" round {now.rounds - 1}, {'finished' if now.finished else 'not finished'}"
        ),
    ]
    if rejected:
        lines.append(f"rejected: {rejected}")
    if now.per_second is not None:
        lines.append(
            f"{now.per_second} images/s lately, ETA {duration(now.eta_s)}, "
            f"last commit {duration(now.last_commit_s_ago)} ago"
        )
    lines.append(f"model {now.model}; a newer model means a new run folder")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    return ended(lambda: tyro.cli(show, prog="maskfleet status", args=arguments))


if __name__ == "__main__":
    sys.exit(main())
