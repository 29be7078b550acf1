"""The model on a device: batches in, answers out. torch lives here and in the four files around.

Pixels become a model's numbers in feeding.py, scores become labels in finishing.py; a CPU does so
picture by picture (here), a GPU batch by batch (gpu.py, captured.py). Whole pictures come back as
finished labels and counts; of tiled pictures only native scores, and `Segmenter.finish` turns
blended scores into labels the same way. A classifier's scores end as a softmax.

Shapes: B batch, C channels, K classes; h, w native grid; H, W pixels.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from models import load_bundle_bytes
from models.parts import kernels
from models.parts.replay import Replayed
from pipeline.batch import Batch, padded
from pipeline.clock import Pass
from pipeline.config import Inference, SegmentConfig
from pipeline.errors import RunRefused
from pipeline.feeding import on_host
from pipeline.finishing import Finisher, as_array
from pipeline.gpu import Gpu, Queues, Streams
from pipeline.heap import Holes, keep_freed_memory, out_of_memory
from pipeline.place import Found
from pipeline.records import Array, Pixels, PlannedImage
from pipeline.tile import Picture, Rows, Tile, TileAnswer

PRIMITIVES = 64  # a model of one size has some 30, a fragment of mixed sizes some 300
PROBE_SIDE = 256
TURNS = 4  # the first one warms up
PROBE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
GAIN = 0.97  # a larger batch must be at least 3 % faster per pixel to be worth its memory


class Segmenter:
    """A bundle on a device, used by several threads.

    On a CPU every thread predicts with one torch thread, so that answers do not depend on how many
    cores there are; on a GPU one thread predicts at a time.
    """

    def __init__(
        self,
        model_json: bytes,
        weights: bytes,
        device: str = "auto",
        architecture: str | None = None,
        inference: Inference = Inference(),  # noqa: B008 - frozen
    ) -> None:
        try:
            model, self.bundle = load_bundle_bytes(model_json, weights, architecture)
        except ValueError as error:
            raise RunRefused(f"the model bundle cannot be used: {error}") from error
        self.device = torch.device(device_of(device))
        keep_freed_memory()
        if self.device.type == "cpu":
            few_primitives()
            torch.set_num_threads(1)
        else:
            _products_of(inference.precision)
        # torch's own stub of Module.to leaves memory_format out.
        model = model.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model = model.eval().folded().requires_grad_(requires_grad=False)
        self._number = torch.float32
        if inference.precision == "bf16":
            self._number = torch.bfloat16
            self.model = self.model.to(self._number)
        if inference.compile:
            if not self.model.compiles:
                raise RunRefused(
                    f"--inference.compile: {self.bundle.architecture} is not run by torch; drop it"
                )
            work = "scores" if self.bundle.task == "classify" else "grid"
            setattr(self.model, work, torch.compile(getattr(self.model, work)))
            self.model.captures = False  # compiled code keeps graphs of its own, or none
        elif self.device.type == "cpu" and self.model.replays:
            self.model.grid = Replayed(self.model.grid)
        self._finisher = Finisher([entry.id for entry in self.bundle.classes], self.device)
        self.dtype, self.fill = self._finisher.dtype, self._finisher.fill
        self._gpu = None if self.device.type == "cpu" else self._on_gpu(Streams(self.device))
        self._holes = Holes()
        self._most_tiles: dict[tuple[int, int], int] = {}
        """Tiles of a padded shape that fit the memory, learnt from running out of it."""

    def _on_gpu(self, queues: Queues) -> Gpu:
        return Gpu(self.model, self.bundle.input, self._finisher, self._number, queues, self.device)

    # ------------------------------------------------------------------------------- predicting

    @classmethod
    def of(cls, bundle: tuple[bytes, bytes], config: SegmentConfig) -> "Segmenter":
        """The model of a run's bundle as its config wants it used."""
        return cls(*bundle, config.compute.device, config.architecture, config.inference)

    def predict(
        self,
        batches: Iterable[Batch],
        confidence: bool,
        saw: Callable[[Pass], None] = lambda _: None,
    ) -> Iterator[TileAnswer]:
        """Answers to every tile, in the batches' order; a tile that does not fit has a failure.

        Args:
            batches: tiles of any pictures.
            confidence: whether confidences of every pixel are wanted.
            saw: is told of every pass of the model.
        """
        for batch in batches:
            most = self._most_tiles.get((batch.height, batch.width), len(batch.tiles))
            for start in range(0, len(batch.tiles), most):
                part = batch.tiles[start : start + most]
                yield from self._answered(part, batch.height, batch.width, confidence, saw)

    def _answered(
        self,
        tiles: tuple[Tile, ...],
        height: int,
        width: int,
        confidence: bool,
        saw: Callable[[Pass], None],
    ) -> Iterator[TileAnswer]:
        made = self._attempted(tiles, height, width, confidence)
        if made is None and self._gpu is not None:
            self._gpu.give_back()  # also what graphs of other shapes hold
            if len(tiles) == 1:
                made = self._attempted(tiles, height, width, confidence)
        if made is None and len(tiles) == 1:
            failure = f"one tile of {height} x {width} pixels does not fit the memory"
            yield TileAnswer(tiles[0], failure=failure)
            return
        if made is None:
            half = len(tiles) // 2
            self._most_tiles[height, width] = half
            yield from self._answered(tiles[:half], height, width, confidence, saw)
            yield from self._answered(tiles[half:], height, width, confidence, saw)
            return
        answers, held = made
        for each in self._passes(tiles, height, width, held):
            saw(each)
        yield from answers

    def _attempted(
        self, tiles: tuple[Tile, ...], height: int, width: int, confidence: bool
    ) -> tuple[list[TileAnswer], float] | None:
        """See `_run`; None where memory ended: with the error is gone what it kept alive."""
        try:
            return self._run(tiles, height, width, confidence)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return None

    def _passes(
        self, tiles: tuple[Tile, ...], height: int, width: int, held: float
    ) -> Iterator[Pass]:
        """How tiles went through the model: on a CPU one by one, each padded for itself."""
        areas = [tile.height * tile.width for tile in tiles]
        if self._gpu is not None:
            yield Pass(len(tiles), sum(areas), len(tiles) * height * width, held)
            return
        for tile, area in zip(tiles, areas, strict=True):
            yield Pass(1, area, math.prod(self.model.padded_size(tile.height, tile.width)))

    @torch.inference_mode()
    def _run(
        self, tiles: tuple[Tile, ...], height: int, width: int, confidence: bool
    ) -> tuple[list[TileAnswer], float]:
        """Answers, and the seconds for which they had the GPU."""
        if self._gpu is not None:
            return self._gpu.answers(tiles, height, width, confidence)
        least = self.model.min_side
        sizes = [(max(t.height, least), max(t.width, least)) for t in tiles]
        if self.bundle.task == "classify":
            x_BCHW = self._input(tiles, max(height, least), max(width, least))
            probabilities_BK = self.model(x_BCHW, torch.tensor(sizes)).float().softmax(1)
            answers_BK = zip(tiles, probabilities_BK.numpy(), strict=True)
            return [TileAnswer(tile, probabilities_K=each_K) for tile, each_K in answers_BK], 0.0
        answers = []
        for tile, size in zip(tiles, sizes, strict=True):
            self.model.check_size(*size)
            x_1CHW = self._input((tile,), *self.model.padded_size(*size))
            h, w = self.model.native_size(*size)
            valid_Khw = self.model.grid(x_1CHW, None)[0, :, :h, :w].float()
            if valid_Khw.shape[1:] != (h, w):
                raise RunRefused(
                    f"{self.bundle.architecture} answers {tuple(valid_Khw.shape[1:])} cells for a "
                    f"picture of {size}, not {(h, w)} as its native_size says; mend one of the two"
                )
            if tile.picture.tiled:
                answers.append(TileAnswer(tile, scores_KGg=valid_Khw.numpy()))
            else:
                nodata = tile.picture.pixels.nodata_HW
                wanted = confidence or tile.picture.large
                span = self.model.span(*size)
                rows = self._finish(
                    valid_Khw, 0, (h, w), span, (0, tile.height), tile.width, nodata, wanted
                )
                answers.append(TileAnswer(tile, rows=rows))
        return answers, 0.0

    def _input(self, tiles: tuple[Tile, ...], height: int, width: int) -> torch.Tensor:
        return on_host(tiles, self.bundle.input, self._number, height, width)

    def between_fragments(self) -> None:
        """Now and then give back the holes that pictures of many sizes leave in the heap."""
        self._holes.give_back()

    # -------------------------------------------------------------------------------- finishing

    @torch.inference_mode()
    def finish(
        self,
        picture: Picture,
        scores_KGg: Array,
        g0: int,
        cells: tuple[int, int],
        y0: int,
        y1: int,
        confidence: bool,
    ) -> Rows:
        """Pixel rows y0 to y1 of a tiled picture, from blended scores that begin at grid row g0."""
        pixels = picture.pixels
        nodata = None if pixels.nodata_HW is None else pixels.nodata_HW[y0:y1]
        span = self.model.span(
            max(pixels.height, self.model.min_side), max(pixels.width, self.model.min_side)
        )
        rest = g0, cells, span, (y0, y1), pixels.width, nodata, confidence or picture.large
        try:
            if self._gpu is not None:  # blended on the host, finished there
                return self._gpu.finish(scores_KGg, *rest)
            return self._finish(torch.from_numpy(scores_KGg), *rest)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise MemoryError(str(error)) from error

    def _finish(
        self,
        scores_Khw: torch.Tensor,
        g0: int,
        cells: tuple[int, int],
        size: tuple[int, int],
        span: tuple[int, int],
        width: int,
        nodata: Array | None,
        confidence: bool,
    ) -> Rows:
        blank = None if nodata is None else torch.from_numpy(np.ascontiguousarray(nodata))[None]
        done = self._finisher.finished(scores_Khw, g0, cells, size, span, width, blank, confidence)
        return Rows(
            as_array(done.labels_BHW, self.dtype)[0],
            None if done.certainty_BHW is None else done.certainty_BHW.numpy()[0],
            done.counts_BK.numpy()[0],
            done.sums_BK.numpy()[0],
        )

    # ---------------------------------------------------------------------------------- probing

    def found(self, budget: int | None = None) -> Found:
        """What a run freezes of this model on this machine; the budget is probed if not given."""
        about = self.model
        return Found(
            budget or self.probe(),
            self.device.type,
            about.stride,
            about.min_side,
            about.receptive_field,
            about.multiple,
            self.bundle.task == "segment" and about.partial_cells,
            about.max_side,
            kernels.LIBRARY is not None,
        )

    def probe(self) -> int:
        """The pixel budget of a batch: the smallest whose pixels are about as fast as any's.

        Found once per run and frozen in its run.json. On a CPU, where pictures pass one by one,
        none is faster than another: that of one picture.
        """
        side = min(PROBE_SIDE, self.model.max_side or PROBE_SIDE)
        if self._gpu is None:
            self._timed(1, side, turns=1)  # a model that cannot be run at all says so now
            return side**2
        best, budget = float("inf"), side**2
        for count in PROBE_BATCHES:
            seconds = self._timed(count, side)
            if seconds is None or seconds > best * GAIN:
                break
            best, budget = seconds, count * side**2
        return budget

    def _timed(self, count: int, side: int, turns: int = TURNS) -> float | None:
        """Seconds per picture at a batch size, the best turn; None where memory ends."""
        values = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
        plan = PlannedImage(0, "", "", None, None, 0, "", "", 0)  # nobody's: only its pixels count
        picture = Picture(plan, Pixels(values, None), 0, "", large=False, rows=(0,), columns=(0,))
        tiles = (Tile(picture, 0, 0, side, side),) * count
        side = padded(side, math.lcm(self.model.stride, self.model.multiple))
        times = []
        for _ in range(turns):
            start = time.perf_counter()
            try:
                self._run(tiles, side, side, confidence=False)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                return None
            times.append(time.perf_counter() - start)
        return min(times) / count


def device_of(wanted: str) -> str:
    """`cpu` or `cuda`, for what was asked.

    Raises:
        RunRefused: cuda was asked for and is not here.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunRefused(
            "--compute.device cuda: torch sees no GPU here; "
            "use auto or cpu, or install a CUDA build of torch"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _products_of(precision: str) -> None:
    """How exactly this process's GPU multiplies float32; torch alone would round convolutions."""
    digits = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cudnn.conv.fp32_precision = digits  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cuda.matmul.fp32_precision = digits


def few_primitives() -> None:
    """Tell torch to keep the code of few shapes, if it has not begun yet.

    It keeps 1024 convolutions in oneDNN, and as many more of each thread in ideep, the layer above.
    With mixed sizes both fill for a fifth of 10,000 pictures and longer: 74 MB (2026-11-21: after
    1300 pictures 270 MB with 1024 of each, 242 with 64 and 1024, 233 with 256, 219 with 64; making
    code anew takes 2 % of the time with 64, 1 % with 256).
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(PRIMITIVES))
