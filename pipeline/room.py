"""Memory for pictures that are decoded ahead, shared by the fragments of a process."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """So many bytes per fragment, all in one: who has small pictures leaves more to the others.

    A picture may always come in where nothing else is, so that none is too large.
    """

    def __init__(self, share: int) -> None:
        self._share, self._fragments, self._held = share, 0, 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def fragment(self) -> Iterator[None]:
        """One more fragment decodes, and brings its share."""
        with self._changed:
            self._fragments += 1
        try:
            yield
        finally:
            with self._changed:
                self._fragments -= 1

    def take(self, nbytes: int, *, wait: bool) -> bool:
        """Take room for a picture; False if there is none now, or others wait.

        Args:
            nbytes: what it needs decoded.
            wait: until there is room. Only for one that holds none itself, or all might wait.
        """
        with self._changed:
            if not wait and (self._queue or not self._fits(nbytes)):
                return False
            # One after the other: small pictures must not keep a large one waiting for ever.
            me = object()
            self._queue.append(me)
            self._changed.wait_for(lambda: self._queue[0] is me and self._fits(nbytes))
            self._queue.popleft()
            self._held += nbytes
            self._changed.notify_all()
            return True

    def _fits(self, nbytes: int) -> bool:
        return not self._held or self._held + nbytes <= self._share * self._fragments

    def give_back(self, nbytes: int) -> None:
        """A picture has gone on, or never came."""
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()
