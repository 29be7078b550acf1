"""Simulated time: what happens when, and servers that take one thing after another."""

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Events:
    """What will happen, in order of time; at the same time, in the order it was announced."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def at(self, time: float, do: Callable[..., None], *about: Any) -> None:
        """Announce something."""
        heapq.heappush(self._heap, (time, next(self._numbers), do, about))

    def run(self, until: Callable[[], bool]) -> None:
        """Let happen what was announced, and what that announces, until there is enough."""
        while not until():
            self.now, _, do, about = heapq.heappop(self._heap)
            do(*about)


class Server:
    """Serves in order of arrival, so much a second.

    All that arrives at once shares the rate of a network or of many cores, in truth; in order of
    arrival as much is served in all, and nothing needs to be reckoned anew when something arrives.
    """

    __slots__ = ("busy", "free", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free = 0.0
        self.busy = 0.0

    def served(self, now: float, amount: float) -> float:
        """When an amount that arrives now is done."""
        seconds = amount / self.rate
        self.busy += seconds
        self.free = max(now, self.free) + seconds
        return self.free

    def stop(self, now: float) -> None:
        """Leave undone what is not done."""
        self.busy -= max(0.0, self.free - now)
        self.free = now
