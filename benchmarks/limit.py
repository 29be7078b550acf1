"""End to end against the machine's own limit: cores / (sum of single-thread costs of the stages).

    python -m benchmarks.limit PICTURES... [--images 600] [--model demo] [--on process local]
        [--repeats 3]

The stages are measured one by one in one thread of this process on pictures of the corpus; the runs
are whole commands in processes of their own, interleaved. Reported: pictures/s and megapixels/s
from first fragment to last and of the whole command, each as a fraction of the limit.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.corpora import pictures, repeated
from benchmarks.record import record
from pipeline.batch import pack
from pipeline.create import OVERLAP, TILE, grid_of, read_bundle
from pipeline.decode import DecodeLimits, decode
from pipeline.fragment import slots_of
from pipeline.infer import Segmenter
from pipeline.records import PlannedImage
from pipeline.tile import Picture, cut, stitch

SLOT = 2**18
STAGES = ("read", "decode", "predict", "encode")


def stage_costs(files: list[Path], segmenter: Segmenter, budget: int) -> dict[str, float]:
    """Single-thread seconds per megapixel of each stage."""
    about = segmenter.bundle.tile
    found = segmenter.found(budget)
    grid = grid_of(found, about.size if about else TILE, about.overlap if about else OVERLAP)
    spent, megapixels, decoded = dict.fromkeys(STAGES, 0.0), 0.0, []
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
    finish = partial(segmenter.finish, confidence=False)
    start = time.perf_counter()
    answers = segmenter.predict(
        pack(cut(decoded, grid), budget, 2**40, grid.align), confidence=False
    )
    strips = list(stitch(answers, grid, finish))
    spent["predict"] = time.perf_counter() - start
    start = time.perf_counter()
    for strip in strips:
        slots_of(strip.rows.labels_HW, SLOT, 255)
    spent["encode"] = time.perf_counter() - start
    return {stage: seconds / megapixels for stage, seconds in spent.items()}


def run_once(source: Path, out: Path, model: str, on: str) -> dict[str, float]:
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
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in {0, 3}:
        raise SystemExit(done.stderr)
    call = json.loads(done.stdout)["this_call"]
    return {
        "whole": call["images"] / (time.perf_counter() - start),
        "steady": call["images_per_second_first_to_last_fragment"],
        "megapixels": call["megapixels"] / call["images"],
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
    parser.add_argument("--on", nargs="+", default=["process", "local"])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    import os

    cores = len(os.sched_getaffinity(0))
    segmenter = Segmenter(*read_bundle(given.model), "cpu")
    budget = segmenter.probe()
    files = pictures(given.pictures)
    sample = files[:: max(1, len(files) // given.sample)][: given.sample]
    costs: list[dict[str, float]] = []
    rates: dict[str, list[dict[str, float]]] = {on: [] for on in given.on}
    with tempfile.TemporaryDirectory() as folder:
        source = repeated(given.pictures, given.images, Path(folder) / "pictures")
        stage_costs(sample[:4], segmenter, budget)  # warm
        for turn in range(given.repeats):
            costs.append(stage_costs(sample, segmenter, budget))
            for on in given.on:
                rates[on].append(
                    run_once(source, Path(folder) / f"run-{on}-{turn}", given.model, on)
                )
        costs.append(stage_costs(sample, segmenter, budget))
    stage = {name: statistics.median(c[name] for c in costs) for name in STAGES}
    limit = cores / sum(stage.values())
    size = rates[given.on[0]][0]["megapixels"]
    lines = [
        (
            f"{given.images} pictures of {size:.3f} MP on average"
            f" ({', '.join(p.name for p in given.pictures)}), budget {budget} px,"
            f" {given.repeats} runs, medians; stages measured on {len(sample)} of them"
        ),
        "",
        "| stage | ms a megapixel, one thread |",
        "|---|---|",
        *(f"| {name} | {1000 * seconds:.2f} |" for name, seconds in stage.items()),
        (f"| work-bound limit, {cores} cores | {limit:.2f} MP/s, {limit / size:.2f} pictures/s |"),
        "",
        (
            "| --on | first to last fragment, pictures/s (MP/s) | of the limit"
            " | whole command, pictures/s (MP/s) | of the limit |"
        ),
        "|---|---|---|---|---|",
    ]
    for on, turns in rates.items():
        steady = statistics.median(t["steady"] for t in turns)
        whole = statistics.median(t["whole"] for t in turns)
        lines.append(
            f"| {on} | {steady:.2f} ({steady * size:.2f}) | {steady * size / limit:.2f}"
            f" | {whole:.2f} ({whole * size:.2f}) | {whole * size / limit:.2f} |"
        )
    record(f"end to end against the limit: {', '.join(p.name for p in given.pictures)}", lines)


if __name__ == "__main__":
    main()
