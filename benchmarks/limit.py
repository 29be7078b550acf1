"""End to end against the machine's own limit: cores / (sum of single-thread costs of the stages).

    python -m benchmarks.limit PICTURES... [--images 600] [--model demo] [--on process local]
        [--repeats 3]

The stages are measured one by one in one thread of this process on pictures of the corpus; the runs
are whole commands in processes of their own, interleaved. Reported: pictures/s and megapixels/s
from first fragment to last and of the whole command, each as a fraction of the limit. On a GPU the
limit is what the model alone does with its inputs in pinned memory, or what the cores beside it can
decode, whichever is less.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.corpora import pictures, repeated
from benchmarks.record import record
from pipeline.batch import pack
from pipeline.captured import Captured
from pipeline.clock import Pass
from pipeline.config import Inference
from pipeline.create import OVERLAP, TILE, grid_of, read_bundle
from pipeline.decode import DecodeLimits, decode
from pipeline.fragment import CLASS_STATS, DETAIL, IMAGES, assemble, slots_of
from pipeline.infer import Segmenter
from pipeline.records import PlannedImage
from pipeline.storage import open_store
from pipeline.tile import Picture, Rows, cut, stitch

SLOT = 2**18
FRAGMENT = 64  # pictures that are committed together
STAGES = ("read", "decode", "preprocess", "forward", "finish", "encode", "commit")
"""finish: up-sampling, argmax, confidence and counts, which are one pass over the pixels."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a megapixel costs."""

    seconds: dict[str, float]
    """Of one thread, per stage; on a GPU its own seconds, all under `forward`."""
    model_only: float | None
    """Seconds of the GPU with inputs in pinned memory; None on a CPU."""


class Staged(Segmenter):
    """A segmenter that knows how its time divides."""

    def __init__(self, *about) -> None:
        self.spent = Counter[str]()
        super().__init__(*about)

    def _input(self, *about):
        return self._timed_as("preprocess", super()._input, *about)

    def _finish(self, *about) -> Rows:
        return self._timed_as("finish", super()._finish, *about)

    def _timed_as(self, stage, work, *about):
        start = time.perf_counter()
        made = work(*about)
        self.spent[stage] += time.perf_counter() - start
        return made


def stage_costs(files: list[Path], segmenter: Staged, budget: int) -> Costs:
    """Each stage alone, over all pictures."""
    about = segmenter.bundle.tile
    found = segmenter.found(budget)
    grid = grid_of(found, about.size if about else TILE, about.overlap if about else OVERLAP)
    spent, megapixels, decoded = Counter[str](), 0.0, []
    for number, file in enumerate(files):
        start = time.perf_counter()
        data = file.read_bytes()
        read = time.perf_counter()
        pixels = decode(data, DecodeLimits())
        spent["read"] += read - start
        spent["decode"] += time.perf_counter() - read
        megapixels += pixels.height * pixels.width / 1e6
        plan = PlannedImage(number, file.name, str(file), None, None, len(data), "", "files", 0)
        rows, columns = grid.offsets(pixels.height), grid.offsets(pixels.width)
        decoded.append(
            Picture(plan, pixels, len(data), "", large=False, rows=rows, columns=columns)
        )
    segmenter.spent = Counter()
    start = time.perf_counter()
    batches = pack(cut(decoded, grid), budget, 2**40, grid.align)
    passes: list[Pass] = []
    answers = segmenter.predict(batches, confidence=False, saw=passes.append)

    def finish(*about):
        return segmenter.finish(*about, confidence=False)

    strips = list(stitch(answers, grid, finish))
    spent["forward"] = time.perf_counter() - start - segmenter.spent.total()
    spent.update(segmenter.spent)
    if segmenter.device.type != "cpu":
        spent["forward"] = sum(one.device_s for one in passes)
    start = time.perf_counter()
    frames = [f for strip in strips for f in slots_of(strip.rows.labels_HW, SLOT, 255)]
    spent["encode"] = time.perf_counter() - start
    spent["commit"] = committing(frames)
    alone = None if segmenter.device.type == "cpu" else model_only(segmenter, decoded, budget)
    return Costs(
        {stage: spent[stage] / megapixels for stage in STAGES},
        None if alone is None else alone / megapixels,
    )


def committing(frames: list[bytes]) -> float:
    """Seconds to put the masks into objects and the objects onto the disk."""
    images, stats = IMAGES.append(DETAIL).empty_table(), CLASS_STATS.empty_table()
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        for number, first in enumerate(range(0, len(frames), FRAGMENT)):
            start = time.perf_counter()
            part = frames[first : first + FRAGMENT]
            data = assemble({}, images, stats, part, range(len(part)), 4096)
            store.create(f"c/{number}", data)
            seconds += time.perf_counter() - start
    return seconds


def model_only(segmenter: Segmenter, decoded: list[Picture], budget: int) -> float:
    """Seconds of the GPU for the forward passes alone, inputs copied from pinned memory."""
    grid = grid_of(segmenter.found(budget), TILE, OVERLAP)
    passes = []
    for batch in pack(cut(decoded, grid), budget, 2**40, grid.align):
        sizes = torch.tensor([(tile.height, tile.width) for tile in batch.tiles])
        shape = (len(batch.tiles), segmenter.bundle.input.channels, batch.height, batch.width)
        passes.append((torch.zeros(shape, dtype=torch.uint8, pin_memory=True), sizes))

    @torch.inference_mode()
    def through() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for x_BCHW, sizes in passes:
            x_BCHW = x_BCHW.to(segmenter.device, non_blocking=True).to(number)
            segmenter.model(x_BCHW, sizes, native=True)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    number = next(segmenter.model.parameters()).dtype
    own, segmenter.model.grid = segmenter.model.grid, by_graphs(segmenter.model.grid)
    with torch.cuda.stream(torch.cuda.Stream()):
        through()
        seconds = min(through() for _ in range(3))
    segmenter.model.grid = own
    return seconds


def by_graphs(grid: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The model's work with CUDA graphs: as fast as it can be alone."""
    captured = Captured()

    def work(x_BCHW: torch.Tensor, sizes_B2: torch.Tensor | None) -> torch.Tensor:
        if sizes_B2 is None:
            return captured("even", [x_BCHW], lambda given: [grid(given[0], None)])[0]
        return captured("uneven", [x_BCHW, sizes_B2], lambda given: [grid(*given)])[0]

    return work


def limits_of(costs: list[Costs], cores: int) -> tuple[dict[str, float], dict[str, float]]:
    """Megapixels per second that each of what works could do alone, and the medians per stage."""
    stage = {name: statistics.median(c.seconds[name] for c in costs) for name in STAGES}
    on_gpu = [c.model_only for c in costs if c.model_only is not None]
    if not on_gpu:
        return {f"{cores} cores": cores / sum(stage.values())}, stage
    beside = stage["read"] + stage["decode"] + stage["encode"] + stage["commit"]
    return {
        "the model alone on the GPU": 1 / statistics.median(on_gpu),
        f"{cores} cores beside it": cores / beside,
    }, stage


def run_once(
    source: Path, out: Path, model: str, on: str, more: Sequence[str] = ()
) -> dict[str, Any]:
    """One whole command."""
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "jobs",
        "segment",
        str(source),
        "--out",
        str(out),
        "--model",
        model,
        "--on",
        on,
        "--log",
        "json",
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in {0, 3}:
        raise SystemExit(done.stderr)
    call = json.loads(done.stdout)["this_call"]
    if call["images_per_second_first_to_last_fragment"] is None:
        raise SystemExit(
            f"{call['images']} pictures are {call['fragments']} fragments, too few to time the "
            "first to the last: give --images 200 or more"
        )
    busy = call["busy_seconds_per_stage"]
    return {
        "own": call["efficiency"],
        "storing": sum(busy[s] for s in ("measure", "pack", "store")) / sum(busy.values()),
        "whole": call["images"] / (time.perf_counter() - start),
        "steady": call["images_per_second_first_to_last_fragment"],
        "megapixels": call["megapixels"] / call["images"],
        "bottleneck": call["bottleneck"],
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--sample", type=int, default=96)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--on", nargs="+", default=["process", "local"])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    inference = Inference(precision=given.precision)
    segmenter = Staged(*read_bundle(given.model), given.device, None, inference)
    more = ["--compute.device", given.device, "--inference.precision", given.precision]
    more += [] if given.workers is None else ["--compute.workers", str(given.workers)]
    budget = segmenter.probe()
    files = pictures(given.pictures)
    sample = files[:: max(1, len(files) // given.sample)][: given.sample]
    costs: list[Costs] = []
    rates: dict[str, list[dict[str, Any]]] = {on: [] for on in given.on}
    with tempfile.TemporaryDirectory() as folder:
        source = repeated(given.pictures, given.images, Path(folder) / "pictures")
        stage_costs(sample[:4], segmenter, budget)  # warm
        for turn in range(given.repeats):
            costs.append(stage_costs(sample, segmenter, budget))
            for on in given.on:
                out = Path(folder) / f"run-{on}-{turn}"
                rates[on].append(run_once(source, out, given.model, on, more))
        costs.append(stage_costs(sample, segmenter, budget))
    limits, stage = limits_of(costs, cores)
    limit = min(limits.values())
    size = rates[given.on[0]][0]["megapixels"]
    lines = [
        (
            f"{given.images} pictures of {size:.3f} MP on average"
            f" ({', '.join(p.name for p in given.pictures)}), budget {budget} px,"
            f" {given.precision}, {given.workers or 'default'} workers,"
            f" {given.repeats} runs, medians; stages measured on {len(sample)} of them"
        ),
        "",
        "| stage | ms a megapixel, one thread |",
        "|---|---|",
        *(f"| {name} | {1000 * seconds:.2f} |" for name, seconds in stage.items()),
        *(
            f"| limit: {name} | {most:.2f} MP/s, {most / size:.2f} pictures/s |"
            for name, most in limits.items()
        ),
        "",
        (
            "| --on | first to last fragment, pictures/s (MP/s) | of the limit"
            " | by its receipt | storage and tables | whole command, pictures/s (MP/s)"
            " | of the limit | bottleneck by its receipt |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for on, turns in rates.items():
        steady = statistics.median(t["steady"] for t in turns)
        whole = statistics.median(t["whole"] for t in turns)
        own = statistics.median(t["own"] for t in turns)
        storing = statistics.median(t["storing"] for t in turns)
        lines.append(
            f"| {on} | {steady:.2f} ({steady * size:.2f}) | {steady * size / limit:.2f}"
            f" | {own:.2f} | {storing:.1%} | {whole:.2f} ({whole * size:.2f})"
            f" | {whole * size / limit:.2f} | {turns[-1]['bottleneck']} |"
        )
    record(f"end to end against the limit: {', '.join(p.name for p in given.pictures)}", lines)


if __name__ == "__main__":
    main()
