"""Memory for pictures that are decoded ahead, shared by the fragments of a process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """So many bytes per fragment, all in one: who has small pictures leaves more to the others.

    A picture may always come in where nothing else is, so that none is too large.
    """

    def __init__(self, share: int) -> None:
        self._share, self._fragments, self._held = share, 0, 0
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
        """Take room for a picture; False if there is none now.

        Args:
            nbytes: what it needs decoded.
            wait: until there is room. Only for one that holds none itself, or all might wait.
        """
        with self._changed:
            while self._held and self._held + nbytes > self._share * self._fragments:
                if not wait:
                    return False
                self._changed.wait()
            self._held += nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        """A picture has gone on, or never came."""
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()
