"""This process as the place where fragments run; cluster.py is the other one."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from pipeline.config import Compute, SegmentConfig
from pipeline.infer import Segmenter
from pipeline.labels import in_order
from pipeline.line import Line
from pipeline.memory import refuse_too_little
from pipeline.place import GPU_THREADS, Capacity, Found
from pipeline.records import Receipt, Task
from pipeline.run import run_here

In = TypeVar("In")
Out = TypeVar("Out")


class Here:
    """This process: as many fragments at a time as there are cores, or a few for a GPU."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._segmenter: Segmenter | None = None

    @property
    def capacity(self) -> Capacity:
        """See `Place.capacity`."""
        on_gpu = self._segmenter is not None and self._segmenter.device.type != "cpu"
        return Capacity(len(os.sched_getaffinity(0)), int(on_gpu))

    def found(
        self,
        bundle: tuple[bytes, bytes],
        images: int,  # noqa: ARG002 - the contract
        config: SegmentConfig,
    ) -> Found:
        """See `Place.found`."""
        refuse_too_little(len(bundle[1]), processes=1)  # which its workers are threads of
        self._segmenter = Segmenter.of(bundle, config)
        return self._segmenter.found()

    def run(self, tasks: Iterable[Task], run_uri: str, stop: threading.Event) -> Iterator[Receipt]:
        """See `Place.run`."""
        line = Line.open(run_uri, self._compute)
        segmenter = self._segmenter or line.segmenter()
        self._segmenter = segmenter
        yield from run_here(tasks, line, segmenter, self._threads, stop)

    def each(self, make: Callable[[], Callable[[In], Out]], items: Sequence[In]) -> Iterator[Out]:
        """See `pipeline.cluster.OnRay.each`: one worker, shared by threads."""
        yield from in_order(make(), items, self._threads)

    @property
    def _threads(self) -> int:
        cores = self.capacity.cores
        return self._compute.workers or (min(GPU_THREADS, cores) if self.capacity.gpus else cores)

    def close(self) -> None:
        """Nothing was started."""
