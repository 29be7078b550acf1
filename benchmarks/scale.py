"""Plan, resume, status, finalize and report over archives of up to millions of pictures.

    python -m benchmarks.scale [--images 10000 100000 1000000] [--ready 10000000]
        [--shards 1000000]

The archive is real small files (hard links, benchmarks/synthetic.py), its answers are true fragment
objects with made-up masks; `--ready` plans a bucket whose listing costs nothing, `--shards` tar
shards and Parquet tables. Every piece of work has a process of its own, imports included
(benchmarks/measured.py): `plan` lists and plans, `answer` commits every fragment and finishes,
`no-op resume` is the whole command again.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import synthetic
from benchmarks.measured import Cost, cost_of
from benchmarks.record import record


def over(images: int, folder: Path) -> dict[str, Cost]:
    """Each piece of work in turn."""
    source, out = synthetic.write(folder / "in", images), folder / "run"
    again = ("command", "segment", source, "--out", out, "--log", "text")
    return {
        "plan": cost_of("plan", source, out),
        "answer, finalize": cost_of("answer", source, out),
        "no-op resume": cost_of(*again),
        "dry run": cost_of(*again, "--dry-run"),
        "status": cost_of("command", "status", out, "--json"),
        "finalize": cost_of("finish", out),
        "report": cost_of("report", out),
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--ready", type=int, nargs="*", default=[])
    parser.add_argument("--shards", type=int, nargs="*", default=[])
    given = parser.parse_args()
    lines = [
        "| pictures | work | seconds | CPU seconds | most memory, MB | requests |",
        "|---|---|---|---|---|---|",
    ]
    costs: list[tuple[int, str, Cost]] = []
    for images in given.images:
        with tempfile.TemporaryDirectory() as folder:
            costs += [(images, work, cost) for work, cost in over(images, Path(folder)).items()]
    for images in given.ready:
        cost = cost_of("index", f"{synthetic.READY}{images}")
        costs.append((images, "plan in memory, listing ready", cost))
    for images in given.shards:
        for kind, made in (("tar", synthetic.write_tars), ("Parquet", synthetic.write_tables)):
            with tempfile.TemporaryDirectory() as folder:
                cost = cost_of("index", made(Path(folder) / "in", images))
            costs.append((images, f"plan in memory, {kind} shards", cost))
    for images, work, cost in costs:
        asked = ", ".join(f"{count:,} {name}" for name, count in sorted(cost.requests.items()))
        lines.append(
            f"| {images:,} | {work} | {cost.seconds:.1f} | {cost.cpu:.1f} | {cost.peak_mb:.0f}"
            f" | {asked} |"
        )
    record("archives of many pictures", lines)


if __name__ == "__main__":
    main()
