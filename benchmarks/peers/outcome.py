"""What a peer says at its end: one JSON line, read from the statistics that it stored."""

import json
import time

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from benchmarks.peers.command import Command
from benchmarks.peers.work import ROWS


def written(rows: list[dict], command: Command) -> None:
    """Store the statistics, for peers whose framework does not."""
    table = pa.Table.from_pylist(rows, ROWS)
    pq.write_table(table, command.out / "statistics" / "statistics.parquet", compression="zstd")


def told(command: Command) -> None:
    """Print pictures, seconds of the whole process, the steady rate and pixels by class."""
    rows = ds.dataset(command.out / "statistics", format="parquet").to_table()
    pictures = rows.group_by("key").aggregate([("finished", "max")])["finished_max"]
    first, last = pc.min(pictures).as_py(), pc.max(pictures).as_py()
    later = len(pictures) - pc.sum(pc.equal(pictures, first)).as_py()
    pixels = rows.group_by("class_id").aggregate([("pixel_count", "sum")]).sort_by("class_id")
    line = {
        "pictures": len(pictures),
        "seconds": round(time.time() - psutil.Process().create_time(), 3),
        "seconds_first_to_last_batch": round(last - first, 3),
        "per_second_first_to_last_batch": later / (last - first) if last > first else None,
        "pixels_by_class": {row["class_id"]: row["pixel_count_sum"] for row in pixels.to_pylist()},
    }
    print(json.dumps(line))
