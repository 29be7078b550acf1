"""Batches that fragments in flight share: an option (`batch.mix`), off by default.

Alone, a fragment ends with a batch of every padded shape that is not full. Shared, these fill up
with tiles of the fragments beside it: fewer passes where pictures have many sizes and the device
wants large batches (benchmarks/batching.py says how many). The price: batches depend on what else
is in flight, so that on a GPU the last bits of an answer may too. On a CPU tiles pass one by one,
and nothing changes.

Whichever thread fills a batch runs it. A fragment that has no more tiles waits for the others to
fill its batches while they still bring some; when at most a quarter of them does, it runs what it
waits for, full or not.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.batch import Batch, Shape, shape_of
from pipeline.tile import Tile, TileAnswer

Predict = Callable[[list[Batch]], Iterable[TileAnswer]]
"""Answers of batches, in the order of their tiles."""

FEW = 4  # one of so many that still brings tiles is nobody to wait for


@dataclass(slots=True, eq=False)
class _Member:
    """A fragment that shares batches."""

    ready: deque[TileAnswer] = field(default_factory=deque)
    unanswered: int = 0
    feeding: bool = True
    """Whether more tiles may come."""


class Mixer:
    """Answers the tiles of several threads, batches shared."""

    def __init__(self, budget: int, window: int, align: int) -> None:
        """Made once for all fragments of a process.

        Args:
            budget: padded pixels of a batch at most.
            window: decoded bytes that may wait, of all fragments together.
            align: see `pack`.
        """
        self._budget, self._window, self._align = budget, window, align
        self._groups: dict[Shape, list[tuple[Tile, _Member]]] = {}
        self._held = 0
        self._members: set[_Member] = set()
        self._changed = threading.Condition()
        self._broken: BaseException | None = None

    def answers(self, tiles: Iterable[Tile], predict: Predict) -> Iterator[TileAnswer]:
        """Answers to a fragment's tiles; those of equal shape in their order.

        Args:
            tiles: of one fragment.
            predict: answers of batches that this thread runs, whosever their tiles are.
        """
        me = _Member()
        with self._changed:
            self._members.add(me)
        try:
            for tile in tiles:
                self._run(self._added(tile, me), predict)
                yield from self._taken(me)
            with self._changed:
                me.feeding = False
                self._changed.notify_all()
            while me.unanswered or me.ready:
                self._run(self._awaited(me), predict)
                yield from self._taken(me)
        finally:
            self._left(me)

    def _added(self, tile: Tile, me: _Member) -> list[tuple[Tile, _Member]]:
        """Put a tile to its like; what became full is to be run."""
        shape = shape_of(tile, self._align)
        with self._changed:
            me.unanswered += 1
            self._held += tile.values_HWC.nbytes
            group = self._groups.setdefault(shape, [])
            group.append((tile, me))
            if (len(group) + 1) * shape[0] * shape[1] > self._budget:
                return self._pop(shape)
            if self._held > self._window:
                return self._pop(max(self._groups, key=lambda one: _nbytes(self._groups[one])))
            return []

    def _awaited(self, me: _Member) -> list[tuple[Tile, _Member]]:
        """What is to be run so that this fragment gets on; nothing while others see to it."""
        with self._changed:
            while True:
                if self._broken is not None:
                    raise RuntimeError("another fragment's batch has failed") from self._broken
                if me.ready:
                    return []
                feeding = sum(member.feeding for member in self._members)
                mine = [s for s, group in self._groups.items() if any(m is me for _, m in group)]
                if mine and FEW * feeding <= len(self._members):
                    return self._pop(mine[0])
                self._changed.wait()

    def _run(self, group: list[tuple[Tile, _Member]], predict: Predict) -> None:
        if not group:
            return
        shape = shape_of(group[0][0], self._align)
        try:
            answers = list(predict([Batch(tuple(t for t, _ in group), *shape[:2])]))
        except BaseException as error:
            with self._changed:
                self._broken = error
                self._changed.notify_all()
            raise
        with self._changed:
            for answer, (_, member) in zip(answers, group, strict=True):
                member.ready.append(answer)
                member.unanswered -= 1
            self._changed.notify_all()

    def _taken(self, me: _Member) -> list[TileAnswer]:
        with self._changed:
            taken = list(me.ready)
            me.ready.clear()
            return taken

    def _left(self, me: _Member) -> None:
        """A fragment is over, or given up: nobody waits for it, nothing of it is run."""
        with self._changed:
            self._members.discard(me)
            for shape in list(self._groups):
                kept = [(t, m) for t, m in self._groups[shape] if m is not me]
                dropped = [t for t, m in self._groups[shape] if m is me]
                self._held -= sum(tile.values_HWC.nbytes for tile in dropped)
                if kept:
                    self._groups[shape] = kept
                else:
                    del self._groups[shape]
            self._changed.notify_all()

    def _pop(self, shape: Shape) -> list[tuple[Tile, _Member]]:
        group = self._groups.pop(shape)
        self._held -= _nbytes(group)
        return group


def _nbytes(group: list[tuple[Tile, _Member]]) -> int:
    return sum(tile.values_HWC.nbytes for tile, _ in group)
