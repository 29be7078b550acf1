"""A lease of create-only numbered objects: one holder at a time, fenced by the number.

``000007.json`` says who holds it; the holder renews by creating the next number, gives it up by a
number that says so, and whoever finds a number above its own has lost it. No clock orders anything,
and nothing is ever overwritten.

A lease is taken from a dead holder only after *watching* it: so long as this process saw no new
number, by its own monotonic clock, counting only time in which it really looked. An outage of the
store, or a frozen observer, therefore never lets a living holder look dead, and no wall clock can.

Old numbers are deleted by the holder. So a creation counts only if no higher number is there
afterwards: a holder that slept may well create the number after its own once more, and sees the
higher one next to it.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import RunRefused, RunUnfinished, StorageError, StorageMissing
from pipeline.storage import Store

LASTS_S = 60.0  # a dead holder's lease is taken over after so long; a minute of cron at most
PART = 4  # a holder renews after a quarter of that: three renewals may fail


class LeaseLost(RunUnfinished):
    """Another one holds the lease by now; nothing more may be done under it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One numbered object."""

    number: int
    owner: str
    """For people: machine and process."""
    free: bool
    """Given up."""
    note: dict[str, Any]
    """What the holder wants its successor to know; passed on by whoever says nothing newer."""
    token: str
    """Unique, so that an answer lost on the way is not mistaken for a defeat."""


class Lease:
    """One lease, as one process sees it."""

    def __init__(
        self,
        store: Store,
        folder: str,
        owner: str,
        monotonic: Callable[[], float] = time.monotonic,
        lasts_s: float = LASTS_S,
    ) -> None:
        self._store, self._folder, self._owner = store, folder, owner
        self.monotonic, self._lasts_s = monotonic, lasts_s
        self.renew_s = lasts_s / PART
        self._watched: int | None = None
        self._watched_s = 0.0
        self._looked = 0.0
        self.alive = False
        """Whether the holder was seen to renew while this process watched."""

    def look(self) -> Claim | None:
        """The highest number, or None where nobody ever held it."""
        claim = self._head()
        number = None if claim is None else claim.number
        now = self.monotonic()
        if number == self._watched:
            self._watched_s += min(now - self._looked, self.renew_s)
        else:
            self.alive = self._watched is not None
            self._watched, self._watched_s = number, 0.0
        self._looked = now
        return claim

    def take(self) -> "Held | None":
        """Hold it, if nobody does or its holder is dead. Does not wait: ask again."""
        claim = self.look()
        if claim is not None and not claim.free and self._watched_s < self._lasts_s:
            return None
        before = 0 if claim is None else claim.number
        note = {} if claim is None else claim.note
        mine = self.append(before, note, free=False)
        return None if mine is None else Held(self, mine)

    def append(self, after: int, note: dict[str, Any], *, free: bool) -> Claim | None:
        """Create the next number; None if another one was first."""
        claim = Claim(after + 1, self._owner, free, note, uuid.uuid4().hex)
        data = json.dumps(asdict(claim)).encode() + b"\n"
        if not self._store.create(self._path(claim.number), data):
            return None
        numbers = self.numbers()
        if max(numbers, default=0) != claim.number:
            return None
        with contextlib.suppress(StorageError):  # tidying; the next holder does it as well
            for number in numbers:
                if number < after:
                    self._store.delete(self._path(number))
        return claim

    def numbers(self) -> list[int]:
        """The numbers that are there."""
        try:
            names = [found.path.rpartition("/")[2] for found in self._store.list(self._folder)]
        except StorageMissing:
            return []
        return sorted(int(n[:-5]) for n in names if n.endswith(".json") and n[:-5].isdigit())

    def _head(self) -> Claim | None:
        for _ in range(100):  # between listing and reading two holders may come and tidy up
            numbers = self.numbers()
            if not numbers:
                return None
            with contextlib.suppress(StorageMissing):
                return self._claim(numbers[-1])
        raise StorageMissing(f"{self._folder}: its objects vanish as soon as they are listed")

    def _claim(self, number: int) -> Claim:
        data = self._store.read(self._path(number))
        try:
            return Claim(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise RunRefused(
                f"{self._store.uri}/{self._path(number)} is damaged ({error}); "
                "delete it where no scheduler runs"
            ) from error

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:06d}.json"


class Held:
    """A lease in hand."""

    def __init__(self, lease: Lease, claim: Claim) -> None:
        self._lease, self._claim = lease, claim
        self._renewed = lease.monotonic()

    @property
    def number(self) -> int:
        """The fence: higher than any holder's before."""
        return self._claim.number

    @property
    def note(self) -> dict[str, Any]:
        """What was last written down."""
        return self._claim.note

    def renew(self, note: dict[str, Any] | None = None) -> None:
        """Create the next number.

        Raises:
            LeaseLost: if another one holds the lease.
        """
        said = self.note if note is None else note
        claim = self._lease.append(self.number, said, free=False)
        if claim is None:
            raise LeaseLost(
                f"another scheduler took over the lease (number {self.number} was ours)"
            )
        self._claim, self._renewed = claim, self._lease.monotonic()

    def renew_if_due(self) -> None:
        """`renew`, where the last time is a quarter of the lease ago."""
        if self._lease.monotonic() - self._renewed >= self._lease.renew_s:
            self.renew()

    def check(self) -> None:
        """Make sure that it is still ours: right before anything that cannot be taken back.

        Raises:
            LeaseLost: if another one holds the lease.
        """
        if max(self._lease.numbers(), default=0) != self.number:
            raise LeaseLost(
                f"another scheduler took over the lease (number {self.number} was ours)"
            )

    def release(self) -> None:
        """Give it up; nothing happens if it is lost already."""
        self._lease.append(self.number, self.note, free=True)
