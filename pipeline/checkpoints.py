"""States of a training on storage: written whole, read back whole, or not at all.

    trainings/ID/CALL/000001200/state.safetensors
    trainings/ID/CALL/000001200/state.json         written last; holds the hash of the other

Every call that trains writes into a folder of its own, so two calls that overlap (a driver that was
thought dead) never touch each other's; whoever goes on takes the furthest state that is whole. What
a killed writer left of one is removed when nobody can be at it any more (`_abandoned`).
"""

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator

from models.training.states import State, from_files, to_files
from pipeline.errors import StorageBusy, StorageMissing
from pipeline.patience import patiently
from pipeline.storage import Found, open_store

log = logging.getLogger("maskfleet")

WEIGHTS, FACTS = "state.safetensors", "state.json"
KEPT = 3  # the newest may be damaged, and the one before it
ABANDONED_S = 1800.0
"""After so long between two files of a state its writer is dead: a store that is away is waited for
a third of that (patience.py)."""


class Checkpoints:
    """The states of one training."""

    def __init__(self, uri: str, call: str) -> None:
        """Nothing is read yet.

        Args:
            uri: the training's folder.
            call: the folder in it that this call writes to.
        """
        self._store, self._call = open_store(uri), call

    def save(self, state: State) -> str:
        """Write a state; the folder, below the training's."""
        folder = f"{self._call}/{state.done:09d}"
        weights, facts = to_files(state)
        patiently(lambda: self._store.replace(f"{folder}/{WEIGHTS}", weights))
        patiently(lambda: self._store.replace(f"{folder}/{FACTS}", facts))
        return folder

    def newest(self, at_most: int | None = None) -> State | None:
        """The furthest whole state; what is damaged is told and passed over.

        Args:
            at_most: of this many steps or fewer.
        """
        for folder, done in _complete(patiently(self._listed)):
            if at_most is not None and done > at_most:
                continue
            try:
                return from_files(*(self._read(f"{folder}/{name}") for name in (WEIGHTS, FACTS)))
            except (ValueError, StorageMissing) as error:
                where = f"{self._store.uri}/{folder}"
                log.warning("the checkpoint %s is passed over: %s", where, error)
        return None

    def prune(self, kept: int = KEPT) -> None:
        """Remove all but the newest few, and what was left of others that never became whole.

        A store that is away keeps them a while longer.
        """
        with contextlib.suppress(StorageBusy):
            self._prune(kept)

    def _prune(self, kept: int) -> None:
        listed = self._listed()
        for folder, _ in _complete(listed)[kept:]:
            for name in (FACTS, WEIGHTS):  # the facts first: what has none is no checkpoint
                self._store.delete(f"{folder}/{name}")
        for path in _abandoned([*listed, *self._store.unfinished()]):
            self._store.delete(path)

    def _read(self, path: str) -> bytes:
        return patiently(lambda: self._store.read(path))

    def _listed(self) -> list[Found]:
        try:
            return list(self._store.list())
        except StorageMissing:
            return []


def _complete(listed: Iterable[Found]) -> list[tuple[str, int]]:
    """Folders of complete states and their steps, furthest first."""
    placed = [_placed(found) for found in listed]
    found = [(done, folder) for folder, done, name in filter(None, placed) if name == FACTS]
    return [(folder, done) for done, folder in sorted(found, reverse=True)]


def _abandoned(listed: Iterable[Found]) -> Iterator[str]:
    """Files of states that never became whole, that lie behind one that did, and that are old.

    Behind it they are of no use, whoever wrote them. Old: by the store's clock alone, which wrote
    down both times; a writer that is alive follows its first file with the second one.
    """
    placed = [(found, place) for found in listed if (place := _placed(found))]
    whole = {place[:2]: found.mtime for found, place in placed if place[2] == FACTS}
    furthest = max((done for _, done in whole), default=-1)
    latest = max(whole.values(), default=0.0)
    for found, (folder, done, _) in placed:
        old = found.regular and found.mtime < latest - ABANDONED_S
        if old and done <= furthest and (folder, done) not in whole:
            yield found.path


def _placed(found: Found) -> tuple[str, int, str] | None:
    """Folder and steps of the state that a file belongs to, and its name there."""
    match = re.fullmatch(r"(.+/(\d{9}))/([^/]+)", found.path)
    return match and (match.group(1), int(match.group(2)), match.group(3))
