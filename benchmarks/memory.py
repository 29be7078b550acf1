"""Resident memory of driver and workers over a long run, sampled every second.

    python -m benchmarks.memory PICTURES... [--images 10000] [--model demo] [--on process]

Reported per process that lived through the run: its own memory (resident less shared) after the
first fifth, at the end, the peak, and the growth over the last four fifths (of the straight line
through all samples there); beside it the growth of all resident memory. The difference
is Ray's object store, through which pictures pass beside GPUs: whoever has read an object there
counts its pages as resident until the store has been used once from end to end
(`compute.object_store_mb`), though they exist once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

from benchmarks.corpora import repeated
from benchmarks.record import record


def kind(process: psutil.Process) -> str | None:
    """What a process of the run is, or None for those that are not ours to watch."""
    command = " ".join(process.cmdline())
    if "(_Worker)" in command:
        return "segment actor"
    if "ray::" in command:
        return "task worker"
    return "driver" if "jobs" in command and "segment" in command else None


Sample = tuple[float, int, int]
"""When, resident bytes, shared bytes."""


def growth(values: list[float]) -> float:
    """End against start of the straight line through the last four fifths.

    A line, not two moments: memory goes up and down with every fragment.
    """
    late = np.array(values[len(values) // 5 :])
    slope, start = np.polyfit(np.arange(len(late)), late, 1)
    return float(slope * (len(late) - 1) / start)


def sample(root: psutil.Process, seen: dict[tuple[int, str], list[Sample]]) -> None:
    """Resident and shared bytes of the run's processes now."""
    for process in [root, *root.children(recursive=True)]:
        try:
            name = kind(process)
            if name:
                memory = process.memory_info()
                seen[process.pid, name].append((time.monotonic(), memory.rss, memory.shared))
        except psutil.Error:
            continue


def main() -> None:
    """Run, sample, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--on", default="process")
    given = parser.parse_args()
    seen: dict[tuple[int, str], list[Sample]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        source = repeated(given.pictures, given.images, Path(folder) / "pictures")
        out = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "jobs",
            "segment",
            str(source),
            "--out",
            str(out),
            "--model",
            given.model,
            "--on",
            given.on,
            "--log",
            "json",
        ]
        start = time.monotonic()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            while process.poll() is None:
                sample(psutil.Process(process.pid), seen)
                time.sleep(1)
            receipt = json.loads(process.stdout.read())
        seconds = time.monotonic() - start
    counts = receipt["counts"]
    lines = [
        (
            f"{counts['planned']} pictures: {counts['done']} done,"
            f" {counts['rejected_total']} rejected, {seconds:.0f} s, --on {given.on}"
        ),
        "",
        (
            "| process | after a fifth, MB | at the end, MB | peak, MB"
            " | growth over the last four fifths | with shared pages |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for (pid, name), points in sorted(seen.items(), key=lambda item: item[0][1]):
        if points[-1][0] - points[0][0] < 0.7 * seconds:
            continue
        own = [(rss - shared) / 1e6 for _, rss, shared in points]
        whole = [rss / 1e6 for _, rss, _ in points]
        lines.append(
            f"| {name} {pid} | {own[len(own) // 5]:.0f} | {own[-1]:.0f} | {max(own):.0f}"
            f" | {100 * growth(own):+.1f} % | {100 * growth(whole):+.1f} % |"
        )
    record("resident memory over a long run", lines)


if __name__ == "__main__":
    main()
