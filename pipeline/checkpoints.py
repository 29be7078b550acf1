"""States of a training on storage: written whole, read back whole, or not at all.

    trainings/ID/CALL/000001200/state.safetensors
    trainings/ID/CALL/000001200/state.json         written last; holds the hash of the other

Every call that trains writes into a folder of its own, so two calls that overlap (a driver that was
thought dead) never touch each other's; whoever goes on takes the furthest state that is whole.
"""

import contextlib
import logging
import re
from collections.abc import Iterator

from models.training.states import State, from_files, to_files
from pipeline.errors import StorageBusy, StorageMissing
from pipeline.patience import patiently
from pipeline.storage import open_store

log = logging.getLogger("maskfleet")

WEIGHTS, FACTS = "state.safetensors", "state.json"
KEPT = 3  # the newest may be damaged, and the one before it


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
        for folder, done in self._folders():
            if at_most is not None and done > at_most:
                continue
            try:
                return from_files(*(self._read(f"{folder}/{name}") for name in (WEIGHTS, FACTS)))
            except (ValueError, StorageMissing) as error:
                where = f"{self._store.uri}/{folder}"
                log.warning("the checkpoint %s is passed over: %s", where, error)
        return None

    def prune(self, kept: int = KEPT) -> None:
        """Remove all but the newest few; a store that is away keeps them a while longer."""
        with contextlib.suppress(StorageBusy):
            self._prune(kept)

    def _prune(self, kept: int) -> None:
        for folder, _ in list(self._folders())[kept:]:
            for name in (FACTS, WEIGHTS):  # the facts first: what has none is no checkpoint
                self._store.delete(f"{folder}/{name}")

    def _read(self, path: str) -> bytes:
        return patiently(lambda: self._store.read(path))

    def _folders(self) -> Iterator[tuple[str, int]]:
        """Folders of complete states and their steps, furthest first."""
        found = []
        try:
            for each in patiently(lambda: list(self._store.list())):
                match = re.fullmatch(rf"(.+/(\d{{9}}))/{re.escape(FACTS)}", each.path)
                if match:
                    found.append((int(match.group(2)), match.group(1)))
        except StorageMissing:
            return
        for done, folder in sorted(found, reverse=True):
            yield folder, done
