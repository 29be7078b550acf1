"""Plain Ray Data: read, `map_batches` with a pool of actors, `write_parquet`.

    python -m benchmarks.peers.ray_data SOURCE OUT [--batch N] [--threads N] [--workers N]
        [--reader images|bytes]

--workers: actors, which write their masks themselves: masks sent back would only be copied.
--reader: `read_images` decodes in tasks of its own, with bytes (`read_binary_files`) the actors do;
    of tar shards (`read_webdataset`) it says where Pillow runs as well.
"""

import io
import os

os.environ.update(RAY_DATA_DISABLE_PROGRESS_BARS="1", RAY_USAGE_STATS_ENABLED="0")

import numpy as np
import pyarrow as pa
import ray
from PIL import Image

from benchmarks.peers.command import Command, parsed
from benchmarks.peers.outcome import told
from benchmarks.peers.reading import key_of, pixels_of
from benchmarks.peers.work import ROWS, Model

ACTOR_CPUS = 0.5  # beside actors that hold all CPUs no read task would ever start


class Segment:
    """An actor with the model."""

    def __init__(self, command: Command) -> None:
        self.source, self.model = command.source, Model(command)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        keys = [key_of(path, self.source) for path in batch["path"]]
        if "member" in batch:
            keys = [f"{key}#{name}" for key, name in zip(keys, batch["member"], strict=True)]
        if "bytes" in batch:
            pictures = [pixels_of(data) for data in batch["bytes"]]
        else:
            pictures = list(batch["image"])
        return pa.Table.from_pylist(self.model.segmented(keys, pictures), ROWS)


def from_shards(command: Command) -> ray.data.Dataset:
    """Members of tar shards."""

    def row(sample: dict) -> dict:
        suffix = next(name for name in sample if name not in {"__key__", "__url__", "path"})
        about = {"path": sample["path"], "member": f"{sample['__key__']}.{suffix}"}
        if command.reader == "bytes":
            return {**about, "bytes": sample[suffix]}
        with Image.open(io.BytesIO(sample[suffix])) as image:
            return {**about, "image": np.asarray(image.convert("RGB"))}

    shards = [str(shard) for shard in command.shards]
    return ray.data.read_webdataset(shards, decoder=None, include_paths=True).map(row)


def main() -> None:
    """Segment everything."""
    command = parsed(__doc__, readers=("images", "bytes"))
    tuned = {"MALLOC_ARENA_MAX": "1"} if command.form == "folded" else {}
    ray.init(include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": tuned})
    if command.shards:
        pictures = from_shards(command)
    elif command.reader == "images":
        pictures = ray.data.read_images(str(command.source), mode="RGB", include_paths=True)
    else:
        pictures = ray.data.read_binary_files(str(command.source), include_paths=True)
    rows = pictures.map_batches(
        Segment,
        fn_constructor_args=(command,),
        batch_size=command.batch,
        compute=ray.data.ActorPoolStrategy(size=command.workers),
        num_cpus=ACTOR_CPUS,
    )
    rows.write_parquet(str(command.out / "statistics"))
    told(command)


if __name__ == "__main__":
    main()
