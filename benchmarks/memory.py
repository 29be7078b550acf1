"""Resident memory of driver and workers over a long run, sampled every second.

    python -m benchmarks.memory PICTURES... [--images 10000] [--model demo] [--on process]

Reported per process that lived through the run: memory after the first fifth, at the end, the peak,
and the growth over the last four fifths (mean of the last tenth against the tenth after the first
fifth).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from benchmarks.corpora import repeated
from benchmarks.record import record


def kind(process: psutil.Process) -> str | None:
    """What a process of the run is, or None for those that are not ours to watch."""
    command = " ".join(process.cmdline())
    if "_Segment" in command:
        return "segment actor"
    if "ray::" in command:
        return "task worker"
    return "driver" if "jobs" in command and "segment" in command else None


def sample(root: psutil.Process, seen: dict[tuple[int, str], list[tuple[float, int]]]) -> None:
    """Resident bytes of the run's processes now."""
    for process in [root, *root.children(recursive=True)]:
        try:
            name = kind(process)
            if name:
                seen[process.pid, name].append((time.monotonic(), process.memory_info().rss))
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
    seen: dict[tuple[int, str], list[tuple[float, int]]] = defaultdict(list)
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
            " | growth over the last four fifths |"
        ),
        "|---|---|---|---|---|",
    ]
    for (pid, name), points in sorted(seen.items(), key=lambda item: item[0][1]):
        if points[-1][0] - points[0][0] < 0.7 * seconds:
            continue
        values = [rss / 1e6 for _, rss in points]
        fifth, tenth = len(values) // 5, max(1, len(values) // 10)
        early, late = values[fifth : fifth + tenth], values[-tenth:]
        growth = (sum(late) / len(late)) / (sum(early) / len(early)) - 1
        lines.append(
            f"| {name} {pid} | {early[0]:.0f} | {late[-1]:.0f} | {max(values):.0f}"
            f" | {100 * growth:+.1f} % |"
        )
    record("resident memory over a long run", lines)


if __name__ == "__main__":
    main()
