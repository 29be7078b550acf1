"""How far a training is: a small object on storage, and a line for people."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pipeline.errors import StorageMissing
from pipeline.progress import duration
from pipeline.storage import Store

NOTE = "progress.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A training at some moment."""

    step: int
    of: int
    loss: float | None
    """Of the last step."""
    miou: float | None
    """Of the last look at the pictures held out."""
    best: float | None
    """Of all looks."""
    best_step: int | None
    learning_rate: float | None
    pictures_per_s: float | None
    eta_s: float | None
    """Seconds to the end, without looks."""
    seconds: float
    """So far, without the time between two calls."""


def show(store: Store, progress: Progress) -> None:
    """Leave a note in the training's folder, over the one before."""
    store.replace(NOTE, json.dumps(asdict(progress)).encode())


def shown(store: Store) -> Progress | None:
    """The last note."""
    try:
        return Progress(**json.loads(store.read(NOTE)))
    except StorageMissing:
        return None


def as_line(progress: Progress) -> str:
    """For people."""
    return "  ".join(_parts(progress))


def _parts(progress: Progress) -> Iterator[str]:
    yield f"step {progress.step:,} of {progress.of:,}"
    if progress.loss is not None:
        yield f"loss {progress.loss:.4f}"
    if progress.miou is not None and progress.best is not None:
        yield (
            f"mIoU {100 * progress.miou:.1f} "
            f"(best {100 * progress.best:.1f} at {progress.best_step:,})"
        )
    if progress.learning_rate is not None:
        yield f"rate {progress.learning_rate:.2e}"
    if progress.pictures_per_s is not None:
        yield f"{progress.pictures_per_s:.1f} pictures/s"
    if progress.eta_s is not None:
        yield f"ETA {duration(progress.eta_s)}"
