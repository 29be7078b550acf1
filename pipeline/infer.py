"""The model on a device: batches in, answers out. torch lives here, and in finishing.py.

Whole pictures come back as finished labels and counts; of tiled pictures only native scores leave
this file, and `Segmenter.finish` turns blended scores into labels, strip by strip, the same way.
Scores are never kept at full size: a strip of at most `STRIP` values is up-sampled (bilinear,
half-pixel centres), reduced to labels, and forgotten. A classifier's scores end as a softmax.

Shapes: B batch, C channels, K classes; h, w native grid; H, W pixels.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from models import load_bundle_bytes
from models.parts.replay import Replayed
from pipeline.batch import Batch, padded
from pipeline.clock import Pass
from pipeline.config import Inference, SegmentConfig
from pipeline.errors import RunRefused
from pipeline.finishing import OCTAVE, counted, decided, upsampled
from pipeline.heap import Holes, keep_freed_memory
from pipeline.place import Found
from pipeline.records import Array, Pixels, PlannedImage
from pipeline.tile import Picture, Rows, Tile, TileAnswer

STRIP = 4_000_000  # score values up-sampled at once, at most: 16 MB of float32
# Of them a CPU's cache keeps so many from pass to pass; fewer rows cost more than that saves.
CACHED, ROWS = 350_000, 16
PRIMITIVES = 64  # a model of one size has some 30, a fragment of mixed sizes some 300
PROBE_SIDE = 256
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
        if self.device.type == "cpu":
            keep_freed_memory()
            few_primitives()
            torch.set_num_threads(1)
        # torch's own stub of Module.to leaves memory_format out.
        model = model.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model = model.eval().folded()
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
        elif self.device.type == "cpu" and self.model.replays:
            self.model.grid = Replayed(self.model.grid)
        ids = [entry.id for entry in self.bundle.classes]
        self.dtype = np.dtype(np.uint8 if max(ids) < 255 else np.uint16)
        self.fill = int(np.iinfo(self.dtype).max)
        kind = torch.uint8 if self.dtype == np.uint8 else torch.int32  # uint16 has few operators
        self._ids_K = torch.tensor(ids, device=self.device).to(kind)
        self._identity = ids == list(range(len(ids)))
        self._kind = kind
        self._lock = threading.Lock() if self.device.type != "cpu" else _NoLock()
        self._holes = Holes()
        self._most_tiles: dict[tuple[int, int], int] = {}
        """Tiles of a padded shape that fit the memory, learnt from running out of it."""

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
        try:
            with self._lock:
                start = time.perf_counter()
                answers = self._run(tiles, height, width, confidence)
                held = time.perf_counter() - start  # answers are on the host: the GPU is done
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if len(tiles) == 1:
                yield TileAnswer(
                    tiles[0],
                    failure=f"one tile of {height} x {width} pixels does not fit the memory",
                )
                return
            half = len(tiles) // 2
            self._most_tiles[height, width] = half
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            yield from self._answered(tiles[:half], height, width, confidence, saw)
            yield from self._answered(tiles[half:], height, width, confidence, saw)
            return
        for each in self._passes(tiles, height, width, held):
            saw(each)
        yield from answers

    def _passes(
        self, tiles: tuple[Tile, ...], height: int, width: int, held: float
    ) -> Iterator[Pass]:
        """How tiles went through the model: on a CPU one by one, each padded for itself."""
        areas = [tile.height * tile.width for tile in tiles]
        if self.device.type != "cpu":
            yield Pass(len(tiles), sum(areas), len(tiles) * height * width, held)
            return
        for tile, area in zip(tiles, areas, strict=True):
            yield Pass(1, area, math.prod(self.model.padded_size(tile.height, tile.width)))

    @torch.inference_mode()
    def _run(
        self, tiles: tuple[Tile, ...], height: int, width: int, confidence: bool
    ) -> list[TileAnswer]:
        sizes = [
            (max(t.height, self.model.min_side), max(t.width, self.model.min_side)) for t in tiles
        ]
        x_BCHW = self._input(
            tiles, max(height, self.model.min_side), max(width, self.model.min_side)
        )
        if self.bundle.task == "classify":
            probabilities_BK = self.model(x_BCHW, torch.tensor(sizes)).float().softmax(1)
            answers_BK = zip(tiles, probabilities_BK.cpu().numpy(), strict=True)
            return [TileAnswer(tile, probabilities_K=each_K) for tile, each_K in answers_BK]
        scores_BKhw = self.model(x_BCHW, torch.tensor(sizes), native=True)
        answers = []
        for tile, size, scores_Khw in zip(tiles, sizes, scores_BKhw, strict=True):
            h, w = self.model.native_size(*size)
            valid_Khw = scores_Khw[:, :h, :w].float()
            if tile.picture.tiled:
                answers.append(TileAnswer(tile, scores_KGg=valid_Khw.cpu().numpy()))
            else:
                nodata = tile.picture.pixels.nodata_HW
                wanted = confidence or tile.picture.large
                span = self.model.span(*size)
                rows = self._finish(
                    valid_Khw, 0, (h, w), span, (0, tile.height), tile.width, nodata, wanted
                )
                answers.append(TileAnswer(tile, rows=rows))
        return answers

    def _input(self, tiles: tuple[Tile, ...], height: int, width: int) -> torch.Tensor:
        """x_BCHW: normalised pixels; padding is 0, the mean.

        They go to the device as they are stored, in a quarter of the bytes, and are normalised
        there.
        """
        about = self.bundle.input
        x_BHWC = torch.empty(
            (len(tiles), height, width, about.channels), dtype=self._number, device=self.device
        )
        for tile, x_HX in zip(tiles, x_BHWC.flatten(2), strict=True):
            values_HWC = tile.values_HWC
            own = about.range if values_HWC.dtype == np.uint16 else None  # 8 bits are 0 to 255
            lo, hi = own or (0, np.iinfo(values_HWC.dtype).max)
            scale = (1 / ((hi - lo) * np.asarray(about.std))).astype(np.float32)
            shift = (-(lo / (hi - lo) + np.asarray(about.mean)) / np.asarray(about.std)).astype(
                np.float32
            )
            if own is not None:
                values_HWC = np.clip(values_HWC, lo, hi)
            if about.channels == 1 and values_HWC.shape[2] == 3:
                values_HWC = _luma(values_HWC)
            # By rows of all channels: three values would be a short loop (2026-11-29, one thread,
            # a picture of 360 x 480: 0.3 ms; channel by channel it takes 1.5).
            floats_HX = self._on_device(values_HWC).expand(-1, -1, about.channels).flatten(1)
            scale_X, shift_X = (
                torch.from_numpy(np.tile(factor_C, tile.width)).to(self.device)
                for factor_C in (scale, shift)
            )
            x_HX[: tile.height, : len(scale_X)] = torch.addcmul(shift_X, floats_HX, scale_X)
            x_HX[: tile.height, len(scale_X) :] = 0
            x_HX[tile.height :] = 0
        return x_BHWC.permute(0, 3, 1, 2)

    def _on_device(self, values_HWC: Array) -> torch.Tensor:
        """Pixels as float32 on the device; from pinned memory they are copied beside other work."""
        if self.device.type == "cpu":
            return torch.from_numpy(values_HWC.astype(np.float32))
        kind = torch.from_numpy(np.empty(0, values_HWC.dtype)).dtype
        pinned_HWC = torch.empty(values_HWC.shape, dtype=kind, pin_memory=True)
        pinned_HWC.numpy()[...] = values_HWC
        return pinned_HWC.to(self.device, non_blocking=True).to(torch.float32)

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
        scores = torch.from_numpy(scores_KGg)  # blended on the host, finished there
        nodata = None if pixels.nodata_HW is None else pixels.nodata_HW[y0:y1]
        span = self.model.span(
            max(pixels.height, self.model.min_side), max(pixels.width, self.model.min_side)
        )
        wanted = confidence or picture.large
        try:
            return self._finish(scores, g0, cells, span, (y0, y1), pixels.width, nodata, wanted)
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
        classes = scores_Khw.shape[0]
        row = classes * size[1]
        step = max(1, STRIP // row)
        if scores_Khw.device.type == "cpu":
            step = min(step, max(ROWS, CACHED // row))
        parts = []
        for y0 in range(*span, step):
            y1 = min(y0 + step, span[1])
            octaves_KHW = upsampled(scores_Khw, g0, cells, size, y0, y1, OCTAVE)[:, :, :width]
            blank = (
                None
                if nodata is None
                else torch.from_numpy(np.ascontiguousarray(nodata[y0 - span[0] : y1 - span[0]]))
            )
            parts.append(self._reduced(octaves_KHW, blank, confidence))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _reduced(
        self, octaves_KHW: torch.Tensor, blank_HW: torch.Tensor | None, confidence: bool
    ) -> Rows:
        """Labels, counts and confidences of some rows."""
        index_HW, sure_HW = decided(octaves_KHW)
        index_HW = index_HW.to(self._kind)
        if blank_HW is not None:
            blank_HW = blank_HW.to(index_HW.device)
            index_HW = index_HW.masked_fill(blank_HW, self.fill)
            sure_HW = sure_HW.masked_fill(blank_HW, 0.0)
        counts, sums = counted(index_HW, sure_HW, len(octaves_KHW))
        labels = index_HW if self._identity else self._renamed(index_HW, blank_HW)
        certainty = (sure_HW * 255).round_().to(torch.uint8).cpu().numpy() if confidence else None
        return Rows(labels.cpu().numpy().astype(self.dtype, copy=False), certainty, counts, sums)

    def _renamed(self, index_HW: torch.Tensor, blank_HW: torch.Tensor | None) -> torch.Tensor:
        known_HW = index_HW if blank_HW is None else index_HW.masked_fill(blank_HW, 0)
        labels_HW = self._ids_K[known_HW.long()]
        return labels_HW if blank_HW is None else labels_HW.masked_fill(blank_HW, self.fill)

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
        )

    def probe(self) -> int:
        """The pixel budget of a batch: the smallest whose pixels are about as fast as any's.

        Found once per run and frozen in its run.json.
        """
        side = min(PROBE_SIDE, self.model.max_side or PROBE_SIDE)
        best, budget = float("inf"), side**2
        for count in PROBE_BATCHES:
            seconds = self._timed(count, side)
            if seconds is None or seconds > best * GAIN:
                break
            best, budget = seconds, count * side**2
        return budget

    def _timed(self, count: int, side: int) -> float | None:
        """Seconds per picture at a batch size, the best of three; None where memory ends."""
        values = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
        plan = PlannedImage(0, "", "", None, None, 0, "", "", 0)  # nobody's: only its pixels count
        picture = Picture(plan, Pixels(values, None), 0, "", large=False, rows=(0,), columns=(0,))
        tiles = (Tile(picture, 0, 0, side, side),) * count
        side = padded(side, math.lcm(self.model.stride, self.model.multiple))
        times = []
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            try:
                self._run(tiles, side, side, confidence=False)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                return None
            times.append(time.perf_counter() - start)
        return min(times[1:]) / count


def _joined(parts: list[Rows]) -> Rows:
    sure = [p.confidence_HW for p in parts if p.confidence_HW is not None]  # all have it, or none
    return Rows(
        np.concatenate([p.labels_HW for p in parts]),
        np.concatenate(sure) if sure else None,
        np.sum([p.counts_K for p in parts], axis=0),
        np.sum([p.confidences_K for p in parts], axis=0),
    )


def _luma(values_HWC: Array) -> Array:
    """ITU-R 601-2 luma, as Pillow converts RGB to L."""
    return (values_HWC @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None]


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


def out_of_memory(error: BaseException) -> bool:
    """Whether it is for want of memory, the host's or a GPU's; torch has no one class for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(
        error
    )


class _NoLock:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def few_primitives() -> None:
    """Tell torch to keep the code of few shapes, if it has not begun yet.

    It keeps 1024 convolutions in oneDNN, and as many more of each thread in ideep, the layer above.
    With mixed sizes both fill for a fifth of 10,000 pictures and longer: 74 MB (2026-11-21: after
    1300 pictures 270 MB with 1024 of each, 242 with 64 and 1024, 233 with 256, 219 with 64; making
    code anew takes 2 % of the time with 64, 1 % with 256).
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(PRIMITIVES))
