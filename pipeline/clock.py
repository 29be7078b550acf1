"""What a fragment costs: seconds per leg, what passed the model, and signs of life.

The watchdog listens to the signs of life; the rest ends in the receipt.
"""

import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of the model."""

    tiles: int
    pixels: int
    """Of the tiles."""
    padded: int
    """Of what went through the model: tiles, and what they are padded with."""
    device_s: float = 0.0
    """Seconds for which it had the GPU; 0 on a CPU."""


class Clock:
    """Seconds per leg of one fragment, each without the legs that feed it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """On the wall, waiting included."""
        self.busy: defaultdict[str, float] = defaultdict(float)
        """Seconds of a core (or of the GPU: `device`) that a stage has worked."""
        self.passed: Counter[str] = Counter()
        """Passes of the model, tiles, pixels of tiles, pixels with padding."""
        self.beat = time.monotonic()
        """When a leg last handed something on."""
        self._inner: list[tuple[float, float]] = []

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Book what it takes under a name."""
        began = self._begin()
        try:
            yield
        finally:
            self._end(name, began)

    def _begin(self) -> tuple[float, float]:
        """Something begins, within what has begun before: now, on the wall and of this thread."""
        self._inner.append((0.0, 0.0))
        return time.perf_counter(), time.thread_time()

    def _end(self, name: str, began: tuple[float, float]) -> None:
        """Book what has begun last, without what was booked within it."""
        self.beat = time.monotonic()
        spent, work = time.perf_counter() - began[0], time.thread_time() - began[1]
        inner = self._inner.pop()
        self.seconds[name] += spent - inner[0]
        self.busy[name] += work - inner[1]
        if self._inner:
            outer = self._inner[-1]
            self._inner[-1] = (outer[0] + spent, outer[1] + work)

    def over(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Items, with the time it takes to make them booked under a name."""
        source = iter(items)
        while True:
            began = self._begin()
            try:
                item = next(source, _END)
            finally:
                self._end(name, began)
            if item is _END:
                return
            yield cast("T", item)

    def said(self) -> dict[str, Any]:
        """What it has booked, as the fields of a receipt (and of JSON)."""
        return {
            "seconds": dict(self.seconds),
            "busy": dict(self.busy),
            "passed": dict(self.passed),
        }

    def hear(self, said: dict[str, Any]) -> None:
        """Add what another clock has said of the same fragment."""
        add(self.seconds, said["seconds"])
        add(self.busy, said["busy"])
        self.passed.update(said["passed"])

    def work(self, name: str, seconds: float) -> None:
        """Book what other threads have worked for a stage."""
        self.busy[name] += seconds

    def saw(self, passed: Pass) -> None:
        """Count a pass of the model in."""
        counts = self.passed
        counts["passes"] += 1
        counts["tiles"] += passed.tiles
        counts["pixels"] += passed.pixels
        counts["padded"] += passed.padded
        if passed.device_s:
            self.busy["device"] += passed.device_s


def add(totals: dict[str, float], more: Mapping[str, float]) -> None:
    """Add to each its own."""
    for name, value in more.items():
        totals[name] = totals.get(name, 0.0) + value


def peak_memory_mb() -> float:
    """The most memory this process has had in use at once, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


_END = object()
