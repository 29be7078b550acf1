"""Daft: glob, download and decode in the engine, a class that holds the model, `write_parquet`.

    python -m benchmarks.peers.daft_frame SOURCE OUT [--batch N] [--threads N] [--workers N]
        [--reader bytes|images]

--workers: instances of the class.
--reader: bytes: the class decodes, with Pillow; images: the engine does, but its pixels are not
    quite those of libjpeg. Daft knows no tar shards: a function with one row in and many out reads
    them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["DAFT_ANALYTICS_ENABLED"] = "0"
os.environ["DAFT_PROGRESS_BAR"] = "0"

import daft
from daft import DataType, Series, col
from daft.functions import decode_image, download, unnest

from benchmarks.peers.command import Command, parsed
from benchmarks.peers.outcome import told
from benchmarks.peers.reading import key_of, members, pixels_of
from benchmarks.peers.work import ROWS, Model

ROW = DataType.struct({field.name: DataType.from_arrow_type(field.type) for field in ROWS})
MEMBER = DataType.struct({"key": DataType.string(), "bytes": DataType.binary()})


def keyed(command: Command) -> daft.DataFrame:
    """Key and bytes of every picture."""
    source = command.source

    @daft.func(return_dtype=MEMBER, unnest=True)
    def opened(path: str) -> Iterator[dict]:
        for key, data in members([Path(path.removeprefix("file://"))], source):
            yield {"key": key, "bytes": data}

    @daft.func(return_dtype=DataType.string())
    def key(path: str) -> str:
        return key_of(path.removeprefix("file://"), source)

    if command.shards:
        return daft.from_glob_path(f"{source}/**/*.tar").select(opened(col("path")))
    files = daft.from_glob_path(f"{source}/**")
    return files.select(key(col("path")).alias("key"), download(col("path")).alias("bytes"))


def main() -> None:
    """Segment everything."""
    command = parsed(__doc__, readers=("bytes", "images"))

    @daft.cls(max_concurrency=command.workers)
    class Segment:
        def __init__(self) -> None:
            self.model = Model(command)

        @daft.method.batch(return_dtype=DataType.list(ROW), batch_size=command.batch)
        def rows(self, keys: Series, pictures: Series) -> list[list[dict]]:
            decoded = [pixels_of(p) if isinstance(p, bytes) else p for p in pictures.to_pylist()]
            rows = self.model.segmented(keys.to_pylist(), decoded)
            classes = len(self.model.ids)
            return [rows[i : i + classes] for i in range(0, len(rows), classes)]

    frame = keyed(command)
    pictures = col("bytes")
    if command.reader == "images":
        pictures = decode_image(pictures, mode="RGB")
    rows = frame.select(Segment().rows(col("key"), pictures).alias("row")).explode("row")
    rows.select(unnest(col("row"))).write_parquet(str(command.out / "statistics"))
    told(command)


if __name__ == "__main__":
    main()
