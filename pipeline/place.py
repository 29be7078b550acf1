"""Where fragments run: what a whole call asks of this process, or of a cluster."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.config import SegmentConfig
from pipeline.records import Receipt, Task

GPU_THREADS = 4  # fragments that share a GPU, or an actor that has one: decoding beside predicting


@dataclass(frozen=True, slots=True)
class Found:
    """What a place says of itself when a run is created."""

    budget: int
    """Padded pixels of a batch."""
    device: str
    stride: int
    min_side: int
    receptive_field: int | None
    multiple: int = 1
    partial_cells: bool = False
    max_side: int | None = None
    compiled: bool = True
    """Whether what we have in C can be used there (`models.parts.kernels`)."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a place could use at once."""

    cores: int
    gpus: int = 0


class Place(Protocol):
    """Where fragments are run."""

    @property
    def capacity(self) -> Capacity:
        """What there is for all of its work."""
        ...

    def found(self, bundle: tuple[bytes, bytes], images: int, config: SegmentConfig) -> Found:
        """Load the model there, once, and find the pixel budget for a run of so many images.

        Args:
            bundle: model.json and weights.safetensors.
            images: how many are planned.
            config: the run's.
        """
        ...

    def run(self, tasks: Iterable[Task], run_uri: str, stop: threading.Event) -> Iterator[Receipt]:
        """Receipts of fragments as they are committed."""
        ...

    def close(self) -> None:
        """Give back what was started."""
        ...
