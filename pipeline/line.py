"""All that the legs need, made from the run folder alone, on any machine."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import Compute, SegmentConfig
from pipeline.decode import DecodeLimits
from pipeline.ledger import Ledger
from pipeline.mixing import Mixer
from pipeline.records import PlannedImage, Task
from pipeline.room import Room
from pipeline.storage import Store, open_store
from pipeline.tile import Grid

if TYPE_CHECKING:
    from pipeline.infer import Segmenter


BESIDE_GPU = 2  # threads that decode, for each fragment in flight


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A run, its source and its config; holds no secrets and no model."""

    ledger: Ledger
    source: Store
    config: SegmentConfig
    grid: Grid
    room: Room
    mixer: Mixer | None = None
    """Where fragments share batches."""

    @classmethod
    def open(cls, run_uri: str, compute: Compute) -> "Line":
        """The line of an existing run."""
        ledger = Ledger.open(open_store(run_uri))
        config = ledger.config.model_copy(update={"compute": compute})
        window = config.batch.window_mb * 1024**2
        shared = Mixer(ledger.budget, window, ledger.grid.align) if config.batch.mix else None
        return cls(ledger, open_store(config.source), config, ledger.grid, Room(window), shared)

    def decoders(self, device: str) -> int:
        """Threads that decode ahead of a model on a device of this type."""
        asked = self.config.compute.decode_threads
        # Where every core has a worker they would take its core, and to hand a picture over costs
        # half a millisecond (2026-12-01).
        return asked if asked is not None else 0 if device == "cpu" else BESIDE_GPU

    @property
    def limits(self) -> DecodeLimits:
        """What is still taken for a picture."""
        about = self.config.decode
        return DecodeLimits(max_bytes=about.max_bytes, max_pixels=about.max_pixels)

    def segmenter(self) -> "Segmenter":
        """The run's own copy of its model, on this machine's device."""
        from pipeline.infer import Segmenter  # torch: not for the driver of a cluster

        return Segmenter.of(self.ledger.bundle_files(), self.config)

    def images(self, task: Task) -> list[PlannedImage]:
        """The planned images of a fragment."""
        return self.ledger.planned(task.round, task.row_group)
