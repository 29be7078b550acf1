"""The masks of a run as a torch data set; safe to hand to DataLoader workers."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.ledger import Ledger
from pipeline.reader import Run
from pipeline.storage import open_store


class MaskDataset(Dataset[dict[str, Any]]):
    """Every image that has a mask; holds the run's URI, so that a worker process opens its own."""

    def __init__(self, uri: str, pictures: bool) -> None:
        self.uri = uri
        self.pictures = pictures
        rows = self._run.images.select(["key", "status"]).to_pylist()
        self.keys = [row["key"] for row in rows if row["status"] == "done"]

    @cached_property
    def _run(self) -> Run:
        return Run(Ledger.open(open_store(self.uri)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = self.keys[index]
        item: dict[str, Any] = {"key": key, "mask": torch.from_numpy(self._run.mask(key))}
        if self.pictures:
            values_HWC = self._run.picture(key)
            item["image"] = torch.from_numpy(np.ascontiguousarray(values_HWC.transpose(2, 0, 1)))
        return item
