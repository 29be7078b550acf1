"""Batches on a GPU: bytes go in, labels come back, and neither waits for the other.

Three queues of the device (CUDA streams): one copies batches in as they are stored, one works, one
copies labels out; each waits for what it reads and for nothing else. Threads take turns at giving
it work, not at waiting for answers: while one decodes the next pictures or compresses the last
masks, the batches of others are on their way. From stored pixels to labels and counts a batch is
one piece of work that asks for no value, whatever sizes and holes its pictures have, so that a CUDA
graph can be all of it (captured.py).

Shapes: B batch, C channels, K classes; h, w native grid; H, W pixels.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from models.parts.bundle import InputInfo
from models.parts.padding import inside
from models.parts.segmenter import Segmenter
from pipeline.captured import Captured
from pipeline.feeding import factors, normalised, staged
from pipeline.finishing import Finished, Finisher, as_array
from pipeline.records import Array
from pipeline.tile import Rows, Tile, TileAnswer

Size = tuple[int, int]
"""Height and width in pixels."""


class Landing(Protocol):
    """Answers on their way to the host."""

    def arrived(self) -> list[torch.Tensor]:
        """They, once they are there."""
        ...

    @property
    def held_s(self) -> float:
        """Seconds of the GPU that the work took; known once they have arrived."""
        ...


class Queues(Protocol):
    """Where a GPU's work is put in order."""

    pinned: bool
    """Whether it copies from and to memory that the host does not move."""
    captures: bool
    """Whether work can be captured."""

    def inward(self, host: torch.Tensor) -> torch.Tensor:
        """The same on the device, for work that is given to it after this."""
        ...

    def working(self) -> AbstractContextManager[None]:
        """What is given to the device in here is one piece of work."""
        ...

    def outward(self, there: list[torch.Tensor]) -> Landing:
        """What the last piece of work has made, to the host."""
        ...

    def give_back(self) -> None:
        """Free memory that is kept for later."""
        ...


class Streams:
    """The three queues of a CUDA device."""

    pinned = captures = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._work, self._out = (torch.cuda.Stream(device) for _ in range(3))
        self._began = self._ended = torch.cuda.Event(enable_timing=True)

    def inward(self, host: torch.Tensor) -> torch.Tensor:
        """See `Queues.inward`; the host's tensor is pinned."""
        with torch.cuda.stream(self._in):
            there = host.to(self._device, non_blocking=True)
        there.record_stream(self._work)
        self._work.wait_stream(self._in)
        return there

    @contextmanager
    def working(self) -> Iterator[None]:
        """See `Queues.working`."""
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._work):
            self._began.record()
            yield
            self._ended.record()

    def outward(self, there: list[torch.Tensor]) -> Landing:
        """See `Queues.outward`."""
        done = torch.cuda.Event(blocking=True)  # its waiter sleeps: cores are for decoding
        self._out.wait_event(self._ended)
        host = []
        with torch.cuda.stream(self._out):
            for each in there:
                each.record_stream(self._out)
                # Contiguous on the device: a strided copy would go value by value.
                near = torch.empty(each.shape, dtype=each.dtype, pin_memory=True)
                host.append(near.copy_(each.contiguous(), non_blocking=True))
            done.record()
        return _OnItsWay(host, self._began, self._ended, done)

    def give_back(self) -> None:
        """See `Queues.give_back`."""
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True, eq=False)
class _OnItsWay:
    host: list[torch.Tensor]
    began: torch.cuda.Event
    ended: torch.cuda.Event
    done: torch.cuda.Event

    def arrived(self) -> list[torch.Tensor]:
        """See `Landing.arrived`."""
        self.done.synchronize()
        return self.host

    @property
    def held_s(self) -> float:
        """See `Landing.held_s`."""
        return self.began.elapsed_time(self.ended) / 1000


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is wanted of a batch, and what is known of it: with its shape all that its work is."""

    kind: str
    """Of its values."""
    labels: bool = False
    """Of whole pictures: labels and counts."""
    confidence: bool = False
    native: bool = False
    """Of parts of pictures: scores as they are."""
    even: bool = False
    """Every tile fills the shape."""


class Gpu:
    """A model on a GPU, used by several threads."""

    def __init__(
        self,
        model: Segmenter,
        about: InputInfo,
        finisher: Finisher,
        number: torch.dtype,
        queues: Queues,
        device: torch.device,
    ) -> None:
        self._model, self._about, self._number = model, about, number
        self._finisher, self._queues, self._device = finisher, queues, device
        self._classifies = model.task == "classify"
        self._captured = Captured() if model.captures and queues.captures else None
        self._lock = threading.Lock()
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def answers(
        self, tiles: Sequence[Tile], height: int, width: int, confidence: bool
    ) -> tuple[list[TileAnswer], float]:
        """Answers to a batch, in its order, and the seconds for which it had the GPU.

        Args:
            tiles: of one kind of values.
            height: of the shape they are padded to, in pixels.
            width: the same.
            confidence: whether confidences of every pixel are wanted.
        """
        least = self._model.min_side
        shape = self._model.padded_size(max(height, least), max(width, least))
        wanted = self._wanted(tiles, shape, confidence)
        given = [
            staged(tiles, self._about, *shape, pinned=self._queues.pinned),
            self._near(self._measures(tiles)),
        ]
        blank = self._blank(tiles, shape) if wanted.labels else None
        given += [] if blank is None else [blank]
        with self._lock, torch.inference_mode():
            there = [self._queues.inward(each) for each in given]
            self._send_factors(tiles[0].values_HWC.dtype)
            work = partial(self._made, tiles, wanted)
            with self._queues.working():
                captured = self._captured
                made = work(there) if captured is None else captured(wanted, there, work)
            landing = self._queues.outward(made)
        return self._told(tiles, wanted, landing.arrived()), landing.held_s

    def give_back(self) -> None:
        """Free what is kept for later; between two batches, for a capture must not be disturbed."""
        with self._lock:
            if self._captured is not None:
                self._captured.forget()
            self._queues.give_back()

    def finish(
        self,
        scores_KGg: Array,
        g0: int,
        cells: Size,
        size: Size,
        span: tuple[int, int],
        width: int,
        nodata_HW: Array | None,
        confidence: bool,
    ) -> Rows:
        """Rows of a tiled picture from its blended scores; see `Finisher.finished`."""
        given = [self._near(torch.from_numpy(scores_KGg)[None])]
        given += [self._near(torch.tensor([each])) for each in (cells, size)]
        if nodata_HW is not None:
            given.append(self._near(torch.from_numpy(nodata_HW)[None]))
        with self._lock, torch.inference_mode():
            there = [self._queues.inward(each) for each in given]
            scores_1KGg, cells_12, sizes_12, *blank = there
            with self._queues.working():
                finished = self._finisher.finished_together(
                    scores_1KGg,
                    cells_12,
                    sizes_12,
                    span,
                    width,
                    blank[0] if blank else None,
                    confidence,
                    g0,
                )
            landing = self._queues.outward(_tensors(finished))
        return self._rows(landing.arrived())[0]

    # ---------------------------------------------------------------------------- to the device

    def _wanted(self, tiles: Sequence[Tile], shape: Size, confidence: bool) -> _Wanted:
        whole = [tile for tile in tiles if not (self._classifies or tile.picture.tiled)]
        return _Wanted(
            kind=tiles[0].values_HWC.dtype.name,
            labels=bool(whole),
            confidence=bool(whole) and (confidence or any(tile.picture.large for tile in whole)),
            native=not self._classifies and len(whole) < len(tiles),
            even=all((tile.height, tile.width) == shape for tile in tiles),
        )

    def _read(self, tile: Tile) -> Size:
        """The size at which the model reads a tile."""
        return max(tile.height, self._model.min_side), max(tile.width, self._model.min_side)

    def _measures(self, tiles: Sequence[Tile]) -> torch.Tensor:
        """measures_4B2 of every tile: its own size, the padded one, its cells and their span."""
        model, measures = self._model, []
        for tile in tiles:
            read = self._read(tile)
            own = (tile.height, tile.width), model.padded_size(*read)
            scored = (
                (read, read) if self._classifies else (model.native_size(*read), model.span(*read))
            )
            measures.append((*own, *scored))
        return torch.tensor(measures).transpose(0, 1)

    def _blank(self, tiles: Sequence[Tile], shape: Size) -> torch.Tensor | None:
        """blank_BHW, True where a picture has no data; None where all have."""
        holes = [tile.picture.pixels.nodata_HW for tile in tiles if not tile.picture.tiled]
        if all(hole is None for hole in holes):
            return None
        blank_BHW = torch.zeros((len(tiles), *shape), dtype=torch.bool)
        for tile, blank_HW in zip(tiles, blank_BHW.numpy(), strict=True):
            hole = tile.picture.pixels.nodata_HW
            if hole is not None and not tile.picture.tiled:
                blank_HW[: tile.height, : tile.width] = hole
        return self._near(blank_BHW)

    def _near(self, host: torch.Tensor) -> torch.Tensor:
        """A copy from which the device can be fed while the host does something else."""
        pinned = self._queues.pinned
        return torch.empty(host.shape, dtype=host.dtype, pin_memory=pinned).copy_(host)

    def _send_factors(self, kind: np.dtype) -> None:
        if kind.name not in self._factors:
            scale_C, shift_C = (
                torch.from_numpy(each).to(self._device) for each in factors(self._about, kind)
            )
            self._factors[kind.name] = scale_C, shift_C

    # ------------------------------------------------------------------------------------- there

    def _made(
        self, tiles: Sequence[Tile], wanted: _Wanted, there: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """What the host wants to have of a batch, from what it has sent."""
        stored_BHWC, measures_4B2 = there[:2]
        own_B2, padded_B2, cells_B2, sizes_B2 = measures_4B2.unbind()
        shape = stored_BHWC.shape[1], stored_BHWC.shape[2]
        x_BCHW = normalised(
            stored_BHWC,
            *self._factors[wanted.kind],
            None if wanted.even else own_B2,
            self._number,
        ).contiguous(memory_format=torch.channels_last)
        scores = self._scores(x_BCHW, tiles, None if wanted.even else padded_B2).float()
        if self._classifies:
            return [scores.softmax(1)]
        made = [scores] if wanted.native else []
        if wanted.labels:
            blank_BHW = there[2] if len(there) > 2 else None
            if not wanted.even:
                outside_BHW = ~inside(own_B2, *shape)
                blank_BHW = outside_BHW if blank_BHW is None else blank_BHW | outside_BHW
            finished = self._finisher.finished_together(
                scores, cells_B2, sizes_B2, (0, shape[0]), shape[1], blank_BHW, wanted.confidence
            )
            made += _tensors(finished)
        return made

    def _scores(
        self, x_BCHW: torch.Tensor, tiles: Sequence[Tile], padded_B2: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores on the native grid, or of the whole picture."""
        model = self._model
        if model.captures:  # `forward` without what it asks the host
            work = getattr(model, "scores" if self._classifies else "grid")
            return work(x_BCHW, padded_B2)
        sizes_B2 = torch.tensor([self._read(tile) for tile in tiles])
        return model(x_BCHW, sizes_B2) if self._classifies else model(x_BCHW, sizes_B2, native=True)

    # ---------------------------------------------------------------------------------- and back

    def _told(
        self, tiles: Sequence[Tile], wanted: _Wanted, host: list[torch.Tensor]
    ) -> list[TileAnswer]:
        """Answers to every tile from what has come back."""
        if self._classifies:
            said = zip(tiles, host[0].numpy(), strict=True)
            return [TileAnswer(tile, probabilities_K=each_K) for tile, each_K in said]
        scores_BKhw = host.pop(0).numpy() if wanted.native else None
        rows = self._rows(host) if wanted.labels else []
        answers = []
        for i, tile in enumerate(tiles):
            if tile.picture.tiled and scores_BKhw is not None:
                h, w = self._model.native_size(*self._read(tile))
                answers.append(TileAnswer(tile, scores_KGg=scores_BKhw[i, :, :h, :w]))
            else:
                answers.append(TileAnswer(tile, rows=_cropped(rows[i], tile.height, tile.width)))
        return answers

    def _rows(self, host: list[torch.Tensor]) -> list[Rows]:
        labels_BHW = as_array(host[0], self._finisher.dtype)
        counts_BK, sums_BK = host[1].numpy(), host[2].numpy()
        sure = host[3].numpy() if len(host) > 3 else [None] * len(labels_BHW)
        return [Rows(*of_one) for of_one in zip(labels_BHW, sure, counts_BK, sums_BK, strict=True)]


def _tensors(finished: Finished) -> list[torch.Tensor]:
    made = [finished.labels_BHW, finished.counts_BK, finished.sums_BK]
    return made if finished.certainty_BHW is None else [*made, finished.certainty_BHW]


def _cropped(rows: Rows, height: int, width: int) -> Rows:
    """Without what is padding, in memory of its own where that is not all of it."""
    if rows.labels_HW.shape == (height, width):
        return rows
    sure_HW = rows.confidence_HW
    return Rows(
        np.ascontiguousarray(rows.labels_HW[:height, :width]),
        None if sure_HW is None else np.ascontiguousarray(sure_HW[:height, :width]),
        rows.counts_K,
        rows.confidences_K,
    )
