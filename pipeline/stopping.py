"""How a driver on Ray stops in order: what workers have begun ends, and nothing more begins.

A worker first notes that a fragment is with it and then looks whether to stop; the driver first
says stop and then looks which fragments are noted. So none is missed, whoever came first. Words and
notes lie in the cluster's own table of keys (GCS), where every process of it reads without another
actor to start. A table that does not answer in time stops nothing.
"""

import threading
import uuid
from contextlib import suppress
from types import TracebackType
from typing import Any

from ray.exceptions import RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client

SPACE = b"maskfleet"
LOOK_S = 0.1  # how soon workers hear of it
PATIENCE_S = 3.0  # with the table; Ray's own is without end


class Notes:
    """What a worker does for a run: see the module."""

    def __init__(self, call: str) -> None:
        self._call = call

    @property
    def stopped(self) -> bool:
        """Whether the driver has said stop."""
        with suppress(RayError):
            return bool(_table().internal_kv_exists(_stop(self._call), SPACE, PATIENCE_S))
        return False

    def begin(self, fragment: int) -> bool:
        """Note that a fragment is here; False if it is not to be begun any more."""
        if self.stopped:
            return False
        with suppress(RayError):
            _put(_noted(self._call) + str(fragment).encode())
        return not self.stopped


class Stopping:
    """What the driver does: a context around its run."""

    def __init__(self, stop: threading.Event) -> None:
        self.call = uuid.uuid4().hex
        self._stop, self._over = stop, threading.Event()
        self._landed: set[int] = set()
        self._held: set[int] | None = None
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
            _table().internal_kv_del(_noted(self.call), True, SPACE, PATIENCE_S)  # noqa: FBT003

    def landed(self, fragment: int) -> None:
        """A fragment has come out, done or not begun."""
        self._landed.add(fragment)

    @property
    def done(self) -> bool:
        """Whether to stop now: it was asked for, and no worker holds a fragment any more."""
        if not self._stop.is_set():
            return False
        if self._held is None:
            with suppress(RayError):  # then the next fragment that comes out asks again
                self._held = self._asked()
        return self._held is not None and self._held <= self._landed

    def _asked(self) -> set[int]:
        _put(_stop(self.call))  # the listener may not have: the notes come after the word
        notes = _table().internal_kv_keys(_noted(self.call), SPACE, PATIENCE_S)
        return {int(note.rpartition(b"/")[2]) for note in notes}

    def _listen(self) -> None:
        while not self._over.wait(LOOK_S):
            if self._stop.is_set():
                with suppress(RayError):
                    _put(_stop(self.call))
                    return


def _table() -> Any:  # noqa: ANN401 - Ray's GcsClient, which it does not type
    return internal_kv_get_gcs_client()


def _put(key: bytes) -> None:
    _table().internal_kv_put(key, b"", True, SPACE, PATIENCE_S)  # noqa: FBT003 - Ray's order


def _stop(call: str) -> bytes:
    return f"{call}/stop".encode()


def _noted(call: str) -> bytes:
    return f"{call}/with/".encode()
