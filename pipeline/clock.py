"""Seconds per leg of a fragment, and the sign of life that the watchdog listens to."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar, cast

T = TypeVar("T")


class Clock:
    """Seconds per leg of one fragment, each without the legs that feed it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.beat = time.monotonic()
        """When a leg last handed something on."""
        self._inner: list[float] = []

    def over(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Items, with the time it takes to make them booked under a name."""
        source = iter(items)
        while True:
            self._inner.append(0.0)
            start = time.perf_counter()
            item = next(source, _END)
            self.beat = time.monotonic()
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent
            if item is _END:
                return
            yield cast("T", item)


_END = object()
