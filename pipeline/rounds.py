"""Rounds over many schedules: one of them (`tick`), or for as long as we live (`stay`).

An error of one schedule is told and is no reason to leave the others.
"""

import math
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TypeVar

from pipeline.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_REFUSED,
    EXIT_UNFINISHED,
    MaskfleetError,
    RunRefused,
)
from pipeline.schedule import failed
from pipeline.scheduler import Scheduler, Seen

T = TypeVar("T")

EVERY_S = 20.0  # between two rounds: cron counts in minutes
WATCH_S = 1.0  # between two looks at a job in our care, or at a lease
CLUSTER_S = 5.0  # between two questions for a job on a cluster


class Rounds:
    """Rounds of one process."""

    def __init__(
        self, scheduler: Scheduler, tell: Callable[[str], None], pause: Callable[[float], bool]
    ) -> None:
        """Pause waits so many seconds, and answers whether to stop: an event's `wait`."""
        self._scheduler, self._tell, self._pause = scheduler, tell, pause
        self._errors: dict[str, int] = {}

    def tick(self, names: list[str], *, wait: bool) -> int:
        """One round; stays while jobs run in our care.

        Args:
            names: the schedules.
            wait: stay for jobs on clusters and for retries as well.

        Returns:
            0, or the exit code of a job that failed; 4 if something did not answer, or if told
            to stop before the end.
        """
        stay = {Seen.HERE, Seen.BUSY} | ({Seen.THERE, Seen.WAITING} if wait else set())
        # each with the tick to stay with: a second one that comes meanwhile is the next round's
        pending: dict[str, datetime | None] = dict.fromkeys(names)
        stopped = False
        while pending and not stopped:
            close = False
            for name, only in list(pending.items()):
                found = self._visited(name, only)
                seen, tick = (Seen.IDLE, None) if found is None else found
                if found is None and self._scheduler.cares_for(name):
                    seen = Seen.HERE
                close = close or seen in {Seen.HERE, Seen.BUSY}
                if seen in stay:
                    pending[name] = tick or only
                else:
                    del pending[name]
            if pending:
                stopped = self._pause(WATCH_S if close else CLUSTER_S)
        return EXIT_UNFINISHED if stopped else self._code()

    def stay(
        self,
        names: Callable[[], list[str]],
        every_s: float = EVERY_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Rounds until stopped. Jobs in our care are looked at more often than that."""
        last, everyone, wanted = -math.inf, list[str](), list[str]()
        stopped = False
        while not stopped:
            if monotonic() - last >= every_s:
                last = monotonic()
                everyone = wanted = self._of("", names) or everyone
            for name in wanted:
                self._visited(name, None)
            self._scheduler.ended.clear()
            wanted = [name for name in everyone if self._scheduler.cares_for(name)]
            stopped = self._pause(min(every_s, WATCH_S) if wanted else every_s)

    def _visited(self, name: str, only: datetime | None) -> tuple[Seen, datetime | None] | None:
        return self._of(name, partial(self._scheduler.visit, name, only))

    def _of(self, name: str, call: Callable[[], T]) -> T | None:
        try:
            answer = call()
        except MaskfleetError as error:
            refused = isinstance(error, RunRefused)
            self._errors[name] = EXIT_REFUSED if refused else EXIT_UNFINISHED
            self._tell(f"{name}: {error}" if name else str(error))
            return None
        self._errors.pop(name, None)
        return answer

    def _code(self) -> int:
        """What the round came to: the last word on every schedule."""
        codes: dict[str, int] = {}
        for end in self._scheduler.ended:
            codes[end.name] = EXIT_UNFINISHED if end.outcome == "lost" else end.outcome
        bad = [code for code in {**codes, **self._errors}.values() if failed(code)]
        if len(bad) < 2:
            return bad[0] if bad else EXIT_DONE
        return bad[0] if len(set(bad)) == 1 else EXIT_BUG
