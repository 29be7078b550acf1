"""A DataLoader: its workers read and decode, this process predicts, a thread writes.

    python -m benchmarks.peers.torch_loader SOURCE OUT [--batch N] [--threads N] [--workers N]

--workers: processes of the loader; 0: this process decodes as well.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from benchmarks.peers.command import Command, parsed
from benchmarks.peers.outcome import told, written
from benchmarks.peers.reading import key_of, listed, members, pixels_of
from benchmarks.peers.work import Model

Sample = tuple[str, torch.Tensor]


class Files(Dataset[Sample]):
    """Loose pictures."""

    def __init__(self, command: Command) -> None:
        self.source, self.paths = command.source, listed(command.source)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        return key_of(path, self.source), torch.from_numpy(pixels_of(path))


class Shards(IterableDataset[Sample]):
    """Tar shards, dealt out to the workers."""

    def __init__(self, command: Command) -> None:
        self.source, self.paths = command.source, command.shards

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        mine = self.paths[worker.id :: worker.num_workers] if worker else self.paths
        for key, data in members(mine, self.source):
            yield key, torch.from_numpy(pixels_of(data))


def main() -> None:
    """Segment everything."""
    command = parsed(__doc__)
    model = Model(command)
    loader = DataLoader(
        Shards(command) if command.shards else Files(command),
        batch_size=command.batch,
        num_workers=command.workers,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)),  # sizes differ: no stack
        prefetch_factor=4 if command.workers else None,
    )
    with ThreadPoolExecutor(1) as writer:
        writing = []
        for keys, tensors in loader:
            answers = model.predicted([tensor.numpy() for tensor in tensors])
            writing.append(writer.submit(model.stored, keys, answers))
        written([row for each in writing for row in each.result()], command)
    told(command)


if __name__ == "__main__":
    main()
