"""What every peer does with decoded pictures: labels, a mask in a file, rows of statistics.

Shapes: B batch, K classes, H W pixels, C channels.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numcodecs import Zstd

from benchmarks.peers.command import Command
from benchmarks.tutorial import AsWritten
from models import load_bundle
from pipeline.heap import keep_freed_memory

ROWS = pa.schema(
    {
        "key": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "class_id": pa.int32(),
        "pixel_count": pa.int64(),
        "fraction": pa.float64(),
        "mean_confidence": pa.float64(),
        "finished": pa.float64(),  # when its batch was done: the clock of the race
    }
)


class Model:
    """The bundle in memory, as the command wants it used."""

    def __init__(self, command: Command) -> None:
        torch.set_num_threads(command.threads)
        model, card = load_bundle(command.model)
        self.model = model.eval()
        if command.form == "folded":
            keep_freed_memory()
            self.model = model.to(memory_format=torch.channels_last).folded()
        elif command.form == "written":
            self.model = AsWritten(model).eval()
        self.ids = [entry.id for entry in card.classes]
        self.mean = torch.tensor(card.input.mean)
        self.std = torch.tensor(card.input.std)
        self.masks = command.out / "masks"

    @torch.inference_mode()
    def predicted(self, pictures_HWC: Sequence[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
        """labels_HW, pixels_K and confidences_K (sums) of each; equal sizes go together."""
        groups = defaultdict(list)
        for place, picture_HWC in enumerate(pictures_HWC):
            groups[picture_HWC.shape].append(place)
        answers = {}
        for places in groups.values():
            x_BHWC = torch.from_numpy(np.stack([pictures_HWC[place] for place in places]))
            x_BCHW = ((x_BHWC.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
            sure_BHW, labels_BHW = self.model(x_BCHW).softmax(1).max(1)
            for place, labels_HW, sure_HW in zip(places, labels_BHW, sure_BHW, strict=True):
                flat, classes = labels_HW.flatten(), len(self.ids)
                pixels_K = torch.bincount(flat, minlength=classes)
                sums_K = torch.bincount(flat, sure_HW.flatten().double(), minlength=classes)
                labels = labels_HW.to(torch.uint8).numpy()
                answers[place] = (labels, pixels_K.numpy(), sums_K.numpy())
        return [answers[place] for place in range(len(pictures_HWC))]

    def stored(self, keys: Sequence[str], answers: Sequence[tuple[np.ndarray, ...]]) -> list[dict]:
        """Write the masks; rows of statistics, one per picture and class."""
        rows, codec = [], Zstd(1)
        for key, (labels_HW, pixels_K, sums_K) in zip(keys, answers, strict=True):
            mask_file(self.masks, key).write_bytes(codec.encode(labels_HW))
            height, width = labels_HW.shape
            rows += [
                {
                    "key": key,
                    "height": height,
                    "width": width,
                    "class_id": class_id,
                    "pixel_count": int(pixels),
                    "fraction": pixels / labels_HW.size,
                    "mean_confidence": total / pixels if pixels else None,
                }
                for class_id, pixels, total in zip(self.ids, pixels_K, sums_K, strict=True)
            ]
        finished = time.time()
        return [{**row, "finished": finished} for row in rows]

    def segmented(self, keys: Sequence[str], pictures_HWC: Sequence[np.ndarray]) -> list[dict]:
        """Both."""
        return self.stored(keys, self.predicted(pictures_HWC))


def mask_file(folder: Path, key: str) -> Path:
    """Where the mask of a key lies: zstd of its bytes, row by row."""
    return folder / f"{key.replace('/', '_')}.zst"
