"""One loop: Pillow decodes, the model answers, a file is written.

python -m benchmarks.peers.plain_loop SOURCE OUT [--batch N] [--threads N]
"""

from collections.abc import Iterator

import numpy as np

from benchmarks.peers.command import Command, parsed
from benchmarks.peers.outcome import told, written
from benchmarks.peers.reading import key_of, listed, members, pixels_of
from benchmarks.peers.work import Model


def pictures(command: Command) -> Iterator[tuple[str, np.ndarray]]:
    """Every picture of the source, decoded."""
    if command.shards:
        for key, data in members(command.shards, command.source):
            yield key, pixels_of(data)
    else:
        for path in listed(command.source):
            yield key_of(path, command.source), pixels_of(path)


def main() -> None:
    """Segment everything."""
    command = parsed(__doc__)
    model, rows = Model(command), []
    keys, batch = [], []
    for key, picture in pictures(command):
        keys.append(key)
        batch.append(picture)
        if len(batch) == command.batch:
            rows += model.segmented(keys, batch)
            keys, batch = [], []
    if batch:
        rows += model.segmented(keys, batch)
    written(rows, command)
    told(command)


if __name__ == "__main__":
    main()
