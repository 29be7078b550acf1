"""How a driver on Ray stops in order: what workers have begun ends, and nothing more begins.

A worker first notes that a fragment is with it and then looks whether to stop; the driver first
says stop and then looks which fragments are noted. So none is missed, whoever came first. Words and
notes lie in the cluster's own table of keys (GCS), where every process of it reads without another
actor to start. A table that does not answer stops nothing.
"""

import threading
import uuid
from contextlib import suppress
from types import TracebackType

from ray.exceptions import RayError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_exists,
    _internal_kv_list,
    _internal_kv_put,
)

SPACE = b"maskfleet"
LOOK_S = 0.1  # how soon workers hear of it


class Notes:
    """What a worker does for a run: see the module."""

    def __init__(self, call: str) -> None:
        self._call = call

    @property
    def stopped(self) -> bool:
        """Whether the driver has said stop."""
        with suppress(RayError):
            return bool(_internal_kv_exists(f"{self._call}/stop", namespace=SPACE))
        return False

    def begin(self, fragment: int) -> bool:
        """Note that a fragment is here; False if it is not to be begun any more."""
        with suppress(RayError):
            _internal_kv_put(f"{self._call}/with/{fragment}", b"", namespace=SPACE)
        return not self.stopped


class Stopping:
    """What the driver does: a context around its run."""

    def __init__(self, stop: threading.Event) -> None:
        self.call = uuid.uuid4().hex
        self._stop, self._over = stop, threading.Event()
        self._with: set[int] | None = None
        """Fragments that workers hold: known once they were told to stop."""

    def __enter__(self) -> "Stopping":
        threading.Thread(target=self._listen, daemon=True, name="stopping").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        with suppress(RayError):  # the word stays: a worker may still ask
            _internal_kv_del(f"{self.call}/with/", del_by_prefix=True, namespace=SPACE)

    def _listen(self) -> None:
        while not self._over.wait(LOOK_S):
            if self._stop.is_set():
                self._say()
                return

    def _say(self) -> None:
        with suppress(RayError):
            _internal_kv_put(f"{self.call}/stop", b"", namespace=SPACE)

    def landed(self, fragment: int) -> None:
        """A fragment has come out, done or not begun."""
        if self._with is not None:
            self._with.discard(fragment)
            return
        with suppress(RayError):
            _internal_kv_del(f"{self.call}/with/{fragment}", namespace=SPACE)

    @property
    def done(self) -> bool:
        """Whether to stop now: it was asked for, and no worker holds a fragment any more."""
        if not self._stop.is_set():
            return False
        if self._with is None:
            self._say()  # if the listener has not yet: the notes come after the word
            self._with = self._noted()
        return not self._with

    def _noted(self) -> set[int]:
        with suppress(RayError):
            notes = _internal_kv_list(f"{self.call}/with/", namespace=SPACE)
            return {int(note.rpartition(b"/")[2]) for note in notes}
        return set()
