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
        self._inner.append((0.0, 0.0))
        start, worked = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.beat = time.monotonic()
            spent, work = time.perf_counter() - start, time.thread_time() - worked
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
            with self.during(name):
                item = next(source, _END)
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
        self.passed.update(passes=1, tiles=passed.tiles, pixels=passed.pixels, padded=passed.padded)
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
